"""The fast-deployment net (POD, Peng et al., ICCV 2019, section 3.2): plain convolutions in place
of scale learners, with the learnt weights cut along the output channels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from detkit.config import suggest
from detkit.errors import CheckpointError, ConfigError
from detkit.ops import split_conv2d
from detkit.scales.decompose import Part, Plan, whole_groups
from detkit.scales.insert import replace
from detkit.scales.learner import (
    FixedScaleConv2d,
    GlobalScaleConv2d,
    check_convolution,
    copied,
    learners,
    plain_convolution,
)

ZERO_DILATION = ("center", "sum")
"""Weights of a side of 1: the middle tap (the paper's), or the sum of the three, which is what
sampling at dilation 0 computes."""

WEIGHTS = ("transfer", "none")
"""Cut the weights of the convolution replaced, or start afresh (He)."""


class SplitConv2d(nn.Module):
    """Plain convolutions at different dilations on disjoint output channels, into one output.

    State dict: ``weights.0``, ``weights.1``, ... lower first, and ``bias`` over all channels.
    A call may end with a ReLU (``relu=True``).

    Args:
        weights: (O_i, C/groups, kh, kw) of each part.
        bias: (sum(O_i),) or None.
        dilations: (D_h, D_w) of each part, 0 along a side of 1.
        stride: (h, w).
        groups: Groups of the undivided convolution.
    """

    rectifies = True

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        bias: nn.Parameter | None,
        dilations: Sequence[tuple[int, int]],
        stride: tuple[int, int],
        groups: int,
    ) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self.bias = bias
        self.dilations = list(dilations)
        self.stride, self.groups = stride, groups
        self.in_channels = weights[0].shape[1] * groups
        self.out_channels = sum(len(w) for w in weights)

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Map (N, C, H, W) to (N, O, (H - 1) // stride + 1, (W - 1) // stride + 1)."""
        weights = list(self.weights)
        return split_conv2d(
            x, weights, self.bias, self.dilations, self.stride, self.groups, relu=relu
        )

    def macs(self, output: Tensor) -> int:
        """Multiply-adds of a call that gave ``output``."""
        weights: int = sum(w.numel() for w in self.weights)
        return output.numel() // self.out_channels * weights

    def extra_repr(self) -> str:
        """Settings in the module's printed form."""
        parts = [
            f"{len(w)}x({w.shape[2]}, {w.shape[3]}) at {d}"
            for w, d in zip(self.weights, self.dilations, strict=True)
        ]
        return (
            f"{self.in_channels}, [{', '.join(parts)}], stride={self.stride}, groups={self.groups}"
        )

    def separate(self) -> list[tuple[int, nn.Conv2d]]:
        """Each part as a plain convolution, with the first of the input channels it reads."""
        begins = [0, *accumulate(len(w) for w in self.weights)]
        per_group = self.out_channels // self.groups
        parts = []
        for begin, weight, (h, w) in zip(begins, self.weights, self.dilations, strict=False):
            bias = None if self.bias is None else self.bias[begin : begin + len(weight)]
            groups = max(len(weight) // per_group, 1)
            dilation = max(h, 1), max(w, 1)
            conv = plain_convolution(weight, bias, self.stride, dilation, groups)
            parts.append((begin // per_group * weight.shape[1], conv))
        return parts


def apply(
    model: nn.Module, plan: Plan, *, weights: str = "transfer", zero_dilation: str = "center"
) -> nn.Module:
    """Replace the layers of ``plan`` in ``model``, in place, by plain convolutions.

    A layer of one convolution becomes an ``nn.Conv2d``, others a :class:`SplitConv2d`. Norms and
    following layers stay as they are: channels keep their order.

    Args:
        model: Holds scale learners, or plain 3x3 convolutions, at the plan's paths.
        plan: What becomes of each layer.
        weights: See :data:`WEIGHTS`.
        zero_dilation: See :data:`ZERO_DILATION`.

    Returns:
        ``model``.

    Raises:
        ConfigError: An unknown option.
        CheckpointError: A layer of the plan does not fit ``model``; nothing is replaced then.
    """
    layers = [{"path": e.path, "parts": [p.to_plain() for p in e.parts]} for e in plan.layers]
    return rebuild(model, layers, weights=weights, zero_dilation=zero_dilation)


def rebuild(
    model: nn.Module,
    layers: Iterable[Mapping[str, Any]],
    *,
    weights: str = "transfer",
    zero_dilation: str = "center",
) -> nn.Module:
    """As :func:`apply`, from the plain layers that ``Plan.to_plain`` gives and a checkpoint keeps.

    Args:
        model: The model that the layers were planned for, with its plain convolutions or learners.
        layers: ``{"path", "parts": [{"kernel", "dilation", "padding", "channels"}, ...]}`` each;
            other keys are not read.
        weights: See :data:`WEIGHTS`.
        zero_dilation: See :data:`ZERO_DILATION`.
    """
    for what, name, known in (
        ("weights", weights, WEIGHTS),
        ("zero_dilation", zero_dilation, ZERO_DILATION),
    ):
        if name not in known:
            raise ConfigError(
                f"{what}: must be one of {', '.join(known)}, got {name!r}{suggest(name, known)}"
            )
    modules = dict(model.named_modules())
    made: dict[str, nn.Module] = {}
    for layer in layers:
        path = layer["path"]
        if path in made:
            raise CheckpointError(f"{path}: must be one layer, got two")
        conv = _replaceable(modules.get(path) if path else None, path or "model")
        made[path] = split(conv, _parts(conv, layer), zero_dilation)
        if weights == "none":
            _start_afresh(made[path])
    for path, module in made.items():
        replace(model, modules[path], module)
    return model


def _replaceable(module: nn.Module | None, path: str) -> nn.Conv2d | GlobalScaleConv2d:
    if isinstance(module, GlobalScaleConv2d):
        return module
    if module is None:
        raise CheckpointError(f"{path}: must be a module of the model, got none there")
    try:
        check_convolution(module, path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return module  # type: ignore[return-value] # checked to be nn.Conv2d


def _parts(conv: nn.Conv2d | GlobalScaleConv2d, layer: Mapping[str, Any]) -> list[Part]:
    """Parts of a plain layer, refused where they do not make up ``conv``."""
    path, unit = layer["path"], whole_groups(conv.out_channels, conv.groups)
    parts = []
    for plain in layer["parts"]:
        pairs = zip(plain["kernel"], plain["dilation"], strict=True)
        h, w = (0 if k == 1 else d for k, d in pairs)
        part = Part((h, w), plain["channels"])
        if part.to_plain() != dict(plain):
            raise CheckpointError(
                f"{path}: parts must have sides 3 with padding = dilation, or 1 with dilation 1 "
                f"and padding 0, got {dict(plain)}"
            )
        if min(h, w) < 0 or part.channels < 1 or part.channels % unit:
            raise CheckpointError(
                f"{path}: parts must have dilations of at least 0 and whole groups of {unit} "
                f"channels, got {dict(plain)}"
            )
        parts.append(part)
    total = sum(part.channels for part in parts)
    if total != conv.out_channels:
        raise CheckpointError(
            f"{path}: parts must have {conv.out_channels} channels together, got {total}"
        )
    return parts


def split(
    conv: nn.Conv2d | GlobalScaleConv2d, parts: Sequence[Part], zero_dilation: str = "center"
) -> nn.Module:
    """``conv`` as plain convolutions with its weights, cut along the output channels, lower first.

    Args:
        conv: The 3x3 convolution.
        parts: Dilations and channels; the channels add up to those of ``conv``.
        zero_dilation: See :data:`ZERO_DILATION`.

    Returns:
        ``nn.Conv2d`` for one part, otherwise :class:`SplitConv2d`; parameters are copies.
    """
    ends = [0, *accumulate(part.channels for part in parts)]
    sliced = [
        _collapsed(conv.weight[begin:end], part, zero_dilation)
        for (begin, end), part in zip(pairwise(ends), parts, strict=True)
    ]
    stride = (conv.stride[0], conv.stride[1])
    if len(parts) == 1:
        made: nn.Module = plain_convolution(
            sliced[0], conv.bias, stride, parts[0].dilation, conv.groups
        )
    else:
        weights = [copied(weight) for weight in sliced]
        bias = None if conv.bias is None else copied(conv.bias)
        made = SplitConv2d(weights, bias, [part.reach for part in parts], stride, conv.groups)
    for parameter in made.parameters():
        parameter.requires_grad_(conv.weight.requires_grad)
    return made.train(conv.training)


def _collapsed(weight: Tensor, part: Part, zero_dilation: str) -> Tensor:
    """``weight`` (O, C, 3, 3) with a side of 1 where the dilation is 0."""
    for axis, side in zip((2, 3), part.kernel, strict=True):
        if side == 1:
            middle = weight.narrow(axis, 1, 1)
            weight = weight.sum(axis, keepdim=True) if zero_dilation == "sum" else middle
    return weight


def _start_afresh(module: nn.Module) -> None:
    """He initialisation for the output channels of the whole layer."""
    convs = [module.weight] if isinstance(module, nn.Conv2d) else list(module.parameters())
    weights = [w for w in convs if w.dim() == 4]
    outputs = sum(len(w) for w in weights)
    groups = module.groups if isinstance(module, nn.Conv2d | SplitConv2d) else 1
    for weight in weights:
        fan_out = outputs // groups * weight[0, 0].numel()
        nn.init.normal_(weight, std=math.sqrt(2 / fan_out))
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.zeros_(parameter)


def freeze(model: nn.Module, means: Mapping[str, Sequence[float]]) -> nn.Module:
    """Replace every scale learner of ``model``, in place, by the convolution at its mean scale.

    The net that :func:`apply` approximates, to compare with: see :meth:`GlobalScaleConv2d.freeze`.

    Args:
        model: Holds learners.
        means: Mean (d_h, d_w) in pixels of each by path.

    Returns:
        ``model``.

    Raises:
        CheckpointError: A mean is missing or left over; nothing is replaced then.
    """
    found = learners(model)
    if not found or found.keys() != means.keys():
        odd = ", ".join(sorted(found.keys() ^ means.keys())) or "none"
        raise CheckpointError(
            f"scales: must hold one mean for each of {len(found)} learners, got a difference at "
            f"{odd}"
        )
    made = {path: learner.freeze(means[path]) for path, learner in found.items()}
    for path, module in made.items():
        replace(model, found[path], module)
    return model


def to_plain(model: nn.Module) -> nn.Module:
    """Copy of ``model`` made of PyTorch alone, for people and exporters without detkit's operators.

    Each :class:`SplitConv2d` becomes a ``torch.fx.GraphModule`` of ``nn.Conv2d`` modules and one
    ``torch.cat``; each :class:`FixedScaleConv2d` one of up to four ``nn.Conv2d`` and a sum, which
    interpolates between whole dilations.

    Raises:
        CheckpointError: ``model`` holds scale learners: their scales depend on the image.
    """
    model = copy.deepcopy(model)
    holder = nn.Sequential(model)
    makers: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
        SplitConv2d: _concatenation,
        FixedScaleConv2d: _interpolation,
    }
    for path, module in list(holder.named_modules()):
        if isinstance(module, GlobalScaleConv2d):
            raise CheckpointError(
                f"{path.partition('.')[2] or 'model'}: must have fixed dilations, got a scale "
                "learner; decompose the model first"
            )
        if type(module) in makers:
            replace(holder, module, makers[type(module)](module).train(module.training))
    return holder[0]


def _concatenation(layer: SplitConv2d) -> nn.Module:
    graph = fx.Graph()
    x = graph.placeholder("x")
    root, outputs = nn.Module(), []
    for number, (begin, conv) in enumerate(layer.separate()):
        root.add_module(f"part{number}", conv)
        used = x
        if conv.in_channels < layer.in_channels:
            used = graph.call_function(torch.narrow, (x, 1, begin, conv.in_channels))
        outputs.append(graph.call_module(f"part{number}", (used,)))
    graph.output(graph.call_function(torch.cat, (outputs, 1)))
    return fx.GraphModule(root, graph, "PlainSplitConv2d")


def _interpolation(layer: FixedScaleConv2d) -> nn.Module:
    """Sampling between n and n + 1 is the mix of the convolutions there, as k = 3 has one tap on
    each side of the centre.
    """
    plain = layer.folded()
    if plain is not None:
        return plain
    if min(layer.values) < 0:
        raise CheckpointError(
            f"fixed scales: must not be negative to become plain, got {layer.values}"
        )
    graph = fx.Graph()
    x = graph.placeholder("x")
    root, total = nn.Module(), None
    shares = [
        [(n, 1 - (d - n)), (n + 1, d - n)] for d, n in ((d, math.floor(d)) for d in layer.values)
    ]
    terms = [((h, w), a * b) for h, a in shares[0] for w, b in shares[1] if a * b > 0]
    for number, (reach, share) in enumerate(terms):
        part = Part(reach, len(layer.weight))
        weight = share * _collapsed(layer.weight.detach(), part, "sum")
        bias = layer.bias if number == 0 else None
        conv = plain_convolution(weight, bias, layer.stride, part.dilation, layer.groups)
        root.add_module(f"part{number}", conv)
        term = graph.call_module(f"part{number}", (x,))
        total = term if total is None else graph.call_function(torch.add, (total, term))
    graph.output(total)
    return fx.GraphModule(root, graph, "PlainFixedScaleConv2d")
