"""Mean average precision of the PASCAL VOC challenge: 2007 (11 points), 2010 to 2012 (area).

The rules of the VOC development kit: detections of a class are taken over all images in order of
score; each takes the truth box of its image it overlaps most; IoU at or above the threshold is a
hit the first time, a false positive when that box was taken already, and nothing at all when the
box is difficult (COCO crowds count as difficult). Boxes are [x, y, width, height] of continuous
extent, which equals the kit's inclusive pixels with width = xmax - xmin + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Record = dict[str, Any]
Array = npt.NDArray[np.float64]


def evaluate_voc(
    truth: Record, results: Sequence[Record], *, year: int = 2007, iou: float = 0.5
) -> Record:
    """VOC mean average precision.

    Args:
        truth: normalised COCO ground truth; annotations with a true "difficult", "ignore" or
            "iscrowd" are difficult.
        results: normalised detections with "bbox".
        year: 2007 for the 11-point rule, later for the area.
        iou: smallest overlap of a hit.

    Returns:
        {"mAP": mean over the classes that have truth, "per_class": {name: {"AP": value}}}; None
        where undefined.
    """
    average = _eleven_points if year < 2010 else _area
    per_class: dict[str, dict[str, float | None]] = {}
    for category in sorted(truth["categories"], key=lambda c: c["id"]):
        annotations = [a for a in truth["annotations"] if a["category_id"] == category["id"]]
        detections = [r for r in results if r["category_id"] == category["id"]]
        hits, positives = match(annotations, detections, iou)
        value = average(hits, positives) if positives else None
        per_class[category["name"]] = {"AP": value}
    defined = [v["AP"] for v in per_class.values() if v["AP"] is not None]
    return {"mAP": sum(defined) / len(defined) if defined else None, "per_class": per_class}


def match(
    annotations: Sequence[Record], detections: Sequence[Record], iou: float
) -> tuple[npt.NDArray[np.bool_], int]:
    """Hit or false positive per counted detection of one class, best first, and the positives."""
    by_image: dict[Any, list[Record]] = {}
    for annotation in annotations:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    boxes = {i: np.array([a["bbox"] for a in rows], np.float64) for i, rows in by_image.items()}
    taken: set[tuple[Any, int]] = set()
    hits = []
    for detection in sorted(detections, key=lambda r: -r["score"]):
        image = detection["image_id"]
        best, overlap = _nearest(np.array(detection["bbox"], dtype=np.float64), boxes.get(image))
        if overlap >= iou and _difficult(by_image[image][best]):
            continue
        hits.append(overlap >= iou and (image, best) not in taken)
        if hits[-1]:
            taken.add((image, best))
    return np.array(hits, dtype=bool), sum(not _difficult(a) for a in annotations)


def _difficult(annotation: Record) -> bool:
    return any(bool(annotation.get(key)) for key in ("difficult", "ignore", "iscrowd"))


def _nearest(box: Array, others: Array | None) -> tuple[int, float]:
    """Index and IoU of the one of ``others`` (G, 4) that ``box`` (4,) overlaps most; all xywh."""
    if others is None:
        return -1, 0.0
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=1)  # (G,)
    overlaps = common / (box[2:].prod() + others[:, 2:].prod(axis=1) - common)
    best = int(overlaps.argmax())
    return best, float(overlaps[best])


def _eleven_points(hits: npt.NDArray[np.bool_], positives: int) -> float:
    """Mean over recall 0, .1, … 1 of the best precision at that recall or above."""
    found = hits.cumsum()
    precision = found / np.arange(1, len(hits) + 1)
    # recall compared in whole numbers: 3 of 10 reaches 0.3, which it does not in floats
    points = [precision[10 * found >= tenth * positives] for tenth in range(11)]
    return float(sum(p.max() for p in points if p.size) / 11)


def _area(hits: npt.NDArray[np.bool_], positives: int) -> float:
    """Area under precision made non-increasing; each hit adds 1 / positives of recall."""
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hits].sum() / positives)
