"""Running out of memory, told with what filled it and what to change."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from detkit.errors import OutOfMemoryError
from detkit.types import Batch, ClassificationBatch

Part = Batch | ClassificationBatch

_SIGNS = (
    "can't allocate memory",  # torch's CPU allocator
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the process has no memory left; on the CPU torch has no own class."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def explained(what: str, parts: Sequence[Part], *, training: bool) -> Iterator[None]:
    """Say what the memory should have held when it runs out inside the block.

    Args:
        what: which step, for the message.
        parts: batches held one after the other; the one with most pixels is described.
        training: whether to name the settings of training or those of evaluation.

    Raises:
        OutOfMemoryError: the memory ran out; everything else passes through.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        largest = max(parts, key=lambda part: part.images.numel())
        raise OutOfMemoryError(
            f"{what}: must fit into memory, got {_describe(largest)}; "
            f"{_advice(largest, training)} ({_allocator_says(error)})"
        ) from error


def _describe(part: Part) -> str:
    count, _, height, width = part.images.shape
    text = f"{count} image{'s' if count > 1 else ''} of {height}x{width} pixels at once"
    if not isinstance(part, Batch) or not part.targets:
        return text
    boxes = [len(target.boxes) for target in part.targets]
    most = f", {max(boxes)} of them in one image" if count > 1 else ""
    return f"{text} with {sum(boxes)} boxes{most}"


def _advice(part: Part, training: bool) -> str:
    """The settings that take less memory, the most effective first."""
    detection = isinstance(part, Batch)
    if not training:
        extra = " or data.long_side, rpn.post_nms_test or box.max_detections" if detection else ""
        return f"lower data.short_side{extra}"
    rois = "the RoIs of two stages (box.batch_per_image, with box.ohem rpn.post_nms_train)"
    extra = f" or {rois}" if detection else ""
    return (
        f"lower --batch-size, data.short_side{extra}, raise train.accumulate, or set train.amp=bf16"
    )


def _allocator_says(error: BaseException) -> str:
    """The allocator's first two sentences, without their place in torch's sources."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    start = line.find("DefaultCPUAllocator")
    return ". ".join(line[max(0, start) :].split(". ")[:2]).rstrip(".")


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's malloc.h


def reuse_freed_memory(reuse: bool = True) -> bool:
    """Whether the C library now keeps large blocks that are freed, for the next who ask.

    glibc gives blocks over 32 MiB, such as maps of stride 4, back to the system and gets them anew,
    page by page: a fifteenth of a training step of Faster R-CNN ResNet-50-FPN on the CPU, and a
    third of the detection of 16 images of 700x1100 at once with Light-Head S. The process keeps the
    most it has needed. Another C library stays as it is.

    Args:
        reuse: False for glibc's own way, as it is once large blocks have been asked for.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    blocks, top = (0, 2**31 - 1) if reuse else (65536, 2**26)
    wanted = ((_MMAP_THRESHOLD, 2**25), (_MMAP_MAX, blocks), (_TRIM_THRESHOLD, top))
    return all(mallopt(*setting) for setting in wanted) and reuse
