"""Box arithmetic in plain PyTorch, differentiable, on any device; half precisions widen to float32.

Letters: A boxes of the first set, G of the second. A NaN coordinate or delta makes the result of
that box (its row or column of an IoU matrix) NaN and touches no other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LOG_RATIO = math.log(1000 / 16)
"""Largest predicted log growth of a side: a 16-pixel anchor becomes 1000 pixels at most."""


def _wide(boxes: Tensor) -> Tensor:
    """At least float32: the area of a 300-pixel box overflows float16."""
    return boxes if boxes.dtype == torch.float64 else boxes.float()


def _row(numbers: Sequence[float], like: Tensor) -> Tensor:
    """(len(numbers),) made where ``like`` is: a CUDA graph cannot hold a copy from the host."""
    return torch.cat([like.new_full((1,), number) for number in numbers])


def limits(sizes: Tensor, like: Tensor) -> Tensor:
    """(N, 4) width, height, width, height of ``sizes`` (N, 2), to clip boxes at."""
    sides = sizes.to(like, non_blocking=True).flip(1)
    return torch.cat([sides, sides], 1)


def area(boxes: Tensor) -> Tensor:
    """Width times height of xyxy boxes (..., 4) -> (...); inverted boxes keep the sign."""
    boxes = _wide(boxes)
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every pair.

    Args:
        a: (A, 4) xyxy.
        b: (G, 4) xyxy.

    Returns:
        (A, G) in 0..1; 0 where both boxes are empty, NaN where either has a NaN.
    """
    inter = _intersection(a, b)
    union = area(a)[:, None] + area(b)[None, :] - inter
    return inter / torch.where(union == 0, torch.ones_like(union), union)


def overlap_share(a: Tensor, b: Tensor) -> Tensor:
    """Share of each box of ``a`` (A, 4) inside each box of ``b`` (G, 4), the crowd rule: (A, G)."""
    own = area(a)[:, None]
    return _intersection(a, b) / torch.where(own == 0, torch.ones_like(own), own)


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    """Common area of every pair, (A, G), one coordinate at a time: long rows vectorise."""
    ax1, ay1, ax2, ay2 = _wide(a)[:, :, None].unbind(1)  # each (A, 1)
    bx1, by1, bx2, by2 = _wide(b).t().contiguous()  # each (G,)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    return width * height


def clip(boxes: Tensor, height: float, width: float) -> Tensor:
    """Boxes (..., 4) moved inside an image of ``height`` x ``width`` pixels; a NaN stays NaN."""
    limits = _row([width, height, width, height], boxes)
    return torch.minimum(boxes.clamp(min=0), limits)


def encode(
    boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
) -> Tensor:
    """Regression targets (dx, dy, dw, dh) that turn ``anchors`` into ``boxes``.

    Source: Girshick et al., Rich feature hierarchies (CVPR 2014), appendix C.

    Args:
        boxes: (A, 4) xyxy with positive sides; an empty side gives -inf.
        anchors: (A, 4) xyxy with positive sides.
        weights: Factors of the four targets.

    Returns:
        (A, 4) targets.
    """
    boxes, anchors = _wide(boxes), _wide(anchors)
    size = boxes[:, 2:] - boxes[:, :2]
    anchor_size = anchors[:, 2:] - anchors[:, :2]
    shift = ((boxes[:, :2] + boxes[:, 2:]) - (anchors[:, :2] + anchors[:, 2:])) * 0.5 / anchor_size
    deltas = torch.cat([shift, torch.log(size / anchor_size)], dim=1)
    return deltas * _row(weights, boxes)


def decode(
    deltas: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
) -> Tensor:
    """The boxes that ``deltas`` make of ``anchors``: the inverse of :func:`encode`, growth limited.

    Args:
        deltas: (A, 4), or (A, K, 4) for one box per class.
        anchors: (A, 4) xyxy.
        weights: As given to :func:`encode`.

    Returns:
        xyxy boxes in the shape of ``deltas``, in the dtype of ``anchors``, at least float32.
    """
    anchors = _wide(anchors)
    deltas = deltas.to(anchors.dtype) / _row(weights, anchors)
    if deltas.ndim == 3:
        anchors = anchors[:, None]  # (A, 1, 4)
    size = anchors[..., 2:] - anchors[..., :2]
    center = anchors[..., :2] + size * 0.5 + deltas[..., :2] * size
    half = torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_RATIO)) * size * 0.5
    return torch.cat([center - half, center + half], dim=-1)
