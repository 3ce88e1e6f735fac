"""Inference of our detectors in tensors of fixed shape, so that one graph serves every image.

``detect`` of a detector makes lists whose lengths depend on the image. Here every choice is a
``topk`` of a fixed number over candidates followed by as many fillers of score -inf, and what is
suppressed gets the score -inf. The layers are the detector's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.config import DataConfig
from detkit.deploy.adaptive import mean_of_samples
from detkit.deploy.onnx_ops import LOWEST, nms_mask, roi_align
from detkit.errors import ConfigError
from detkit.models.detector import OneStageDetector, TwoStageDetector, image_size
from detkit.models.heads.box import BoxHead
from detkit.models.heads.detections import usable
from detkit.models.heads.mask import MaskHead
from detkit.models.heads.ps_roi import PsAlign, PsCells
from detkit.models.heads.retina import RetinaHead
from detkit.models.heads.roi import Align, RoiPool, RoiPooler
from detkit.models.heads.rpn import RPN
from detkit.ops import boxes as box_ops
from detkit.ops.reference.roi import ps_roi_align

Found = tuple[Tensor, Tensor, Tensor, Tensor]


class DenseDetector(nn.Module):
    """A detector from raw images to a fixed number of rows per image.

    Args:
        detector: In eval mode; its layers are used, not copied.
        data: Mean and deviation of the pixels, their channels' order, and the multiple that images
            are padded to.

    Raises:
        ConfigError: The detector has a part that cannot be written this way.

    Attributes:
        outputs: Names of what :meth:`forward` returns.
    """

    offset: Tensor
    factor: Tensor

    def __init__(self, detector: nn.Module, data: DataConfig) -> None:
        super().__init__()
        if not isinstance(detector, TwoStageDetector | OneStageDetector):
            raise ConfigError(f"export: must be a detector, got {type(detector).__name__}")
        if isinstance(detector, TwoStageDetector):
            _check_two_stage(detector)
        self.detector = detector
        self.outputs = ["boxes", "labels", "scores", "count"]
        if isinstance(detector, TwoStageDetector) and detector.mask_head is not None:
            self.outputs.append("masks")
        self.multiple = data.pad_multiple
        self.bgr = data.channels == "bgr"
        mean, std = (torch.tensor(v).mul(255).view(3, 1, 1) for v in (data.mean, data.std))
        self.register_buffer("offset", mean)
        self.register_buffer("factor", std.reciprocal())

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detections, best first.

        Args:
            images: (N, 3, H, W) uint8, RGB; each image in the top left corner.
            sizes: (N, 2) int64 height and width of each image; what lies outside is not looked at.

        Returns:
            boxes (N, D, 4) xyxy in pixels of ``images``, labels (N, D) int64 in 1..K, scores
            (N, D), count (N,) int64: rows that are detections; the others are zero. With a mask
            head, masks (N, D, M, M): probabilities that :func:`paste_masks` takes.
        """
        x = self.normalised(images, sizes)
        features = self.detector.features(x)
        if isinstance(self.detector, OneStageDetector):
            return _filled(*one_stage(self.detector.head, features, image_size(x), sizes))
        found = _filled(*two_stage(self.detector, features, image_size(x), sizes))
        if self.detector.mask_head is None:
            return found
        return *found, mask_cells(self.detector.mask_head, features, found)

    def normalised(self, images: Tensor, sizes: Tensor) -> Tensor:
        """What the detector takes: normalised, zero outside each image, sides padded."""
        height, width = image_size(images)
        x = (images.float() - self.offset) * self.factor
        x = x.flip(1) if self.bgr else x
        rows = torch.arange(height, device=x.device) < sizes[:, 0, None]  # (N, H)
        columns = torch.arange(width, device=x.device) < sizes[:, 1, None]  # (N, W)
        x = torch.where((rows[:, :, None] & columns[:, None])[:, None], x, 0.0)
        return F.pad(x, (0, self.missing(width), 0, self.missing(height)))

    def missing(self, side: int) -> int:
        """Pixels from ``side`` to the next multiple.

        Written so that a side not known while tracing becomes ``multiple`` times an unknown: the
        tracer then sees that halving is exact and keeps the sizes of all maps short.
        """
        return (side + self.multiple - 1) // self.multiple * self.multiple - side


