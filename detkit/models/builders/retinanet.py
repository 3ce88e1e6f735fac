"""RetinaNet on a feature pyramid (Lin et al., Focal Loss for Dense Object Detection, 2017)."""

from __future__ import annotations

from detkit.config import Config
from detkit.errors import ConfigError
from detkit.models.backbones.base import Backbone
from detkit.models.builders.parts import anchor_grid, pyramid_sizes
from detkit.models.detector import OneStageDetector
from detkit.models.heads.retina import ClassBranch, RetinaBranch, RetinaHead
from detkit.models.necks.fpn import FPN, ConvolvedLevels
from detkit.types import FeatureSpec


def retinanet(config: Config, backbone: Backbone, num_classes: int) -> OneStageDetector:
    """Two branches over P3 to P7; where the backbone has a stage 6, P6 is its pyramid level."""
    neck = retina_neck(config, backbone)
    specs, retina, norm = neck.feature_specs, config.retina, config.model.head_norm
    grid = anchor_grid(config, specs, pyramid_sizes(config, list(specs)))
    shape = config.model.neck_channels, retina.convs, grid.per_cell[0]
    head = RetinaHead(
        ClassBranch(*shape, num_classes, norm, retina.prior),
        RetinaBranch(*shape, 4, norm),
        grid,
        list(specs),
        retina,
        config.box,
    )
    return OneStageDetector(backbone, neck, head, num_classes)


def retina_neck(config: Config, backbone: Backbone) -> FPN:
    """Pyramid P3 to P7.

    Raises:
        ConfigError: ``retina.p6_from`` is given where P6 is not convolved.
    """
    specs = {name: spec for name, spec in backbone.feature_specs.items() if name != "c2"}
    channels, norm, source = (
        config.model.neck_channels,
        config.model.head_norm,
        config.retina.p6_from,
    )
    if "c6" in specs:
        if source != "c5":
            raise ConfigError(
                f"retina.p6_from: must be 'c5' for {config.model.backbone}, whose stage 6 makes "
                f"P6, got {source!r}"
            )
        source = "p6"
    spec = specs["c" + source[1:]]
    if source != "c5":  # a level of the pyramid itself
        spec = FeatureSpec(channels, spec.stride)
    return FPN(specs, channels, norm, ConvolvedLevels(source, spec, channels, norm))
