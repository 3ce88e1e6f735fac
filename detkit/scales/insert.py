"""Scale learners into a model: the 3x3 convolutions of conv3 to conv5 of detkit's backbones (POD,
Peng et al., ICCV 2019, section 3.1), or those that a predicate picks in any module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from detkit.errors import ConfigError
from detkit.models.backbones.base import Backbone
from detkit.models.heads.roi import RoiPooler
from detkit.scales.learner import GlobalScaleConv2d, check_convolution, follow_pooler

Select = Callable[[str, nn.Conv2d], bool]
"""Whether the 3x3 convolution at a path of the model learns its scale."""

FIRST_STAGE = 3
"""conv2 learns scales near 1 (section 4.1), so selection starts here."""


@dataclass(frozen=True)
class ScaleLayer:
    """One layer with a learnt scale.

    Attributes:
        path: Where the module is in the model.
        label: ``R`` with stage and block, from 1, as in the paper (``R31``; ``a``, ``b``, ... where
            a block has several), the path where the stage is not known.
        part: ``backbone``, or the model's part that the layer is in (``head``).
        channels: Input and output channels.
        kernel: Sides, (3, 3).
        stride: (h, w).
        dilation: (h, w) of the convolution replaced; scales are in pixels, so include it.
        groups: Groups of the convolution.
        map: From the predictor's number to the scale.
        scale_group: ``sample`` or ``image``.
    """

    path: str
    label: str
    part: str
    channels: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    map: str
    scale_group: str

    def to_plain(self) -> dict[str, Any]:
        """Plain types for a checkpoint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ScaleLayer:
        """The layer that :meth:`to_plain` wrote."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()
        }
        return cls(**values)


def insert(
    model: nn.Module,
    select: Select | Iterable[str] | None = None,
    *,
    map: str = "elu1",
    init: str = "zero",
    scale_group: str = "sample",
    max_scale: float | None = 32.0,
) -> list[ScaleLayer]:
    """Replace 3x3 convolutions of ``model`` by scale learners, in place.

    Parameters stay the same objects under the same names. A convolution that the model has at
    several places is replaced at all of them. Either all chosen ones are replaced or, on an error,
    none.

    Args:
        model: Any module.
        select: ``select(path, conv)`` of each 3x3 convolution, or paths, or None for conv3 to conv5
            of detkit's detectors and backbones, stride-2 ones included.
        map: See :class:`GlobalScaleConv2d`; so are the other options.
        init: Start of the predictors.
        scale_group: Whom a scale is for, in layers outside a backbone, where a row is an image
            anyway. With ``image``, detkit's RoI poolers in ``model`` name the images; elsewhere see
            :func:`images_of_rows`.
        max_scale: Largest scale in pixels.

    Returns:
        The layers, in the order in which the model lists its parts, which is that of the network
        where modules are created in the order they run.

    Raises:
        ConfigError: Nothing is selected, or a path is not a 3x3 convolution.
        ValueError: A selected convolution cannot be replaced; the message names it.
    """
    labels = stage_labels(model)
    convs = dict(_convolutions(model))
    chosen = _chosen(convs, labels, select)
    for path in chosen:
        check_convolution(convs[path], path or "model")
    if "" in chosen:
        raise ConfigError("insert: model must hold convolutions, got a convolution itself")
    made = {
        path: GlobalScaleConv2d(
            convs[path],
            map=map,
            init=init,
            scale_group="sample" if _part(model, path) == "backbone" else scale_group,
            max_scale=max_scale,
        )
        for path in chosen
    }
    for path, learner in made.items():
        replace(model, convs[path], learner)
    if any(learner.scale_group == "image" for learner in made.values()):
        for module in model.modules():
            if isinstance(module, RoiPooler):
                follow_pooler(model, module)
    return [_layer(model, p, labels.get(p, p), learner) for p, learner in made.items()]


def _convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            yield path, module


def _chosen(
    convs: Mapping[str, nn.Conv2d],
    labels: Mapping[str, str],
    select: Select | Iterable[str] | None,
) -> list[str]:
    """Paths in the model's order."""
    if select is None:
        chosen = [path for path in convs if path in labels]
        remedy = "give select, as the model has no detkit backbone or has learners already"
    elif callable(select):
        chosen = [path for path, conv in convs.items() if select(path, conv)]
        remedy = f"the model has {len(convs)} such convolutions"
    else:
        wanted = set(select)
        unknown = sorted(wanted - convs.keys())
        if unknown:
            raise ConfigError(
                f"insert: select must name 3x3 nn.Conv2d modules, got {', '.join(unknown)}"
            )
        chosen = [path for path in convs if path in wanted]
        remedy = "name at least one"
    if not chosen:
        raise ConfigError(f"insert: select must pick 3x3 nn.Conv2d modules, got none; {remedy}")
    return chosen


