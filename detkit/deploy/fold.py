"""Batch norms folded into the layers before them: fewer operators, the same function.

With fixed statistics a batch norm is a multiply-add per channel, and so part of the convolution or
linear layer it follows: ``W' = W g / sqrt(v + eps)``, ``b' = beta + (b - mean) g / sqrt(v + eps)``.
Light-Head R-CNN's speeds are measured so.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from detkit.models.norm import FrozenBatchNorm2d, SyncBatchNorm2d
from detkit.scales.learner import FixedScaleConv2d, GlobalScaleConv2d
from detkit.scales.split import SplitConv2d

log = logging.getLogger("detkit")

SCALED = (GlobalScaleConv2d, FixedScaleConv2d)
"""Convolutions with scales. Sampling is linear and a learner looks at its input, so scaling an
output channel is scaling its weights, as anywhere."""

LAYERS = (nn.Conv2d, nn.Linear, SplitConv2d, *SCALED)
"""What a norm is folded into; their subclasses may compute something else and stay as they are."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, SyncBatchNorm2d)
"""What is folded."""

Pair = tuple[str, str]


def fold(model: nn.Module) -> nn.Module:
    """A copy for inference in which batch norms are part of the layer they follow.

    A pair is a ``Conv2d`` (any groups, dilation, padding, with or without bias), ``Linear``, split
    convolution or convolution with a learnt or fixed scale whose output goes into one batch norm
    and nowhere else: neighbours in an ``nn.Sequential``, or calls in the ``forward`` of the module
    that holds both, whatever their names; ``forward`` is followed symbolically, so the order of the
    attributes does not matter. Rows of a linear layer may get axes of length 1 before their norm.
    The layer gets the norm's scale and shift, computed in float64, and a bias; the norm becomes
    ``nn.Identity``.

    Left as they are, and logged by name with the reason: norms that are no batch norms or keep no
    statistics, norms that follow something else, pairs of which one is registered in more than one
    place, and those in a ``forward`` that depends on values and cannot be followed. Layers that
    some other module reaches into and calls on its own cannot be seen from here.

    Args:
        model: any module, left as it is; it need not be in eval mode.

    Returns:
        the copy, in eval mode, its folded weights without gradients.
    """
    folded = copy.deepcopy(model).eval()
    uses = Counter(id(child) for m in folded.modules() for child in m._modules.values())
    left: dict[str, str] = {}  # name of a norm to why it stays
    count = 0
    for prefix, parent in list(folded.named_modules()):
        pairs, untraced = _pairs(parent)
        for layer_path, norm_path in pairs:
            layer, norm = parent.get_submodule(layer_path), parent.get_submodule(norm_path)
            if max(uses[id(layer)], uses[id(norm)]) > 1:
                left[_join(prefix, norm_path)] = "it or its layer is registered in several places"
            elif _foldable(layer, norm):
                _replace(parent, layer_path, _merged(layer, norm))
                _replace(parent, norm_path, nn.Identity())
                count += 1
        if untraced:
            left |= {_join(prefix, path): untraced for path, _ in _held(parent, NORMS)}
    log.info("batch norms folded: %d", count)
    _tell_left(folded, left)
    return folded


def _pairs(parent: nn.Module) -> tuple[list[Pair], str]:
    """Paths of (layer, norm) in ``parent``, and why its forward could not be followed, if so."""
    if type(parent).forward is nn.Sequential.forward:
        names = list(parent._modules)
        children = zip(names, names[1:], strict=False)
        return [pair for pair in children if _is_pair(parent, *pair)], ""
    norms, layers = dict(_held(parent, NORMS)), dict(_held(parent, LAYERS))
    if not (norms and layers):
        return [], ""
    try:
        # A shallow copy: attributes that forward sets must not keep the tracer's stand-ins.
        graph = _CallTracer().trace(copy.copy(parent))
    except Exception as error:  # noqa: BLE001 - whatever foreign code does with the stand-ins
        return [], f"the forward of {type(parent).__name__} cannot be followed ({error})"
    return list(_called_pairs(graph, set(layers), set(norms))), ""


