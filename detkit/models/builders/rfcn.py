"""R-FCN and Light-Head R-CNN: position-sensitive maps of the last stage, proposals from C4.

Published where a paper says so; the pyramid variant is detkit's own reading, because the paper
gives its result and no structure.
"""

from __future__ import annotations

from detkit.config import Config
from detkit.errors import ConfigError
from detkit.models.backbones.base import Backbone
from detkit.models.builders.parts import cell_sizes, pyramid_sizes, region_proposals
from detkit.models.detector import TwoStageDetector
from detkit.models.heads.box import BoxHead
from detkit.models.heads.light import LightPredictor
from detkit.models.heads.ps_roi import ps_pool
from detkit.models.heads.rfcn import Vote
from detkit.models.heads.roi import RoiPooler
from detkit.models.necks.fpn import FPN
from detkit.models.necks.position_sensitive import (
    OneLevelNeck,
    ScoreMaps,
    ThinMaps,
    ThinPyramid,
    ThinScoreMaps,
)


def rfcn(config: Config, backbone: Backbone, num_classes: int) -> TwoStageDetector:
    """R-FCN (arXiv 1605.06409): score maps of the last stage vote on each RoI.

    Raises:
        ConfigError: A setting that R-FCN has no part for.
    """
    box, thin = config.box, config.thin
    for key, value, must in (
        ("box.channels", box.channels, 0),
        ("thin.kernel", thin.kernel, 1),
    ):
        if value != must:
            raise ConfigError(
                f"{key}: must be {must} for rfcn, whose score maps vote, got {value}; "
                "rfcn-thin and light-head have it"
            )
    maps = ScoreMaps(
        _last_channels(backbone),
        thin.mid_channels,
        box.resolution,
        num_classes,
        box.class_agnostic,
        thin.lr_factor,
        config.model.head_norm,
    )
    neck = OneLevelNeck(backbone.feature_specs, maps)
    return _one_level(config, backbone, neck, Vote(num_classes), num_classes)


def light_head(config: Config, backbone: Backbone, num_classes: int) -> TwoStageDetector:
    """Thin maps of the last stage under one fully connected layer (arXiv 1711.07264).

    With ``thin.kernel`` 1 and ``box.channels`` 0 it is R-FCN on thin maps, ``rfcn-thin``.
    """
    neck = OneLevelNeck(backbone.feature_specs, _thin_maps(config, _last_channels(backbone)))
    return _one_level(config, backbone, neck, _light_predictor(config, num_classes), num_classes)


def light_head_fpn(config: Config, backbone: Backbone, num_classes: int) -> TwoStageDetector:
    """Light-Head R-CNN on a feature pyramid: one convolution makes the thin maps of all levels.

    Each RoI is pooled from the level that its size picks. The paper reports this variant without
    describing it, so the structure is inferred.
    """
    pyramid = FPN(backbone.feature_specs, config.model.neck_channels, config.model.head_norm)
    neck = ThinPyramid(
        pyramid, _thin_maps(config, config.model.neck_channels), config.box.roi_max_level
    )
    specs = pyramid.feature_specs
    rpn = region_proposals(config, specs, pyramid_sizes(config, list(specs)))
    pooler = RoiPooler(neck.thin_specs, ps_pool(config.box), config.box.canonical_size)
    head = BoxHead(pooler, _light_predictor(config, num_classes), config.box)
    return TwoStageDetector(backbone, neck, rpn, head, num_classes)


def _last_channels(backbone: Backbone) -> int:
    return list(backbone.feature_specs.values())[-1].channels


def _thin_maps(config: Config, cin: int) -> ThinMaps | ThinScoreMaps:
    """Thin maps of a map with so many channels."""
    thin, norm = config.thin, config.model.head_norm
    channels = thin.channels * config.box.resolution**2
    if thin.kernel == 1:
        return ThinScoreMaps(cin, thin.mid_channels, channels, thin.lr_factor, norm)
    return ThinMaps(cin, thin.mid_channels, channels, thin.kernel, thin.lr_factor, norm)


def _light_predictor(config: Config, num_classes: int) -> LightPredictor:
    box = config.box
    return LightPredictor(
        config.thin.channels * box.resolution**2,
        box.channels,
        num_classes,
        box.class_agnostic,
        config.model.head_norm,
    )


def _one_level(
    config: Config,
    backbone: Backbone,
    neck: OneLevelNeck,
    predictor: Vote | LightPredictor,
    num_classes: int,
) -> TwoStageDetector:
    """Proposals from C4, RoIs from the position-sensitive maps."""
    specs = neck.feature_specs
    rpn = region_proposals(config, {neck.rpn_level: specs[neck.rpn_level]}, [cell_sizes(config)])
    pooler = RoiPooler({neck.level: specs[neck.level]}, ps_pool(config.box))
    head = BoxHead(pooler, predictor, config.box)
    return TwoStageDetector(backbone, neck, rpn, head, num_classes)
