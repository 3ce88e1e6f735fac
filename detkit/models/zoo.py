"""Named models as plain functions in two dicts; a name that is not there names the nearest one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from detkit.config import Config, suggest
from detkit.errors import ConfigError
from detkit.models.backbones.base import Backbone
from detkit.models.backbones.detnet import detnet, detnet_tiny
from detkit.models.backbones.resnet import resnet, resnet_tiny
from detkit.models.backbones.shuffle import shuffle_net
from detkit.models.backbones.shuffle_supernet import ShuffleSupernet
from detkit.models.backbones.xception import xception145
from detkit.models.builders.c4 import frcnn_c4
from detkit.models.builders.fpn import frcnn_fpn, maskrcnn_fpn
from detkit.models.builders.retinanet import retinanet
from detkit.models.builders.rfcn import light_head, light_head_fpn, rfcn
from detkit.models.classifier import Classifier
from detkit.models.detector import Detector
from detkit.models.search_space import (
    ARCHITECTURES,
    PREFIX,
    SPACES,
    SUPERNETS,
    parse_architecture,
    parse_supernet,
)

_R50, _R101 = (3, 4, 6, 3), (3, 4, 23, 3)


def _published(name: str) -> Callable[[str], Backbone]:
    """Maker of a network of DetNAS."""
    found = ARCHITECTURES[name]
    space = SPACES[found.space]
    return lambda norm: shuffle_net(space, space.parse(found.genes), norm)


BACKBONES: dict[str, Callable[[str], Backbone]] = {
    "resnet50": lambda norm: resnet(_R50, norm),
    "resnet101": lambda norm: resnet(_R101, norm),
    "resnet50-msra": lambda norm: resnet(_R50, norm, stride_in_1x1=True),
    "resnet101-msra": lambda norm: resnet(_R101, norm, stride_in_1x1=True),
    "resnet50-dilated": lambda norm: resnet(_R50, norm, stride_in_1x1=True, dilated=True),
    "resnet101-dilated": lambda norm: resnet(_R101, norm, stride_in_1x1=True, dilated=True),
    "detnet59": lambda norm: detnet((3, 4, 6, 3, 3), norm),
    "detnet59-noproj": lambda norm: detnet((3, 4, 6, 3, 3), norm, project_last=False),
    "detnet110": lambda norm: detnet((3, 4, 23, 3, 3), norm),
    "xception145": xception145,
    "resnet50-tiny": resnet_tiny,
    "detnet59-tiny": detnet_tiny,
    **{name: _published(name) for name in ARCHITECTURES},
}
"""Backbone by name, from the name of its norms."""

WEIGHTS_OF = {"resnet50-dilated": "resnet50-msra", "resnet101-dilated": "resnet101-msra"}
"""Backbones that take the pre-trained weights of another one: only stride and dilation differ."""


def build_backbone(
    name: str, norm: str = "frozen_bn", frozen_stages: int = 0, norm_eps: float = 1e-5
) -> Backbone:
    """A backbone with random weights: one of BACKBONES, a supernet, or any network of DetNAS.

    Args:
        name: Its name.
        norm: Name of its norms.
        frozen_stages: Stages that stay fixed.
        norm_eps: Added to the variances of its batch norms.

    Raises:
        ConfigError: An unknown name.
    """
    backbone = _maker(name)(norm)
    last = backbone.num_stages
    if frozen_stages > last:
        raise ConfigError(
            f"model.frozen_stages: must be in 0..{last} for {name}, got {frozen_stages}"
        )
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = norm_eps
    return backbone.freeze(frozen_stages)


def _maker(name: str) -> Callable[[str], Backbone]:
    if name.startswith(PREFIX):
        space, genes = parse_architecture(name)
        return lambda norm: shuffle_net(space, genes, norm)
    supernet = parse_supernet(name)
    if supernet is not None:
        return lambda norm: ShuffleSupernet(supernet, norm)
    return BACKBONES[_known("model.backbone", name, BACKBONES | dict.fromkeys(SUPERNETS))]


def build_classifier(config: Config, num_classes: int) -> Classifier:
    """Classifier over ``config.model.backbone``, random weights."""
    model = config.model
    backbone = build_backbone(model.backbone, model.norm, model.frozen_stages, model.norm_eps)
    return Classifier(backbone, num_classes, config.train.label_smoothing)


def build_detector(config: Config, num_classes: int) -> Detector:
    """The detector ``config.model.detector`` on ``config.model.backbone``, random weights.

    Args:
        config: The run's configuration; the tables model to mask are used.
        num_classes: Classes without background.

    Raises:
        ConfigError: An unknown name, or settings that do not fit together.
    """
    model = config.model
    build = DETECTORS[_known("model.detector", model.detector, DETECTORS)]
    backbone = build_backbone(model.backbone, model.norm, model.frozen_stages, model.norm_eps)
    return build(config, backbone, num_classes)


DETECTORS: dict[str, Callable[[Config, Backbone, int], Detector]] = {
    "frcnn-c4": frcnn_c4,
    "frcnn-fpn": frcnn_fpn,
    "maskrcnn-fpn": maskrcnn_fpn,
    "retinanet": retinanet,
    "rfcn": rfcn,
    "rfcn-thin": light_head,
    "light-head": light_head,
    "light-head-fpn": light_head_fpn,
}
"""Detector by name, from the configuration, the backbone and the number of classes."""

WITH_MASKS = frozenset({"maskrcnn-fpn"})
"""The detectors that learn masks."""


def _known(key: str, name: str, table: Mapping[str, object]) -> str:
    if name not in table:
        raise ConfigError(
            f"{key}: must be one of {', '.join(table)}, got {name!r}{suggest(name, table)}"
        )
    return name
