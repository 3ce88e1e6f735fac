"""RoIAlign (Mask R-CNN, arXiv 1703.06870 §3): bilinear samples, averaged in a grid of bins per box.

No autocast rule is registered: the features keep their dtype, coordinates and sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Pools each box to a fixed grid; the same call and numbers as torchvision's ``roi_align``.

    Coordinates and sums are float32 (float64 for a float64 input) whatever the features' dtype. A
    NaN feature reaches only the outputs that touch it; a box with a non-finite number gives NaN in
    all its outputs; samples more than a pixel outside the map count 0. Boxes get no gradient.

    Args:
        input: (N, C, H, W) float16, bfloat16, float32 or float64; any strides.
        boxes: (R, 5) rows (batch index, x1, y1, x2, y2), or per image an (L, 4) tensor of
            x1, y1, x2, y2.
        output_size: Bins down and across, or one number for both.
        spatial_scale: Map pixels per box unit, e.g. 1/16.
        sampling_ratio: Samples per bin and axis; <= 0 takes ceil(box size on the map / bins). A bin
            of over 2^22 samples an axis pools to 0.
        aligned: Shift by half a pixel, so that pixel centres are at .5. Otherwise boxes are made
            at least one map pixel large.

    Returns:
        (R, C, P, Q) in the input's dtype, contiguous.

    Raises:
        ValueError: On wrong shapes, dtypes, devices or sizes, and on CPU for a batch index outside
            the batch. On CUDA, where looking would wait for the device, such a RoI is NaN.
    """
    check_input("roi_align", input)
    check_sampling("roi_align", spatial_scale, sampling_ratio)
    height, width = output_pair("roi_align", output_size)
    rois = as_rois("roi_align", input, boxes)
    if use_native("roi_align", input, rois):
        pooled: Tensor = torch.ops.detkit.roi_align(
            input, rois, spatial_scale, height, width, sampling_ratio, aligned
        )
        return pooled
    return reference.roi_align(input, rois, (height, width), spatial_scale, sampling_ratio, aligned)


def _fake(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return input.new_empty((rois.shape[0], input.shape[1], pooled_height, pooled_width))


def _fake_backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
    deterministic: bool = False,
) -> Tensor:
    return grad.new_empty((batch, channels, height, width))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, rois, *ctx.numbers = inputs
    ctx.input_shape = input.shape
    ctx.save_for_backward(rois)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (rois,) = ctx.saved_tensors
    spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned = ctx.numbers
    grad_input = torch.ops.detkit._roi_align_backward(
        grad,
        rois,
        spatial_scale,
        pooled_height,
        pooled_width,
        *ctx.input_shape,
        sampling_ratio,
        aligned,
        torch.are_deterministic_algorithms_enabled(),
    )
    return grad_input, None, None, None, None, None, None


if BUILD_INFO:
    torch.library.register_fake("detkit::roi_align", _fake)
    torch.library.register_fake("detkit::_roi_align_backward", _fake_backward)
    torch.library.register_autograd("detkit::roi_align", _backward, setup_context=_setup_context)
    torch.library.register_autograd("detkit::_roi_align_backward", no_double_backward)
