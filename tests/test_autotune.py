"""The choice between ways to compute a convolution on CUDA; its logic on CPU tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detkit import doctor, ops
from detkit.errors import ConfigError
from detkit.ops import _autotune as tuning
from detkit.ops._library import BUILD_INFO


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Ways take the time that their function's attribute says; yields the ways measured."""
    measured: list[str] = []

    def milliseconds(way: tuning.Way, inputs: object) -> float:
        measured.append(way.__name__)
        return {"columns": 3.0, "vendor": 2.0, "fused": 1.0}[way.__name__]

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    mode = tuning.autotune()
    tuning.autotune("proven")
    yield measured
    tuning.autotune(mode)


def columns(x: Tensor, w: Tensor) -> Tensor:
    return x * w


def vendor(x: Tensor, w: Tensor) -> Tensor:
    return w * x


def fused(x: Tensor, w: Tensor) -> Tensor:
    return w * x + 0


WAYS: dict[str, tuning.Way] = {"columns": columns, "vendor": vendor, "fused": fused}


def tensors(size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.rand(2, size), torch.rand(2, size)


@pytest.mark.parametrize(("mode", "fastest"), [("proven", "vendor"), ("all", "fused")])
def test_the_fastest_is_measured_once_per_shape(clock: list[str], mode: str, fastest: str) -> None:
    ops.autotune(mode)
    for size in (4, 5, 4):
        assert tuning.pick("conv", tensors(size), "", WAYS) == fastest
    assert len(clock) == 2 * tuning._ROUNDS * (2 if mode == "proven" else 3)
    assert [(c.op, c.shape, c.way) for c in ops.choices()] == [
        ("conv", f"2x{size} 2x{size} float32", fastest) for size in (4, 5)
    ]
    assert ops.choices()[0].milliseconds["columns"] == 3.0
    assert doctor.report()["autotune"]["choices"][0]["way"] == fastest


def test_gradients_and_dtypes_are_measured_apart(clock: list[str]) -> None:
    ops.autotune("all")
    x, w = tensors()
    grad = x.clone().requires_grad_()
    for call in ((x, w), (grad, w), (x.double(), w.double())):
        tuning.pick("conv", call, "", WAYS)
    assert len(ops.choices()) == 3
    assert grad.grad is None


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_a_way_that_disagrees_is_left_out(clock: list[str], wrong: str) -> None:
    def fused(x: Tensor, w: Tensor) -> Tensor:
        return x * w * 1.01 if wrong == "output" else x.detach() * w + 0 * x

    ops.autotune("all")
    x, w = tensors()
    with pytest.warns(RuntimeWarning, match="conv gave other numbers by fused than by columns"):
        way = tuning.pick("conv", (x.requires_grad_(), w), "", {**WAYS, "fused": fused})
    assert way == "vendor"
    assert set(ops.choices()[0].milliseconds) == {"columns", "vendor"}


def test_nothing_is_decided_by_an_output_that_is_not_finite(clock: list[str]) -> None:
    x, w = tensors()
    assert tuning.pick("conv", (x * torch.nan, w), "", WAYS) == "columns"
    assert not clock and not ops.choices()
    assert tuning.pick("conv", (x, w), "", WAYS) == "vendor"


def test_a_captured_graph_measures_nothing(
    clock: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuning.pick("conv", tensors(4), "", WAYS) == "vendor"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.pick("conv", tensors(4), "", WAYS) == "vendor"
    assert tuning.pick("conv", tensors(5), "", WAYS) == "columns"


def test_where_there_is_no_choice(clock: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda(torch.Tensor):
        is_cuda = True

    x = torch.rand(1, 8, 4, 4)
    assert not tuning.may_choose(x)
    cuda = x.as_subclass(OnCuda)
    assert not tuning.may_choose(cuda)  # of an unknown kind: a traced tensor is one
    monkeypatch.setattr(tuning, "Tensor", OnCuda)
    assert tuning.may_choose(cuda)
    assert not tuning.may_choose(cuda[:0])
    torch.use_deterministic_algorithms(True)
    try:
        assert not tuning.may_choose(cuda)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(tuning, "_mode", "off")
    assert not tuning.may_choose(cuda)


@pytest.mark.parametrize(
    ("dtype", "group_in", "tf32", "fits"),
    [
        (torch.float16, 8, False, True),
        (torch.bfloat16, 12, False, False),
        (torch.float32, 12, True, True),
        (torch.float32, 12, False, False),
        (torch.float32, 6, True, False),
        (torch.float64, 8, True, False),
    ],
)
def test_fused_kernels_round_floats_only_where_torch_may(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, group_in: int, tf32: bool, fits: bool
) -> None:
    class OnCuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        input = torch.rand(1, group_in, 4, 4, dtype=dtype).as_subclass(OnCuda)
        assert tuning.fused_fits(input, group_in) == fits
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_a_way_that_no_longer_fits_is_not_remembered(clock: list[str]) -> None:
    """As the fused one for floats once TF32 is forbidden."""
    ops.autotune("all")
    assert tuning.pick("conv", tensors(), "", WAYS) == "fused"
    assert tuning.pick("conv", tensors(), "", {k: WAYS[k] for k in ("columns", "vendor")}) == (
        "vendor"
    )


def test_unknown_mode() -> None:
    with pytest.raises(ConfigError, match="autotune: must be one of off, proven, all, got 'on'"):
        ops.autotune("on")


@pytest.mark.skipif(not BUILD_INFO, reason="the extension is not built")
def test_algorithms_of_the_native_operators() -> None:
    """The CPU has one; direct calls of the other are refused."""
    x, w = torch.rand(1, 8, 4, 4), torch.rand(8, 8, 3, 3)
    with pytest.raises(RuntimeError, match="algorithm must be 0 on this device, got 1"):
        torch.ops.detkit.dilated_conv2d(x, w, None, [1, 1], [1, 1], [1, 1], 1, 1)


def test_the_page_runs_as_written() -> None:
    page = (Path(__file__).parents[1] / "docs/cuda.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/cuda.md", "exec"), {})


CALLS = {
    "dilated": lambda x, w, s: ops.dilated_conv2d(x, w, padding=2, dilation=2),
    "scaled": lambda x, w, s: ops.scaled_conv2d(x, w, s, stride=2),
    "split": lambda x, w, s: ops.split_conv2d(x, [w[:40], w[40:]], None, [(1, 1), (2, 3)]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_way_agrees_on_a_gpu(name: str, dtype: torch.dtype, channels_last: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.randn(2, 64, 31, 45, device="cuda", dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(72, 64, 3, 3, device="cuda", dtype=dtype) / 24
    s = torch.tensor([[2.37, 1.61], [0.4, 3.0]], device="cuda")
    mode = ops.autotune()
    try:
        ops.autotune("off")
        expected = CALLS[name](x, w, s)
        ops.autotune("all")
        output = CALLS[name](x, w, s)
        measured = ops.choices()
    finally:
        ops.autotune(mode)
    bound = 8 * max(torch.finfo(dtype).eps, 2**-11) * expected.abs().max()
    assert (output - expected).abs().max() <= bound
    ways = {"columns", "fused"} | ({"vendor"} if name != "scaled" else set())
    assert set(measured[0].milliseconds) == ways  # a missing one disagreed, and warned
