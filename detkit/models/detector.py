"""Detectors put together from parts: losses from ``forward``, detections from ``detect``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detkit.config import RpnConfig
from detkit.errors import DataError
from detkit.models.backbones.base import Backbone
from detkit.models.heads.box import BoxHead
from detkit.models.heads.mask import MaskHead, paste_masks
from detkit.models.heads.retina import RetinaHead
from detkit.models.heads.rpn import RPN, RpnOutput
from detkit.models.norm import has_trained_norms
from detkit.models.targets import RoiSample
from detkit.types import Batch, Detections


class TwoStageDetector(nn.Module):
    """Backbone and neck give maps, the RPN proposes boxes, the head classifies and refines them.

    Args:
        backbone: Images (N, 3, H, W) to maps by name.
        neck: Maps by name to the maps that ``rpn`` and ``head`` use.
        rpn: Region proposal network.
        head: Classes and boxes of the proposals.
        num_classes: Classes without background.
        mask_head: Masks of the head's boxes, learnt from its positives.
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: nn.Module,
        rpn: RPN,
        head: BoxHead,
        num_classes: int,
        mask_head: MaskHead | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.rpn = rpn
        self.head = head
        self.num_classes = num_classes
        self.mask_head = mask_head

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of the neck."""
        maps: dict[str, Tensor] = self.neck(self.backbone(images))
        return maps

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses by name; their sum is what to minimise.

        Raises:
            DataError: A label is outside 1..num_classes, or a mask is missing.
            ValueError: Not one target per image.
        """
        features, output, proposals = self._proposed(batch)
        losses = self.rpn.losses(output, batch.targets, batch.sizes)
        samples = self._samples(proposals, batch)
        losses |= self.head.losses(features, samples)
        if self.mask_head is not None:
            losses |= self.mask_head.losses(features, samples, batch.targets)
        return losses

    @torch.no_grad()
    def run_norms(self, batch: Batch) -> None:
        """Show norms what :meth:`forward` shows them, maps and drawn RoIs, for their statistics.

        Losses are left out, and so are heads without statistics. Raises as :meth:`forward` does.
        """
        heads = [m for m in (self.rpn, self.head, self.mask_head) if m is not None]
        if not any(has_trained_norms(head) for head in heads):
            run_maps_norms(self, batch.images)
            return
        features, _, proposals = self._proposed(batch)
        samples = self._samples(proposals, batch)
        self.head(features, [sample.boxes for sample in samples])
        if self.mask_head is not None:
            self.mask_head(features, [sample.positives for sample in samples])

    def _proposed(self, batch: Batch) -> tuple[dict[str, Tensor], RpnOutput, list[Tensor]]:
        """Maps, predictions for anchors, and the proposals of each image."""
        features = self.features(batch.images)
        check_targets(batch, self.num_classes)  # waits for the device, which now has work
        output = self.rpn(features, image_size(batch.images))
        config: RpnConfig = self.rpn.config
        proposals = self.rpn.proposals(
            output,
            batch.sizes,
            config.pre_nms_train,
            config.post_nms_train,
            config.post_nms_scope,
        )
        return features, output, proposals

    def _samples(self, proposals: Sequence[Tensor], batch: Batch) -> list[RoiSample]:
        """The RoIs of each image that the heads learn from."""
        return [
            self.head.sample(boxes, truth)
            for boxes, truth in zip(proposals, batch.targets, strict=True)
        ]

    @torch.no_grad()
    def detect(
        self, images: Tensor, sizes: Tensor, output_sizes: Tensor | None = None
    ) -> list[Detections]:
        """Detections of each image, best first, with masks where there is a mask head.

        Args:
            images: (N, 3, H, W), normalised, zero-padded at right and bottom.
            sizes: (N, 2) height and width before padding.
            output_sizes: (N, 2) height and width of the images whose pixels boxes and masks come
                in, as the files have them; None gives the pixels of ``images``, masks (R, H, W).
        """
        small, cells = self.detect_cells(images, sizes)
        return self.placed(small, cells, images, sizes, output_sizes)

    def placed(
        self,
        small: Sequence[Detections],
        cells: Sequence[Tensor],
        images: Tensor,
        sizes: Tensor,
        output_sizes: Tensor | None,
    ) -> list[Detections]:
        """What :meth:`detect` makes of what :meth:`detect_cells` gives; arguments as of these."""
        found = in_output_pixels(small, sizes, output_sizes)
        if self.mask_head is None:
            return found
        shapes = [images.shape[2:]] * len(images) if output_sizes is None else output_sizes.tolist()
        threshold = self.mask_head.config.threshold
        for one, probabilities, shape in zip(found, cells, shapes, strict=True):
            one["masks"] = paste_masks(probabilities, one["boxes"], shape, threshold)
        return found

    @torch.no_grad()
    def detect_cells(self, images: Tensor, sizes: Tensor) -> tuple[list[Detections], list[Tensor]]:
        """Detections in pixels of ``images``, and the probabilities that masks are pasted from.

        Args:
            images: See :meth:`detect`.
            sizes: See :meth:`detect`.

        Returns:
            Boxes, labels and scores of each image, and of each image (R, M, M); none of these
            without a mask head.
        """
        features = self.features(images)
        config: RpnConfig = self.rpn.config
        proposals = self.rpn.proposals(
            self.rpn(features, image_size(images)), sizes, config.pre_nms_test, config.post_nms_test
        )
        found = self.head.detect(features, proposals, sizes)
        return found, [] if self.mask_head is None else self.mask_head.detect(features, found)

    def run_layers(self, images: Tensor, proposals: int) -> None:
        """Run every layer once, to count costs (meta device).

        The head sees ``proposals`` RoIs per image, the mask head as many as there are detections.
        """
        features = self.features(images)
        self.rpn(features, image_size(images))
        self.head.run_layers(features, proposals)
        if self.mask_head is not None:
            self.mask_head.run_layers(features, self.head.config.max_detections)