def two_stage(
    detector: TwoStageDetector,
    features: Mapping[str, Tensor],
    image: tuple[int, int],
    sizes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (N, D, 4), labels (N, D) and scores (N, D), -inf for fillers."""
    boxes, exists = proposals(detector.rpn, features, image, sizes)
    return box_detections(detector.head, features, boxes, exists, sizes)


def proposals(
    rpn: RPN, features: Mapping[str, Tensor], image: tuple[int, int], sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Proposals (N, P, 4), best first, and which of them exist (N, P)."""
    config = rpn.config
    output = rpn(features, image)
    counts = [sum(output.counts)] if config.joint else output.counts
    levels = zip(
        output.logits.float().split(counts, 1),
        output.deltas.split(counts, 1),
        output.anchors.split(counts),
        strict=True,
    )
    parts = [_best_anchors(*level, config.pre_nms_test) for level in levels]
    boxes = clipped(torch.stack([b for b, _ in parts], 1).flatten(1, 2), sizes)  # (N, L*K, 4)
    scores = torch.stack([s for _, s in parts], 1)  # (N, L, K)
    scores = torch.where(_large(boxes, config.min_size).view_as(scores), scores, -torch.inf)
    kept = nms_mask(
        boxes.view(-1, config.pre_nms_test, 4), scores.flatten(0, 1)[:, None], config.nms_iou
    )
    scores = torch.where(kept.view_as(scores), scores, -torch.inf).flatten(1)
    scores, index = best(scores, config.post_nms_test)
    return rows_of(boxes, index), scores > LOWEST


def _best_anchors(
    logits: Tensor, deltas: Tensor, anchors: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The boxes (N, K, 4) of a level's best anchors, and their scores (N, K)."""
    scores, index = best(logits, count)
    every = anchors.expand(logits.shape[0], -1, -1)
    return decoded(rows_of(deltas, index), rows_of(every, index)), scores


def box_detections(
    head: BoxHead, features: Mapping[str, Tensor], boxes: Tensor, exists: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of proposals (N, P, 4) that exist (N, P); see :func:`two_stage`."""
    config, (n, p) = head.config, exists.shape
    logits, deltas = head.predictor(pooled(head.pooler, features, boxes, exists))
    scores = logits.float().softmax(1)[:, 1:].unflatten(0, (n, p))  # (N, P, K)
    scores = torch.where(exists[..., None] & (scores > config.score_threshold), scores, -torch.inf)
    scores = scores.transpose(1, 2)  # (N, K, P)
    found = box_ops.decode(deltas, boxes.flatten(0, 1), config.weights)  # (N*P, K or 1, 4)
    found = found.unflatten(0, (n, p)).transpose(1, 2)  # (N, K or 1, P, 4)
    found = clipped(found.flatten(1, 2), sizes).view_as(found)
    scores = torch.where(usable(found, config), scores, -torch.inf)
    if found.shape[1] == 1:
        kept = nms_mask(found[:, 0], scores, config.nms_iou)
    else:
        kept = nms_mask(found.flatten(0, 1), scores.flatten(0, 1)[:, None], config.nms_iou)
    scores = torch.where(kept.view_as(scores), scores, -torch.inf)
    score, index = best(scores.flatten(1), config.max_detections)
    every = found.expand(-1, scores.shape[1], -1, -1).flatten(1, 2)
    return rows_of(every, index), index // p + 1, score


def mask_cells(head: MaskHead, features: Mapping[str, Tensor], found: Found) -> Tensor:
    """Probabilities (N, D, M, M) of the boxes found, each for its label; zero for fillers."""
    boxes, labels, _, count = found
    exists = torch.arange(labels.shape[1], device=count.device) < count[:, None]  # (N, D)
    logits = head.predictor(pooled(head.pooler, features, boxes, exists))  # (N*D, K, M, M)
    row = (labels.flatten() - 1).clamp(min=0).view(-1, 1, 1, 1).expand(-1, 1, *logits.shape[2:])
    cells = logits.gather(1, row)[:, 0].float().sigmoid().unflatten(0, labels.shape)
    return torch.where(exists[..., None, None], cells, 0.0)


def pooled(
    pooler: RoiPooler, features: Mapping[str, Tensor], boxes: Tensor, exists: Tensor
) -> Tensor:
    """Features (N*P, C, h, w) of boxes (N, P, 4), zero for those that do not exist (N, P)."""
    n, p = exists.shape
    image = torch.arange(n, device=boxes.device)[:, None].expand(n, p).reshape(-1, 1)
    rois = torch.cat([image.to(boxes.dtype), boxes.flatten(0, 1)], 1)
    maps = [features[name] for name in pooler.levels.values()]
    if len(maps) == 1:
        return pool_level(pooler.pool, maps[0], rois, pooler.scales[0])
    level = torch.where(exists.flatten(), pooler.assign(rois[:, 1:]), -1)
    out = maps[0].new_zeros(rois.shape[0], *pooler.out_shape)
    for number, x, scale in zip(pooler.levels, maps, pooler.scales, strict=True):
        index = (level == number).nonzero().flatten()
        out = out.index_put((index,), pool_level(pooler.pool, x, rois[index], scale))
    return out


def pool_level(pool: RoiPool, x: Tensor, rois: Tensor, scale: float) -> Tensor:
    """What ``pool(x, rois, scale)`` gives, in operators that ONNX has."""
    if isinstance(pool, Align):
        out: Tensor = roi_align(x, rois, pool.resolution, scale, pool.sampling_ratio, pool.aligned)
        return out
    if isinstance(pool, PsAlign) and pool.reduce == "avg" and pool.sampling_ratio <= 0:
        return mean_of_samples(x, rois, pool.resolution, scale, pool.offset)
    if isinstance(pool, PsAlign):
        return ps_roi_align(
            x,
            rois,
            (pool.resolution, pool.resolution),
            scale,
            pool.sampling_ratio,
            pool.reduce,
            pool.offset,
        )
    return pool(x, rois, scale)


def one_stage(
    head: RetinaHead, features: Mapping[str, Tensor], image: tuple[int, int], sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (N, D, 4), labels (N, D) and scores (N, D), -inf for fillers."""
    output, config = head(features, image), head.box
    classes = output.logits.shape[2]
    scores, rows, labels, start = [], [], [], 0
    for part, count in zip(output.logits.split(output.counts, 1), output.counts, strict=True):
        entries = part.float().sigmoid().flatten(1)
        entries = torch.where(entries > config.score_threshold, entries, -torch.inf)
        score, index = best(entries, head.config.pre_nms)
        scores.append(score)
        rows.append(start + index // classes)
        labels.append(index % classes)
        start = start + count
    score, row, label = (torch.cat(parts, 1) for parts in (scores, rows, labels))  # (N, C)
    every = output.anchors.expand(row.shape[0], -1, -1)
    boxes = decoded(rows_of(output.deltas, row), rows_of(every, row), config.weights)
    boxes = clipped(boxes, sizes)
    score = torch.where(usable(boxes, config), score, -torch.inf)
    own = label[:, None] == torch.arange(classes, device=label.device)[:, None]  # (N, K, C)
    kept = nms_mask(boxes, torch.where(own, score[:, None], -torch.inf), config.nms_iou)
    score, index = best(torch.where(kept.any(1), score, -torch.inf), config.max_detections)
    return rows_of(boxes, index), label.gather(1, index) + 1, score


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` best scores of each row (N, T), best first, and where they are.

    Where a row has fewer, fillers of score -inf follow that point at its last entry.
    """
    filler = scores.new_full((scores.shape[0], count), -torch.inf)
    values, index = torch.cat([scores, filler], 1).topk(count, 1)
    return values, index.clamp(max=scores.shape[1] - 1)


def rows_of(boxes: Tensor, index: Tensor) -> Tensor:
    """Boxes (N, K, 4) of ``boxes`` (N, T, 4) that ``index`` (N, K) names."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


def decoded(deltas: Tensor, anchors: Tensor, weights: tuple[float, ...] = (1.0,) * 4) -> Tensor:
    """:func:`detkit.ops.boxes.decode` for deltas and anchors (N, K, 4)."""
    boxes = box_ops.decode(deltas.flatten(0, 1), anchors.flatten(0, 1), weights)
    return boxes.view_as(anchors)


def clipped(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (N, K, 4) moved into their images of ``sizes`` (N, 2) height and width."""
    return torch.minimum(boxes.clamp(min=0), box_ops.limits(sizes, boxes)[:, None])


def _large(boxes: Tensor, least: float) -> Tensor:
    """Whether boxes (..., 4) are not empty and no side is below ``least``."""
    side = (boxes[..., 2:] - boxes[..., :2]).amin(-1)
    return (side > 0) & (side >= least)


def _filled(boxes: Tensor, labels: Tensor, scores: Tensor) -> Found:
    """Zeros in place of fillers, and the number of rows that are none."""
    exists = scores > LOWEST
    return (
        torch.where(exists[..., None], boxes, 0.0),
        torch.where(exists, labels, 0),
        torch.where(exists, scores, 0.0),
        exists.sum(1),
    )


def _check_two_stage(detector: TwoStageDetector) -> None:
    pool = detector.head.pooler.pool
    if not isinstance(pool, Align | PsAlign | PsCells):
        raise ConfigError(f"export: must pool by RoIAlign, PS-RoIAlign or whole cells, got {pool}")
