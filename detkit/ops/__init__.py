"""The operators: native kernels where they were built, the same in plain PyTorch elsewhere.

:func:`backend` says which runs; ``DETKIT_OPS=auto|native|reference`` decides. On CUDA
:func:`autotune` says among which ways convolutions are chosen, :func:`choices` what was.
"""

from detkit.ops import boxes
from detkit.ops._autotune import autotune, choices
from detkit.ops._library import backend
from detkit.ops.dilated_conv import dilated_conv2d
from detkit.ops.nms import batched_nms, nms, nms_padded
from detkit.ops.ps_roi_align import ps_roi_align
from detkit.ops.ps_roi_pool import ps_roi_pool
from detkit.ops.roi_align import roi_align
from detkit.ops.scaled_conv import scaled_conv2d
from detkit.ops.split_conv import split_conv2d

__all__ = [
    "autotune",
    "backend",
    "batched_nms",
    "boxes",
    "choices",
    "dilated_conv2d",
    "nms",
    "nms_padded",
    "ps_roi_align",
    "ps_roi_pool",
    "roi_align",
    "scaled_conv2d",
    "split_conv2d",
]