class OneStageDetector(nn.Module):
    """Backbone and neck give maps, the head classifies and refines every anchor on them.

    Args:
        backbone: Images (N, 3, H, W) to maps by name.
        neck: Maps by name to the maps that ``head`` uses.
        head: Classes and boxes of anchors.
        num_classes: Classes without background.
    """

    def __init__(
        self, backbone: Backbone, neck: nn.Module, head: RetinaHead, num_classes: int
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.num_classes = num_classes

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of the neck."""
        maps: dict[str, Tensor] = self.neck(self.backbone(images))
        return maps

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses by name; their sum is what to minimise.

        Raises:
            DataError: A label is outside 1..num_classes.
            ValueError: Not one target per image.
        """
        output = self.head(self.features(batch.images), image_size(batch.images))
        check_targets(batch, self.num_classes)  # waits for the device, which now has work
        return self.head.losses(output, batch.targets)

    @torch.no_grad()
    def run_norms(self, batch: Batch) -> None:
        """What norms see in :meth:`forward`, without losses or heads that have no statistics."""
        if has_trained_norms(self.head):
            self.head(self.features(batch.images), image_size(batch.images))
        else:
            run_maps_norms(self, batch.images)

    @torch.no_grad()
    def detect(
        self, images: Tensor, sizes: Tensor, output_sizes: Tensor | None = None
    ) -> list[Detections]:
        """Detections of each image, best first.

        Args:
            images: (N, 3, H, W), normalised, zero-padded at right and bottom.
            sizes: (N, 2) height and width before padding.
            output_sizes: (N, 2) height and width of the images whose pixels boxes come in, as the
                files have them; None gives the pixels of ``images``.
        """
        output = self.head(self.features(images), image_size(images))
        return in_output_pixels(self.head.detect(output, sizes), sizes, output_sizes)

    def run_layers(self, images: Tensor, proposals: int) -> None:
        """Run every layer once, to count costs (meta device); there are no ``proposals``."""
        self.head(self.features(images), image_size(images))


Detector = TwoStageDetector | OneStageDetector
"""Any detector: ``forward(batch)`` gives losses, ``detect(images, sizes, output_sizes=None)``
detections."""


def run_maps_norms(detector: Detector, images: Tensor) -> None:
    """Run backbone and neck on ``images`` (N, 3, H, W), the neck where it has statistics."""
    maps = detector.backbone(images)
    if has_trained_norms(detector.neck):
        detector.neck(maps)


def in_output_pixels(
    detections: Sequence[Detections], sizes: Tensor, output_sizes: Tensor | None
) -> list[Detections]:
    """Boxes of resized images in pixels of images of ``output_sizes``, clipped to these.

    Every detector's ``detect`` ends with this, after choosing its detections in input pixels;
    without ``output_sizes`` nothing changes. Sides are whole pixels, so each axis has its own
    factor.

    Args:
        detections: Boxes in pixels of images of ``sizes``, one entry per image, without masks.
        sizes: (N, 2) height and width before padding.
        output_sizes: (N, 2) height and width wanted, or None.
    """
    if output_sizes is None:
        return list(detections)
    scaled = []
    rows = zip(detections, sizes.tolist(), output_sizes.tolist(), strict=True)
    for found, (height, width), (high, wide) in rows:
        boxes = found["boxes"]
        edge = torch.tensor([wide, high] * 2, dtype=torch.float64, device=boxes.device)
        factor = edge / torch.tensor([width, height] * 2, dtype=torch.float64, device=boxes.device)
        moved = torch.minimum((boxes * factor).clamp(min=0), edge).to(boxes.dtype)
        scaled.append(Detections(boxes=moved, labels=found["labels"], scores=found["scores"]))
    return scaled


def image_size(images: Tensor) -> tuple[int, int]:
    """(height, width) of padded images (N, 3, H, W)."""
    return images.shape[2], images.shape[3]


def check_targets(batch: Batch, num_classes: int) -> None:
    """Refuse a batch that would fail deep inside a loss.

    Raises:
        DataError: A label is outside 1..num_classes.
        ValueError: Not one target per image.
    """
    if len(batch.targets) != len(batch.images):
        raise ValueError(
            f"batch: one target per image ({len(batch.images)}), got {len(batch.targets)}"
        )
    labels = torch.cat([t.labels for t in batch.targets])
    if not len(labels):
        return
    low, high = torch.stack(labels.aminmax()).tolist()
    if not 1 <= low <= high <= num_classes:
        raise DataError(
            f"labels: must be in 1..{num_classes}, got {low}..{high} "
            f"in {', '.join(batch.files) or 'this batch'}"
        )
