"""What is taken for what: a confusion matrix of detections, and how well each image was read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from detkit.engine.matches import Matches, by_image
from detkit.engine.overlap import intersection, iou

Record = dict[str, Any]
Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

IOU = 0.5
"""Overlap from which a box stands for an object, whatever its class."""


def boxes_of(rows: Sequence[Record]) -> Array:
    """(N, 4) boxes of COCO rows."""
    return np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)


def confusion(
    truth: Record, results: Sequence[Record], matches: Matches, threshold: float
) -> Counts:
    """How many objects of each class were taken for which: (K + 1, K + 1).

    Rows are the classes of the truth, columns those of the detections at or above ``threshold``.
    The last row counts detections where there is no object, the last column objects that nothing
    was detected on. One box goes to one object, pairs of the largest overlap first, regardless of
    class. Crowds do not count, nor does a box that lies in one.

    Args:
        truth: normalised ground truth.
        results: detections, all with boxes.
        matches: their matches.
        threshold: lowest score that counts.
    """
    size = len(matches.names) + 1
    table = np.zeros((size, size), dtype=np.int64)
    objects, found = boxes_of(truth["annotations"]), boxes_of(results)
    shown = matches.scores >= threshold
    images = len(truth["images"])
    sides = by_image(matches.images, images), by_image(matches.object_images, images)
    for here, there in zip(*sides, strict=True):
        here = here[shown[here]]
        crowd, there = there[matches.crowd[there]], there[~matches.crowd[there]]
        pairs = _pairs(iou(found[here], objects[there]))
        for d, g in pairs:
            table[matches.object_classes[there[g]], matches.classes[here[d]]] += 1
        taken, known = {d for d, _ in pairs}, {g for _, g in pairs}
        for g in set(range(len(there))) - known:
            table[matches.object_classes[there[g]], -1] += 1
        excused = _inside(found[here], objects[crowd])
        for d in set(range(len(here))) - taken - excused:
            table[-1, matches.classes[here[d]]] += 1
    return table


def _pairs(overlaps: Array) -> list[tuple[int, int]]:
    """One-to-one pairs of overlap `IOU` or more, the largest overlap first."""
    order = np.argsort(-overlaps, axis=None, kind="stable")
    pairs: list[tuple[int, int]] = []
    rows: set[int] = set()
    columns: set[int] = set()
    for place in order[: np.count_nonzero(overlaps >= IOU)]:
        d, g = divmod(int(place), overlaps.shape[1])
        if d not in rows and g not in columns:
            pairs.append((d, g))
            rows.add(d)
            columns.add(g)
    return pairs


def _inside(boxes: Array, crowds: Array) -> set[int]:
    """Boxes that lie in one of the crowds by at least half."""
    if not len(crowds):
        return set()
    share = intersection(boxes, crowds).max(1) >= IOU * boxes[:, 2] * boxes[:, 3]
    return {int(d) for d in np.flatnonzero(share)}


def image_quality(
    truth: Record, results: Sequence[Record], matches: Matches, threshold: float
) -> list[float | None]:
    """How well each image was read, 0 to 1: its panoptic quality over boxes of all classes.

    The overlaps of the hits are summed and divided by hits + half of the misses and of the false
    positives (Kirillov et al., Panoptic segmentation, CVPR 2019). None for an image that has
    neither objects nor detections.
    """
    objects, found = boxes_of(truth["annotations"]), boxes_of(results)
    shown = (matches.scores >= threshold) & matches.counted[0]
    quality: list[float | None] = []
    images = len(truth["images"])
    sides = by_image(matches.images, images), by_image(matches.object_images, images)
    for here, there in zip(*sides, strict=True):
        here = here[shown[here]]
        hits = here[matches.objects[here] >= 0]
        overlap = sum(
            float(iou(found[[d]], objects[[g]])[0, 0])
            for d, g in zip(hits, matches.objects[hits], strict=True)
        )
        truths = np.count_nonzero(~matches.crowd[there])
        whole = (len(here) + truths) / 2  # hits + half of what either side has alone
        quality.append(float(overlap / whole) if whole else None)
    return quality
