"""Faster R-CNN without a pyramid: proposals and RoIs from C4 (Ren et al., 2015)."""

from __future__ import annotations

from torch import nn

from detkit.config import Config
from detkit.errors import ConfigError
from detkit.models.backbones.base import Backbone
from detkit.models.builders.parts import cell_sizes, region_proposals
from detkit.models.detector import TwoStageDetector
from detkit.models.heads.box import BoxHead
from detkit.models.heads.c4 import TailPredictor
from detkit.models.heads.roi import Align, RoiPooler


def frcnn_c4(config: Config, backbone: Backbone, num_classes: int) -> TwoStageDetector:
    """RPN on C4; the stages after it leave the backbone for the head and run on RoIAlign of C4.

    On DetNet these are stages 5 and 6, which keep the resolution of the RoIs.

    Raises:
        ConfigError: A setting that this detector has no part for.
    """
    box, model = config.box, config.model
    if box.channels:
        raise ConfigError(
            f"box.channels: must be 0 for frcnn-c4, whose head is the backbone's last stages, "
            f"got {box.channels}"
        )
    if model.head_norm not in ("none", model.norm):
        raise ConfigError(
            f"model.head_norm: must be none or model.norm = {model.norm!r} for frcnn-c4, whose "
            f"head is of the backbone's layers, got {model.head_norm!r}"
        )
    channels = list(backbone.feature_specs.values())[-1].channels
    tail = backbone.take_stages_after("c4")
    specs = {"c4": backbone.feature_specs["c4"]}
    rpn = region_proposals(config, specs, [cell_sizes(config)])
    pooler = RoiPooler(specs, Align(box.resolution, box.sampling_ratio, box.aligned))
    predictor = TailPredictor(tail, channels, num_classes, box.class_agnostic)
    head = BoxHead(pooler, predictor, box)
    return TwoStageDetector(backbone, nn.Identity(), rpn, head, num_classes)
