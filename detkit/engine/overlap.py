"""Overlap of boxes [x, y, width, height] in numpy, for what is told about detections on the CPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def iou(a: Array, b: Array) -> Array:
    """Intersection over union of each box of ``a`` (A, 4) and each of ``b`` (B, 4): (A, B).

    0 where both boxes are empty.
    """
    union = _area(a)[:, None] + _area(b) - (common := intersection(a, b))
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def intersection(a: Array, b: Array) -> Array:
    """Area that each box of ``a`` (A, 4) shares with each of ``b`` (B, 4): (A, B)."""
    low = np.maximum(a[:, None, :2], b[:, :2])
    high = np.minimum(a[:, None, :2] + a[:, None, 2:], b[:, :2] + b[:, 2:])
    return np.asarray(np.clip(high - low, 0, None).prod(axis=2))


def _area(boxes: Array) -> Array:
    return np.asarray(boxes[:, 2] * boxes[:, 3])
