"""Convolutions with different dilations on disjoint output channels, the fast-deployment layer of
POD.

Peng et al., ICCV 2019, section 3.2. All parts write into one output, nothing is concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detkit.ops import _autotune as tuning
from detkit.ops import _conv_rules as rules
from detkit.ops._library import BUILD_INFO, use_native
from detkit.ops.reference import conv as reference

_OP = "split_conv2d"


def split_conv2d(
    input: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    dilations: Sequence[tuple[int, int]],
    stride: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    relu: bool = False,
) -> Tensor:
    """Convolve ``input`` with each part at its own dilation; the outputs share one tensor, in the
    parts' order.

    Each part pads with dilation * (k // 2) zeros, so all parts have the same size. With groups,
    output channel o belongs to group o // (sum(O_i) / groups) as in the undivided convolution; each
    part covers whole groups and reads their inputs.

    Args:
        input: (N, C, H, W).
        weights: Parts (O_i, C/groups, kh, kw) of the input's dtype, kh and kw odd, 1 where the
            dilation is 0.
        bias: (sum(O_i),) or None.
        dilations: (d_h, d_w) of each part in pixels.
        stride: Pixels between outputs, an int or (h, w).
        groups: Groups of the undivided convolution.
        relu: Make outputs below 0 0, on CUDA without passing over them again.

    Returns:
        (N, sum(O_i), (H - 1) // stride + 1, (W - 1) // stride + 1), channels_last if the input is.

    Raises:
        ValueError: On shapes, dtypes, devices or numbers that do not fit.
    """
    rules.require(len(weights) > 0, _OP, "weights must have at least one part", len(weights))
    outputs = sum(w.shape[0] for w in weights)
    rules.check_tensors(_OP, input, weights, bias, outputs)
    _check_parts(input, weights, outputs, groups)
    flat = _flat_dilations(weights, dilations)
    strides = rules.pair(_OP, "stride", stride, 1)
    settings = flat, strides, groups
    if not use_native(_OP, input):
        return reference.split_conv2d(input, weights, bias, *settings, relu)
    native = torch.ops.detkit.split_conv2d
    if not tuning.may_choose(input):
        columns = tuning.ALGORITHMS[tuning.COLUMNS]
        output: Tensor = native(input, list(weights), bias, *settings, columns, relu)
        return output
    names = [tuning.COLUMNS]
    if tuning.fused_fits(input, weights[0].shape[1]):
        names.append(tuning.FUSED)
    ways: dict[str, tuning.Way] = {
        name: lambda x, b, *parts, algorithm=tuning.ALGORITHMS[name]: native(
            x, list(parts), b, *settings, algorithm, relu
        )
        for name in names
    }
    ways[tuning.VENDOR] = lambda x, b, *parts: reference.split_conv2d(x, parts, b, *settings, relu)
    return tuning.run_fastest(_OP, (input, bias, *weights), str((*settings, relu)), ways)


def _check_parts(input: Tensor, weights: Sequence[Tensor], outputs: int, groups: int) -> None:
    rules.require(groups >= 1, _OP, "groups must be at least 1", groups)
    rules.require(
        outputs % groups == 0,
        _OP,
        f"output channels must be a multiple of groups={groups}",
        outputs,
    )
    per_group, begin = outputs // groups, 0
    for part, weight in enumerate(weights):
        name, size = f"{_OP}: part {part}", weight.shape[0]
        rules.check_groups(name, input.shape[1], weight, groups, whole=False)
        inside = begin % per_group + size <= per_group
        whole = begin % per_group == 0 and size % per_group == 0
        must = f"output channels must be whole groups of {per_group} or lie inside one"
        rules.require(size > 0 and (inside or whole), name, must, f"{begin}..{begin + size}")
        begin += size


def _flat_dilations(weights: Sequence[Tensor], dilations: Sequence[tuple[int, int]]) -> list[int]:
    """``[h, w, h, w, ...]``, checked against the kernels."""
    count = f"{len(dilations)} for {len(weights)} parts"
    rules.require(
        len(dilations) == len(weights), _OP, "dilations must have one (h, w) per part", count
    )
    flat: list[int] = []
    for part, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
        both = rules.pair(f"{_OP}: part {part}", "dilation", dilation, 0)
        kernel = tuple(weight.shape[2:])
        for k, d in zip(kernel, both, strict=True):
            fits = k % 2 == 1 and (k == 1 or d > 0)
            rules.require(
                fits,
                f"{_OP}: part {part}",
                "kernel sides must be odd, 1 where the dilation is 0",
                kernel,
            )
        flat += both
    return flat


def _fake(
    input: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    dilations: list[int],
    stride: list[int],
    groups: int,
    algorithm: int = 0,
    relu: bool = False,
) -> Tensor:
    size = [(input.shape[a + 2] + stride[a] - 1) // stride[a] for a in (0, 1)]
    return rules.empty_output(input, sum(w.shape[0] for w in weights), size)


def _fake_backward(
    grad: Tensor,
    input: Tensor,
    weights: list[Tensor],
    dilations: list[int],
    stride: list[int],
    groups: int,
    need_input: bool,
    need_weights: bool,
) -> tuple[Tensor, list[Tensor]]:
    return (
        rules.empty_grad(input, need_input),
        [rules.empty_grad(w, need_weights) for w in weights],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weights, _, *settings = inputs
    ctx.settings = settings[:3]  # dilations, stride, groups
    # Here the flags are still flat, one per tensor of the list; in backward they are nested.
    needed = any(ctx.needs_input_grad[1 : 1 + len(weights)])
    rectified = output if any(settings[4:]) else None
    rules.save_input(ctx, input, needed, *weights, rectified=rectified)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad = rules.before_relu(ctx, grad)
    input, *weights = rules.saved_input(ctx, grad)
    needs = ctx.needs_input_grad
    gx, gws = torch.ops.detkit._split_conv2d_backward(
        grad, input, weights, *ctx.settings, needs[0], any(needs[1])
    )
    gb = grad.sum((0, 2, 3)) if needs[2] else None
    wanted = [g if need else None for g, need in zip(gws, needs[1], strict=True)]
    others = len(needs) - 3  # torch leaves out arguments that have their defaults
    return rules.input_grad(ctx, gx), wanted, gb, *[None] * others


if BUILD_INFO:
    torch.library.register_fake("detkit::split_conv2d", _fake)
    torch.library.register_fake("detkit::_split_conv2d_backward", _fake_backward)
    torch.library.register_autograd("detkit::split_conv2d", _backward, setup_context=_setup_context)
    torch.library.register_autograd("detkit::_split_conv2d_backward", rules.no_double_backward)
    _library = torch.library.Library("detkit", "FRAGMENT")
    rules.register_autocast(_library, _OP, torch.ops.detkit.split_conv2d, casts=(0, 1, 2))
