"""Greedy non-maximum suppression, over all boxes or within each class; also at a fixed size."""

from __future__ import annotations

import torch
from torch import Tensor

from detkit.ops._library import BUILD_INFO, use_native
from detkit.ops.reference import nms as reference


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that survive greedy suppression, best score first.

    A box is dropped when its IoU with a better-scored survivor exceeds ``iou_threshold``. Equal
    scores keep their order, NaN scores come first, and a box with a NaN coordinate suppresses
    nothing and is never suppressed. IoU is computed in float32 (float64 for float64 boxes).

    Args:
        boxes: (N, 4) xyxy, any floating dtype.
        scores: (N,), any floating dtype.
        iou_threshold: In 0..1.

    Returns:
        (M,) int64, M <= N.

    Raises:
        ValueError: On wrong shapes, dtypes, devices or thresholds.
    """
    _check("nms", boxes, scores, iou_threshold)
    if use_native("nms", boxes):
        kept: Tensor = torch.ops.detkit.nms(boxes, scores, iou_threshold)
        return kept
    return reference.nms(boxes, scores, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """As :func:`nms`, but boxes suppress each other only within one class (or level, or image).

    Classes are kept apart by their index; coordinates are not shifted, so nothing is rounded.

    Args:
        boxes: (N, 4) xyxy, any floating dtype.
        scores: (N,), any floating dtype.
        idxs: (N,) class of each box, any integer dtype, any values.
        iou_threshold: In 0..1.

    Returns:
        (M,) int64, best score first over all classes, M <= N.

    Raises:
        ValueError: On wrong shapes, dtypes, devices or thresholds.
    """
    _check("batched_nms", boxes, scores, iou_threshold)
    _check_idxs("batched_nms", boxes, scores, idxs)
    if use_native("batched_nms", boxes):
        kept: Tensor = torch.ops.detkit.batched_nms(boxes, scores, idxs, iou_threshold)
        return kept
    return reference.batched_nms(boxes, scores, idxs, iou_threshold)


def nms_padded(
    boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int, idxs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The first ``limit`` indices of :func:`nms`, or of :func:`batched_nms` with ``idxs``, padded.

    No size depends on the data: on CUDA nothing waits for the device, and a CUDA graph can hold the
    call. Boxes that must not count get the score -inf: they come last and suppress no other.

    Args:
        boxes: (N, 4) xyxy, any floating dtype.
        scores: (N,), any floating dtype.
        iou_threshold: In 0..1.
        limit: Indices wanted, at least 0.
        idxs: (N,) class of each box, or None for one class.

    Returns:
        (limit,) int64 indices, best score first, -1 where there are no more; and their number, ()
        int64.

    Raises:
        ValueError: On wrong shapes, dtypes, devices, thresholds or limits.
    """
    _check("nms_padded", boxes, scores, iou_threshold)
    if idxs is not None:
        _check_idxs("nms_padded", boxes, scores, idxs)
    if limit < 0:
        raise ValueError(f"nms_padded: limit must be at least 0, got {limit}")
    if use_native("nms", boxes):
        padded: tuple[Tensor, Tensor] = torch.ops.detkit.nms_padded(
            boxes, scores, idxs, iou_threshold, limit
        )
        return padded
    return reference.nms_padded(boxes, scores, iou_threshold, limit, idxs)


def _check_idxs(op: str, boxes: Tensor, scores: Tensor, idxs: Tensor) -> None:
    if idxs.shape != scores.shape or idxs.device != boxes.device:
        raise ValueError(
            f"{op}: idxs must have shape {tuple(scores.shape)} on {boxes.device}, "
            f"got {tuple(idxs.shape)} on {idxs.device}"
        )
    if idxs.is_floating_point() or idxs.is_complex() or idxs.dtype == torch.bool:
        raise ValueError(f"{op}: idxs must be integers, got {idxs.dtype}")


def _check(op: str, boxes: Tensor, scores: Tensor, iou_threshold: float) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{op}: boxes must have shape (N, 4), got {tuple(boxes.shape)}")
    if scores.ndim != 1 or scores.shape[0] != boxes.shape[0]:
        raise ValueError(
            f"{op}: scores must have shape ({boxes.shape[0]},), got {tuple(scores.shape)}"
        )
    if scores.device != boxes.device:
        raise ValueError(f"{op}: scores must be on {boxes.device} like boxes, got {scores.device}")
    for name, tensor in (("boxes", boxes), ("scores", scores)):
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    if not 0.0 <= iou_threshold <= 1.0:
        raise ValueError(f"{op}: iou_threshold must be in 0..1, got {iou_threshold}")


def _register_fakes() -> None:
    def kept(boxes: Tensor) -> Tensor:
        size = torch.library.get_ctx().new_dynamic_size()
        return boxes.new_empty(size, dtype=torch.long)

    @torch.library.register_fake("detkit::nms")
    def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        return kept(boxes)

    @torch.library.register_fake("detkit::batched_nms")
    def _(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
        return kept(boxes)

    @torch.library.register_fake("detkit::nms_padded")
    def _(
        boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, limit: int
    ) -> tuple[Tensor, Tensor]:
        return boxes.new_empty(limit, dtype=torch.long), boxes.new_empty((), dtype=torch.long)


if BUILD_INFO:
    _register_fakes()
