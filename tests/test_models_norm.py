"""Norms: frozen ones stay frozen, synchronised ones equal one big batch, state dicts exchange."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from detkit.errors import ConfigError
from detkit.models.norm import (
    NORMS,
    FrozenBatchNorm2d,
    SyncBatchNorm2d,
    conv_norm,
    group_norm,
    norm_named,
    normalise_rows,
    rows_norm,
)


def test_frozen_norm_never_changes_and_applies_its_statistics() -> None:
    norm = FrozenBatchNorm2d(3)
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0, 16.0]))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -1.0, 2.0]))
        norm.bias.fill_(0.5)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    nn.Sequential(norm).train()
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    out = norm(x)
    shape = (1, 3, 1, 1)
    expected = (x - before["running_mean"].view(shape)) / (
        before["running_var"].view(shape) + 1e-5
    ).sqrt()
    torch.testing.assert_close(out, expected * before["weight"].view(shape) + 0.5)
    out.sum().backward()
    assert not norm.training and not any(p.requires_grad for p in norm.parameters())
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


def frozen_pair(groups: int, bias: bool) -> tuple[nn.Conv2d, FrozenBatchNorm2d]:
    """A convolution in float64 and a frozen norm of numbers that all matter."""
    torch.manual_seed(3)
    conv = nn.Conv2d(4, 6, 3, 2, padding=1, groups=groups, bias=bias).double()
    norm = FrozenBatchNorm2d(6).double()
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean):
            values.normal_()
        norm.running_var.uniform_(0.5, 2)
    return conv, norm


@pytest.mark.parametrize(("groups", "bias"), [(1, False), (2, True)])
def test_a_convolution_with_its_frozen_norm_in_the_weights(groups: int, bias: bool) -> None:
    """The same map and the same gradients as one after the other, and no call of the norm."""
    conv, norm = frozen_pair(groups, bias)
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64, requires_grad=True)
    wanted = [x, *conv.parameters()]
    separate = norm(conv(x))
    weights = torch.randn_like(separate)
    expected = torch.autograd.grad((separate * weights).sum(), wanted)
    norm.forward = None  # type: ignore[assignment]  # a call would fail
    together = conv_norm(conv, norm, x)
    got = torch.autograd.grad((together * weights).sum(), wanted)
    torch.testing.assert_close(together, separate)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_pointwise_convolution_left_to_onednn_is_the_same(stride: int) -> None:
    """With one thread a 1x1 kernel on channels last maps is called dilated: same map, gradients."""
    torch.manual_seed(4)
    conv, norm = nn.Conv2d(4, 6, 1, stride, bias=False), FrozenBatchNorm2d(6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 7, 5).to(memory_format=torch.channels_last).requires_grad_()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        together = conv_norm(conv, norm, x)
        wanted = [x, conv.weight]
        weights = torch.randn_like(together)
        got = torch.autograd.grad((together * weights).sum(), wanted)
    finally:
        torch.set_num_threads(threads)
    separate = norm(conv(x))
    torch.testing.assert_close(together, separate)
    torch.testing.assert_close(got, torch.autograd.grad((separate * weights).sum(), wanted))


def test_a_frozen_norm_is_called_where_somebody_listens_or_nothing_is_learnt() -> None:
    """Counting and statistics hang on calls; without gradients the result is bit by bit as ever."""
    conv, norm = frozen_pair(1, False)
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(conv_norm(conv, norm, x), norm(conv(x)))
    calls = []
    handle = conv.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(conv_norm(conv, norm, x), norm(conv(x)))
    assert len(calls) == 2
    handle.remove()
    conv_norm(conv, norm, x)
    assert len(calls) == 2
    other = nn.BatchNorm2d(6).double()
    assert torch.equal(conv_norm(conv, other, x), other(conv(x)))


def test_batch_norms_exchange_their_state_dicts() -> None:
    source = nn.BatchNorm2d(4)
    source(torch.randn(8, 4, 3, 3))
    for name in ("frozen_bn", "bn", "sync_bn"):
        norm = norm_named(name)(4)
        norm.load_state_dict(source.state_dict(), strict=True)
        x = torch.randn(2, 4, 3, 3)
        assert torch.equal(norm.eval()(x), source.eval()(x))


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (48, 16), (24, 8), (7, 1)])
def test_group_norm_divides_any_width(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


def test_unknown_norm() -> None:
    with pytest.raises(ConfigError, match="got 'synbn'; did you mean 'sync_bn'"):
        norm_named("synbn")
    assert set(NORMS) == {"frozen_bn", "bn", "sync_bn", "gn", "none"}


def test_sync_norm_alone_is_batch_norm() -> None:
    ours, peer = SyncBatchNorm2d(4), nn.BatchNorm2d(4)
    x = torch.randn(8, 4, 3, 3)
    assert torch.equal(ours(x), peer(x))
    assert all(torch.equal(v, peer.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
@pytest.mark.parametrize("name", ["none", "bn", "sync_bn", "gn"])
def test_rows_of_any_number_normalise_with_gradients(name: str, rows: int) -> None:
    norm = rows_norm(name)(16).train()
    x = torch.randn(rows, 16, requires_grad=True)
    out = normalise_rows(norm, x)
    assert out.shape == x.shape and out.isfinite().all()
    assert rows == 0 or out.std() > 0.1  # groups of single numbers would all become zero
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in norm.parameters())
    assert all(v.isfinite().all() for v in norm.state_dict().values())


# Uneven shares and a mean far above the deviation, where a one-pass variance would cancel.
SHARES = (3, 5)


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(sum(SHARES), 4, 3, 5, generator=generator) + 1000
    return x, torch.randn(x.shape, generator=generator)


def _normalise(norm: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_(True)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -0.5, 0.3]))
        norm.bias.fill_(0.1)
    out = norm.train()(x)
    out.backward(grad)
    result = {"out": out.detach(), "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return result | {k: v for k, v in norm.state_dict().items() if "running" in k or "num" in k}


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    share = [t.split(SHARES)[rank] for t in _data()]
    torch.save(_normalise(SyncBatchNorm2d(4), *share), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_sync_norm_over_two_processes_equals_the_full_batch(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    full = _normalise(nn.BatchNorm2d(4).double(), *(t.double() for t in _data()))
    for key in ("out", "x"):
        got = torch.cat([part[key] for part in parts]).double()
        torch.testing.assert_close(got, full[key], rtol=1e-4, atol=2e-3)
    for key in ("weight", "bias"):  # a data-parallel wrapper averages these over processes
        got = (parts[0][key] + parts[1][key]).double()
        torch.testing.assert_close(got, full[key], rtol=1e-4, atol=2e-2)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(parts[0][key], parts[1][key])
        torch.testing.assert_close(
            parts[0][key].to(full[key].dtype), full[key], rtol=1e-5, atol=1e-5
        )
