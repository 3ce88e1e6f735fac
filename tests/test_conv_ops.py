"""The three convolutions: by hand, against the reference, F.conv2d and torchvision.

The identities I1 to I8 are those that define the scaled convolution (POD, Peng et al., ICCV 2019).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detkit import ops
from detkit.ops import _library
from detkit.ops.reference import conv as reference

F64 = torch.float64
needs_native = pytest.mark.skipif(
    ops.backend()["scaled_conv2d"] == "reference", reason="needs the compiled operators"
)


def rand(*shape: int, dtype: torch.dtype = F64, device: str = "cpu", grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=F64).to(dtype).to(device).requires_grad_(grad)


def scale_tensor(
    *pairs: tuple[float, float], grad: bool = False, dtype: torch.dtype = F64
) -> Tensor:
    return torch.tensor(pairs, dtype=dtype, requires_grad=grad)


def gradients(y: Tensor, inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients under a fixed random weighting of the outputs."""
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return list(torch.autograd.grad(y, inputs, g.to(y)))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to ``tolerance`` of the largest value (at least 1); NaN in the same places."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().cpu().to(F64), expected.detach().cpu().to(F64)
    assert torch.equal(actual.isnan(), expected.isnan())
    if expected.numel():
        allowed = tolerance * max(1.0, float(expected.nan_to_num().abs().max()))
        assert float((actual - expected).nan_to_num().abs().max()) <= allowed


def tolerance(dtype: torch.dtype) -> float:
    return {F64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]


# --- by hand -------------------------------------------------------------------------------------


def test_scaled_hand_case(device: str) -> None:
    x = torch.tensor([1.0, 2, 4, 8, 16], device=device).view(1, 1, 1, 5)
    w = torch.tensor([1.0, 10, 100], device=device).view(1, 1, 1, 3)
    scales = torch.tensor([[1.0, 1.5]], device=device, requires_grad=True)
    y = ops.scaled_conv2d(x, w, scales)  # taps at -1.5, 0 and 1.5: means of two neighbours
    assert y.flatten().tolist() == [310, 620.5, 1241.5, 883, 166]
    y.sum().backward()
    assert scales.grad is not None  # 100 * (2 + 4 + 8 - 16) right, -(1 + 1 + 2 + 4) left
    assert scales.grad.tolist() == [[0, -208]]


def test_dilated_hand_case(device: str) -> None:
    x = torch.arange(1.0, 8.0, device=device).view(1, 1, 1, 7)
    w = torch.tensor([1.0, 10, 100], device=device).view(1, 1, 1, 3)
    y = ops.dilated_conv2d(
        x, w, torch.ones(1, device=device), stride=(1, 2), padding=(0, 1), dilation=(1, 2)
    )
    assert y.flatten().tolist() == [421, 643, 65]  # at -1 1 3, 1 3 5, 3 5 7, and the bias


def test_split_hand_case(device: str) -> None:
    x = torch.arange(1.0, 6.0, device=device).view(1, 1, 1, 5)
    w = torch.tensor([1.0, 10, 100], device=device)
    parts = [w.view(1, 1, 1, 3), w[1:2].view(1, 1, 1, 1)]
    y = ops.split_conv2d(x, parts, None, [(0, 2), (0, 0)])
    assert y[0, 0].tolist() == [[310, 420, 531, 42, 53]]
    assert y[0, 1].tolist() == [[10, 20, 30, 40, 50]]


# --- against the reference -----------------------------------------------------------------------

# batch, groups, inputs and outputs per group, height, width, kernel, stride, scales (repeated)
SCALED = {
    "plain": (2, 1, 12, 20, 19, 23, (3, 3), (1, 1), [(1.37, 2.61), (0.4, 0.9)]),
    "several tiles": (1, 1, 70, 40, 37, 41, (3, 3), (1, 1), [(1.41, 1.39)]),
    "stride 2": (2, 1, 12, 16, 21, 22, (3, 3), (2, 2), [(0.77, 0.82), (1.0, 2.5)]),
    "stride 3 and 1": (2, 1, 6, 12, 20, 17, (5, 3), (3, 1), [(1.2, 3.3), (2.6, 0.1)]),
    "groups": (2, 4, 8, 12, 15, 14, (3, 3), (1, 1), [(2.81, 3.68), (1.0, 1.0)]),
    "depthwise": (2, 9, 1, 1, 18, 17, (3, 3), (1, 1), [(0.5, 3.25), (2.0, 1.5)]),
    "many small samples": (33, 1, 24, 32, 7, 7, (3, 3), (1, 1), [(3.57, 3.45), (1.2, 0.3), (2, 2)]),
    "whole scales": (2, 1, 12, 20, 13, 11, (3, 3), (1, 1), [(2.0, 3.0), (2.0, 3.0)]),
    "kernel 1": (2, 2, 20, 24, 6, 7, (1, 1), (2, 1), [(1.5, 1.5), (0.0, 9.0)]),
    "kernel 1x5": (1, 1, 16, 10, 8, 30, (1, 5), (1, 1), [(1.7, 1.3)]),
    "zero and negative": (
        3,
        1,
        5,
        7,
        9,
        8,
        (3, 3),
        (1, 1),
        [(0.0, 1.5), (-1.3, 0.0), (-2.0, -0.7)],
    ),
    "beyond the map": (3, 1, 5, 7, 6, 9, (3, 3), (1, 2), [(5.5, 8.5), (6.0, 9.0), (1e30, -1e9)]),
    "one pixel": (2, 1, 5, 7, 1, 1, (3, 3), (1, 1), [(0.3, 0.6), (1.0, 2.0)]),
    "one row": (1, 1, 5, 7, 1, 40, (3, 3), (2, 2), [(0.5, 6.4)]),
    "no samples": (0, 1, 5, 7, 6, 6, (3, 3), (1, 1), []),
    "no pixels": (2, 1, 5, 7, 0, 6, (3, 3), (1, 1), [(1.0, 1.5), (2.0, 2.5)]),
}


def scaled_inputs(name: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], tuple]:
    n, groups, c, o, h, w, kernel, stride, pairs = SCALED[name]
    x = rand(n, groups * c, h, w, dtype=dtype, device=device)
    weight = rand(groups * o, c, *kernel, dtype=dtype, device=device)
    wide = dtype if dtype == F64 else torch.float32
    rows = [pairs[i % len(pairs)] for i in range(n)]
    scales = torch.tensor(rows, dtype=wide, device=device).reshape(n, 2)
    bias = rand(groups * o, dtype=dtype, device=device)
    return [t.requires_grad_() for t in (x, weight, scales, bias)], (stride, groups)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCALED)
