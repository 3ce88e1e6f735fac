"""Greedy non-maximum suppression in plain PyTorch, on any device.

Data-dependent, so torch.compile breaks the graph here; the native operators trace whole.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """As :func:`detkit.ops.nms`."""
    return batched_nms(boxes, scores, torch.zeros_like(scores, dtype=torch.long), iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """As :func:`detkit.ops.batched_nms`."""
    order = scores.argsort(descending=True, stable=True)  # (N,) NaN scores first, ties by index
    boxes = boxes[order] if boxes.dtype == torch.float64 else boxes[order].float()
    idxs = idxs[order]
    x1, y1, x2, y2 = boxes.unbind(1)
    areas = (x2 - x1) * (y2 - y1)
    keep = torch.ones_like(order, dtype=torch.bool)
    for i in range(len(order)):
        if not keep[i]:
            continue
        rest = slice(i + 1, None)
        width = (torch.minimum(x2[i], x2[rest]) - torch.maximum(x1[i], x1[rest])).clamp(min=0)
        height = (torch.minimum(y2[i], y2[rest]) - torch.maximum(y1[i], y1[rest])).clamp(min=0)
        inter = width * height
        # A NaN box has a NaN area, hence a NaN IoU with every box, which exceeds nothing.
        iou = inter / (areas[i] + areas[rest] - inter)
        # Compared in float64, so that a threshold between two float32 values stays where it is.
        keep[rest] &= ~((iou.double() > iou_threshold) & (idxs[i] == idxs[rest]))
    return order[keep]


def nms_padded(
    boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int, idxs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As :func:`detkit.ops.nms_padded`."""
    one_class = torch.zeros_like(scores, dtype=torch.long)
    kept = batched_nms(boxes, scores, one_class if idxs is None else idxs, iou_threshold)[:limit]
    padded = kept.new_full((limit,), -1)
    padded[: len(kept)] = kept
    return padded, torch.tensor(len(kept), device=boxes.device)
