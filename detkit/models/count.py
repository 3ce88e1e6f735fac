"""Parameters and multiply-adds, counted on the meta device: nothing is computed or stored.

One multiply-add of a Conv2d, ConvTranspose2d or Linear is 1; norms, activations, pooling and biases
are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from detkit.config import Config
from detkit.models.backbones.base import Backbone
from detkit.models.classifier import Classifier
from detkit.models.zoo import build_backbone, build_detector

_KINDS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


_VALUES_ALONE = (
    F.batch_norm,
    nn.init.kaiming_normal_,
    nn.init.kaiming_uniform_,
    nn.init.normal_,
    nn.init.uniform_,
    Tensor.normal_,
    Tensor.uniform_,
)


class _NoValues(TorchFunctionMode):
    """Leaves out batch norms and random weights: on the meta device both are slow Python code."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The tensor as it is, of a function that changes values and no shape."""
        named = kwargs or {}
        if func in _VALUES_ALONE:
            return args[0] if args else named["tensor"]
        return func(*args, **named)


@contextmanager
def shapes_only() -> Iterator[None]:
    """The meta device for models that are built to be counted: twice as fast as it alone."""
    with torch.device("meta"), _NoValues():
        yield


@dataclass(frozen=True)
class Part:
    """Cost of a part: parameters, multiply-adds for one image, Conv2d layers."""

    params: int
    macs: int
    convs: int


def macs_by_module(model: nn.Module, run: Callable[[], object]) -> dict[nn.Module, int]:
    """Multiply-adds of each layer with products of ``model`` while ``run`` executes it.

    Layers are Conv2d, ConvTranspose2d, Linear, and whatever has a method ``macs(output)``. Batch
    norms are left out of the run: its numbers mean nothing, its shapes everything.
    """
    macs: dict[nn.Module, int] = {}

    def add(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(module, _KINDS):
            each = module.weight[0].numel()
            # each: weights that make one output number, or that one input number is spread by
            numbers = inputs[0] if isinstance(module, nn.ConvTranspose2d) else out
            count = numbers.numel() * each
        else:
            count = cast(_Costed, module).macs(out)
        macs[module] = macs.get(module, 0) + count

    layers = [m for m in model.modules() if isinstance(m, _KINDS) or hasattr(m, "macs")]
    handles = [m.register_forward_hook(add) for m in layers]
    try:
        with torch.no_grad(), _NoValues():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return macs


class _Costed(Protocol):
    def macs(self, output: Tensor) -> int:
        """Multiply-adds of a call that gave ``output``."""


def _part(modules: Iterable[nn.Module], macs: dict[nn.Module, int]) -> Part:
    inside = {m for module in modules for m in module.modules()}
    params = {p for m in inside for p in m.parameters(recurse=False)}
    return Part(
        params=sum(p.numel() for p in params),
        macs=sum(macs.get(m, 0) for m in inside),
        convs=sum(isinstance(m, nn.Conv2d) or hasattr(m, "macs") for m in inside),
    )


def count_classifier(
    backbone: Backbone, num_classes: int = 1000, side: int = 224
) -> dict[str, Part]:
    """Cost of the classifier over ``backbone`` for one square image.

    Args:
        backbone: On the meta device.
        num_classes: Classes of the last layer.
        side: Side of the image in pixels.

    Returns:
        Parts ``total``, ``stage1`` (the stem), ``stage2``, ... and ``fc``.
    """
    with shapes_only():
        model = Classifier(backbone, num_classes).eval()
        images = torch.empty(1, 3, side, side)
    macs = macs_by_module(model, lambda: model.classify(images))
    parts = {"total": _part([model], macs)}
    for number in range(1, backbone.num_stages + 1):
        parts[f"stage{number}"] = _part(backbone.stage(number), macs)
    return parts | {"fc": _part([model.fc], macs)}


def count_backbone(name: str, num_classes: int = 1000, side: int = 224) -> dict[str, Part]:
    """:func:`count_classifier` of a named backbone; raises ConfigError for an unknown name."""
    with shapes_only():
        backbone = build_backbone(name)
    return count_classifier(backbone, num_classes, side)


def count_detector(
    config: Config, num_classes: int, height: int, width: int, proposals: int = 1000
) -> dict[str, Part]:
    """Cost of a detector for one image.

    Args:
        config: Which detector and backbone.
        num_classes: Classes without background.
        height: Height of the padded image in pixels.
        width: Its width.
        proposals: RoIs the head of a two-stage detector sees.

    Returns:
        Parts ``total``, ``backbone``, ``neck``, ``head`` and, of two stages, ``rpn``, with masks
        ``mask_head``.
    """
    with shapes_only():
        model = build_detector(config, num_classes).eval()
        images = torch.empty(1, 3, height, width)

    macs = macs_by_module(model, lambda: model.run_layers(images, proposals))
    parts = {name: _part([part], macs) for name, part in model.named_children()}
    return {"total": _part([model], macs)} | parts
