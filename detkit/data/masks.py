"""Segmentations as COCO json has them: polygons, or RLE with its counts as a list or a string."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from detkit.rle import run_lengths


def segmentation_fault(segmentation: Any, height: int, width: int) -> str:
    """What is wrong with a segmentation, or an empty string; size 0 x 0 means unknown."""
    if isinstance(segmentation, list):
        return _polygon_fault(segmentation)
    if isinstance(segmentation, dict):
        return _rle_fault(segmentation, height, width)
    return f"a value of type {type(segmentation).__name__}"


def _polygon_fault(polygons: list[Any]) -> str:
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "a polygon without three points"
        if not all(isinstance(v, int | float) and abs(v) <= sys.float_info.max for v in polygon):
            return "a polygon with a coordinate that is no number"
    return ""


def _rle_fault(rle: dict[str, Any], height: int, width: int) -> str:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(v, int) for v in size):
        return f"RLE with size {size!r}"
    if height and size != [height, width]:
        return f"RLE of {size[1]}x{size[0]} in an image of {width}x{height}"
    if isinstance(counts, list):
        if not all(isinstance(v, int) and v >= 0 for v in counts):
            return "RLE counts that are not all whole numbers"
        total = sum(counts)
    elif isinstance(counts, str):
        runs = run_lengths(counts)
        if runs is None or (runs < 0).any():
            return "RLE counts that break off"
        total = int(runs.sum())
    else:
        return "RLE without counts"
    return "" if total == size[0] * size[1] else f"RLE of {total} pixels for {size[0] * size[1]}"


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """One compressed RLE of a sound segmentation (polygons are rasterised and joined)."""
    rle: dict[str, Any]
    if isinstance(segmentation, list):
        # pycocotools walks along outlines pixel by pixel, far outside the image too.
        far = 10.0 * max(height, width)
        near = [np.clip(np.asarray(p, dtype=np.float64), -far, far).tolist() for p in segmentation]
        rle = coco_mask.merge(coco_mask.frPyObjects(near, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    return rle


def decode(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """(height, width) mask of a sound segmentation."""
    pixels: NDArray[np.uint8] = coco_mask.decode(to_rle(segmentation, height, width))
    return pixels.astype(np.bool_)


def segmentation_area(segmentation: Any, height: int, width: int) -> float:
    """Pixels of a sound segmentation."""
    return float(coco_mask.area(to_rle(segmentation, height, width)))


def segmentation_box(segmentation: Any, height: int, width: int) -> list[float]:
    """Box (x, y, width, height) of a sound segmentation: of its points or of its pixels."""
    if isinstance(segmentation, list):
        points = np.concatenate([np.reshape(p, (-1, 2)) for p in segmentation])
        low, high = points.min(axis=0), points.max(axis=0)
        return [*low.tolist(), *(high - low).tolist()]
    return [float(v) for v in coco_mask.toBbox(to_rle(segmentation, height, width))]


def encode_counts(mask: NDArray[np.bool_]) -> list[int]:
    """RLE counts of a (H, W) mask: column by column, runs of 0 and 1 in turn, starting with 0."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    ends = changes if len(changes) and changes[-1] == mask.size else np.append(changes, mask.size)
    counts = np.diff(np.concatenate([[0], ends]))
    return [int(c) for c in counts]
