"""What the two RoI operators share: argument checks, the (R, 5) form of boxes, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_SAMPLING_RATIO = 1024  # samples per bin and axis; more can only be a mistake
FEW = 32  # as many RoIs are read faster one by one than by operators on a view


def check_input(op: str, input: Tensor) -> None:
    """Raises ValueError unless ``input`` is a batch of float maps."""
    if input.dim() != 4:
        raise ValueError(f"{op}: input must be (N, C, H, W), got shape {tuple(input.shape)}")
    if not input.is_floating_point():
        raise ValueError(f"{op}: input must be floating point, got {input.dtype}")


def check_sampling(op: str, spatial_scale: float, sampling_ratio: int) -> None:
    """Raises ValueError for a scale that is not positive, or a ratio above the limit."""
    if not 0 < spatial_scale < float("inf"):
        raise ValueError(f"{op}: spatial_scale must be positive and finite, got {spatial_scale}")
    if sampling_ratio > MAX_SAMPLING_RATIO:
        raise ValueError(
            f"{op}: sampling_ratio must be at most {MAX_SAMPLING_RATIO}, got {sampling_ratio}"
        )


def output_pair(op: str, output_size: int | Sequence[int]) -> tuple[int, int]:
    """Bins down and across; raises ValueError unless both are positive."""
    pair = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(
            f"{op}: output_size must be a positive number or a pair of them, got {output_size}"
        )
    return pair[0], pair[1]


def as_rois(op: str, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """Boxes of either form as (R, 5) rows of the coordinates' dtype, without gradient."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if isinstance(boxes, Tensor):
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise ValueError(
                f"{op}: boxes must be (R, 5) with the batch index first or a list of (L, 4), "
                f"got shape {tuple(boxes.shape)}"
            )
        plain = boxes.dtype == dtype and not boxes.requires_grad
        rois = boxes if plain else boxes.detach().to(dtype)
        _check_batch_index(op, rois, input.shape[0])
    else:
        rois = _join(op, boxes, input, dtype)
    if rois.device != input.device:
        raise ValueError(f"{op}: boxes must be on the input's {input.device}, got {rois.device}")
    return rois


def _join(op: str, boxes: Sequence[Tensor], input: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, 5) rows of one (L, 4) tensor per image."""
    if len(boxes) != input.shape[0]:
        raise ValueError(
            f"{op}: boxes must hold one tensor per image, got {len(boxes)} for {input.shape[0]}"
        )
    for b in boxes:
        if b.dim() != 2 or b.shape[1] != 4:
            raise ValueError(f"{op}: boxes of an image must be (L, 4), got shape {tuple(b.shape)}")
    rows = []
    for i, b in enumerate(boxes):
        b = b.detach().to(dtype)
        rows.append(torch.cat([torch.full_like(b[:, :1], i), b], dim=1))  # (L, 5)
    return torch.cat(rows) if rows else input.new_zeros((0, 5), dtype=dtype)


def _check_batch_index(op: str, rois: Tensor, batch: int) -> None:
    """Eager CPU only: on CUDA the look would wait for the device, and a trace has no numbers."""
    if rois.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if rois.shape[0] <= FEW:
        indices = [row[0] for row in rois.tolist()]
    else:
        lowest, highest = rois[:, 0].aminmax()
        if lowest.item() >= 0 and highest.item() < batch:  # else NaN or an error
            return
        indices = rois[:, 0].tolist()
    for value in indices:
        if value < 0 or value >= batch:  # NaN is not wrong: its RoI becomes NaN
            raise ValueError(f"{op}: batch indices must be in 0..{batch - 1}, got {value:g}")


def no_double_backward(ctx: Any, *grads: Tensor) -> None:
    """Backward of a backward op: a silent zero would be a wrong gradient."""
    raise RuntimeError("double backward through RoI operators is not supported")