def test_scaled_equals_the_reference(device: str, name: str, dtype: torch.dtype) -> None:
    inputs, (stride, groups) = scaled_inputs(name, dtype, device)
    exact = [t.detach().cpu().to(F64).requires_grad_() for t in inputs]
    y = ops.scaled_conv2d(*inputs, stride, groups)
    expected = reference.scaled_conv2d(*exact, stride, groups)
    assert y.dtype == dtype
    assert_close(y, expected, tolerance(dtype))
    for actual, wanted in zip(gradients(y, inputs), gradients(expected, exact), strict=True):
        assert_close(actual, wanted, tolerance(dtype))


# batch, groups, inputs and outputs per group, height, width, kernel, stride, padding, dilation
DILATED = {
    "same": (2, 1, 12, 20, 19, 23, (3, 3), (1, 1), (1, 1), (1, 1)),
    "several tiles": (1, 1, 70, 40, 37, 41, (3, 3), (1, 1), (2, 2), (2, 2)),
    "valid, uneven": (2, 1, 12, 20, 19, 23, (2, 4), (2, 3), (0, 0), (3, 1)),
    "wide padding": (1, 1, 12, 20, 6, 5, (3, 3), (1, 2), (9, 12), (2, 5)),
    "groups": (2, 4, 8, 12, 15, 14, (3, 3), (2, 1), (3, 1), (3, 1)),
    "depthwise": (2, 9, 1, 2, 18, 17, (5, 5), (2, 2), (2, 2), (1, 1)),
    "many small samples": (33, 1, 24, 32, 7, 7, (3, 3), (1, 1), (2, 2), (2, 2)),
    "kernel 1": (2, 1, 24, 32, 9, 40, (1, 1), (1, 1), (0, 0), (1, 1)),
    "kernel 1, stride 2": (2, 1, 24, 32, 9, 40, (1, 1), (2, 2), (0, 0), (1, 1)),
    "no samples": (0, 1, 5, 7, 6, 6, (3, 3), (1, 1), (1, 1), (1, 1)),
    "one pixel": (1, 1, 5, 7, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DILATED)
def test_dilated_equals_conv2d(device: str, name: str, dtype: torch.dtype) -> None:
    n, groups, c, o, h, w, kernel, *rest = DILATED[name]
    x = rand(n, groups * c, h, w, dtype=dtype, device=device, grad=True)
    weight = rand(groups * o, c, *kernel, dtype=dtype, device=device, grad=True)
    inputs = [x, weight, rand(groups * o, dtype=dtype, device=device, grad=True)]
    exact = [t.detach().cpu().to(F64).requires_grad_() for t in inputs]
    y, expected = ops.dilated_conv2d(*inputs, *rest, groups), F.conv2d(*exact, *rest, groups)
    assert_close(y, expected, tolerance(dtype))
    for actual, wanted in zip(gradients(y, inputs), gradients(expected, exact), strict=True):
        assert_close(actual, wanted, tolerance(dtype))


def test_dilated_takes_the_arguments_of_conv2d() -> None:
    x, w = rand(2, 4, 9, 10), rand(6, 4, 2, 3)
    for kwargs in (
        {"padding": "same"},
        {"padding": "same", "dilation": 3},
        {"padding": "valid", "stride": 2},
        {"padding": (1, 2), "stride": [2]},
    ):
        assert_close(ops.dilated_conv2d(x, w, **kwargs), F.conv2d(x, w, **kwargs), 1e-12)
    assert_close(ops.dilated_conv2d(x[0], w), F.conv2d(x[0], w), 1e-12)


# groups, inputs per group, stride, parts (outputs, kernel, dilation)
SPLIT = {
    "two": (1, 12, (1, 1), [(5, (3, 3), (1, 2)), (11, (3, 3), (2, 3))]),
    "1x1 and 3x3": (1, 24, (1, 1), [(24, (1, 1), (0, 0)), (40, (3, 3), (1, 1))]),
    "1x3, 3x1, 5x5": (
        1,
        6,
        (2, 2),
        [(3, (1, 3), (0, 1)), (1, (3, 1), (2, 0)), (4, (5, 5), (2, 1))],
    ),
    "one": (1, 6, (1, 2), [(7, (3, 3), (4, 9))]),
    "whole groups": (4, 5, (1, 1), [(9, (3, 3), (1, 1)), (3, (3, 3), (2, 2))]),
    "inside a group": (
        2,
        5,
        (1, 1),
        [(1, (1, 1), (0, 3)), (3, (3, 3), (1, 2)), (4, (3, 3), (3, 3))],
    ),
    "depthwise": (6, 1, (1, 1), [(2, (3, 3), (1, 1)), (4, (3, 3), (3, 2))]),
}


def cat_of_convs(x: Tensor, weights: list[Tensor], bias: Tensor, name: str) -> Tensor:
    """The split convolution out of F.conv2d of the undivided groups."""
    groups, _, stride, parts = SPLIT[name]
    per_group = sum(size for size, _, _ in parts) // groups
    outputs = []
    for w, (size, kernel, dilation) in zip(weights, parts, strict=True):
        padding = [d * (k // 2) for d, k in zip(dilation, kernel, strict=True)]
        for o in range(size):  # every output alone, on the inputs of its group
            group = len(outputs) // per_group
            used = x[:, group * w.shape[1] : (group + 1) * w.shape[1]]
            at = len(outputs)
            positive = [max(d, 1) for d in dilation]
            outputs.append(
                F.conv2d(used, w[o : o + 1], bias[at : at + 1], stride, padding, positive)
            )
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("size", [(19, 18), (5, 6), (1, 1)], ids=str)
@pytest.mark.parametrize("name", SPLIT)
def test_split_equals_cat_of_conv2d(device: str, name: str, size: tuple[int, int]) -> None:
    groups, c, stride, parts = SPLIT[name]
    x = rand(3, groups * c, *size, grad=True)
    weights = [rand(o, c, *kernel, grad=True) for o, kernel, _ in parts]
    bias = rand(sum(o for o, _, _ in parts), grad=True)
    inputs = [x, *weights, bias]
    expected = cat_of_convs(x, weights, bias, name)
    wanted = gradients(expected, inputs)
    moved = [t.detach().to(device).requires_grad_() for t in inputs]
    dilations = [d for _, _, d in parts]
    y = ops.split_conv2d(moved[0], moved[1:-1], moved[-1], dilations, stride, groups)
    assert_close(y, expected, 1e-10)
    for actual, right in zip(gradients(y, moved), wanted, strict=True):
        assert_close(actual, right, 1e-10)
    exact = reference.split_conv2d(x, weights, bias, sum(map(list, dilations), []), stride, groups)
    assert_close(exact, expected, 1e-10)


# --- layouts, dtypes, NaN ------------------------------------------------------------------------


def called(op: str, x: Tensor, w: Tensor, scales: Tensor, relu: bool = False) -> Tensor:
    """One of the three operators on common inputs, w (O, C, 3, 3)."""
    if op == "dilated":
        return ops.dilated_conv2d(x, w, None, 1, 2, 2, relu=relu)
    if op == "split":
        return ops.split_conv2d(x, [w[:4], w[4:]], None, [(1, 2), (2, 3)], relu=relu)
    return ops.scaled_conv2d(x, w, scales, relu=relu)


OPERATORS = ("dilated", "scaled", "split")


@needs_native
@pytest.mark.parametrize("op", OPERATORS)
def test_output_and_gradient_follow_the_layout(device: str, op: str) -> None:
    w, scales = rand(12, 10, 3, 3, device=device), scale_tensor((1.3, 0.6), (2.2, 1.0)).to(device)
    plain = rand(2, 10, 17, 19, device=device)
    expected = called(op, plain, w, scales)
    wide = rand(2, 10, 17, 38, device=device)
    wide[..., ::2] = plain
    for x, format in (
        (plain.to(memory_format=torch.channels_last), torch.channels_last),
        (wide[..., ::2], torch.contiguous_format),
        (plain.transpose(2, 3).contiguous().transpose(2, 3), torch.contiguous_format),
    ):
        x = x.detach().requires_grad_()
        y = called(op, x, w, scales)
        assert y.is_contiguous(memory_format=format)
        assert_close(y, expected, 1e-12)
        (grad,) = torch.autograd.grad(y.sum(), x)  # of a gradient that is one expanded number
        assert grad.is_contiguous(memory_format=format)
        frozen = called(op, x, w.detach(), scales.detach())
        assert_close(torch.autograd.grad(frozen.sum(), x)[0], grad, 1e-12)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_relu_is_that_of_torch(device: str, op: str, channels_last: bool) -> None:
    """Values, all gradients and the reference; a NaN stays."""
    x = rand(2, 6, 9, 8, device=device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    w, scales = rand(8, 6, 3, 3, device=device), scale_tensor((1.3, 0.6), (2.2, 1.0)).to(device)
    inputs = [x, w, scales][: 3 if op == "scaled" else 2]
    for tensor in inputs:
        tensor.requires_grad_()
    y, expected = called(op, x, w, scales, relu=True), called(op, x, w, scales).relu()
    assert torch.equal(y, expected) and (y == 0).any()
    for ours, right in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        assert_close(ours, right, 1e-12)
    with _library.reference_only():
        assert_close(called(op, x, w, scales, relu=True), expected, 1e-10)
    spoilt = x.detach().clone()
    spoilt[0, 0, 4, 4] = torch.nan
    assert called(op, spoilt, w.detach(), scales.detach(), relu=True)[0, 0].isnan().any()


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device: str, op: str, dtype: torch.dtype) -> None:
    """Inputs are rounded to the autocast dtype; scales are not (the step at 9 would be 1/16)."""
    x = rand(2, 64, 9, 21, dtype=torch.float32, device=device, grad=True)
    w = rand(12, 64, 3, 3, dtype=torch.float32, device=device, grad=True)
    scales = torch.tensor([[9 + 1 / 64, 2.3], [1.5, 8 + 3 / 64]], device=device, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        y = called(op, x, w, scales)
    assert y.dtype == dtype
    rounded = [t.detach().cpu().to(dtype).to(F64) for t in (x, w)]
    expected = called(op, *rounded, scales.detach().cpu().to(F64))
    error = (y.cpu().to(F64) - expected).square().mean().sqrt()
    assert error <= 3e-3 * expected.square().mean().sqrt()
    grads = torch.autograd.grad(y.float().sum(), [x, w, scales] if op == "scaled" else [x, w])
    assert all(g.dtype == torch.float32 for g in grads)
    with torch.autocast(device, dtype=dtype):
        assert called(op, x.double(), w.double(), scales.double()).dtype == F64


@pytest.mark.parametrize("op", OPERATORS)
def test_nan_reaches_only_the_outputs_that_touch_it(device: str, op: str) -> None:
    w = rand(8, 3, 3, 3, device=device)
    for pair in ((1.0, 2.0), (1.5, 2.0), (0.7, 3.3)):
        scales = scale_tensor(pair).to(device)
        x = rand(1, 3, 9, 11, device=device)
        clean = called(op, x, w, scales)
        touched = torch.zeros_like(clean)
        for delta in (1.0, 3.0):  # outputs that change with the pixel
            moved = x.clone()
            moved[0, 1, 4, 5] += delta
            touched += (called(op, moved, w, scales) - clean).abs()
        x[0, 1, 4, 5] = torch.nan
        y = called(op, x, w, scales)
        assert torch.equal(y.isnan(), touched > 0)
        assert_close(y[~y.isnan()], clean[~y.isnan()], 1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kernel", [1, 3])
def test_non_finite_scale(device: str, value: float, kernel: int) -> None:
    x, w = rand(2, 3, 5, 6, device=device), rand(4, 3, kernel, kernel, device=device)
    scales = scale_tensor((1.0, 1.5), (1.0, value)).to(device)
    if device == "cpu":
        with pytest.raises(ValueError, match="scaled_conv2d: scales must be finite, got"):
            ops.scaled_conv2d(x, w, scales)
    else:
        y = ops.scaled_conv2d(x, w, scales)
        assert y[1].isnan().all() and y[0].isfinite().all()
    y = reference.scaled_conv2d(x, w, scales, None, (1, 1), 1)
    assert y[1].isnan().all() and y[0].isfinite().all()


# --- the identities ------------------------------------------------------------------------------


def dilated_by(d: int, weight: Tensor, dim: int) -> tuple[Tensor, int]:
    """Kernel and dilation of one axis, where dilation 0 is the kernel summed to one tap."""
    return (weight.sum(dim, keepdim=True), 1) if d == 0 else (weight, d)


def mix(x: Tensor, w: Tensor, h: int, wd: int, stride: int) -> Tensor:
    """Dilated convolution of a 3x3 kernel at dilation (h, wd), either of which may be 0."""
    w, h_used = dilated_by(h, w, 2)
    w, w_used = dilated_by(wd, w, 3)
    padding = (h_used * (w.shape[2] // 2), w_used * (w.shape[3] // 2))
    return F.conv2d(x, w, None, stride, padding, (h_used, w_used))


@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_identity_1_whole_scales_are_dilations(device: str, k: int, stride: int) -> None:
    x, w = rand(2, 6, 13, 16, device=device), rand(8, 3, k, k, device=device)
    for h, wd in ((1, 1), (2, 3), (6, 1), (15, 4)):
        y = ops.scaled_conv2d(x, w, scale_tensor((h, wd)).to(device), None, stride, 2)
        padding = (h * (k // 2), wd * (k // 2))
        assert_close(y, F.conv2d(x, w, None, stride, padding, (h, wd), 2), 1e-12)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("pair", [(1.7, 2.9), (0.46, 0.89), (0.8, 1.4), (8.49, 9.34), (2.0, 0.25)])
def test_identity_2_mix_of_dilated(device: str, stride: int, pair: tuple[float, float]) -> None:
    x, w = rand(2, 5, 14, 12), rand(7, 5, 3, 3)
    (n_h, f_h), (n_w, f_w) = ((int(d), d - int(d)) for d in pair)
    expected = sum(
        a_h * a_w * mix(x, w, n_h + a, n_w + b, stride)
        for a, a_h in enumerate((1 - f_h, f_h))
        for b, a_w in enumerate((1 - f_w, f_w))
    )
    args = (x.to(device), w.to(device), scale_tensor(pair).to(device))
    assert_close(ops.scaled_conv2d(*args, None, stride), expected, 1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pair", [(1.7, 2.9), (0.46, 0.89), (1.0, 1.0), (2.0, 3.5), (0.0, 1.0)])
def test_identity_3_scale_gradient_is_a_difference(
    device: str, stride: int, pair: tuple[float, float]
) -> None:
    """At whole scales too: there it is the difference to the next dilation."""
    x, w = rand(1, 4, 12, 13), rand(6, 4, 3, 3)
    (n_h, f_h), (n_w, f_w) = ((int(d), d - int(d)) for d in pair)
    of_h = sum(
        a * (mix(x, w, n_h + 1, n_w + b, stride) - mix(x, w, n_h, n_w + b, stride))
        for b, a in enumerate((1 - f_w, f_w))
    )
    of_w = sum(
        a * (mix(x, w, n_h + b, n_w + 1, stride) - mix(x, w, n_h + b, n_w, stride))
        for b, a in enumerate((1 - f_h, f_h))
    )
    scales = scale_tensor(pair).to(device).requires_grad_()
    y = ops.scaled_conv2d(x.to(device), w.to(device), scales, None, stride)
    g = rand(*y.shape)
    (grad,) = torch.autograd.grad(y, scales, g.to(device))
    assert_close(grad, torch.stack([(g * of_h).sum(), (g * of_w).sum()])[None], 1e-11)


def expansion(k: int, d: float) -> tuple[Tensor, Tensor]:
    """T[i, a], the weight of tap i at whole offset a in -reach..reach, and its derivative in d."""
    reach = int((k // 2) * d) + 1
    table, slope = torch.zeros(2, k, 2 * reach + 1, dtype=F64)
    for i in range(-(k // 2), k // 2 + 1):
        sign, n = (i > 0) - (i < 0), int(abs(i) * d)
        for offset, weight, change in (
            (sign * n, 1 - (abs(i) * d - n), -abs(i)),
            (sign * (n + 1), abs(i) * d - n, abs(i)),
        ):
            table[i + k // 2, offset + reach] += weight
            slope[i + k // 2, offset + reach] += change
    return table, slope


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("pair", [(1.3, 2.4), (0.55, 1.85), (1.0, 2.0)])
def test_identity_4_expanded_kernel(
    device: str, k: int, stride: int, pair: tuple[float, float]
) -> None:
    """One plain convolution with T_h^T W T_w; gradients of weight and scales from its own."""
    x, w = rand(2, 4, 15, 14), rand(6, 4, k, k)
    (t_h, s_h), (t_w, s_w) = (expansion(k, d) for d in pair)
    big = torch.einsum("ocij,ia,jb->ocab", w, t_h, t_w).requires_grad_()
    expected = F.conv2d(x, big, None, stride, (t_h.shape[1] // 2, t_w.shape[1] // 2))
    (g_big,) = gradients(expected, [big])
    weight = w.to(device).requires_grad_()
    scales = scale_tensor(pair).to(device).requires_grad_()
    y = ops.scaled_conv2d(x.to(device), weight, scales, None, stride)
    assert_close(y, expected, 1e-11)
    gw, gs = gradients(y, [weight, scales])
    assert_close(gw, torch.einsum("ocab,ia,jb->ocij", g_big, t_h, t_w), 1e-10)
    by_h = torch.einsum("ocab,ia,jb,ocij->", g_big, s_h, t_w, w)
    by_w = torch.einsum("ocab,ia,jb,ocij->", g_big, t_h, s_w, w)
    assert_close(gs, torch.stack([by_h, by_w])[None], 1e-10)


@pytest.mark.parametrize(
    ("pair", "pixels"),
    [((1.0, 1.0), 9), ((0.4, 0.9), 9), ((2.0, 3.0), 9), ((1.5, 0.7), 15), ((2.2, 3.4), 25)],
)
def test_identity_5_number_of_pixels_read(
    device: str, pair: tuple[float, float], pixels: int
) -> None:
    x = rand(1, 1, 15, 15, device=device, grad=True)
    w = torch.ones(1, 1, 3, 3, dtype=F64, device=device)
    y = ops.scaled_conv2d(x, w, scale_tensor(pair).to(device))
    (grad,) = torch.autograd.grad(y[0, 0, 7, 7], x)
    assert int((grad != 0).sum()) == pixels
    assert float(grad.sum()) == pytest.approx(9)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("pair", [(0.46, 0.89), (1.0, 0.3), (1.0, 1.0)])
def test_identity_6_up_to_one_is_a_folded_3x3(
    device: str, stride: int, pair: tuple[float, float]
) -> None:
    x, w = rand(2, 5, 11, 12, grad=True), rand(7, 5, 3, 3, grad=True)
    scales = scale_tensor(pair, grad=True)

    def fold(weight: Tensor, f: Tensor, dim: int) -> Tensor:
        before, middle, behind = weight.unbind(dim)
        return torch.stack([f * before, middle + (1 - f) * (before + behind), f * behind], dim)

    folded = fold(fold(w, scales[0, 0], 2), scales[0, 1], 3)
    expected = F.conv2d(x, folded, None, stride, 1)
    moved = [t.detach().to(device).requires_grad_() for t in (x, w, scales)]
    y = ops.scaled_conv2d(*moved, None, stride)
    assert_close(y, expected, 1e-12)
    actual, wanted = gradients(y, moved), gradients(expected, [x, w, scales])
    for i in (0, 1):
        assert_close(actual[i], wanted[i], 1e-11)
    below = torch.tensor([d < 1 for d in pair])  # at 1 it is the other one-sided derivative
    assert_close(actual[2].cpu()[0, below], wanted[2][0, below], 1e-11)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_identity_7_adjoint_and_batch_order(device: str, stride: int) -> None:
    x, w = rand(3, 5, 11, 12, device=device, grad=True), rand(7, 5, 3, 3, device=device)
    scales = scale_tensor((1.3, 0.6), (2.0, 3.7), (0.4, 9.5)).to(device)
    y = ops.scaled_conv2d(x, w, scales, None, stride)
    g = rand(*y.shape, device=device)
    (grad,) = torch.autograd.grad(y, x, g)
    assert (y * g).sum().item() == pytest.approx((x * grad).sum().item(), rel=1e-12)
    order = [2, 0, 1]
    assert torch.equal(ops.scaled_conv2d(x[order], w, scales[order], None, stride), y[order])


@pytest.mark.parametrize("pair", [(1.0, 1.0), (2.0, 1.0), (1.4, 0.8), (0.0, 3.0)])
@pytest.mark.parametrize(("stride", "size"), [(1, (9, 10)), (2, (9, 11)), (3, (10, 13))])
def test_identity_7_flips(
    device: str, pair: tuple[float, float], stride: int, size: tuple[int, int]
) -> None:
    """Mirrored input, weight, gradient: mirrored output, equal scale gradients, at kinks too."""
    x, w = rand(1, 4, *size, device=device), rand(6, 4, 3, 3, device=device)
    scales = scale_tensor(pair).to(device).requires_grad_()
    y = ops.scaled_conv2d(x, w, scales, None, stride)
    g = rand(*y.shape, device=device)
    (grad,) = torch.autograd.grad(y, scales, g)
    for dims in ([2], [3], [2, 3]):
        flipped = ops.scaled_conv2d(x.flip(dims), w.flip(dims), scales, None, stride)
        assert_close(flipped.flip(dims), y, 1e-12)
        assert_close(torch.autograd.grad(flipped, scales, g.flip(dims))[0], grad, 1e-11)


@pytest.mark.parametrize("k", [(1, 1), (3, 3), (5, 5), (3, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_identity_8_torchvision_deform_conv2d(
    tv, k: tuple[int, int], stride: int, groups: int
) -> None:
    """Constant offsets (d - 1)(tap); gradients as well, off the kinks."""
    x, w = rand(3, 6, 12, 14, grad=True), rand(8, 6 // groups, *k, grad=True)
    scales = scale_tensor((1.37, 2.22), (0.3, 0.77), (-0.6, 13.6), grad=True)
    bias = rand(8, grad=True)
    y = ops.scaled_conv2d(x, w, scales, bias, stride, groups)
    offsets = torch.stack(
        [
            (scales[:, axis] - 1) * (tap - k[axis] // 2)
            for i in range(k[0])
            for j in range(k[1])
            for axis, tap in enumerate((i, j))
        ],
        1,
    )[:, :, None, None].expand(-1, -1, *y.shape[2:])
    padding = (k[0] // 2, k[1] // 2)
    expected = tv.ops.deform_conv2d(x, offsets, w, bias, stride=stride, padding=padding)
    assert_close(y, expected, 1e-11)
    inputs = [x, w, scales, bias]
    for actual, wanted in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        assert_close(actual, wanted, 1e-10)


# --- gradients -----------------------------------------------------------------------------------

# Fractions of |tap| * scale are in [0.1, 0.9] for all taps, so that no kink is near.
GRADCHECK = [
    # k, stride, groups, size, scales
    (3, 1, 1, (5, 6), [(1.3, 2.6), (0.45, 0.8)]),
    (3, 2, 2, (6, 5), [(0.7, 1.5), (2.25, 0.4)]),
    (3, 3, 1, (7, 7), [(-0.6, 3.3), (8.4, -1.7)]),
    (3, 1, 1, (1, 6), [(0.5, 0.2)]),
    (3, 2, 1, (5, 1), [(1.2, 9.3)]),
    (5, 1, 1, (6, 5), [(1.2, 0.3), (0.8, 2.3)]),
    (5, 2, 2, (5, 6), [(-0.7, 1.3)]),
    (5, 3, 1, (7, 6), [(3.4, 0.15)]),
    (1, 2, 2, (4, 5), [(1.5, 0.4)]),
]


@pytest.mark.parametrize(("k", "stride", "groups", "size", "pairs"), GRADCHECK)
def test_gradcheck_scaled(
    device: str, k: int, stride: int, groups: int, size: tuple[int, int], pairs: list
) -> None:
    inputs = [
        rand(len(pairs), 2 * groups, *size, device=device, grad=True),
        rand(2 * groups, 2, k, k, device=device, grad=True),
        scale_tensor(*pairs).to(device).requires_grad_(),
        rand(2 * groups, device=device, grad=True),
    ]
    assert torch.autograd.gradcheck(
        lambda *a: ops.scaled_conv2d(*a, stride, groups), inputs, eps=1e-6, nondet_tol=0.0
    )


def test_gradcheck_dilated_and_split(device: str) -> None:
    x, w = rand(2, 4, 5, 6, device=device, grad=True), rand(4, 2, 3, 2, device=device, grad=True)
    bias = rand(4, device=device, grad=True)
    assert torch.autograd.gradcheck(
        lambda *a: ops.dilated_conv2d(*a, (2, 1), (2, 1), (1, 3), 2), (x, w, bias), nondet_tol=0.0
    )
    parts = [rand(1, 4, 1, 3, device=device, grad=True), rand(3, 4, 3, 3, device=device, grad=True)]
    assert torch.autograd.gradcheck(
        lambda x, a, b, bias: ops.split_conv2d(x, [a, b], bias, [(0, 1), (1, 2)], 2),
        (x, *parts, bias),
        nondet_tol=0.0,
    )


def test_shared_scales_sum_their_gradients(device: str) -> None:
    x, w = rand(3, 4, 7, 8, device=device), rand(5, 4, 3, 3, device=device)
    each = scale_tensor((1.4, 0.6)).to(device).expand(3, 2).clone().requires_grad_()
    expected = ops.scaled_conv2d(x, w, each)
    (wanted,) = gradients(expected, [each])
    for shape in ((2,), (1, 2)):
        shared = each[0].detach().reshape(shape).requires_grad_()
        y = ops.scaled_conv2d(x, w, shared)
        assert torch.equal(y, expected)
        assert_close(gradients(y, [shared])[0], wanted.sum(0).reshape(shape), 1e-12)


@needs_native
@pytest.mark.parametrize("op", OPERATORS)
def test_only_wanted_gradients(device: str, op: str) -> None:
    """A frozen weight needs no saved input, and every subset gives the same numbers."""
    x, w = rand(2, 3, 8, 9, device=device), rand(8, 3, 3, 3, device=device)
    scales = scale_tensor((1.4, 0.6), (2.0, 1.0)).to(device)
    full = [x, w, scales][: 3 if op == "scaled" else 2]
    for t in full:
        t.requires_grad_()
    wanted = gradients(called(op, x, w, scales), full)
    saved: list[torch.Size] = []
    for i, tensor in enumerate(full):
        args = [t.detach() for t in (x, w, scales)]
        args[i] = tensor
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.shape) or t, lambda t: t
        ):
            y = called(op, *args)
        assert (x.shape in saved) == (i > 0)
        assert torch.equal(gradients(y, [tensor])[0], wanted[i])


@needs_native
@pytest.mark.parametrize("op", OPERATORS)
def test_double_backward_raises(device: str, op: str) -> None:
    x, w = rand(1, 3, 5, 5, device=device, grad=True), rand(8, 3, 3, 3, device=device, grad=True)
    y = called(op, x, w, scale_tensor((1.4, 0.6)).to(device))
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.square().sum().backward()


# --- the same on any number of threads, and under torch's tracers -------------------------------


@pytest.fixture
def threads() -> Callable[[int], None]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(2, 64, 40, 33), (1, 48, 13, 13), (9, 40, 7, 7)], ids=str)
def test_equal_on_any_number_of_threads(
    threads: Callable[[int], None], dtype: torch.dtype, size: tuple[int, ...]
) -> None:
    """Of our own kernels; at whole dilations torch's convolution sums as it likes, so those run in
    float64, which is ours."""
    x = rand(*size, dtype=dtype, grad=True)
    w = rand(48, size[1], 3, 3, dtype=dtype, grad=True)
    scales = scale_tensor((1.4, 0.6), dtype=torch.float32).repeat(size[0], 1).requires_grad_()

    def all_values() -> list[Tensor]:
        results = []
        for op in OPERATORS:
            inputs = [x, w, scales] if op == "scaled" else [x.double(), w.double()]
            y = called(op, *inputs[:2], scales)
            results += [y, *gradients(y, inputs)]
        return results

    threads(1)
    alone = all_values()
    for count in (2, 3):
        threads(count)
        for a, b in zip(alone, all_values(), strict=True):
            assert torch.equal(a, b)


def test_runs_in_deterministic_mode(device: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        x, w = (
            rand(2, 3, 8, 9, device=device, grad=True),
            rand(8, 3, 3, 3, device=device, grad=True),
        )
        scales = scale_tensor((1.4, 0.6), (2.0, 1.0)).to(device).requires_grad_()
        for op in OPERATORS:
            runs = []
            for _ in range(2):
                y = called(op, x, w, scales)
                runs.append(gradients(y, [x, w] + [scales] * (op == "scaled")))
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@needs_native
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device: str, dtype: torch.dtype, channels_last: bool) -> None:
    format = torch.channels_last if channels_last else torch.contiguous_format
    native = torch.ops.detkit
    for grad in (False, True):
        x = rand(2, 4, 9, 10, dtype=dtype, device=device).to(memory_format=format)
        x.requires_grad_(grad)
        w = rand(6, 2, 3, 3, dtype=dtype, device=device, grad=grad)
        bias = rand(6, dtype=dtype, device=device, grad=grad)
        scales = torch.tensor([[1.5, 0.5], [2.0, 1.0]], device=device, requires_grad=grad)
        parts = [w[:3].detach().requires_grad_(grad), w[3:, :, 1:2].detach().requires_grad_(grad)]
        dilated = (x, w, bias, [2, 1], [1, 2], [1, 2], 2)
        torch.library.opcheck(native.dilated_conv2d.default, dilated)
        torch.library.opcheck(native.scaled_conv2d.default, (x, w, scales, bias, [1, 2], 2))
        torch.library.opcheck(
            native.split_conv2d.default, (x, parts, bias, [1, 2, 0, 3], [2, 2], 2)
        )
        relu = (0, True)  # by columns
        torch.library.opcheck(native.dilated_conv2d.default, (*dilated, *relu))
        torch.library.opcheck(native.scaled_conv2d.default, (x, w, scales, bias, [1, 2], 2, *relu))
        torch.library.opcheck(
            native.split_conv2d.default, (x, parts, bias, [1, 2, 0, 3], [2, 2], 2, *relu)
        )


@needs_native
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck_backward(device: str, needs: tuple[bool, bool, bool]) -> None:
    native = torch.ops.detkit
    x = rand(2, 4, 9, 10, device=device).to(memory_format=torch.channels_last)
    w, scales = rand(6, 2, 3, 3, device=device), scale_tensor((1.5, 0.5), (2, 1)).to(device)
    g = rand(2, 6, 9, 10, device=device)
    dilated = (g, x, w, [1, 1], [1, 2], [1, 2], 2, *needs[:2])
    torch.library.opcheck(native._dilated_conv2d_backward.default, dilated)
    scaled = (g, x, w, scales, [1, 1], 2, *needs)
    torch.library.opcheck(native._scaled_conv2d_backward.default, scaled)
    split = (g, x, [w[:3], w[3:, :, 1:2]], [1, 2, 0, 3], [1, 1], 2, *needs[:2])
    torch.library.opcheck(native._split_conv2d_backward.default, split)


class Layers(torch.nn.Module):
    """All three operators in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(rand(8, 4, 3, 3, dtype=torch.float32) / 6)
        self.v = torch.nn.Parameter(rand(8, 8, 3, 3, dtype=torch.float32) / 8)
        self.bias = torch.nn.Parameter(rand(8, dtype=torch.float32))

    def forward(self, x: Tensor, scales: Tensor) -> Tensor:
        y = ops.scaled_conv2d(x, self.w, scales, self.bias, stride=2).relu()
        y = ops.dilated_conv2d(y, self.v, padding=2, dilation=2).relu()
        return ops.split_conv2d(y, [self.v[:3], self.v[3:]], self.bias, [(1, 2), (2, 3)])


def layer_inputs(n: int, h: int, w: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    x = rand(n, 4, h, w, dtype=torch.float32, device=device)
    return x, (torch.rand(n, 2) * 3).to(device).requires_grad_()


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_whole(device: str, grad: bool) -> None:
    module = Layers().to(device).requires_grad_(grad)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((2, 9, 10), (3, 12, 7)):
        x, scales = layer_inputs(*size, device)
        scales = scales.requires_grad_(grad)
        y, expected = compiled(x, scales), module(x, scales)
        assert_close(y, expected, 1e-6)
        if grad:
            inputs = [scales, module.w, module.v, module.bias]
            for a, b in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
                assert_close(a, b, 1e-5)


def test_compiles_under_autocast(device: str) -> None:
    module = Layers().to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, scales = layer_inputs(2, 9, 10, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, expected = compiled(x, scales), module(x, scales)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    inputs = [scales, module.w, module.v, module.bias]
    for a, b in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        assert_close(a, b, 1e-5)


@needs_native
def test_inference_mode(device: str) -> None:
    module = Layers().to(device)
    x, scales = layer_inputs(2, 17, 18, device)
    with torch.inference_mode():
        y = module(x, scales)
    assert torch.equal(y, module(x, scales))


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    module = Layers()
    x, scales = layer_inputs(2, 9, 10)
    y = torch.compile(module, fullgraph=True)(x, scales)
    assert_close(y, module(x, scales), 1e-5)
    assert_close(gradients(y, [module.w])[0], gradients(module(x, scales), [module.w])[0], 1e-4)


def test_compiled_scales_must_be_finite() -> None:
    module = Layers().requires_grad_(False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, scales = layer_inputs(2, 9, 10)
    broken = scales.detach().clone()
    broken[1, 0] = torch.nan
    compiled(x, scales.detach())
    with pytest.raises(RuntimeError):
        compiled(x, broken)


def test_exports_with_dynamic_sizes() -> None:
    # Sides from 3, as the layer of stride 2 must leave more than 1: torch treats 1 apart.
    n, h, w = (torch.export.Dim(name, min=least) for name, least in (("n", 2), ("h", 3), ("w", 3)))
    module = Layers().requires_grad_(False)
    x, scales = (t.detach() for t in layer_inputs(2, 9, 10))
    shapes = {"x": {0: n, 2: h, 3: w}, "scales": {0: n}}
    program = torch.export.export(module, (x, scales), dynamic_shapes=shapes).module()
    for size in ((2, 9, 10), (5, 16, 3)):
        x, scales = (t.detach() for t in layer_inputs(*size))
        assert_close(program(x, scales), module(x, scales), 1e-6)


# --- fuzz ----------------------------------------------------------------------------------------

sides = st.integers(1, 9)
finite = st.floats(-4, 12, allow_nan=False).map(lambda d: round(d * 8) / 8) | st.floats(-3, 9)


@given(
    n=st.integers(0, 3),
    groups=st.sampled_from([1, 1, 2, 3]),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(sides, sides),
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pairs=st.lists(st.tuples(finite, finite), min_size=3, max_size=3),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_fuzz_scaled(n, groups, channels, size, kernel, stride, pairs, channels_last, seed) -> None:
    torch.manual_seed(seed)
    c, o = channels
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = rand(n, groups * c, *size).to(memory_format=format).requires_grad_()
    w, bias = rand(groups * o, c, *kernel, grad=True), rand(groups * o, grad=True)
    scales = torch.tensor(pairs[:n], dtype=F64).reshape(n, 2).requires_grad_()
    inputs = [x, w, scales, bias]
    y = ops.scaled_conv2d(*inputs, stride, groups)
    expected = reference.scaled_conv2d(*inputs, stride, groups)
    assert_close(y, expected, 1e-10)
    for actual, wanted in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        assert_close(actual, wanted, 1e-10)


@given(
    n=st.integers(0, 3),
    groups=st.sampled_from([1, 1, 2, 3]),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(sides, sides),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    extra=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_fuzz_dilated(n, groups, channels, size, kernel, stride, extra, dilation, seed) -> None:
    torch.manual_seed(seed)
    c, o = channels
    padding = [e + d * (k - 1) // 2 + 1 for e, d, k in zip(extra, dilation, kernel, strict=True)]
    inputs = [rand(n, groups * c, *size, grad=True), rand(groups * o, c, *kernel, grad=True)]
    y = ops.dilated_conv2d(*inputs, None, stride, padding, dilation, groups)
    expected = F.conv2d(*inputs, None, stride, padding, dilation, groups)
    assert_close(y, expected, 1e-10)
    for actual, wanted in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        assert_close(actual, wanted, 1e-10)


# --- bad arguments -------------------------------------------------------------------------------

X, W, S = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3), torch.ones(2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.dilated_conv2d(X[0, 0], W), "input must be"),
        (lambda: ops.dilated_conv2d(X, W[0]), "weight must be"),
        (lambda: ops.dilated_conv2d(X.long(), W), "floating point"),
        (lambda: ops.dilated_conv2d(X, W.double()), "weight must be torch.float32 like the input"),
        (lambda: ops.dilated_conv2d(X, W, torch.zeros(5)), "bias must be"),
        (lambda: ops.dilated_conv2d(X, W, groups=2), "input channels must be groups"),
        (lambda: ops.dilated_conv2d(X, W, groups=0), "groups must be at least 1"),
        (lambda: ops.dilated_conv2d(X, W[:5, :2], groups=2), "multiple of groups=2, got 5"),
        (lambda: ops.dilated_conv2d(X, W, stride=0), "stride must be"),
        (lambda: ops.dilated_conv2d(X, W, padding=(1, 2, 3)), "padding must be"),
        (lambda: ops.dilated_conv2d(X, W, dilation=3), "kernel's span 7, got 5"),
        (lambda: ops.dilated_conv2d(X, W, padding="half"), "padding must be numbers"),
        (lambda: ops.dilated_conv2d(X, W, stride=2, padding="same"), "stride must be 1"),
        (lambda: ops.scaled_conv2d(X, W, S.double()), "scales must be torch.float32"),
        (lambda: ops.scaled_conv2d(X.half(), W.half(), S.half()), "scales must be torch.float32"),
        (lambda: ops.scaled_conv2d(X.double(), W.double(), S), "scales must be torch.float64"),
        (lambda: ops.scaled_conv2d(X, W, torch.ones(3, 2)), r"scales must be \(2, 2\)"),
        (lambda: ops.scaled_conv2d(X, W, torch.ones(2, 1)), r"scales must be \(2, 2\)"),
        (lambda: ops.scaled_conv2d(X, W[..., :2], S), "kernel sides must be odd"),
        (lambda: ops.split_conv2d(X, [], None, []), "at least one part"),
        (lambda: ops.split_conv2d(X, [W, W], None, [(1, 1)]), "one .h, w. per part"),
        (lambda: ops.split_conv2d(X, [W], None, [(0, 1)]), "1 where the dilation is 0"),
        (lambda: ops.split_conv2d(X, [W[..., :2]], None, [(1, 1)]), "kernel sides must be odd"),
        (lambda: ops.split_conv2d(X, [W], None, [(1, -1)]), "dilation must be"),
        (lambda: ops.split_conv2d(X, [W, W[:, :2]], None, [(1, 1)] * 2), "input channels must be"),
        (
            lambda: ops.split_conv2d(X, [W[:4, :2], W[:2, :2]], None, [(1, 1)] * 2, groups=2),
            "whole groups of 3 or lie inside one, got 0..4",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@needs_native
def test_direct_calls_are_checked_too() -> None:
    native = torch.ops.detkit
    for call in (
        lambda: native.dilated_conv2d(X, W, None, [1, 1], [0, 0], [3, 3], 1),
        lambda: native.dilated_conv2d(X, W, None, [1], [0, 0], [1, 1], 1),
        lambda: native.scaled_conv2d(X, W, S[:1], None, [1, 1], 1),
        lambda: native.scaled_conv2d(X, W, S / 0, None, [1, 1], 1),
        lambda: native.split_conv2d(X, [W], None, [0, 1], [1, 1], 1),
        lambda: native.split_conv2d(X, [W, W[:1]], None, [1] * 4, [1, 1], 2),
        lambda: native._dilated_conv2d_backward(X, X, W, [1, 1], [1, 1], [1, 1], 1, True, True),
    ):
        with pytest.raises(RuntimeError):
            call()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("scale", [(2.3, 1.6), (2.0, 3.0), (9.4, 0.7)])
def test_cutting_the_work_changes_no_bit(stride: int, scale: tuple[float, float]) -> None:
    """More pixels, channels and outputs than are treated at once; threads cut them differently."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 40, 25, 42), torch.randn(33, 40, 3, 3), torch.randn(33)
    scales, threads = torch.tensor([scale]), torch.get_num_threads()
    parts, dilations = [weight[:11], weight[11:]], [(1, 2), (2, 2)]
    sampled, split = [], []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            sampled.append(ops.scaled_conv2d(x, weight, scales, bias, stride))
            split.append(ops.split_conv2d(x, parts, bias, dilations, stride))
    finally:
        torch.set_num_threads(threads)
    wide = [t.double() for t in (x, weight, scales, bias)]
    expected = ops.scaled_conv2d(*wide, stride)
    torch.testing.assert_close(sampled[0].double(), expected, rtol=0, atol=1e-4)
    expected = ops.split_conv2d(wide[0], [p.double() for p in parts], wide[3], dilations, stride)
    torch.testing.assert_close(split[0].double(), expected, rtol=0, atol=1e-4)
    for results in (sampled, split):
        assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_far_taps_on_large_maps(format: torch.memory_format) -> None:
    """Work enough to lay maps out anew; channels and pixels are no multiples of what is moved at
    once."""
    x = rand(2, 80, 40, 37).float().contiguous(memory_format=format).requires_grad_()
    w = rand(40, 80, 3, 3, dtype=torch.float32, grad=True)
    y = ops.dilated_conv2d(x, w, padding=9, dilation=9)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = F.conv2d(*wide, padding=9, dilation=9)
    upstream = torch.randn_like(y)
    assert_close(y, expected, 1e-5)
    found = torch.autograd.grad(y, [x, w], upstream)
    for a, b in zip(found, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        assert_close(a, b, 1e-5)
    assert y.is_contiguous(memory_format=format)
    assert found[0].is_contiguous(memory_format=format)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_threads_share_the_outputs_of_a_split_convolution(
    threads: Callable[[int], None], format: torch.memory_format, count: int
) -> None:
    """Their shares do not end where parts do, and leave the gradients' history alone."""
    threads(count)
    x = rand(1, 32, 40, 37).float().contiguous(memory_format=format).requires_grad_()
    parts = [rand(outs, 32, 3, 3, dtype=torch.float32, grad=True) for outs in (33, 71)]
    bias = rand(104, dtype=torch.float32)
    y = ops.split_conv2d(x, parts, bias, [(1, 2), (3, 9)])
    wide = [t.detach().double().requires_grad_() for t in (x, *parts)]
    expected = torch.cat(
        [
            F.conv2d(wide[0], wide[1], bias[:33].double(), padding=(1, 2), dilation=(1, 2)),
            F.conv2d(wide[0], wide[2], bias[33:].double(), padding=(3, 9), dilation=(3, 9)),
        ],
        1,
    )
    assert_close(y, expected, 1e-5)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *parts], upstream)
    for a, b in zip(found, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        assert_close(a, b, 1e-5)
