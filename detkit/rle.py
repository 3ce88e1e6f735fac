"""What a COCO segmentation says without decoding it: run lengths, area, whether it fits its image.

pycocotools reads run lengths without checking them against the image, takes a polygon of two points
for a box and stops, and gives masks of another size IoU -1; all of this is caught here. Numpy only.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

Runs = npt.NDArray[np.int64]


def run_lengths(counts: object) -> Runs | None:
    """Run lengths (background first) from a list of ints or COCO's compressed text, else None.

    The text holds each number in groups of 5 bits, low bits first, as characters from 48 on: bit 32
    says that another group follows, bit 16 of the last group is the sign. From the fourth number on
    it is the difference to the number two places before that is stored.
    """
    if isinstance(counts, list):
        if not all(isinstance(c, int) and not isinstance(c, bool) for c in counts):
            return None
        return np.array(counts, dtype=np.int64)
    if isinstance(counts, str):
        counts = counts.encode("utf-8")
    return _decompress(counts) if isinstance(counts, bytes) else None


def _decompress(text: bytes) -> Runs | None:
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if codes.size == 0:
        return codes
    last = (codes & 32) == 0  # the group that ends a number
    if codes.min() < 0 or codes.max() > 63 or not last[-1]:
        return None
    starts = np.concatenate(([0], np.flatnonzero(last)[:-1] + 1))
    ends = np.flatnonzero(last)
    place = np.arange(codes.size) - np.repeat(starts, ends - starts + 1)
    if place.max() > 7:  # more than 40 bits: no image has such runs
        return None
    numbers: Runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    negative = (codes[ends] & 16) != 0
    numbers = numbers - (negative.astype(np.int64) << (5 * (place[ends] + 1)))
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def fits(segmentation: object, height: int, width: int) -> bool:
    """True for run lengths {"size", "counts"} that cover an image of this size exactly."""
    if not isinstance(segmentation, dict) or list(segmentation.get("size", ())) != [height, width]:
        return False
    runs = run_lengths(segmentation.get("counts"))
    return runs is not None and bool((runs >= 0).all()) and int(runs.sum()) == height * width


def usable_polygons(segmentation: object) -> list[list[float]]:
    """The polygons with at least three points, complete pairs and finite coordinates."""
    if not isinstance(segmentation, list):
        return []
    return [p for p in segmentation if _is_polygon(p)]


def _is_polygon(points: object) -> bool:
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return False
    largest = sys.float_info.max  # NaN, infinity, and integers beyond floats are not below it
    return all(isinstance(v, int | float) and abs(v) <= largest for v in points)


def mask_area(segmentation: list[list[float]] | dict[str, Any]) -> float:
    """Area in pixels of polygons (sum of the parts, as COCO's own `area`) or of run lengths."""
    if isinstance(segmentation, dict):
        runs = run_lengths(segmentation["counts"])
        return 0.0 if runs is None else float(runs[1::2].sum())
    return sum(_polygon_area(np.array(p, dtype=np.float64).reshape(-1, 2)) for p in segmentation)


def _polygon_area(points: npt.NDArray[np.float64]) -> float:
    x, y = points[:, 0], points[:, 1]  # (P,)
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def decode(segmentation: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """The mask (H, W) of run lengths that fit their "size": 1 inside, runs go down the columns."""
    height, width = segmentation["size"]
    runs = run_lengths(segmentation["counts"])
    if runs is None or not fits(segmentation, height, width):
        raise ValueError(f"rle: run lengths must fill their size, got size {segmentation['size']}")
    flat = np.repeat(np.arange(runs.size, dtype=np.uint8) % 2, runs)
    return flat.reshape(width, height).T
