"""``detect`` in tensors whose shapes follow from those of the images alone, not from what is seen.

The form that a CUDA graph or a compiler can hold: no operator waits for the device to learn a size.
Lists become a fixed number of rows with a count; rows that are none have the score -inf on the way.
The layers and the candidates are the detector's own, suppression is
:func:`detkit.ops.nms_padded`. (For ONNX, whose operators differ, see ``dense.py``.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detkit import ops
from detkit.config import BoxConfig
from detkit.deploy.dense import clipped, decoded, rows_of
from detkit.errors import ConfigError
from detkit.models.detector import OneStageDetector, TwoStageDetector, image_size
from detkit.models.heads.box import BoxHead
from detkit.models.heads.detections import usable
from detkit.models.heads.mask import MaskHead
from detkit.models.heads.retina import RetinaHead
from detkit.models.heads.roi import RoiPooler
from detkit.models.heads.rpn import RPN
from detkit.scales.learner import GlobalScaleConv2d

CANDIDATES = 40
"""Scored boxes of an image that suppression looks at, for each detection wanted."""

_OUTSIDE = -65536.0
"""A coordinate far from every map: a RoI there costs next to nothing."""


class Found(NamedTuple):
    """Detections of N images, best first, in D rows each.

    Attributes:
        boxes: (N, D, 4) xyxy in pixels of the images.
        labels: (N, D) int64 in 1..K.
        scores: (N, D).
        counts: (N,) int64: the first so many rows are detections, the others are zero.
        complete: (N,) bool: whether these are all; where not, an image had more than
            ``CANDIDATES * D`` boxes above the score threshold, and the best of them left fewer than
            D detections.
        cells: (N, D, M, M) probabilities that masks are pasted from; None without a mask head.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    counts: Tensor
    complete: Tensor
    cells: Tensor | None = None


class FixedDetector(nn.Module):
    """A detector whose ``forward`` gives what its ``detect`` gives, in tensors of fixed shape.

    Args:
        detector: Its layers are used, not copied.

    Raises:
        ConfigError: No detector, or one whose layers learn a scale per image or RoI.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        if not isinstance(detector, TwoStageDetector | OneStageDetector):
            raise ConfigError(f"fixed sizes: must be of a detector, got {type(detector).__name__}")
        if any(isinstance(layer, GlobalScaleConv2d) for layer in detector.modules()):
            raise ConfigError(
                "fixed sizes: must be of a net without scale learners, got one with them; "
                "`detkit decompose` makes such a net of it"
            )
        self.detector = detector

    def forward(self, images: Tensor, sizes: Tensor) -> Found:
        """Detections.

        Args:
            images: (N, 3, H, W), normalised, zero-padded at right and bottom.
            sizes: (N, 2) height and width before padding, on the images' device.
        """
        detector = self.detector
        features, image = detector.features(images), image_size(images)
        if isinstance(detector, OneStageDetector):
            return _one_stage(detector.head, features, image, sizes)
        boxes, exist = proposals(detector.rpn, features, image, sizes)
        found = _two_stage(detector.head, features, boxes, exist, sizes)
        if detector.mask_head is None:
            return found
        return found._replace(cells=mask_cells(detector.mask_head, features, found))


def proposals(
    rpn: RPN, features: Mapping[str, Tensor], image: tuple[int, int], sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Proposals (N, P, 4), best first, zero where there are no more, and which exist (N, P)."""
    config = rpn.config
    boxes, scores, level = rpn.candidates(rpn(features, image), sizes, config.pre_nms_test)
    groups = level.expand_as(scores)
    index, exist = _suppressed(boxes, scores, groups, config.nms_iou, config.post_nms_test)
    return torch.where(exist[..., None], rows_of(boxes, index), 0.0), exist


def _two_stage(
    head: BoxHead, features: Mapping[str, Tensor], boxes: Tensor, exist: Tensor, sizes: Tensor
) -> Found:
    """Detections of the proposals (N, P, 4) that exist (N, P)."""
    config, n = head.config, len(boxes)
    logits, deltas = head.predictor(pooled(head.pooler, features, boxes))
    scores = logits.float().softmax(1)[:, 1:].unflatten(0, (n, -1))  # (N, P, K)
    classes = scores.shape[2]
    above = exist[..., None] & (scores > config.score_threshold)
    scores = torch.where(above, scores, -torch.inf).flatten(1)
    limit = min(scores.shape[1], CANDIDATES * config.max_detections)
    # In their order, by which suppression settles ties, as those of `BoxHead.detect` are.
    index = scores.topk(limit, 1, sorted=False).indices.sort(1).values  # (N, C)
    scores = scores.gather(1, index)
    cut = scores.amin(1)
    roi, label = index // classes, index % classes
    row = roi if deltas.shape[1] == 1 else index
    shifts = rows_of(deltas.reshape(n, -1, 4), row)
    refined = decoded(shifts, rows_of(boxes, roi), config.weights)
    found = _best(refined, label + 1, scores, sizes, config)
    last = found.scores[:, -1]  # zero where there are fewer
    complete = (above.flatten(1).sum(1) <= limit) | (last > cut)
    return found._replace(complete=complete)


