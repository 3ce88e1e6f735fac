"""Two operators of a detector that ONNX has and plain PyTorch lacks: RoIAlign and suppression.

Registered so that ``torch.export`` keeps each as one node. In PyTorch they run detkit's operators;
:func:`translations` says how they are written in ONNX. Both have outputs whose shapes follow from
those of their inputs, so no size in the exported graph depends on values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detkit import ops

LOWEST = -3.4e38
"""Scores at or below this are no candidates: a filler has the score -inf."""


@torch.library.custom_op("detkit_onnx::roi_align", mutates_args=())
def roi_align(
    features: Tensor, rois: Tensor, side: int, scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """As :func:`detkit.ops.roi_align`, (R, C, side, side)."""
    return ops.roi_align(features, rois, side, scale, sampling_ratio, aligned)


@roi_align.register_fake
def _(
    features: Tensor, rois: Tensor, side: int, scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    return features.new_empty(rois.shape[0], features.shape[1], side, side)


@torch.library.custom_op("detkit_onnx::nms_mask", mutates_args=())
def nms_mask(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Which boxes survive greedy suppression within each row of scores.

    Args:
        boxes: (B, S, 4) xyxy.
        scores: (B, C, S); a row is suppressed on its own, entries of -inf take no part.
        iou_threshold: See :func:`detkit.ops.nms`.

    Returns:
        (B, C, S) bool.
    """
    row = torch.arange(scores.shape[0] * scores.shape[1]).view(*scores.shape[:2], 1)
    entries = (scores > LOWEST).flatten().nonzero().flatten()
    every_box = boxes[:, None].expand(*scores.shape, 4).flatten(0, 2)
    group = row.to(scores.device).expand_as(scores).flatten()
    kept = ops.batched_nms(
        every_box[entries], scores.flatten()[entries], group[entries], iou_threshold
    )
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[entries[kept]] = True
    return mask.view(scores.shape)


@nms_mask.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator to the function that writes it with ONNX operators; needs onnxscript."""
    from onnxscript import opset18

    op: Any = opset18  # its types allow no tensor of an unnamed kind

    def align(
        features: Any, rois: Any, side: int, scale: float, sampling_ratio: int, aligned: bool
    ) -> Any:
        axis = op.Constant(value_ints=[1])
        begin, middle, end = (op.Constant(value_ints=[i]) for i in (0, 1, 5))
        image = op.Squeeze(op.Cast(op.Slice(rois, begin, middle, axis), to=_INT64), axis)
        return op.RoiAlign(
            features,
            op.Slice(rois, middle, end, axis),
            image,
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
            mode="avg",
            output_height=side,
            output_width=side,
            sampling_ratio=max(sampling_ratio, 0),
            spatial_scale=scale,
        )

    def suppress(boxes: Any, scores: Any, iou_threshold: float) -> Any:
        selected = op.NonMaxSuppression(
            boxes,
            scores,
            op.Constant(value_ints=[_ALL]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[LOWEST]),
        )  # (M, 3) batch, row, box
        none = op.Expand(op.Constant(value_ints=[0]), op.Shape(scores))
        ones = op.Expand(
            op.Constant(value_ints=[1]),
            op.Slice(op.Shape(selected), op.Constant(value_ints=[0]), op.Constant(value_ints=[1])),
        )
        return op.Cast(op.ScatterND(none, selected, ones), to=_BOOL)

    return {
        torch.ops.detkit_onnx.roi_align.default: align,
        torch.ops.detkit_onnx.nms_mask.default: suppress,
    }


_INT64, _BOOL = 7, 9  # onnx.TensorProto
_ALL = 2**31 - 1
