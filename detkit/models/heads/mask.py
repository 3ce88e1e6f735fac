"""Mask head of Mask R-CNN (He et al., 2017): a map per class of each RoI, pasted into the image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detkit.config import MaskConfig
from detkit.errors import DataError
from detkit.models.heads.roi import RoiPooler, to_rois
from detkit.models.necks.fpn import ConvNorm
from detkit.models.norm import norm_named
from detkit.models.targets import RoiSample
from detkit.models.weights import ClassRows
from detkit.ops.roi_align import roi_align
from detkit.types import Detections, Target

_CROP_PIXELS = 1 << 24
"""Largest number of mask pixels held as floats at once (64 MiB)."""


class MaskPredictor(nn.Module):
    """3x3 convolutions, a 2x2 deconvolution of stride 2, and a 1x1 convolution to the classes.

    Args:
        cin: Channels of the pooled features.
        channels: Channels of all layers but the last.
        convs: 3x3 convolutions.
        num_classes: Classes without background.
        norm: Name of the norm after each 3x3 convolution.
    """

    def __init__(
        self, cin: int, channels: int, convs: int, num_classes: int, norm: str = "none"
    ) -> None:
        super().__init__()
        make_norm = norm_named(norm)
        self.class_rows = {"masks": ClassRows(0, 1)}
        self.convs = nn.ModuleList(
            ConvNorm(cin if i == 0 else channels, channels, 3, make_norm) for i in range(convs)
        )
        self.upsample = nn.ConvTranspose2d(channels if convs else cin, channels, 2, 2)
        self.masks = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.masks.weight, std=0.01)  # every pixel starts undecided

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits (R, K, 2h, 2w) of pooled features (R, cin, h, w)."""
        x = pooled
        for conv in self.convs:
            x = torch.relu(conv(x))
        logits: Tensor = self.masks(torch.relu(self.upsample(x)))
        return logits


