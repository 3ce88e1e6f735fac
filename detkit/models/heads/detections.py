"""Final detections from scored boxes: clipped, suppressed per class, limited per image."""

from __future__ import annotations

import torch
from torch import Tensor

from detkit.config import BoxConfig
from detkit.ops import batched_nms
from detkit.types import Detections


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
    boxes = torch.minimum(boxes.clamp(min=0), sizes.to(boxes)[image][:, [1, 0, 1, 0]])
    sides = (boxes[:, 2:] - boxes[:, :2]).amin(1)
    kept = ((sides > 0) | config.keep_empty) & (sides >= config.min_size)
    candidates = kept.nonzero().flatten()
    group = (image * (labels.amax() + 1 if len(labels) else 1) + labels)[candidates]
    best = batched_nms(boxes[candidates], scores[candidates], group, config.nms_iou)
    best = candidates[best]
    each = [best[image[best] == i][: config.max_detections] for i in range(len(sizes))]
    return [Detections(boxes=boxes[i], labels=labels[i], scores=scores[i]) for i in each]
