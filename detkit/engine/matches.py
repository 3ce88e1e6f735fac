"""Which detection found which object, and what follows from it: precision, recall, F1, quality.

The matches are pycocotools' own, so a curve drawn from them has the area that ``detkit eval``
reports. Detections are rows of the results and objects rows of the normalised truth throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from detkit.engine.analysis import AREAS, THRESHOLDS
from detkit.engine.evaluate import evaluate
from detkit.engine.truth import normalise_truth

Record = dict[str, Any]
Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]

RECALLS = np.linspace(0, 1, 101)
"""Recall points of COCO's average precision."""

SCORES = np.linspace(0, 1, 101)
"""Score thresholds of the F1 curves."""


@dataclass(frozen=True)
class Matches:
    """Matches of D detections with G objects, all sizes, within each of K classes.

    Attributes:
        names: K class names, in order of category id.
        scores: (D,) of the detections.
        classes: (D,) 0..K-1.
        images: (D,) place of the image among those of the truth.
        hit: (T, D) found an object that counts, at each of COCO's IoU thresholds.
        counted: (T, D) is a hit or a false positive; False where a crowd excuses it, or where it
            stands below the 100 best of its image and class.
        objects: (D,) the object found at IoU 0.5, -1 for none.
        object_classes: (G,) 0..K-1.
        object_images: (G,) place of the image.
        crowd: (G,) does not count.
    """

    names: tuple[str, ...]
    scores: Array
    classes: Places
    images: Places
    hit: Flags
    counted: Flags
    objects: Places
    object_classes: Places
    object_images: Places
    crowd: Flags

    def positives(self) -> Places:
        """(K,) objects that count, by class."""
        return np.bincount(self.object_classes[~self.crowd], minlength=len(self.names))


def by_image(images: Places, count: int) -> list[Places]:
    """Rows of each of ``count`` images, in order; ``images`` (N,) is the image of each row."""
    order = np.argsort(images, kind="stable")
    return np.split(order, np.searchsorted(images[order], np.arange(1, count)))


def match(truth: Record, results: Sequence[Record]) -> tuple[Record, Record, dict[str, Matches]]:
    """Score detections and keep who matched whom.

    Args:
        truth: COCO ground truth.
        results: detections in COCO's results format.

    Returns:
        the normalised truth, what :func:`detkit.engine.evaluate.evaluate` gives for it with its
        analysis, and the matches of each IoU type (``bbox``, ``segm``).

    Raises:
        DataError: truth or results are unusable.
    """
    truth, notes = normalise_truth(truth)
    raw: dict[str, Sequence[Record | None]] = {}
    scores = evaluate(truth, results, analysis=True, on_matches=raw.__setitem__)
    scores["normalised"] = notes + scores["normalised"]
    return truth, scores, {kind: _matches(truth, results, rows) for kind, rows in raw.items()}


def _matches(truth: Record, results: Sequence[Record], raw: Sequence[Record | None]) -> Matches:
    categories = sorted(truth["categories"], key=lambda c: c["id"])
    class_of = {c["id"]: k for k, c in enumerate(categories)}
    image_of = {image["id"]: n for n, image in enumerate(truth["images"])}
    annotations = truth["annotations"]
    count = len(results)
    hit = np.zeros((len(THRESHOLDS), count), dtype=np.bool_)
    counted = np.zeros_like(hit)
    objects = np.full(count, -1, dtype=np.intp)
    images = len(truth["images"])
    for start in range(0, len(raw), images * len(AREAS)):  # the first area of each class: all sizes
        for row in raw[start : start + images]:
            if row is None or not row["dtIds"]:
                continue
            places = np.asarray(row["dtIds"]) - 1  # ids there are rows here, counted from 1
            matched = np.asarray(row["dtMatches"]).astype(np.intp)
            counted[:, places] = np.asarray(row["dtIgnore"]) == 0
            hit[:, places] = (matched > 0) & counted[:, places]
            objects[places] = np.where(hit[0, places], matched[0] - 1, -1)
    return Matches(
        names=tuple(c["name"] for c in categories),
        scores=np.array([r["score"] for r in results], dtype=np.float64),
        classes=_places([class_of[r["category_id"]] for r in results]),
        images=_places([image_of[r["image_id"]] for r in results]),
        hit=hit,
        counted=counted,
        objects=objects,
        object_classes=_places([class_of[a["category_id"]] for a in annotations]),
        object_images=_places([image_of[a["image_id"]] for a in annotations]),
        crowd=np.array([bool(a["iscrowd"]) for a in annotations], dtype=np.bool_),
    )


def _places(values: Sequence[int]) -> Places:
    return np.array(values, dtype=np.intp)


def precision_curve(scores: Array, hit: Flags, positives: int) -> Array:
    """Precision at each of `RECALLS`, (101,), of counted detections; its mean is COCO's AP.

    Args:
        scores: (D,) of the detections.
        hit: (D,) found an object.
        positives: objects in all, at least 1.
    """
    hit = hit[np.argsort(-scores, kind="stable")]
    found = np.cumsum(hit)
    precision = found / (np.arange(1, len(hit) + 1) + np.spacing(1))
    best = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(found / positives, RECALLS, side="left")
    return np.append(best, 0.0)[np.minimum(reached, len(best))]


def precision_recall(matches: Matches, iou: float) -> list[Array | None]:
    """Precision at each of `RECALLS` of every class; None for a class without objects.

    Args:
        matches: who found whom.
        iou: one of COCO's thresholds.
    """
    t, positives = THRESHOLDS.index(iou), matches.positives()
    curves: list[Array | None] = []
    for k in range(len(matches.names)):
        own = (matches.classes == k) & matches.counted[t]
        own_hits = matches.hit[t, own]
        curves.append(
            precision_curve(matches.scores[own], own_hits, int(positives[k]))
            if positives[k]
            else None
        )
    return curves


@dataclass(frozen=True)
class ScoreCurves:
    """Precision, recall and F1 at IoU 0.5 when detections below a score are dropped.

    Attributes:
        precision: (K, 101) at each of `SCORES`; 1 where nothing is left.
        recall: (K, 101).
        f1: (K, 101).
        classes: K places of the classes that have objects.
    """

    precision: Array
    recall: Array
    f1: Array
    classes: tuple[int, ...]

    @property
    def best(self) -> int:
        """Place in `SCORES` of the best F1, averaged over classes; the lowest of equals."""
        return int(self.f1.mean(0).argmax()) if len(self.classes) else len(SCORES) // 2

    @property
    def threshold(self) -> float:
        """Score of the best F1."""
        return float(SCORES[self.best])


def score_curves(matches: Matches) -> ScoreCurves:
    """The curves of every class that has objects."""
    positives = matches.positives()
    classes = tuple(int(k) for k in np.flatnonzero(positives))
    precision = np.ones((len(classes), len(SCORES)))
    recall, f1 = np.zeros_like(precision), np.zeros_like(precision)
    for row, k in enumerate(classes):
        own = (matches.classes == k) & matches.counted[0]
        kept = matches.scores[own][:, None] >= SCORES  # (D, 101)
        found, seen = kept[matches.hit[0, own]].sum(0), kept.sum(0)
        precision[row] = np.where(seen > 0, found / np.maximum(seen, 1), 1.0)
        recall[row] = found / positives[k]
        f1[row] = 2 * found / (seen + positives[k])
    return ScoreCurves(precision, recall, f1, classes)
