"""Named models as plain functions in two dicts; a name that is not there names the nearest one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from detkit.config import Config, ModelConfig, is_supernet, suggest
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
    SearchSpace,
    own_space,
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
    name: str,
    norm: str = "frozen_bn",
    frozen_stages: int = 0,
    norm_eps: float = 1e-5,
    space: SearchSpace | None = None,
) -> Backbone:
    """A backbone with random weights: one of BACKBONES, a supernet, or any network of DetNAS.

    Args:
        name: Its name.
        norm: Name of its norms.
        frozen_stages: Stages that stay fixed.
        norm_eps: Added to the variances of its batch norms.
        space: A search space beside the published ones.

    Raises:
        ConfigError: An unknown name.
    """
    backbone = _maker(name, space)(norm)
    last = backbone.num_stages
    if frozen_stages > last:
        raise ConfigError(
            f"model.frozen_stages: must be in 0..{last} for {name}, got {frozen_stages}"
        )
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = norm_eps
    return backbone.freeze(frozen_stages)


def _maker(name: str, own: SearchSpace | None) -> Callable[[str], Backbone]:
    if name.startswith(PREFIX):
        space, genes = parse_architecture(name, own)
        return lambda norm: shuffle_net(space, genes, norm)
    supernet = parse_supernet(name, own)
    if supernet is not None:
        return lambda norm: ShuffleSupernet(supernet, norm)
    return BACKBONES[_known("model.backbone", name, BACKBONES | dict.fromkeys(SUPERNETS))]


def build_classifier(config: Config, num_classes: int) -> Classifier:
    """Classifier over ``config.model.backbone``, random weights."""
    model = Classifier(_backbone(config), num_classes, config.train.label_smoothing)
    _set_momentum(model, config.model.norm_momentum)
    return model


def supernet_space(config: Config) -> SearchSpace | None:
    """The space of ``config.model.backbone``, None where it is no supernet.

    Raises:
        ConfigError: A space that is not there, or makes no network.
    """
    return parse_supernet(config.model.backbone, own_space(config.space))


def _backbone(config: Config) -> Backbone:
    model = config.model
    if is_supernet(model.backbone):
        _check_supernet(model)
    return build_backbone(
        model.backbone, model.norm, model.frozen_stages, model.norm_eps, own_space(config.space)
    )


def _check_supernet(model: ModelConfig) -> None:
    """Refuse what fixes norms or weights that each path needs its own way."""
    for key, value, must, good in (
        ("norm", model.norm, "bn, sync_bn or gn", model.norm != "frozen_bn"),
        ("frozen_stages", model.frozen_stages, "0 or 1", model.frozen_stages <= 1),
        ("scales", model.scales, "'off'", model.scales == "off"),
    ):
        if not good:
            raise ConfigError(
                f"model.{key}: must be {must} for a supernet, whose paths share their norms and "
                f"blocks, got {value!r}"
            )


def _set_momentum(model: nn.Module, momentum: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


def build_detector(config: Config, num_classes: int) -> Detector:
    """The detector ``config.model.detector`` on ``config.model.backbone``, random weights.

    Args:
        config: The run's configuration; the tables model to mask and space are used.
        num_classes: Classes without background.

    Raises:
        ConfigError: An unknown name, or settings that do not fit together.
    """
    build = DETECTORS[_known("model.detector", config.model.detector, DETECTORS)]
    model = build(config, _backbone(config), num_classes)
    _set_momentum(model, config.model.norm_momentum)
    return model


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
