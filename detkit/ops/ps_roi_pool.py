"""Position-sensitive RoI pooling over whole cells (R-FCN, arXiv 1605.06409), rounded as its code.

Composed of torch operators: it has no kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detkit.ops._rois import as_rois, check_input, check_sampling, output_pair

SMALLEST_SIZE = 0.1
"""Sides of a box on the map are raised to this many cells."""

CHUNK_ELEMENTS = 2**24
"""Float64 numbers gathered at once, so that memory does not grow with the number of boxes."""


def ps_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """Mean of the whole cells of each bin of each box, from the channels that belong to that bin.

    A box reaches on the map from round(x1) * s to (round(x2) + 1) * s, halves rounded away from
    zero, and is at least 0.1 cells wide; y alike. A bin takes every cell it touches: from the floor
    of its begin to the ceiling of its end, within the map. A bin without cells is 0. Output channel
    d at bin (i, j) reads input channel (d*P + i)*Q + j. torchvision's operator of this name rounds
    elsewhere.

    Composed of torch operators, with no kernel of its own: sums of cells are differences of a
    float64 summed-area table. So a non-finite feature reaches every bin of its channel that ends
    below or right of it, of any box of its image. A box with a non-finite number gives NaN in all
    its outputs. Boxes get no gradient.

    Args:
        input: (N, D*P*Q, H, W) float16, bfloat16, float32 or float64; any strides.
        boxes: (R, 5) rows (batch index, x1, y1, x2, y2), or per image an (L, 4) tensor of
            x1, y1, x2, y2.
        output_size: Bins (P, Q) down and across, or one number for both.
        spatial_scale: Map pixels per box unit (s), e.g. 1/16.

    Returns:
        (R, D, P, Q) in the input's dtype.

    Raises:
        ValueError: On wrong shapes, dtypes, devices or sizes, and on CPU for a batch index outside
            the batch. On CUDA, where looking would wait for the device, such a RoI is NaN.
    """
    check_input("ps_roi_pool", input)
    check_sampling("ps_roi_pool", spatial_scale, 0)
    p, q = output_pair("ps_roi_pool", output_size)
    batch, channels, height, width = input.shape
    if channels % (p * q) != 0:
        raise ValueError(
            f"ps_roi_pool: channels must be a multiple of {p}*{q}={p * q}, got {channels}"
        )
    rois = as_rois("ps_roi_pool", input, boxes).to(torch.float64)
    usable = rois.isfinite().all(1) & (rois[:, 0] >= 0) & (rois[:, 0] < batch)
    rois = torch.where(usable[:, None], rois, 0)
    rows = _edges(rois[:, 2], rois[:, 4], p, spatial_scale, height)
    columns = _edges(rois[:, 1], rois[:, 3], q, spatial_scale, width)
    index, weight = _corners(rois[:, 0].long(), rows, columns, (height, width))
    table = _summed_areas(input, p, q)
    depth = channels // (p * q)
    step = max(1, CHUNK_ELEMENTS // max(1, 4 * p * q * depth))
    parts = [(index, weight)]
    if not torch.compiler.is_compiling():  # a trace does not know how many there are
        parts = list(zip(index.split(step), weight.split(step), strict=True))
    pooled = [(table[i] * w[..., None]).sum(1) for i, w in parts]  # each (r, P*Q, D)
    out = torch.cat(pooled).mT.reshape(rois.shape[0], depth, p, q)
    return torch.where(usable.view(-1, 1, 1, 1), out, torch.nan).to(input.dtype)


def _round(x: Tensor) -> Tensor:
    """The nearest whole number, halves away from zero as C rounds (torch rounds them to even)."""
    whole = x.trunc()
    return whole + x.sign() * ((x - whole).abs() >= 0.5)


def _edges(low: Tensor, high: Tensor, bins: int, scale: float, size: int) -> tuple[Tensor, Tensor]:
    """First cell and the one after the last of each bin along one axis, both (R, bins) int64."""
    start = _round(low) * scale
    length = ((_round(high) + 1) * scale - start).clamp(min=SMALLEST_SIZE)
    # i * length / bins and not i * (length / bins): a bin that ends on a cell's border ends there
    bounds = start[:, None] + length[:, None] * torch.arange(bins + 1, device=low.device) / bins
    first = bounds[:, :-1].floor().clamp(0, size)
    last = bounds[:, 1:].ceil().clamp(0, size)
    return first.long(), last.long()


def _corners(
    image: Tensor,
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor],
    size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Rows of the summed-area table (R, 4, P*Q) and their weights: they sum to the bins' means."""
    (top, bottom), (left, right) = rows, columns
    p, q = top.shape[1], left.shape[1]
    height, width = size
    cells = (bottom - top).clamp(min=0)[:, :, None] * (right - left).clamp(min=0)[:, None, :]
    share = torch.where(cells > 0, 1.0 / cells.clamp(min=1).double(), 0.0).flatten(1)
    plane = image[:, None] * (p * q) + torch.arange(p * q, device=image.device)  # (R, P*Q)
    index, weight = [], []
    for y, x, sign in ((bottom, right, 1), (top, right, -1), (bottom, left, -1), (top, left, 1)):
        corner = (y[:, :, None] * (width + 1) + x[:, None, :]).flatten(1)
        index.append(plane * ((height + 1) * (width + 1)) + corner)
        weight.append(sign * share)
    return torch.stack(index, 1), torch.stack(weight, 1)


def _summed_areas(input: Tensor, p: int, q: int) -> Tensor:
    """(N*P*Q*(H+1)*(W+1), D) float64: sums of all cells above and left of each corner."""
    batch, channels, height, width = input.shape
    planes = input.double().reshape(batch, channels // (p * q), p * q, height, width)
    planes = planes.permute(0, 2, 3, 4, 1)  # (N, P*Q, H, W, D)
    sums = planes.cumsum(2).cumsum(3)
    return torch.nn.functional.pad(sums, (0, 0, 1, 0, 1, 0)).flatten(0, 3)