def stage_labels(model: nn.Module) -> dict[str, str]:
    """Path to label of the 3x3 convolutions of stage 3 and later, plain or replaced already.

    Stages are those of the :class:`Backbone`, where DetNet's stage 6 counts as conv5 and is called
    R61, ..., and those that a head took over from its end and lists as ``backbone_layers``.
    """
    paths = {module: path for path, module in model.named_modules()}
    labels: dict[str, str] = {}
    for number, blocks in _stages(model):
        for index, block in enumerate(blocks, 1):
            inside = [m for m in block.modules() if _is_3x3(m)]
            letters = [""] if len(inside) == 1 else [chr(ord("a") + i) for i in range(len(inside))]
            for module, letter in zip(inside, letters, strict=True):
                labels[paths[module]] = f"R{number}{index}{letter}"
    return labels


def _is_3x3(module: nn.Module) -> bool:
    kernel = getattr(module, "kernel_size", None)
    return isinstance(module, nn.Conv2d | GlobalScaleConv2d) and kernel == (3, 3)


def _stages(model: nn.Module) -> Iterator[tuple[int, list[nn.Module]]]:
    """Number and blocks of each stage from conv3 on."""
    last = None
    for module in model.modules():
        if isinstance(module, Backbone):
            last = module.num_stages
            for number in range(FIRST_STAGE, last + 1):
                yield number, _blocks(module.stage(number))
        elif last is not None:
            for number, child in enumerate(getattr(module, "backbone_layers", ()), last + 1):
                yield number, _blocks([module.get_submodule(child)])


def _blocks(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks of a stage: members of its sequences."""
    blocks: list[nn.Module] = []
    for module in modules:
        whole = not isinstance(module, nn.Sequential | nn.ModuleList)
        blocks += [module] if whole else module.children()
    return blocks


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``model`` has ``old``."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def _layer(model: nn.Module, path: str, label: str, learner: GlobalScaleConv2d) -> ScaleLayer:
    return ScaleLayer(
        path=path,
        label=label,
        part=_part(model, path),
        channels=(learner.in_channels, learner.out_channels),
        kernel=learner.kernel_size,
        stride=learner.stride,
        dilation=learner.dilation,
        groups=learner.groups,
        map=learner.map,
        scale_group=learner.scale_group,
    )


def _part(model: nn.Module, path: str) -> str:
    """``backbone`` inside a backbone, else the model's child that ``path`` is in."""
    parents = [path[:i] for i, letter in enumerate(path) if letter == "."]
    inside = any(isinstance(model.get_submodule(p), Backbone) for p in ("", *parents))
    return "backbone" if inside else path.partition(".")[0]


def layers_of(model: nn.Module) -> list[ScaleLayer]:
    """The learners that ``model`` holds, as :func:`insert` returned them."""
    labels = stage_labels(model)
    return [
        _layer(model, path, labels.get(path, path), module)
        for path, module in model.named_modules()
        if isinstance(module, GlobalScaleConv2d)
    ]
