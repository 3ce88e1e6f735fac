"""RoIAlign and PS-RoIAlign in pure PyTorch: the executable definition and the fall-back.

Differentiable in the features, runs on any device, exact in float64. Letters: N batch, C channels,
H W map, R RoIs, P Q bins down and across, D output channels, G K samples down and across one bin.

Every bin is sampled on a regular grid and every sample interpolated bilinearly. An output touches
the in-map corners of its samples, those of weight 0 too: a NaN feature reaches the outputs that
touch it and no others. A RoI with a non-finite number, or a batch index outside the batch, is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A bin longer than this many samples pools to zero: more cannot be counted exactly in float32, and
# what such a bin takes from a map of H rows is of the order of H / 2^22 of the features.
MAX_GRID = 2**22

# Sampled features held at once, so that the fall-back's memory stays bounded.
CHUNK_ELEMENTS = 2**23


@dataclass(frozen=True)
class _Axis:
    """R boxes along one axis of the map; the tensors are (R,)."""

    size: int  # of the map
    bins: int
    zero_border: (
        bool  # corners off the map count 0; otherwise samples up to a pixel off are clamped
    )
    fixed: int  # samples per bin where all boxes have the same number, otherwise 0
    start: Tensor
    bin_size: Tensor
    grid: Tensor  # samples per bin, of the coordinates' dtype
    window: Tensor  # samples per bin worth a look, int64

    def take(self, index: Tensor) -> _Axis:
        """The same for some of the boxes."""
        names = ("start", "bin_size", "grid", "window")
        return replace(self, **{name: getattr(self, name)[index] for name in names})


@dataclass(frozen=True)
class _Taps:
    """The two neighbours of each sample along one axis; all (R, P, G)."""

    exists: Tensor  # false where a box has fewer samples than G
    index: tuple[Tensor, Tensor]
    weight: tuple[Tensor, Tensor]
    inside: tuple[Tensor, Tensor]


def roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign; arguments and meaning as :func:`detkit.ops.roi_align`, with boxes as (R, 5).

    Args:
        input: (N, C, H, W).
        rois: (R, 5) rows (batch index, x1, y1, x2, y2), float32, or float64 for a float64 input.
        output_size: (P, Q).
        spatial_scale: Map pixels per box unit.
        sampling_ratio: Samples per bin and axis; <= 0 takes about one per pixel.
        aligned: Shift by half a pixel and leave small boxes as they are.

    Returns:
        (R, C, P, Q) in the input's dtype.
    """
    batch, channels, height, width = input.shape
    offset, floor = (0.5, None) if aligned else (0.0, 1.0)
    rows, columns = (
        _axis(rois, low, size, bins, spatial_scale, sampling_ratio, offset, floor, False)
        for low, size, bins in ((2, height, output_size[0]), (1, width, output_size[1]))
    )
    usable = _usable(rois, batch)
    image = torch.where(usable, rois[:, 0], 0).long()
    flat = input.to(rois.dtype).permute(0, 2, 3, 1).flatten(0, 2)  # (N*H*W, C)
    base = (image * (height * width)).view(-1, 1, 1, 1, 1)
    pooled = _pool(flat, base, rows, columns, maximum=False)
    return torch.where(usable.view(-1, 1, 1, 1), pooled, torch.nan).to(input.dtype)


