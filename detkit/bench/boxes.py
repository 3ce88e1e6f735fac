"""Boxes as detectors meet them, made from seeds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detkit.ops.boxes import iou

WIDTH, HEIGHT = 1333.0, 800.0


def proposals(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The ``n`` best boxes of a proposal network (n, 4) with scores (n,), in random order.

    Anchors of five sizes and three shapes, every 16 pixels or 14 where they are to be many; the
    more an anchor overlaps one of 40 objects, the nearer its box comes to it and the higher its
    score.
    """
    g = torch.Generator().manual_seed(seed)
    centers, sides = _anchors(16 if n <= 40000 else 14)
    middle = torch.rand(40, 2, generator=g) * torch.tensor([WIDTH, HEIGHT])
    extent = 24.5 * 13.5 ** torch.rand(40, 2, generator=g)
    overlap, which = iou(_corners(centers, sides), _corners(middle, extent)).max(1)
    near = ((overlap - 0.05) / 0.35).clamp(0, 0.95)[:, None]
    noise = torch.randn(len(sides), 4, generator=g)
    centers = torch.lerp(centers, middle[which], near) + 0.04 * sides * noise[:, :2]
    sides = torch.lerp(sides.log(), extent[which].log(), near) + 0.05 * noise[:, 2:]
    boxes = _corners(centers, sides.exp())
    boxes = boxes.clamp(min=0).minimum(torch.tensor([WIDTH, HEIGHT] * 2))
    scores = torch.sigmoid(9 * overlap - 5 + torch.randn(len(boxes), generator=g))
    usable = (boxes[:, 2:] - boxes[:, :2]).amin(1) > 1
    best = torch.where(usable, scores, -1.0).topk(n).indices
    best = best[torch.randperm(n, generator=g)]
    return boxes[best].contiguous(), scores[best].contiguous()


def mixed(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes of 8 to 640 pixels anywhere: many overlap, few so much that one falls."""
    return _scattered(n, seed, 8.0, 640.0)


def sparse(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Small boxes anywhere, of which most stay."""
    return _scattered(n, seed, 16.0, 64.0)


def regions(n: int, width: float, height: float, seed: int = 0) -> Tensor:
    """RoIs (n, 5) of 16 to 500 pixels inside the first image of a batch."""
    boxes, _ = _scattered(n, seed, 16.0, 500.0, (width, height))
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width - 1, height - 1] * 2))
    return torch.cat([torch.zeros(n, 1), boxes], 1)


def _anchors(stride: int) -> tuple[Tensor, Tensor]:
    """Centers and sides, (A, 2) each."""
    y, x = torch.meshgrid(
        torch.arange(stride / 2, HEIGHT, stride),
        torch.arange(stride / 2, WIDTH, stride),
        indexing="ij",
    )
    shapes = torch.tensor([[2**-a, 2**a] for a in (0.25, 0.0, -0.25)])
    sides = (32 * 2.0 ** torch.arange(5)[:, None, None] * shapes**2).flatten(0, 1)  # (15, 2)
    centers = torch.stack([x, y], -1).reshape(-1, 1, 2).expand(-1, len(sides), 2)
    return centers.reshape(-1, 2), sides.repeat(x.numel(), 1)


def _scattered(
    n: int, seed: int, low: float, high: float, size: tuple[float, float] = (WIDTH, HEIGHT)
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    centers = torch.rand(n, 2, generator=g) * torch.tensor(size)
    sides = low * torch.exp(torch.rand(n, 2, generator=g) * math.log(high / low))
    return _corners(centers, sides), torch.rand(n, generator=g)


def _corners(centers: Tensor, sides: Tensor) -> Tensor:
    return torch.cat([centers - sides / 2, centers + sides / 2], 1)
