"""What each anchor or RoI should learn: matching to truth boxes, crowd regions, sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detkit.ops import boxes as box_ops
from detkit.types import Target

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1

CROWD_SHARE = 0.7
"""A box with this share of its area inside one crowd region is not background."""

_CPU_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 23
"""Largest number of IoUs held at once: a CPU's should stay in its cache, a GPU's be few calls."""


@dataclass
class Matches:
    """State of B boxes against one image's truth.

    Attributes:
        label: (B,) int8, POSITIVE, NEGATIVE or IGNORED.
        index: (B,) int64, the best truth box; 0 where there is none.
    """

    label: Tensor
    index: Tensor


@dataclass
class RoiSample:
    """RoIs of one image that its heads learn from, the P positives first.

    Attributes:
        boxes: (S, 4) xyxy.
        labels: (S,) int64, 1..K of the positives, 0 of the background.
        truth: (P,) int64, the truth box of each positive.
        deltas: (P, 4) regression targets of the positives.
    """

    boxes: Tensor
    labels: Tensor
    truth: Tensor
    deltas: Tensor

    @property
    def positives(self) -> Tensor:
        """(P, 4) boxes of the positives."""
        return self.boxes[: len(self.truth)]


def match(
    boxes: Tensor,
    target: Target,
    fg_iou: float,
    bg_iou: float,
    *,
    keep_best: bool = False,
    chunk: int = 0,
) -> Matches:
    """Compare boxes with the truth of their image.

    Positive at ``fg_iou`` or more with some truth box, negative below ``bg_iou`` with all, ignored
    between. Crowd regions are no truth; a box mostly inside one is ignored and not negative.

    Args:
        boxes: (B, 4) xyxy.
        target: Truth of the image.
        fg_iou: Lowest IoU of a positive.
        bg_iou: Upper bound of a negative's IoU.
        keep_best: The boxes nearest to a truth box are positive at any overlap (ties included);
            they keep their own best truth box.
        chunk: Largest number of IoUs held at once; 0 chooses.
    """
    chunk = chunk or (_CPU_CHUNK if boxes.device.type == "cpu" else _GPU_CHUNK)
    truth = target.boxes[~target.iscrowd]
    best, index, nearest = _best_overlaps(boxes, truth, keep_best, chunk)
    label = torch.full_like(index, IGNORED, dtype=torch.int8)
    label[best < bg_iou] = NEGATIVE
    if len(truth):
        label[best >= fg_iou] = POSITIVE
    label[nearest] = POSITIVE
    crowd = target.boxes[target.iscrowd]
    if len(crowd):
        label[(label == NEGATIVE) & inside_crowd(boxes, crowd, chunk)] = IGNORED
    real = (~target.iscrowd).nonzero().flatten()
    return Matches(label, real[index] if len(real) else index)


def _best_overlaps(
    boxes: Tensor, truth: Tensor, keep_best: bool, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Best IoU (B,) and its truth (B,) of each box, and the boxes (M,) nearest to a truth box."""
    best = boxes.new_zeros(len(boxes))
    index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    candidates = [(best.new_zeros(0), index[:0], index[:0])]
    if len(truth):
        top = best.new_zeros(len(truth))
        step = max(1, chunk // len(truth))
        for start in range(0, len(boxes), step):
            part = slice(start, start + step)
            iou = box_ops.iou(truth, boxes[part])  # (G, step)
            torch.max(iou, 0, out=(best[part], index[part]))
            if keep_best:
                peak = iou.amax(1)
                rows = ((peak >= top) & (peak > 0)).nonzero().flatten()
                top = torch.maximum(top, peak)
                row, where = (iou[rows] == peak[rows, None]).nonzero(as_tuple=True)
                candidates.append((peak[rows[row]], rows[row], where + start))
        value, which, where = (torch.cat(c) for c in zip(*candidates, strict=True))
        return best, index, where[value == top[which]]
    return best, index, index[:0]


def inside_crowd(boxes: Tensor, crowd: Tensor, chunk: int) -> Tensor:
    """(B,) bool: CROWD_SHARE of a box or more lies in one of the regions (C, 4), C > 0."""
    parts = boxes.split(max(1, chunk // len(crowd)))
    return torch.cat([box_ops.overlap_share(part, crowd).amax(1) for part in parts]) >= CROWD_SHARE


def sample(label: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of randomly drawn positives and negatives, at most ``count`` together.

    At most ``positive_fraction * count`` are positive; negatives fill the rest. Draws from
    torch's generator.

    Args:
        label: (B,) as in :class:`Matches`.
        count: Boxes to draw.
        positive_fraction: Largest share of positives.
    """
    positive = _draw((label == POSITIVE).nonzero().flatten(), int(count * positive_fraction))
    return positive, _draw((label == NEGATIVE).nonzero().flatten(), count - len(positive))


def _draw(indices: Tensor, count: int) -> Tensor:
    if len(indices) <= count:
        return indices
    return indices[torch.randperm(len(indices), device=indices.device)[:count]]


def inside_image(boxes: Tensor, height: float, width: float) -> Tensor:
    """(B,) bool: the box does not cross the border of an image of that size."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return (x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height)
