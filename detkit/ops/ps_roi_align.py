"""Position-sensitive RoIAlign (R-FCN, arXiv 1605.06409; Light-Head R-CNN, arXiv 1711.07264).

No autocast rule is registered: the features keep their dtype, coordinates and sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from detkit.ops._library import BUILD_INFO, use_native
from detkit.ops._rois import (
    as_rois,
    check_input,
    check_sampling,
    no_double_backward,
    output_pair,
)
from detkit.ops.reference import roi as reference


def ps_roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    *,
    reduce: Literal["avg", "max"] = "avg",
    offset: float = 0.5,
) -> Tensor:
    """Pools each bin of each box from the channels that belong to that bin.

    Output channel d at bin (i, j) reads input channel (d*P + i)*Q + j. Two rule sets:

    - ``reduce="avg"``, with ``offset=0.5`` torchvision's ``ps_roi_align``: the mean of the samples;
      samples up to one pixel outside the map are clamped to it and others count 0; boxes may have
      size 0 or less. One difference: a bin without samples (an empty box under adaptive sampling)
      is 0 here and NaN there.
    - ``reduce="max"``, with ``offset=0.0`` the code of the Light-Head R-CNN paper: the maximum of
      the samples; corners outside the map count 0; sizes below 0 are raised to 0; 2 by 2 samples
      unless ``sampling_ratio`` says otherwise. The gradient goes to the first maximum.

    Coordinates and sums are float32 (float64 for a float64 input) whatever the features' dtype. A
    NaN feature reaches only the outputs that touch it; a box with a non-finite number gives NaN in
    all its outputs. Boxes get no gradient.

    Args:
        input: (N, D*P*Q, H, W) float16, bfloat16, float32 or float64; any strides.
        boxes: (R, 5) rows (batch index, x1, y1, x2, y2), or per image an (L, 4) tensor of
            x1, y1, x2, y2.
        output_size: Bins (P, Q) down and across, or one number for both.
        spatial_scale: Map pixels per box unit, e.g. 1/16.
        sampling_ratio: Samples per bin and axis; <= 0 takes ceil(box size on the map / bins) for
            "avg" and 2 for "max". A bin of over 2^22 adaptive samples an axis pools to 0.
        reduce: "avg" or "max".
        offset: Map pixels subtracted from the scaled box coordinates.

    Returns:
        (R, D, P, Q) in the input's dtype, contiguous.

    Raises:
        ValueError: On wrong shapes, dtypes, devices, sizes or names, and on CPU for a batch index
            outside the batch. On CUDA, where looking would wait for the device, such a RoI is NaN.
    """
    check_input("ps_roi_align", input)
    check_sampling("ps_roi_align", spatial_scale, sampling_ratio)
    height, width = output_pair("ps_roi_align", output_size)
    if input.shape[1] % (height * width) != 0:
        raise ValueError(
            f"ps_roi_align: channels must be a multiple of {height}*{width}={height * width}, "
            f"got {input.shape[1]}"
        )
    if reduce not in ("avg", "max"):
        raise ValueError(f"ps_roi_align: reduce must be 'avg' or 'max', got {reduce!r}")
    rois = as_rois("ps_roi_align", input, boxes)
    if use_native("ps_roi_align", input, rois):
        pooled: Tensor = torch.ops.detkit.ps_roi_align(
            input, rois, spatial_scale, height, width, sampling_ratio, reduce == "max", offset
        )[0]
        return pooled
    return reference.ps_roi_align(
        input, rois, (height, width), spatial_scale, sampling_ratio, reduce, offset
    )


def _fake(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    reduce_max: bool,
    offset: float,
) -> tuple[Tensor, Tensor]:
    channels = input.shape[1] // (pooled_height * pooled_width)
    shape = (rois.shape[0], channels, pooled_height, pooled_width)
    return input.new_empty(shape), input.new_empty(shape if reduce_max else (0,), dtype=torch.int32)


def _fake_backward(
    grad: Tensor,
    rois: Tensor,
    argmax: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    reduce_max: bool,
    offset: float,
    batch: int,
    channels: int,
    height: int,
    width: int,
    deterministic: bool = False,
) -> Tensor:
    return grad.new_empty((batch, channels, height, width))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, rois, *ctx.numbers = inputs
    ctx.input_shape = input.shape
    ctx.save_for_backward(rois, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    rois, argmax = ctx.saved_tensors
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_input = torch.ops.detkit._ps_roi_align_backward(
        grad, rois, argmax, *ctx.numbers, *ctx.input_shape, deterministic
    )
    return grad_input, None, None, None, None, None, None, None


if BUILD_INFO:
    torch.library.register_fake("detkit::ps_roi_align", _fake)
    torch.library.register_fake("detkit::_ps_roi_align_backward", _fake_backward)
    torch.library.register_autograd("detkit::ps_roi_align", _backward, setup_context=_setup_context)
    torch.library.register_autograd("detkit::_ps_roi_align_backward", no_double_backward)
