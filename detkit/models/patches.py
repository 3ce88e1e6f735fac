"""Neighbourhoods of chosen cells: what a 3x3 convolution sees there, and only there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def patches(maps: Tensor, image: Tensor, cell: Tensor) -> Tensor:
    """The 3x3 cells around chosen ones, row by row, zeros outside the map.

    Args:
        maps: (N, C, H, W).
        image: (S,) int64 in 0..N-1.
        cell: (S,) int64, row * W + column.

    Returns:
        (S, 9, C).
    """
    height, width = maps.shape[2:]
    step = torch.arange(-1, 2, device=cell.device)
    y = (cell // width)[:, None] + step.repeat_interleave(3)  # (S, 9)
    x = (cell % width)[:, None] + step.repeat(3)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    near = maps[image[:, None], :, y.clamp(0, height - 1), x.clamp(0, width - 1)]  # (S, 9, C)
    return torch.where(inside[..., None], near, 0)


def anchor_patches(
    maps: Sequence[Tensor], counts: Sequence[int], index: Tensor
) -> tuple[Tensor, Tensor]:
    """Neighbourhoods of the cells of chosen anchors, level by level.

    Args:
        maps: (N, C, H, W) of each level.
        counts: Anchors of one image on each level; they sum to T.
        index: (S,) int64, image * T + anchor.

    Returns:
        (S, 9, C), and (S,) where in ``index`` each of them is.
    """
    total, end = sum(counts), torch.tensor(counts, device=index.device).cumsum(0)
    image, anchor = index // total, index % total
    level = torch.bucketize(anchor, end, right=True)
    order = level.argsort(stable=True)
    image, anchor = image[order], anchor[order]
    found, start = [], 0
    shares = level.bincount(minlength=len(maps)).tolist()
    rows = zip(maps, counts, image.split(shares), anchor.split(shares), strict=True)
    for x, count, i, a in rows:
        per_cell = count // (x.shape[2] * x.shape[3])
        found.append(patches(x, i, (a - start) // per_cell))
        start += count
    return torch.cat(found), order