def _one_stage(
    head: RetinaHead, features: Mapping[str, Tensor], image: tuple[int, int], sizes: Tensor
) -> Found:
    """Detections of RetinaNet's head."""
    output, config = head(features, image), head.box
    classes = output.logits.shape[2]
    scores, entries, start = [], [], 0
    for part in output.logits.split(output.counts, 1):
        level = part.float().sigmoid().flatten(1)
        level = torch.where(level > config.score_threshold, level, -torch.inf)
        best = level.topk(min(head.config.pre_nms, level.shape[1]), 1, sorted=False)
        index = best.indices.sort(1).values
        scores.append(level.gather(1, index))
        entries.append(start + index)
        start += level.shape[1]
    entry = torch.cat(entries, 1)  # (N, C)
    row = entry // classes
    every = output.anchors.expand(len(row), -1, -1)
    boxes = decoded(rows_of(output.deltas, row), rows_of(every, row), config.weights)
    return _best(boxes, entry % classes + 1, torch.cat(scores, 1), sizes, config)


def _best(boxes: Tensor, labels: Tensor, scores: Tensor, sizes: Tensor, config: BoxConfig) -> Found:
    """Detections of scored boxes (N, C, 4), labels and scores (N, C), -inf for none."""
    boxes = clipped(boxes, sizes)
    scores = torch.where(usable(boxes, config), scores, -torch.inf)
    index, exist = _suppressed(boxes, scores, labels, config.nms_iou, config.max_detections)
    return Found(
        torch.where(exist[..., None], rows_of(boxes, index), 0.0),
        torch.where(exist, labels.gather(1, index), 0),
        torch.where(exist, scores.gather(1, index), 0.0),
        exist.sum(1),
        torch.ones_like(exist[:, 0]),
    )


def _suppressed(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou: float, limit: int
) -> tuple[Tensor, Tensor]:
    """Survivors of each image, best first, and which of them exist, both (N, limit).

    Args:
        boxes: (N, C, 4).
        scores: (N, C), -inf for boxes that do not take part.
        groups: (N, C); boxes of one group alone suppress each other.
        iou: See :func:`detkit.ops.nms`.
        limit: Survivors wanted.
    """
    kept = torch.stack(
        [
            ops.nms_padded(own, score, iou, limit, group)[0]
            for own, score, group in zip(boxes, scores, groups, strict=True)
        ]
    )
    index = kept.clamp(min=0)
    return index, (kept >= 0) & (scores.gather(1, index) != -torch.inf)


def pooled(pooler: RoiPooler, features: Mapping[str, Tensor], boxes: Tensor) -> Tensor:
    """Features (N*P, C, h, w) of boxes (N, P, 4), as the pooler gives them.

    Every level pools every box, those of other levels far outside its map.
    """
    n, p = boxes.shape[:2]
    image = torch.arange(n, device=boxes.device).repeat_interleave(p)[:, None].to(boxes.dtype)
    flat = boxes.flatten(0, 1)
    maps = [features[name] for name in pooler.levels.values()]
    if len(maps) == 1:
        return pooler.pool(maps[0], torch.cat([image, flat], 1), pooler.scales[0])
    level = pooler.assign(flat)
    out = maps[0].new_zeros(n * p, *pooler.out_shape)
    for number, x, scale in zip(pooler.levels, maps, pooler.scales, strict=True):
        own = level == number
        rois = torch.cat([image, torch.where(own[:, None], flat, _OUTSIDE)], 1)
        out = torch.where(own.view(-1, 1, 1, 1), pooler.pool(x, rois, scale), out)
    return out


def mask_cells(head: MaskHead, features: Mapping[str, Tensor], found: Found) -> Tensor:
    """Probabilities (N, D, M, M) of the boxes found, each for its label."""
    logits = head.predictor(pooled(head.pooler, features, found.boxes))  # (N*D, K, M, M)
    row = (found.labels.flatten() - 1).clamp(min=0).view(-1, 1, 1, 1)
    own = logits.gather(1, row.expand(-1, 1, *logits.shape[2:]))[:, 0]
    cells: Tensor = own.float().sigmoid().unflatten(0, found.labels.shape)
    return cells
