"""Faster R-CNN on a feature pyramid (Ren et al., 2015; Lin et al., 2017)."""

from __future__ import annotations

from detkit.config import Config
from detkit.models.backbones.base import Backbone
from detkit.models.builders.parts import (
    pyramid_pooler,
    pyramid_sizes,
    region_proposals,
    two_fc_predictor,
)
from detkit.models.detector import TwoStageDetector
from detkit.models.heads.box import BoxHead
from detkit.models.necks.fpn import FPN


def frcnn_fpn(config: Config, backbone: Backbone, num_classes: int) -> TwoStageDetector:
    """RPN on every level, two fully connected layers on RoIAlign of the levels up to 5."""
    neck = FPN(backbone.feature_specs, config.model.neck_channels, config.model.head_norm)
    specs = neck.feature_specs
    rpn = region_proposals(config, specs, pyramid_sizes(config, list(specs)))
    pooler = pyramid_pooler(config, specs)
    head = BoxHead(pooler, two_fc_predictor(config, pooler, num_classes), config.box)
    return TwoStageDetector(backbone, neck, rpn, head, num_classes)
