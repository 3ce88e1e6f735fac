"""The global scale learner (POD, Peng et al., ICCV 2019, section 3.1): a 3x3 convolution that
predicts how far apart its taps lie, once per sample, from the mean of its input.

The scale is ``dilation * map(r)``, r linear in the mean; the predictor starts at zero, where every
map gives 1, so a fresh learner computes the convolution it replaced, and weight decay pulls towards
that. Scales are float32 throughout, autocast or not: bfloat16 steps at 9 are 1/16.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from detkit.config import suggest
from detkit.errors import ConfigError
from detkit.ops import scaled_conv2d

_SOFTPLUS_ONE = math.log(math.e - 1)  # softplus of this is 1


def _elu1(r: Tensor) -> Tensor:
    """``1 + r`` above 0, ``exp(r)`` below: positive, slope 1 at 0, as the paper's above 1."""
    return torch.where(r > 0, 1 + r, r.clamp(max=0).exp())


def _linear(r: Tensor) -> Tensor:
    """``1 + r``, closest to the paper; may reach 0, which decomposition refuses."""
    return 1 + r


def _softplus(r: Tensor) -> Tensor:
    """Softplus through 1 at 0, slope 0.63 there."""
    # Divided by its own value at 0, as computed, so that r = 0 gives exactly 1.
    return F.softplus(r + _SOFTPLUS_ONE) / F.softplus(torch.full_like(r, _SOFTPLUS_ONE))


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu1": _elu1,
    "linear": _linear,
    "softplus": _softplus,
}
"""From the predictor's number to the scale relative to the layer's dilation, exactly 1 at 0."""

INITS = ("zero", "he")
"""Starting weights of the predictor: zero, or normal with deviation sqrt(2 / C) (the paper's)."""

SCALE_GROUPS = ("sample", "image")
"""Whom a scale is for: each row of the input, or all rows (RoIs) of an image together."""


class ScaleWarning(UserWarning):
    """A learnt scale ran into the largest one allowed."""


