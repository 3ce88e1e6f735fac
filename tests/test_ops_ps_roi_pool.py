"""PS-RoI pooling over whole cells: a plain loop in exact fractions, gradients, edge cases."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from detkit.ops import ps_roi_pool


def rounded(value: float) -> int:
    """Halves away from zero."""
    return int(math.copysign(math.floor(Fraction(abs(value)) + Fraction(1, 2)), value))


def bounds(low: float, high: float, scale: Fraction, bins: int, size: int) -> list[range]:
    """Cells of each bin along one axis."""
    start = rounded(low) * scale
    length = max((rounded(high) + 1) * scale - start, Fraction(1, 10))
    found = []
    for i in range(bins):
        first = math.floor(start + i * length / bins)
        last = math.ceil(start + (i + 1) * length / bins)
        found.append(range(min(max(first, 0), size), min(max(last, 0), size)))
    return found


def by_loop(x: Tensor, rois: Tensor, bins: tuple[int, int], scale: Fraction) -> Tensor:
    """The definition."""
    p, q = bins
    out = torch.zeros(len(rois), x.shape[1] // (p * q), p, q, dtype=torch.float64)
    for r, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        rows = bounds(y1, y2, scale, p, x.shape[2])
        columns = bounds(x1, x2, scale, q, x.shape[3])
        for d in range(out.shape[1]):
            for i in range(p):
                for j in range(q):
                    plane = x[int(image), (d * p + i) * q + j].double()
                    cells = [plane[a, b] for a in rows[i] for b in columns[j]]
                    out[r, d, i, j] = sum(cells) / len(cells) if cells else 0.0
    return out


def rois_over(height: float, width: float, count: int) -> Tensor:
    """(R, 5) boxes that reach over the border, with halves to round and some sides swapped."""
    low = torch.rand(count, 2) * 1.4 - 0.3
    side = torch.rand(count, 2).square() * 1.2
    side[::7] *= -0.3
    corners = torch.cat([low, low + side], 1) * torch.tensor([width, height, width, height])
    corners = (corners * 2).round() / 2
    return torch.cat([torch.randint(0, 2, (count, 1)).float(), corners], 1)


@pytest.mark.parametrize("bins", [(7, 7), (3, 2)], ids=str)
@pytest.mark.parametrize("stride", [2, 16])
def test_equals_a_plain_loop(bins: tuple[int, int], stride: int, device: str) -> None:
    x = torch.randn(2, 2 * bins[0] * bins[1], 9, 12)
    rois = rois_over(9 * stride, 12 * stride, 20)
    found = ps_roi_pool(x.to(device), rois.to(device), bins, 1 / stride)
    expected = by_loop(x, rois, bins, Fraction(1, stride))
    assert (expected == 0).any(), "some bins must be empty"
    torch.testing.assert_close(found.cpu(), expected.float(), rtol=1e-5, atol=1e-6)


def test_channel_of_each_bin() -> None:
    x = torch.arange(3 * 4 * 4.0).view(1, -1, 1, 1).expand(1, 48, 8, 8)
    found = ps_roi_pool(x, torch.tensor([[0, 0.0, 0, 127, 127]]), 4, 1 / 16)
    assert torch.equal(found[0].flatten(), torch.arange(48.0))


def test_a_box_of_whole_cells_takes_each_cell_once() -> None:
    x = torch.randn(1, 49, 7, 7, dtype=torch.float64)
    found = ps_roi_pool(x, [torch.tensor([[0.0, 0.0, 111.0, 111.0]])], 7, 1 / 16)
    expected = x[0].view(7, 7, 7, 7).diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1)
    torch.testing.assert_close(found[0, 0], expected, rtol=0, atol=1e-12)


def test_halves_are_rounded_away_from_zero() -> None:
    x = torch.arange(8.0).view(1, 1, 1, 8)
    rois = torch.tensor([[0, 2.5, 0, 2.5, 0], [0, 3.5, 0, 3.5, 0], [0, -0.5, 0, 0.4, 0]])
    assert ps_roi_pool(x, rois, 1).flatten().tolist() == [3.0, 4.0, 0.0]


def test_gradients() -> None:
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = rois_over(10, 12, 9)
    assert torch.autograd.gradcheck(lambda t: ps_roi_pool(t, rois, 2, 0.5), (x,))
    inside = torch.tensor([[0, 1.0, 1, 8, 7], [1, 3, 2, 9, 8]])
    (grad,) = torch.autograd.grad(ps_roi_pool(x, inside, 2, 0.5).sum(), x)
    torch.testing.assert_close(grad.sum((1, 2, 3)), torch.tensor([8.0, 8.0]).double())


def test_no_boxes_keep_the_graph() -> None:
    x = torch.randn(2, 18, 5, 6, requires_grad=True)
    found = ps_roi_pool(x, torch.zeros(0, 5), 3, 0.5)
    assert found.shape == (0, 2, 3, 3)
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(grad, torch.zeros_like(x))


def test_a_box_that_is_not_finite_is_nan_and_leaves_the_others_alone() -> None:
    x = torch.randn(1, 4, 5, 6, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 1, 4, 4], [0, 1, float("nan"), 4, 4], [0, 1, 1, float("inf"), 4]])
    found = ps_roi_pool(x, rois, 2)
    alone = ps_roi_pool(x, rois[:1], 2)
    assert found[1:].isnan().all() and torch.equal(found[:1], alone)
    (grad,) = torch.autograd.grad(found[0].sum(), x, retain_graph=True)
    assert grad.isfinite().all()
    huge = torch.tensor([[0, -3e38, -3e38, 3e38, 3e38]])
    torch.testing.assert_close(ps_roi_pool(x, huge, 1).flatten(), x.mean((0, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_layouts(dtype: torch.dtype) -> None:
    x, rois = torch.randn(2, 18, 7, 6).to(dtype), rois_over(14, 12, 6)
    expected = by_loop(x, rois, (3, 3), Fraction(1, 2))
    found = ps_roi_pool(x.to(memory_format=torch.channels_last), rois, 3, 0.5)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-2, atol=1e-3)


def test_many_boxes_are_pooled_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rois = torch.randn(2, 18, 7, 6, requires_grad=True), rois_over(14, 12, 50)
    whole = ps_roi_pool(x, rois, 3, 0.5)
    (grad,) = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr(sys.modules[ps_roi_pool.__module__], "CHUNK_ELEMENTS", 500)
    parts = ps_roi_pool(x, rois, 3, 0.5)
    assert torch.equal(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), x)[0], grad)


@pytest.mark.parametrize(
    ("shape", "rois", "size", "message"),
    [
        ((1, 48, 4, 4), [[0, 0, 0, 1, 1]], 7, r"multiple of 7\*7=49, got 48"),
        ((1, 49, 4, 4), [[1, 0, 0, 1, 1]], 7, "batch indices must be in 0..0, got 1"),
        ((1, 49, 4, 4), [[0, 0, 0, 1]], 7, r"boxes must be \(R, 5\)"),
        ((49, 4, 4), [[0, 0, 0, 1, 1]], 7, r"input must be \(N, C, H, W\)"),
        ((1, 49, 4, 4), [[0, 0, 0, 1, 1]], 0, "output_size must be a positive number"),
    ],
)
def test_wrong_calls_are_refused(
    shape: tuple[int, ...], rois: list[list[float]], size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"ps_roi_pool: .*{message}"):
        ps_roi_pool(torch.zeros(shape), torch.tensor(rois, dtype=torch.float32), size)
