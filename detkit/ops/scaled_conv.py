"""Convolution at one real-valued, learnable dilation per sample (POD, Peng et al., ICCV 2019,
section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detkit.errors import NonFiniteValueError
from detkit.ops import _autotune as tuning
from detkit.ops import _conv_rules as rules
from detkit.ops._library import BUILD_INFO, use_native
from detkit.ops.reference import conv as reference

_OP = "scaled_conv2d"


def scaled_conv2d(
    input: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    relu: bool = False,
) -> Tensor:
    """Convolve each sample with taps ``scales`` pixels apart, sampled bilinearly; zeros lie outside
    the map.

    The kernel is anchored at its centre: output (p, q) reads around input (p * stride, q * stride),
    so the size of the output does not depend on the scales. At whole numbers d it equals
    ``F.conv2d(dilation=d, padding=d * (k // 2))``. Gradients reach the scales; where ``|tap| *
    scale`` is whole they are the derivative towards larger scales. Under autocast input and weight
    take the autocast dtype, scales stay float32 and sums are float32.

    Args:
        input: (N, C, H, W).
        weight: (O, C/groups, kh, kw) of the input's dtype, kh and kw odd.
        scales: (N, 2), or (1, 2) or (2,) for all samples, as (d_h, d_w) in pixels; float32, float64
            for a float64 input. Any finite number: 0 lets the taps fall together, negative ones
            mirror the kernel.
        bias: (O,) or None.
        stride: Pixels between outputs, an int or (h, w).
        groups: Groups of input channels, each seen by its own share of the outputs.
        relu: Make outputs below 0 0, on CUDA without passing over them again.

    Returns:
        (N, O, (H - 1) // stride + 1, (W - 1) // stride + 1), channels_last if the input is.

    Raises:
        ValueError: On shapes, dtypes, devices or numbers that do not fit; on a non-finite scale on
            the CPU (on CUDA, where looking would stall the device, its sample becomes NaN).
    """
    rules.check_tensors(_OP, input, [weight], bias, weight.shape[0])
    rules.check_groups(_OP, input.shape[1], weight, groups)
    strides = rules.pair(_OP, "stride", stride, 1)
    odd = weight.shape[2] % 2 == 1 and weight.shape[3] % 2 == 1
    rules.require(odd, _OP, "kernel sides must be odd", tuple(weight.shape[2:]))
    scales = _per_sample(input, scales)
    native = use_native(_OP, input)
    if input.device.type == "cpu":
        _require_finite(scales, native)
    if not native:
        return reference.scaled_conv2d(input, weight, scales, bias, strides, groups, relu)
    run = torch.ops.detkit.scaled_conv2d
    if not (tuning.may_choose(input) and tuning.fused_fits(input, weight.shape[1])):
        columns = tuning.ALGORITHMS[tuning.COLUMNS]
        output: Tensor = run(input, weight, scales, bias, strides, groups, columns, relu)
        return output
    ways: dict[str, tuning.Way] = {
        name: lambda *tensors, algorithm=tuning.ALGORITHMS[name]: run(
            *tensors, strides, groups, algorithm, relu
        )
        for name in (tuning.COLUMNS, tuning.FUSED)
    }
    settings = str((strides, groups, relu))
    return tuning.run_fastest(_OP, (input, weight, scales, bias), settings, ways)


def _per_sample(input: Tensor, scales: Tensor) -> Tensor:
    """Scales (N, 2), checked."""
    wide = input.dtype == torch.float64
    wanted = torch.float64 if wide else torch.float32
    rules.require(
        scales.dtype == wanted,
        _OP,
        f"scales must be {wanted} for a {input.dtype} input",
        scales.dtype,
    )
    rules.require(
        scales.device == input.device, _OP, f"scales must be on {input.device}", scales.device
    )
    samples = input.shape[0]
    ok = scales.dim() in (1, 2) and scales.shape[-1] == 2
    ok = ok and (scales.dim() == 1 or scales.shape[0] == 1 or scales.shape[0] == samples)
    rules.require(ok, _OP, f"scales must be ({samples}, 2), (1, 2) or (2,)", tuple(scales.shape))
    return scales.expand(samples, 2)


def _require_finite(scales: Tensor, native: bool) -> None:
    """Refuse NaN and infinite scales on the CPU; in a traced graph the native kernel does so."""
    if torch.compiler.is_compiling():
        if not native:
            torch._assert_async(scales.isfinite().all(), f"{_OP}: scales must be finite")
    elif not scales.isfinite().all():
        sample = int((~scales.isfinite()).any(1).nonzero()[0])
        got = f"{scales[sample].tolist()} of sample {sample}"
        raise NonFiniteValueError(f"{_OP}: scales must be finite, got {got}")


def _fake(
    input: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    stride: list[int],
    groups: int,
    algorithm: int = 0,
    relu: bool = False,
) -> Tensor:
    size = [(input.shape[a + 2] + stride[a] - 1) // stride[a] for a in (0, 1)]
    return rules.empty_output(input, weight.shape[0], size)


def _fake_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    scales: Tensor,
    stride: list[int],
    groups: int,
    need_input: bool,
    need_weight: bool,
    need_scales: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        rules.empty_grad(input, need_input),
        rules.empty_grad(weight, need_weight),
        rules.empty_grad(scales, need_scales),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, scales, _, *settings = inputs
    ctx.settings = settings[:2]  # stride, groups
    needed = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    rectified = output if any(settings[3:]) else None
    rules.save_input(ctx, input, needed, weight, scales, rectified=rectified)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_input, need_weight, need_scales, need_bias = ctx.needs_input_grad[:4]
    grad = rules.before_relu(ctx, grad)
    gx, gw, gs = torch.ops.detkit._scaled_conv2d_backward(
        grad, *rules.saved_input(ctx, grad), *ctx.settings, need_input, need_weight, need_scales
    )
    gb = grad.sum((0, 2, 3)) if need_bias else None
    gw, gs = gw if need_weight else None, gs if need_scales else None
    return rules.input_grad(ctx, gx), gw, gs, gb, *[None] * 4


if BUILD_INFO:
    torch.library.register_fake("detkit::scaled_conv2d", _fake)
    torch.library.register_fake("detkit::_scaled_conv2d_backward", _fake_backward)
    torch.library.register_autograd(
        "detkit::scaled_conv2d", _backward, setup_context=_setup_context
    )
    torch.library.register_autograd("detkit::_scaled_conv2d_backward", rules.no_double_backward)
    _library = torch.library.Library("detkit", "FRAGMENT")
    rules.register_autocast(_library, _OP, torch.ops.detkit.scaled_conv2d, casts=(0, 1, 3))