def _held(parent: nn.Module, kinds: tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Children of these very types, also those in lists and dicts of modules, with their paths."""
    for name, child in parent._modules.items():
        if child is not None and type(child) in kinds:
            yield name, child
        elif isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from ((_join(name, path), held) for path, held in _held(child, kinds))


def _is_pair(parent: nn.Module, layer: str, norm: str) -> bool:
    return type(parent._modules[layer]) in LAYERS and type(parent._modules[norm]) in NORMS


class _CallTracer(fx.Tracer):
    """Follows one forward; every module it calls is a single step."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _called_pairs(graph: fx.Graph, layers: set[str], norms: set[str]) -> Iterator[Pair]:
    """Layers each of whose calls feeds one norm alone, which is fed by no other."""
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)].append(node)
    for norm in sorted(norms & calls.keys()):
        sources = [_source(node) for node in calls[norm]]
        names = {str(s.target) for s in sources if s is not None and s.op == "call_module"}
        if None in sources or len(names) != 1 or not names <= layers:
            continue
        (layer,) = names
        if set(calls[layer]) == set(sources):
            yield layer, norm


def _source(call: fx.Node) -> fx.Node | None:
    """Where a norm's input comes from, past new axes of length 1; None where others see it too."""
    source = call.args[0] if len(call.args) == 1 and not call.kwargs else None
    while isinstance(source, fx.Node) and len(source.users) == 1:
        if not _adds_axes(source):
            return source
        source = source.args[0]
    return None


def _adds_axes(node: fx.Node) -> bool:
    """Whether it is ``x[..., None, None]``."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return False
    index = node.args[1]
    return isinstance(index, tuple) and all(i is None or i is Ellipsis for i in index)


def _foldable(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether the norm has statistics, and as many as the layer has outputs."""
    mean = norm.running_mean
    return isinstance(mean, Tensor) and len(mean) == sum(len(w) for w in _weights(layer))


def _weights(layer: nn.Module) -> list[Tensor]:
    """The weights of a layer, outputs first; those of a split one lie behind each other."""
    held = list(layer.weights) if isinstance(layer, SplitConv2d) else [layer.weight]
    return [weight for weight in held if isinstance(weight, Tensor)]


@torch.no_grad()
def _merged(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """A layer of the same kind that does the work of both; one with scales is changed in place."""
    if not (isinstance(layer, LAYERS) and isinstance(norm, _NormBase)):
        raise TypeError(f"fold: must be a layer and a norm, got {type(layer)} and {type(norm)}")
    mean, var = norm.get_buffer("running_mean").double(), norm.get_buffer("running_var").double()
    scale = (var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.double()
    bias = -mean if layer.bias is None else layer.bias.double() - mean
    bias = bias * scale
    if norm.affine:
        bias = bias + norm.bias.double()
    weights = _weights(layer)
    shares = scale.split([len(w) for w in weights])
    scaled = [
        _constant(w.double() * s.view(-1, *[1] * (w.ndim - 1)), w)
        for w, s in zip(weights, shares, strict=True)
    ]
    # In place where hooks hold the layer: a RoI pooler tells learners the images of their rows.
    merged = _without_weights(layer) if isinstance(layer, nn.Conv2d | nn.Linear) else layer
    merged.bias = _constant(bias, weights[0])
    if isinstance(merged, SplitConv2d):
        merged.weights = nn.ParameterList(scaled)
    else:
        merged.weight = scaled[0]
    return merged.requires_grad_(False).eval()


def _constant(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=False)


def _without_weights(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """The same layer with a bias, on the meta device: no memory, no random numbers."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, device="meta")
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]  # two numbers; typed for any dimension
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        layer.groups,
        padding_mode=layer.padding_mode,
        device="meta",
    )


def _replace(root: nn.Module, path: str, new: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    root.get_submodule(holder)._modules[name] = new


def _tell_left(model: nn.Module, known: dict[str, str]) -> None:
    """Log the norms that are still there, by reason."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
            reasons["no batch norm"].append(name)
        elif isinstance(module, _NormBase):
            reasons[known.get(name) or _why(module)].append(name)
    for reason, names in reasons.items():
        log.warning("norms left as they are, %s: %s", reason, ", ".join(names))


def _why(norm: nn.Module) -> str:
    if type(norm) not in NORMS:
        return "no batch norm of a kind that can be folded"
    if not norm.track_running_stats:
        return "it keeps no statistics"
    return "it does not follow a single convolution or linear layer"


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path
