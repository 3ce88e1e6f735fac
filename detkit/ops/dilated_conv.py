"""Convolution at an integer dilation, the same call as ``torch.nn.functional.conv2d``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.ops import _autotune as tuning
from detkit.ops import _conv_rules as rules
from detkit.ops._library import BUILD_INFO, use_native
from detkit.ops.reference import conv as reference

_OP = "dilated_conv2d"


def dilated_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    relu: bool = False,
) -> Tensor:
    """Convolve ``input`` with ``weight``, taps ``dilation`` pixels apart; equals ``F.conv2d``.

    Under autocast it runs in the autocast dtype and sums in float32.

    Args:
        input: (N, C, H, W), or (C, H, W) for one image.
        weight: (O, C/groups, kh, kw) of the input's dtype.
        bias: (O,) or None.
        stride: Pixels between outputs, an int or (h, w).
        padding: Zeros around the input, an int or (h, w), or ``"same"`` (stride 1) or ``"valid"``.
        dilation: Pixels between taps, an int or (h, w).
        groups: Groups of input channels, each seen by its own share of the outputs.
        relu: Make outputs below 0 0, on CUDA without passing over them again.

    Returns:
        (N, O, Ho, Wo), channels_last if the input is; Ho = (H + 2 padding - dilation (kh - 1) - 1)
        // stride + 1.

    Raises:
        ValueError: On shapes, dtypes, devices or numbers that do not fit.
    """
    if input.dim() == 3:
        batch = input.unsqueeze(0)
        out = dilated_conv2d(batch, weight, bias, stride, padding, dilation, groups, relu=relu)
        return out.squeeze(0)
    rules.check_tensors(_OP, input, [weight], bias, weight.shape[0])
    rules.check_groups(_OP, input.shape[1], weight, groups)
    strides = rules.pair(_OP, "stride", stride, 1)
    dilations = rules.pair(_OP, "dilation", dilation, 1)
    if isinstance(padding, str):
        input, paddings = _named_padding(input, weight, padding, strides, dilations)
    else:
        paddings = rules.pair(_OP, "padding", padding, 0)
    for axis, name in enumerate(("height", "width")):
        size = input.shape[2 + axis] + 2 * paddings[axis]
        span = dilations[axis] * (weight.shape[2 + axis] - 1) + 1
        rules.require(
            size >= span, _OP, f"padded {name} must be at least the kernel's span {span}", size
        )
    settings = strides, paddings, dilations, groups
    if not use_native(_OP, input):
        return reference.dilated_conv2d(input, weight, bias, *settings, relu)
    native = torch.ops.detkit.dilated_conv2d
    if not tuning.may_choose(input):
        columns = tuning.ALGORITHMS[tuning.COLUMNS]
        output: Tensor = native(input, weight, bias, *settings, columns, relu)
        return output
    names = [tuning.COLUMNS]
    if tuning.fused_fits(input, weight.shape[1]):
        names.append(tuning.FUSED)
    ways: dict[str, tuning.Way] = {
        name: lambda *tensors, algorithm=tuning.ALGORITHMS[name]: native(
            *tensors, *settings, algorithm, relu
        )
        for name in names
    }
    ways[tuning.VENDOR] = lambda x, w, b: reference.dilated_conv2d(x, w, b, *settings, relu)
    return tuning.run_fastest(_OP, (input, weight, bias), str((*settings, relu)), ways)


def _named_padding(
    input: Tensor, weight: Tensor, padding: str, stride: list[int], dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """The input, padded at right and bottom where ``"same"`` needs an odd total, and what is left
    to pad.
    """
    known = padding in ("same", "valid")
    rules.require(known, _OP, "padding must be numbers, 'same' or 'valid'", repr(padding))
    if padding == "valid":
        return input, [0, 0]
    rules.require(stride == [1, 1], _OP, "stride must be 1 with padding='same'", stride)
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, [t // 2 for t in total]


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    algorithm: int = 0,
    relu: bool = False,
) -> Tensor:
    size = [
        (input.shape[a + 2] + 2 * padding[a] - dilation[a] * (weight.shape[a + 2] - 1) - 1)
        // stride[a]
        + 1
        for a in (0, 1)
    ]
    return rules.empty_output(input, weight.shape[0], size)


def _fake_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        rules.empty_grad(input, need_input),
        rules.empty_grad(weight, need_weight),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *settings = inputs
    ctx.settings = settings[:4]  # stride, padding, dilation, groups
    rectified = output if any(settings[5:]) else None
    rules.save_input(ctx, input, ctx.needs_input_grad[1], weight, rectified=rectified)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad = rules.before_relu(ctx, grad)
    gx, gw = torch.ops.detkit._dilated_conv2d_backward(
        grad, *rules.saved_input(ctx, grad), *ctx.settings, need_input, need_weight
    )
    gb = grad.sum((0, 2, 3)) if need_bias else None
    return rules.input_grad(ctx, gx), gw if need_weight else None, gb, *[None] * 6


if BUILD_INFO:
    torch.library.register_fake("detkit::dilated_conv2d", _fake)
    torch.library.register_fake("detkit::_dilated_conv2d_backward", _fake_backward)
    torch.library.register_autograd(
        "detkit::dilated_conv2d", _backward, setup_context=_setup_context
    )
    torch.library.register_autograd("detkit::_dilated_conv2d_backward", rules.no_double_backward)
    _library = torch.library.Library("detkit", "FRAGMENT")
    rules.register_autocast(_library, _OP, torch.ops.detkit.dilated_conv2d, casts=(0, 1, 2))
