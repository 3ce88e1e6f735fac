"""PS-RoIAlign whose samples adapt to the RoI, in tensors whose shapes do not.

The mean of bilinear samples on a regular grid is separable: it is a weighted sum over the rows of
the map, then over its columns. The number of samples depends on the RoI, the number of rows does
not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detkit.ops.reference.roi import MAX_GRID

_NEAR = 7
"""Samples looked at per row of the map. They lie more than half a row apart (or there is one), so
at most four are less than a row away; the others are for rounding."""


def mean_of_samples(x: Tensor, rois: Tensor, side: int, scale: float, offset: float) -> Tensor:
    """:func:`detkit.ops.ps_roi_align` with ``reduce="avg"`` and ``sampling_ratio=0``.

    The arithmetic grows with the product of RoIs and images.

    Args:
        x: (N, D*side*side, H, W), finite.
        rois: (R, 5) rows (image index, x1, y1, x2, y2), finite.
        side: Bins per side.
        scale: Map pixels per box unit.
        offset: Map pixels subtracted from the scaled box coordinates.

    Returns:
        (R, D, side, side).
    """
    height, width = x.shape[2:]
    rows = _shares(rois[:, 2], rois[:, 4], height, side, scale, offset)  # (R, side, H)
    columns = _shares(rois[:, 1], rois[:, 3], width, side, scale, offset)  # (R, side, W)
    own = rois[:, :1] == torch.arange(x.shape[0], device=x.device)  # (R, N)
    planes = x.unflatten(1, (-1, side, side)).permute(2, 0, 4, 1, 3, 5)  # (i, N, H, D, j, W)
    bins = []
    for number, plane in enumerate(planes.unbind(0)):
        down = (own[:, :, None] * rows[:, number, None]).flatten(1)  # (R, N*H)
        sums = down @ plane.flatten(0, 1).flatten(1)  # (R, D*j*W)
        bins.append((sums.unflatten(1, plane.shape[2:]) * columns[:, None]).sum(3))
    return torch.stack(bins, 2)


def _shares(low: Tensor, high: Tensor, size: int, side: int, scale: float, offset: float) -> Tensor:
    """Share (R, side, size) of each row of the map in the mean over a bin's samples.

    Positions in the order of operations of :mod:`detkit.ops.reference.roi`.
    """
    start = low * scale - offset
    length = (high * scale - offset - start) / side
    count = length.ceil().clamp(min=0)
    count = torch.where(count <= MAX_GRID, count, 0.0)
    step = torch.where(count > 0, length / count.clamp(min=1), 1.0)
    numbers = torch.arange(side, device=low.device)
    begin = (start[:, None] + numbers * length[:, None])[..., None]  # (R, side, 1)
    row = torch.arange(size, device=low.device)
    first = ((row - 1 - begin) / step[:, None, None] - 0.5).floor() - 1  # (R, side, size)
    count, length, begin = count.view(-1, 1, 1, 1), length.view(-1, 1, 1, 1), begin[..., None]
    sample = first.clamp(min=0)[..., None] + torch.arange(_NEAR, device=low.device)
    position = begin + (sample + 0.5) * length / count.clamp(min=1)  # (R, side, size, near)
    inside = (sample < count) & (position >= -1) & (position <= size)
    distance = (position.clamp(0, size - 1) - row[:, None]).abs()
    weight = torch.where(inside, (1 - distance).clamp(min=0), 0.0)
    return weight.sum(3) / count.clamp(min=1)[..., 0]
