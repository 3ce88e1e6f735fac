"""Reference of the dilated, split and scaled convolutions, plain PyTorch on any device.

``scaled_conv2d`` is the convolution of POD (Peng et al., ICCV 2019, section 3.1) whose taps lie at
real-valued distances from the output's centre: tap ``i`` samples at ``i * d``. The distance
``|i| * d`` is split into whole part and fraction, so that at integers every tap takes the
derivative towards the larger dilation, on both sides of the centre alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.ops._conv_rules import autocast_dtype


def dilated_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool = False,
) -> Tensor:
    """Convolution at an integer dilation."""
    settings = list(stride), list(padding), list(dilation), groups
    return _rectified(F.conv2d(input, weight, bias, *settings), relu)


def split_conv2d(
    input: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    dilations: Sequence[int],
    stride: Sequence[int],
    groups: int,
    relu: bool = False,
) -> Tensor:
    """Convolutions of disjoint output channels, joined; ``dilations`` is flat, (h, w) per part."""
    per_group = sum(w.shape[0] for w in weights) // groups
    parts, begin = [], 0
    for part, weight in enumerate(weights):
        size, channels = weight.shape[:2]
        dilation = [max(d, 1) for d in dilations[2 * part : 2 * part + 2]]
        padding = [d * (k // 2) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        part_groups = max(size // per_group, 1)
        used = input.narrow(1, begin // per_group * channels, part_groups * channels)
        shift = None if bias is None else bias.narrow(0, begin, size)
        parts.append(F.conv2d(used, weight, shift, list(stride), padding, dilation, part_groups))
        begin += size
    return _rectified(torch.cat(parts, 1), relu)


def scaled_conv2d(
    input: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    groups: int,
    relu: bool = False,
) -> Tensor:
    """Convolution at one real-valued dilation (d_h, d_w) per sample; scales is (N, 2)."""
    dtype = autocast_dtype(input) or input.dtype
    compute = torch.promote_types(dtype, torch.float32)
    device = input.device.type
    with torch.autocast("cpu" if device == "meta" else device, enabled=False):  # none for meta
        x, w = input.to(dtype).to(compute), weight.to(dtype).to(compute)
        size = [(n + s - 1) // s for n, s in zip(x.shape[2:], stride, strict=True)]
        w = w.unflatten(0, (groups, -1))  # (G, O/G, C/G, kh, kw)
        columns = (x.shape[0], groups, w.shape[2], size[0] * size[1])
        y = x.new_zeros(x.shape[0], groups, w.shape[1], columns[3])
        centre_h, centre_w = w.shape[3] // 2, w.shape[4] // 2
        for i in range(w.shape[3]):
            rows = _sample(x, 2, i - centre_h, scales[:, 0], size[0], stride[0])  # (N, C, Ho, W)
            for j in range(w.shape[4]):
                taps = _sample(rows, 3, j - centre_w, scales[:, 1], size[1], stride[1])
                y = y + w[..., i, j] @ taps.reshape(columns)
        y = y.reshape(x.shape[0], weight.shape[0], *size)
        if bias is not None:
            y = y + bias.to(dtype).to(compute).view(-1, 1, 1)
        return _rectified(y.to(dtype), relu)


def _rectified(y: Tensor, relu: bool) -> Tensor:
    return y.relu_() if relu else y


def _sample(x: Tensor, dim: int, tap: int, scale: Tensor, size: int, stride: int) -> Tensor:
    """``x`` along ``dim`` at ``p * stride + tap * scale``, p < size; zero outside; scale (N,)."""
    length, sign = x.shape[dim], (tap > 0) - (tap < 0)
    distance = abs(tap) * scale  # (N,); NaN for a non-finite scale and tap 0 too
    whole = distance.detach().floor()
    fraction = (distance - whole).view(-1, 1, 1, 1)
    near = whole.nan_to_num(0.0).clamp(-length - 1, length).long()  # beyond lie only zeros
    corners = [_shifted(x, dim, sign * (near + step), size, stride) for step in (0, 1)]
    y: Tensor = _Lerp.apply(corners[0], corners[1], fraction)
    return y


def _shifted(x: Tensor, dim: int, offset: Tensor, size: int, stride: int) -> Tensor:
    """``x`` along ``dim`` at ``p * stride + offset``, p < size; zero outside, offset (N,) int64."""
    positions = torch.arange(size, device=x.device) * stride + offset[:, None]  # (N, size)
    positions = positions.unflatten(1, (1, size, 1) if dim == 2 else (1, 1, size))  # (N, 1, ...)
    inside = (positions >= 0) & (positions < x.shape[dim])
    shape = list(x.shape)
    shape[dim] = size
    return x.gather(dim, torch.where(inside, positions, 0).expand(shape)).where(inside, 0)


class _Lerp(torch.autograd.Function):
    """``(1 - f) a + f b``; at f = 0 just ``a``, though ``b`` be NaN, with derivative ``b - a``."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return torch.where(f == 0, a, (1 - f) * a + f * b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, f = ctx.saved_tensors
        return (
            (1 - f) * grad,
            torch.where(f == 0, 0, f * grad),
            (grad * (b - a)).sum((1, 2, 3), keepdim=True),
        )