class MaskHead(nn.Module):
    """Masks of boxes: their loss, and the probabilities that detections are pasted from.

    Args:
        pooler: Features of RoIs.
        predictor: Logits (R, K, M, M) of pooled features.
        config: Where a probability becomes a pixel of the object.
    """

    def __init__(self, pooler: RoiPooler, predictor: nn.Module, config: MaskConfig) -> None:
        super().__init__()
        self.pooler = pooler
        self.predictor = predictor
        self.config = config

    def forward(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Logits (R, K, M, M) of the boxes (R_i, 4) of each image, one image after the other."""
        logits: Tensor = self.predictor(self.pooler(features, to_rois(boxes)))
        return logits

    def losses(
        self,
        features: Mapping[str, Tensor],
        samples: Sequence[RoiSample],
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        """Binary cross entropy of the true class's map, mean over the positives' pixels.

        Without positives it is 0 and every parameter still gets a gradient.

        Args:
            features: Maps of N images by level.
            samples: RoIs of each image, the positives first.
            targets: Truth of each image.

        Raises:
            DataError: A positive's truth has no mask.
        """
        boxes = [sample.positives for sample in samples]
        logits = self(features, boxes)
        classes = torch.cat([s.labels[: len(s.truth)] for s in samples]) - 1  # (P,)
        logits = logits[torch.arange(len(classes), device=classes.device), classes]  # (P, M, M)
        goal = torch.cat(
            [
                crop_masks(_masks_of(target), sample.truth, positive, logits.shape[-1])
                for target, sample, positive in zip(targets, samples, boxes, strict=True)
            ]
        )
        loss = F.binary_cross_entropy_with_logits(logits.float(), goal, reduction="sum")
        return {"mask": loss / max(1, logits.numel())}

    @torch.no_grad()
    def detect(
        self, features: Mapping[str, Tensor], detections: Sequence[Detections]
    ) -> list[Tensor]:
        """Probabilities (R, M, M) of each image's detections, for the class of each.

        Args:
            features: Maps of N images by level.
            detections: N images' boxes, in input pixels, and labels.
        """
        logits = self(features, [found["boxes"] for found in detections])
        classes = torch.cat([found["labels"] for found in detections]) - 1
        rows = torch.arange(len(classes), device=classes.device)
        probabilities = logits[rows, classes].float().sigmoid()
        return list(probabilities.split([len(found["labels"]) for found in detections]))

    def run_layers(self, features: Mapping[str, Tensor], count: int) -> None:
        """Run the predictor once for ``count`` RoIs wherever they are, to count its cost."""
        self.predictor(self.pooler.blank(features, count))


def _masks_of(target: Target) -> Tensor:
    masks = target.masks
    if masks is None and len(target.boxes) == 0:
        return torch.zeros(0, 1, 1, dtype=torch.bool, device=target.boxes.device)
    if masks is None or len(masks) != len(target.boxes):
        raise DataError(
            f"masks: each of {len(target.boxes)} truth boxes must have one for a detector with a "
            f"mask head, got {'none' if masks is None else len(masks)}; open the data with masks"
        )
    return masks


def crop_masks(masks: Tensor, index: Tensor, boxes: Tensor, side: int) -> Tensor:
    """What each box should predict: its share of its truth mask, from 0 to 1 in each cell.

    RoIAlign on pixels that are 0 or 1. However many masks there are, few are floats at a time.

    Args:
        masks: (G, H, W) bool.
        index: (P,) the mask of each box.
        boxes: (P, 4) xyxy in pixels of the masks.
        side: Cells per side.

    Returns:
        (P, side, side) float32.
    """
    crops = torch.empty(len(boxes), side, side, device=boxes.device)
    used, row = index.unique(return_inverse=True)  # many boxes share a mask
    step = max(1, _CROP_PIXELS // max(1, masks.shape[1] * masks.shape[2]))
    for start in range(0, len(used), step):
        mine = (row >= start) & (row < start + step)
        rois = torch.cat([row[mine, None] - start, boxes[mine]], 1)
        some = masks[used[start : start + step], None].float()
        crops[mine] = roi_align(some, rois.float(), side, aligned=True)[:, 0]
    return crops


def paste_masks(
    probabilities: Tensor, boxes: Tensor, size: Sequence[int], threshold: float
) -> Tensor:
    """Masks of a whole image: probabilities sampled at the centres of the pixels in their box.

    Between the centres of the M x M cells they are interpolated bilinearly, beyond the outermost
    ones constant. A pixel belongs to a box where its centre does.

    Args:
        probabilities: (R, M, M).
        boxes: (R, 4) xyxy in pixels of the image.
        size: (height, width) of the image.
        threshold: Lowest probability of a pixel that belongs to the object.

    Returns:
        (R, height, width) bool.
    """
    height, width = int(size[0]), int(size[1])
    pasted = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=probabilities.device)
    for mask, cells, (x1, y1, x2, y2) in zip(pasted, probabilities, boxes.tolist(), strict=True):
        rows, columns = _centres_within(y1, y2, height), _centres_within(x1, x2, width)
        if not (rows and columns):
            continue
        y, x = _across(rows, y1, y2, cells), _across(columns, x1, x2, cells)
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1)
        values = F.grid_sample(
            cells[None, None], grid[None], padding_mode="border", align_corners=False
        )
        mask[rows.start : rows.stop, columns.start : columns.stop] = values[0, 0] >= threshold
    return pasted


def _centres_within(low: float, high: float, limit: int) -> range:
    """Pixels 0..limit-1 whose centres lie in [low, high); none for a side that is not finite."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return range(0)
    return range(max(0, math.ceil(low - 0.5)), min(limit, math.ceil(high - 0.5)))


def _across(pixels: range, low: float, high: float, like: Tensor) -> Tensor:
    """Where the centres of pixels lie in a box, from -1 at ``low`` to 1 at ``high``."""
    centres = torch.arange(pixels.start, pixels.stop, dtype=torch.float64, device=like.device) + 0.5
    return ((centres - low) / (high - low) * 2 - 1).to(like.dtype)