class GlobalScaleConv2d(nn.Module):
    """A 3x3 convolution with a learnt real-valued dilation (d_h, d_w) per sample.

    Takes over weight and bias of ``conv`` under their names, so state-dict keys stay; ``scale`` is
    the predictor, Linear(C -> 2), h before w. Where the weight is frozen so is the predictor.

    Args:
        conv: Convolution to replace; its padding must be ``dilation`` zeros.
        map: Name in :data:`MAPS`.
        init: Name in :data:`INITS`.
        scale_group: Name in :data:`SCALE_GROUPS`; ``image`` needs :func:`images_of_rows`.
        max_scale: Largest scale in pixels, beyond which all outer taps would read zeros and no
            gradient would lead back; None for no limit.

    Attributes:
        last_scales: (N, 2) float32 scales in pixels of the latest call, detached, on its device;
            None before the first. Not part of the state dict.

    Raises:
        ValueError: ``conv`` is not such a convolution, or ``max_scale`` is below its dilation.
        ConfigError: An unknown name.
    """

    rectifies = True
    """Whether a call may end with a ReLU, ``relu=True``."""

    def __init__(
        self,
        conv: nn.Conv2d,
        *,
        map: str = "elu1",
        init: str = "zero",
        scale_group: str = "sample",
        max_scale: float | None = 32.0,
    ) -> None:
        super().__init__()
        check_convolution(conv, "GlobalScaleConv2d")
        _one_of("map", map, MAPS)
        _one_of("init", init, INITS)
        _one_of("scale_group", scale_group, SCALE_GROUPS)
        if max_scale is not None and not max_scale >= max(conv.dilation):
            raise ValueError(
                "GlobalScaleConv2d: max_scale must be at least the convolution's dilation "
                f"{max(conv.dilation)}, got {max_scale}"
            )
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size = (3, 3)
        self.stride: tuple[int, int] = (conv.stride[0], conv.stride[1])
        self.dilation: tuple[int, int] = (conv.dilation[0], conv.dilation[1])
        self.groups = conv.groups
        self.map, self.init, self.scale_group, self.max_scale = map, init, scale_group, max_scale
        self.weight, self.bias = conv.weight, conv.bias
        like = conv.weight
        self.scale = nn.Linear(conv.in_channels, 2, device=like.device, dtype=like.dtype)
        self.reset_scale()
        self.scale.requires_grad_(like.requires_grad)
        self.last_scales: Tensor | None = None
        self._rows: tuple[Tensor, int] | None = None
        self._warned = False
        self.train(conv.training)

    def reset_scale(self) -> None:
        """Put the predictor back to its start."""
        nn.init.zeros_(self.scale.bias)
        if self.init == "he":
            nn.init.kaiming_normal_(self.scale.weight)
        else:
            nn.init.zeros_(self.scale.weight)

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Map (N, C, H, W) to (N, O, (H - 1) // stride + 1, (W - 1) // stride + 1)."""
        scales = self.scales(x)
        if not torch.compiler.is_exporting():  # an exported graph cannot set attributes
            self.last_scales = scales.detach()
        return scaled_conv2d(x, self.weight, scales, self.bias, self.stride, self.groups, relu=relu)

    def scales(self, x: Tensor) -> Tensor:
        """Scales (N, 2) in pixels for the input (N, C, H, W): float32, float64 for float64."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        pooled = x.mean((2, 3), dtype=dtype)  # (N, C)
        rows = None
        if self.scale_group == "image" and not x.is_meta:  # counting costs, no RoI has values
            pooled, rows = self._image_means(pooled)
        # Multiplied and summed: autocast, or TF32, would round the operands of a matrix product.
        r = (pooled[:, None] * self.scale.weight.to(dtype)).sum(2) + self.scale.bias.to(dtype)
        learnt = MAPS[self.map](r)
        h, w = self.dilation
        scales = learnt * h if h == w else torch.stack((learnt[:, 0] * h, learnt[:, 1] * w), 1)
        scales = self._limited(scales)
        return scales if rows is None else scales.index_select(0, rows)

    def _image_means(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Means (images, C) of the rows (R, C) of each image, and the image (R,) of each row."""
        if self._rows is None:
            raise ValueError(
                "GlobalScaleConv2d: scale_group='image' must know the image of each row, got none; "
                "call the model within images_of_rows"
            )
        rows, images = self._rows
        if rows.shape != pooled.shape[:1]:
            raise ValueError(
                f"GlobalScaleConv2d: images_of_rows must name {len(pooled)} rows, got {len(rows)}"
            )
        numbers = torch.arange(images, device=rows.device)
        member = rows == numbers[:, None]  # (images, R)
        # Chosen, not multiplied by 0 or 1: a NaN row stays in its image.
        total = torch.where(member[:, :, None], pooled, 0).sum(1)
        return total / member.sum(1, keepdim=True).clamp(min=1), rows

    def _limited(self, scales: Tensor) -> Tensor:
        if self.max_scale is None:
            return scales
        if scales.device.type == "cpu" and not torch.compiler.is_compiling():
            self.warn_if_limited(scales)
        return scales.clamp(max=self.max_scale)

    def warn_if_limited(self, scales: Tensor) -> None:
        """Warn, once, where ``scales`` reach the limit; waits for the device.

        A call on the CPU does this itself; on CUDA whoever reads ``last_scales`` has to, because
        looking at them would stall training.
        """
        if self._warned or self.max_scale is None or not bool((scales >= self.max_scale).any()):
            return
        self._warned = True
        largest = float(scales.detach().max())
        warnings.warn(
            f"GlobalScaleConv2d: a scale of {largest:.3g} pixels reached max_scale="
            f"{self.max_scale:g} and is held there; maps may be too small for this layer",
            ScaleWarning,
            stacklevel=4,
        )

    def freeze(self, mean: Sequence[float]) -> nn.Module:
        """The convolution at fixed scales (d_h, d_w) in pixels, sharing no memory with this one.

        A plain ``nn.Conv2d`` where each axis is a whole number or lies in (0, 1), with the weights
        folded onto its taps; otherwise a :class:`FixedScaleConv2d`.
        """
        fixed = FixedScaleConv2d(self, mean)
        return fixed.folded() or fixed

    def macs(self, output: Tensor) -> int:
        """Multiply-adds of a call that gave ``output``: the convolution's and the predictor's."""
        return output.numel() * self.weight[0].numel() + len(output) * self.scale.weight.numel()

    def extra_repr(self) -> str:
        """Settings in the module's printed form."""
        return (
            f"{self.in_channels}, {self.out_channels}, stride={self.stride}, "
            f"dilation={self.dilation}, groups={self.groups}, map={self.map}, "
            f"scale_group={self.scale_group}"
        )


class FixedScaleConv2d(nn.Module):
    """A 3x3 convolution at one real-valued dilation for all samples.

    Args:
        conv: Where weight and bias are copied from.
        scales: (d_h, d_w) in pixels.

    Raises:
        ValueError: ``scales`` are not two finite numbers.
    """

    rectifies = True
    scales: Tensor

    def __init__(self, conv: GlobalScaleConv2d, scales: Sequence[float]) -> None:
        super().__init__()
        values = tuple(float(d) for d in scales)
        if len(values) != 2 or not all(math.isfinite(d) for d in values):
            raise ValueError(f"FixedScaleConv2d: scales must be two finite numbers, got {values}")
        self.stride, self.groups = conv.stride, conv.groups
        self.weight = copied(conv.weight)
        self.bias = None if conv.bias is None else copied(conv.bias)
        self.values = (values[0], values[1])
        self.train(conv.training)

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Map (N, C, H, W) to (N, O, (H - 1) // stride + 1, (W - 1) // stride + 1)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        h, w = (x.new_full((1, 1), d, dtype=dtype) for d in self.values)
        scales = torch.cat((h, w), 1)
        return scaled_conv2d(x, self.weight, scales, self.bias, self.stride, self.groups, relu=relu)

    def macs(self, output: Tensor) -> int:
        """Multiply-adds of a call that gave ``output``."""
        return output.numel() * self.weight[0].numel()

    def folded(self) -> nn.Conv2d | None:
        """The equal plain convolution, None where there is none.

        Samples at a distance f < 1 are ``(1 - f) * centre + f * neighbour``, which the weights of a
        3x3 convolution can say; whole distances are dilations.
        """
        if not all(d >= 1 and d == int(d) or 0 < d < 1 for d in self.values):
            return None
        weight = self.weight.detach()
        for axis, d in zip((2, 3), self.values, strict=True):
            if d < 1:
                low, centre, high = weight.unbind(axis)
                taps = (d * low, centre + (1 - d) * (low + high), d * high)
                weight = torch.stack(taps, axis)
        dilation = (max(int(self.values[0]), 1), max(int(self.values[1]), 1))
        conv = plain_convolution(self.weight, self.bias, self.stride, dilation, self.groups)
        conv.weight.data.copy_(weight)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """Settings in the module's printed form."""
        return f"scales={self.values}, stride={self.stride}, groups={self.groups}"


def plain_convolution(
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> nn.Conv2d:
    """``nn.Conv2d`` with copies of ``weight`` (O, C/groups, kh, kw) and ``bias``, padded to "same".

    Gradients are wanted where the given tensors want them.
    """
    outputs, channels, height, width = weight.shape
    conv = nn.Conv2d(
        channels * groups,
        outputs,
        (height, width),
        (stride[0], stride[1]),
        (dilation[0] * (height // 2), dilation[1] * (width // 2)),
        (dilation[0], dilation[1]),
        groups,
        bias is not None,
        device="meta",
    )
    conv.weight, conv.bias = copied(weight), None if bias is None else copied(bias)
    return conv


def copied(tensor: Tensor) -> nn.Parameter:
    """Parameter with a copy of ``tensor``, trainable where it is."""
    return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)


def check_convolution(conv: nn.Module, name: str) -> None:
    """Refuse what a learner cannot replace without changing what is computed.

    Raises:
        ValueError: ``conv`` is no plain 3x3 ``nn.Conv2d`` padded with ``dilation`` zeros, or hooks
            or parametrizations hang on it; the message begins with ``name``.
    """
    if type(conv) is not nn.Conv2d:
        raise ValueError(f"{name}: must be a plain nn.Conv2d, got {type(conv).__name__}")
    if conv.kernel_size != (3, 3):
        raise ValueError(f"{name}: kernel must be (3, 3), got {conv.kernel_size}")
    padding = conv.dilation if conv.padding == "same" else conv.padding
    if conv.padding_mode != "zeros" or padding != conv.dilation:
        raise ValueError(
            f"{name}: padding must be dilation * (k // 2) = {conv.dilation} zeros, got "
            f"{conv.padding} of {conv.padding_mode}; a sampled kernel stands on its centre"
        )
    hooks = (conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks)
    if any(hooks) or "weight" not in conv._parameters:
        raise ValueError(
            f"{name}: must have no hooks and its weight as a parameter, got a "
            "convolution that would lose them; remove weight norm, pruning or hooks first"
        )


@contextmanager
def images_of_rows(model: nn.Module, rows: Tensor, images: int) -> Iterator[None]:
    """Inside the block, learners of ``model`` with ``scale_group="image"`` know their rows' images.

    For heads whose batch axis is RoIs:
    ``with images_of_rows(head, rois[:, 0].long(), len(images)): head(pooled)``.

    Args:
        model: Holds the learners.
        rows: (R,) int64, image 0..images-1 of each row of the learners' input.
        images: How many images there are; those without rows do no harm.
    """
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(
            f"images_of_rows: rows must be (R,) int64, got {tuple(rows.shape)} {rows.dtype}"
        )
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, GlobalScaleConv2d) and module.scale_group == "image":
                stack.callback(setattr, module, "_rows", module._rows)
                module._rows = (rows, images)
        yield


class _RowsFromPooler:
    """Hook before a pooler's call: hands the image of each RoI to the learners."""

    def __init__(self, targets: Sequence[GlobalScaleConv2d]) -> None:
        self.targets = list(targets)

    def __call__(self, pooler: nn.Module, args: tuple[Mapping[str, Tensor], Tensor]) -> None:
        features, rois = args
        rows = rois[:, 0].to(torch.int64), len(next(iter(features.values())))
        for target in self.targets:
            target._rows = rows


def follow_pooler(model: nn.Module, pooler: nn.Module) -> RemovableHandle:
    """Let every call of ``pooler`` name the images of the rows that image-wise learners see next.

    Args:
        model: Holds the learners.
        pooler: Called as ``pooler(features, rois)``: maps (N, ...) by name and rois (R, 5) with the
            image's index first, as detkit's RoI poolers are.

    Raises:
        ValueError: ``model`` has no learner with ``scale_group="image"``.
    """
    targets = [m for m in learners(model).values() if m.scale_group == "image"]
    if not targets:
        raise ValueError(
            "follow_pooler: model must hold a learner with scale_group='image', got none"
        )
    return pooler.register_forward_pre_hook(_RowsFromPooler(targets))


def learners(model: nn.Module) -> dict[str, GlobalScaleConv2d]:
    """Scale learners of ``model`` by path, in the order the model lists its parts."""
    return {p: m for p, m in model.named_modules() if isinstance(m, GlobalScaleConv2d)}


def latest_scales(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Mean (d_h, d_w) in pixels of the latest call of each learner that was called.

    Waits for the device once, for all layers. Warns where a scale is at its limit.
    """
    seen = {p: m for p, m in learners(model).items() if m.last_scales is not None}
    recent = [m.last_scales for m in seen.values() if m.last_scales is not None]
    rows = {p: s for p, s in zip(seen, recent, strict=True) if len(s)}
    if not rows:
        return {}
    stats = torch.stack([torch.cat((s.mean(0), s.amax(0))).double() for s in rows.values()]).cpu()
    for path, values in zip(rows, stats, strict=True):
        seen[path].warn_if_limited(values[2:])
    return {p: (float(v[0]), float(v[1])) for p, v in zip(rows, stats, strict=True)}


def _one_of(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ConfigError(
            f"{what}: must be one of {', '.join(known)}, got {name!r}{suggest(name, known)}"
        )