def ps_roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    reduce: str,
    offset: float,
) -> Tensor:
    """PS-RoIAlign; arguments and meaning as :func:`detkit.ops.ps_roi_align`, with boxes as (R, 5).

    Args:
        input: (N, D*P*Q, H, W); output channel d reads channel (d*P + i)*Q + j at bin (i, j).
        rois: (R, 5) rows (batch index, x1, y1, x2, y2), float32, or float64 for a float64 input.
        output_size: (P, Q).
        spatial_scale: Map pixels per box unit.
        sampling_ratio: Samples per bin and axis; <= 0: one per pixel ("avg") or 2 ("max").
        reduce: "avg" or "max" of a bin's samples.
        offset: Subtracted from the scaled box coordinates.

    Returns:
        (R, D, P, Q) in the input's dtype.
    """
    batch, channels, height, width = input.shape
    p, q = output_size
    maximum = reduce == "max"
    ratio = 2 if maximum and sampling_ratio <= 0 else sampling_ratio
    floor = 0.0 if maximum else None
    rows, columns = (
        _axis(rois, low, size, bins, spatial_scale, ratio, offset, floor, maximum)
        for low, size, bins in ((2, height, p), (1, width, q))
    )
    usable = _usable(rois, batch)
    image = torch.where(usable, rois[:, 0], 0).long().view(-1, 1, 1, 1, 1)
    flat = input.to(rois.dtype).reshape(batch, channels // (p * q), p, q, height, width)
    flat = flat.permute(0, 2, 3, 4, 5, 1).flatten(0, 4)  # (N*P*Q*H*W, D)
    plane = torch.arange(p * q, device=input.device).view(1, p, 1, q, 1)
    base = (image * (p * q) + plane) * (height * width)
    pooled = _pool(flat, base, rows, columns, maximum)
    return torch.where(usable.view(-1, 1, 1, 1), pooled, torch.nan).to(input.dtype)


def _usable(rois: Tensor, batch: int) -> Tensor:
    """(R,) bool: the numbers are finite and the batch index exists."""
    return rois.isfinite().all(1) & (rois[:, 0] >= 0) & (rois[:, 0] < batch)


def _axis(
    rois: Tensor,
    low: int,
    size: int,
    bins: int,
    spatial_scale: float,
    sampling_ratio: int,
    offset: float,
    floor: float | None,
    zero_border: bool,
) -> _Axis:
    """The boxes along one axis; ``low`` is the column of ``rois`` that holds their begin."""
    rois = rois.detach()
    start = rois[:, low] * spatial_scale - offset
    extent = rois[:, low + 2] * spatial_scale - offset - start
    if floor is not None:
        extent = extent.clamp(min=floor)
    # divided by a tensor: by a number, CUDA would multiply by the reciprocal
    bin_size = extent / torch.full_like(extent, bins)
    if sampling_ratio > 0:
        grid = window = torch.full_like(start, sampling_ratio)
    else:
        grid = bin_size.ceil().clamp(min=0)
        grid = torch.where(grid <= MAX_GRID, grid, 0)
        # Samples then lie half a pixel to a pixel apart, so few of a huge bin are near the map.
        window = torch.minimum(grid, 2 * (size + 2) + 2 * _slack(start, bin_size))
    window = window.nan_to_num(0, 0, 0).long()
    return _Axis(size, bins, zero_border, max(sampling_ratio, 0), start, bin_size, grid, window)


def _slack(start: Tensor, bin_size: Tensor) -> Tensor:
    """Samples by which rounding may misplace the window of a bin, generously."""
    return (8 + (start.abs() + bin_size.abs()) * 2.0**-18).clamp(max=MAX_GRID).ceil()


def _taps(axis: _Axis, longest: int) -> _Taps:
    """Neighbours of all samples, placed in torchvision's order of operations; ``longest`` is G."""
    start, bin_size, grid = (t.view(-1, 1, 1) for t in (axis.start, axis.bin_size, axis.grid))
    steps = torch.arange(longest, device=start.device, dtype=start.dtype)
    bins = torch.arange(axis.bins, device=start.device, dtype=start.dtype).view(-1, 1)
    bin_start = start + bins * bin_size  # (R, P, 1)
    first = ((-1 - bin_start) / bin_size * grid).floor() - _slack(start, bin_size)
    first = first.clamp(min=0).minimum(grid).nan_to_num(0)
    first = torch.where(axis.window.view(-1, 1, 1) < grid, first, 0)
    sample = first + steps  # (R, P, G)
    position = bin_start + (sample + 0.5) * bin_size / grid
    exists = sample < grid
    if axis.zero_border:
        return _zero_border_taps(position, exists, axis.size)
    inside = exists & (position >= -1) & (position <= axis.size) & (axis.size > 0)
    position = torch.where(inside, position, 0).clamp(min=0, max=max(axis.size - 1, 0))
    low = position.floor()
    high = (low + 1).clamp(max=max(axis.size - 1, 0))
    part = position - low
    return _Taps(exists, (low.long(), high.long()), (1 - part, part), (inside, inside))


def _zero_border_taps(position: Tensor, exists: Tensor, size: int) -> _Taps:
    """Neighbours where a corner outside the map counts 0 and its sample goes on without it."""
    low = position.floor()
    part = torch.where(low.isfinite(), position - low, 0)
    corners = (low, low + 1)
    inside = tuple(exists & (c >= 0) & (c <= size - 1) for c in corners)
    index = tuple(torch.where(i, c, 0).long() for i, c in zip(inside, corners, strict=True))
    return _Taps(exists, (index[0], index[1]), (1 - part, part), (inside[0], inside[1]))


def _pool(flat: Tensor, base: Tensor, rows: _Axis, columns: _Axis, maximum: bool) -> Tensor:
    """Pools all RoIs, a bounded number of samples at a time.

    Args:
        flat: (planes*H*W, D) features.
        base: (R, P or 1, 1, Q or 1, 1) row of ``flat`` where a bin's plane begins.
        rows: The boxes down the map.
        columns: The boxes across the map.
        maximum: Take the maximum of a bin's samples in place of their mean.

    Returns:
        (R, D, P, Q).
    """
    boxes, depth = rows.start.shape[0], flat.shape[1]
    if _known_zero(boxes) or flat.numel() == 0:  # no sample exists, and there is nothing to index
        zeros = flat.new_zeros(boxes, depth, rows.bins, columns.bins)
        return zeros + flat.sum()  # keeps the graph
    parts = _chunks(rows, columns, depth)
    if len(parts) == 1:
        return _pool_chunk(flat, base, rows, columns, maximum)
    pooled = [_pool_chunk(flat, base[i], rows.take(i), columns.take(i), maximum) for i in parts]
    return torch.cat(pooled)[torch.cat(parts).argsort()]


def _known_zero(count: int) -> bool:
    """Whether it is 0; a trace goes on as for more where it cannot know."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # takes long to import

        return guard_or_false(count == 0)
    return count == 0


def _chunks(rows: _Axis, columns: _Axis, depth: int) -> list[Tensor]:
    """Splits the RoIs, those of many samples apart from those of few, by the memory they need."""
    index = torch.arange(rows.start.shape[0], device=rows.start.device)
    if torch.compiler.is_compiling():
        return [index]
    windows = torch.stack([rows.window, columns.window], 1).clamp(min=1)
    order = windows.prod(1).argsort()
    per_sample = depth * rows.bins * columns.bins
    parts, begin, down, across, needed = [], 0, 0, 0, 0
    for i, (g, k) in enumerate(windows[order].tolist()):
        down, across, needed = max(down, g), max(across, k), needed + g * k
        held = (i + 1 - begin) * down * across  # every box is given as many as the largest
        if i > begin and (held * per_sample > CHUNK_ELEMENTS or held > 4 * needed):
            parts.append(order[begin:i])
            begin, down, across, needed = i, g, k, g * k
    return [*parts, order[begin:]]


def _pool_chunk(flat: Tensor, base: Tensor, rows: _Axis, columns: _Axis, maximum: bool) -> Tensor:
    """(R, D, P, Q) of RoIs whose samples fit in memory together."""
    y, x = (_taps(axis, axis.fixed or _longest(axis)) for axis in (rows, columns))

    def corner(i: int, j: int) -> Tensor:
        cell = base + _down(y.index[i]) * columns.size + _across(x.index[j])  # (R, P, G, Q, K)
        weight = (_down(y.weight[i]) * _across(x.weight[j])).unsqueeze(-1)
        inside = (_down(y.inside[i]) & _across(x.inside[j])).unsqueeze(-1)
        value = flat.index_select(0, cell.flatten()).view(*cell.shape, flat.shape[1])
        return torch.where(inside, value * weight, 0)

    total = corner(0, 0) + corner(0, 1) + corner(1, 0) + corner(1, 1)  # (R, P, G, Q, K, D)
    if maximum:
        exists = (_down(y.exists) & _across(x.exists)).unsqueeze(-1)
        total = torch.where(exists, total, -torch.inf).transpose(2, 3).flatten(3, 4)
        return total.max(3).values.permute(0, 3, 1, 2)  # the gradient goes to the first maximum
    count = (rows.grid * columns.grid).clamp(min=1).view(-1, 1, 1, 1)
    return (total.sum((2, 4)) / count).permute(0, 3, 1, 2)


def _longest(axis: _Axis) -> int:
    if torch.compiler.is_compiling():
        raise ValueError(
            "sampling_ratio: must be > 0 to trace the reference, got an adaptive one; "
            "build the extension or give a number"
        )
    return int(axis.window.max())


def _down(t: Tensor) -> Tensor:
    return t[:, :, :, None, None]


def _across(t: Tensor) -> Tensor:
    return t[:, None, None, :, :]
