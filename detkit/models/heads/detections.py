"""Final detections from scored boxes: clipped, suppressed per class, limited per image."""

from __future__ import annotations

import torch
from torch import Tensor

from detkit.config import BoxConfig
from detkit.ops import batched_nms
from detkit.ops import boxes as box_ops
from detkit.types import Detections

_PER_DETECTION = 16
"""Candidates for each detection wanted that suppression looks at first."""


def best_detections(
    boxes: Tensor, labels: Tensor, scores: Tensor, image: Tensor, sizes: Tensor, config: BoxConfig
) -> list[Detections]:
    """Detections of N images, best first.

    Args:
        boxes: (B, 4) xyxy of all images.
        labels: (B,) int64 in 1..K.
        scores: (B,).
        image: (B,) int64, which image each belongs to.
        sizes: (N, 2) height and width before padding.
        config: Smallest side, suppression and limit.
    """
    boxes = torch.minimum(boxes.clamp(min=0), box_ops.limits(sizes, boxes)[image])
    kept = usable(boxes, config)
    each = [
        _survivors(((image == i) & kept).nonzero().flatten(), boxes, labels, scores, config)
        for i in range(len(sizes))
    ]
    return [Detections(boxes=boxes[i], labels=labels[i], scores=scores[i]) for i in each]


def usable(boxes: Tensor, config: BoxConfig) -> Tensor:
    """Whether boxes (..., 4) may be detections."""
    sides = (boxes[..., 2:] - boxes[..., :2]).amin(-1)
    return ((sides > 0) | config.keep_empty) & (sides >= config.min_size)


def _survivors(
    candidates: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor, config: BoxConfig
) -> Tensor:
    """The ``candidates`` (C,) of one image that suppression leaves, best first, up to the limit.

    Only better-scored boxes suppress a box, so the first ones settle it where enough of them
    survive. A threshold of 0 passes every class of every RoI, and the pairs of all those would fill
    a GPU's memory.
    """
    ranked = candidates[scores[candidates].argsort(descending=True, stable=True)]
    limit = config.max_detections
    count = _PER_DETECTION * limit
    while True:
        first = ranked[:count]
        best = batched_nms(boxes[first], scores[first], labels[first], config.nms_iou)
        if len(best) >= limit or count >= len(ranked):
            return first[best[:limit]]
        count *= 2
