"""Faster and Mask R-CNN on a feature pyramid (Lin et al., 2017; He et al., 2017)."""

from __future__ import annotations

from collections.abc import Mapping

from detkit.config import Config
from detkit.models.backbones.base import Backbone
from detkit.models.builders.parts import (
    box_predictor,
    pyramid_pooler,
    pyramid_sizes,
    region_proposals,
)
from detkit.models.detector import TwoStageDetector
from detkit.models.heads.box import BoxHead
from detkit.models.heads.mask import MaskHead, MaskPredictor
from detkit.models.heads.roi import Align
from detkit.models.necks.fpn import FPN
from detkit.types import FeatureSpec


def frcnn_fpn(
    config: Config, backbone: Backbone, num_classes: int, *, masks: bool = False
) -> TwoStageDetector:
    """RPN on every level, the layers of ``box.head`` on RoIAlign of the levels up to 5."""
    neck = FPN(backbone.feature_specs, config.model.neck_channels, config.model.head_norm)
    specs = neck.feature_specs
    rpn = region_proposals(config, specs, pyramid_sizes(config, list(specs)))
    pooler = pyramid_pooler(config, specs)
    head = BoxHead(pooler, box_predictor(config, pooler, num_classes), config.box)
    mask_head = _mask_head(config, specs, num_classes) if masks else None
    return TwoStageDetector(backbone, neck, rpn, head, num_classes, mask_head)


def maskrcnn_fpn(config: Config, backbone: Backbone, num_classes: int) -> TwoStageDetector:
    """Faster R-CNN with a mask head on RoIAlign of the same levels."""
    return frcnn_fpn(config, backbone, num_classes, masks=True)


def _mask_head(config: Config, specs: Mapping[str, FeatureSpec], num_classes: int) -> MaskHead:
    mask, model = config.mask, config.model
    align = Align(mask.resolution, mask.sampling_ratio, config.box.aligned)
    predictor = MaskPredictor(
        model.neck_channels, mask.channels, mask.convs, num_classes, model.head_norm
    )
    return MaskHead(pyramid_pooler(config, specs, align), predictor, mask)
