"""Why detections are wrong, in six kinds, and what AP50 would be without each.

The kinds and how each is put right are those of TIDE (Bolya et al., TIDE: a general toolbox for
identifying object detection errors, ECCV 2020, section 2): IoU from 0.5 is a hit, below 0.1
background. A false positive has the first kind of the list that fits.

- localisation: overlaps an object of its class, by less than 0.5; put right by moving the box;
- classification: overlaps an object of another class by 0.5 or more; put right by naming it;
- duplicate: a better detection has its object already; put right by leaving it out;
- background: overlaps nothing; put right by leaving it out;
- both: overlaps an object of another class, by less than 0.5; put right by leaving it out;
- missed: an object that nothing was detected on, not even in the wrong place or under the wrong
  name; put right by not asking for it.

Moving or naming a box gives a hit only where its object has none, and only to the best box of those
that would get it; the others are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from detkit.engine.confusion import boxes_of
from detkit.engine.matches import Matches, by_image, precision_curve
from detkit.engine.overlap import iou

Record = dict[str, Any]
Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
"""In the order of the paper's figures."""

HIT, BACKGROUND = 0.5, 0.1
_CLS, _LOC, _BOTH, _DUPE, _BKG = range(5)


@dataclass(frozen=True)
class ErrorTypes:
    """What is wrong, and what each kind costs.

    Attributes:
        ap50: as it is; None without objects.
        counts: errors of each of `KINDS`.
        gain: AP50 won by putting right the errors of a kind alone, also ``false positives`` (all
            of them left out) and ``false negatives`` (all objects without a hit not asked for).
        kinds: (D,) place in `KINDS` of each detection's error, -1 for hits and what does not count.
        missed: (G,) the object is missed.
    """

    ap50: float | None
    counts: dict[str, int]
    gain: dict[str, float | None]
    kinds: Places
    missed: Flags


def error_types(truth: Record, results: Sequence[Record], matches: Matches) -> ErrorTypes:
    """Sort the false positives at IoU 0.5 and the missed objects by what is wrong with them.

    Args:
        truth: normalised ground truth.
        results: detections, all with boxes.
        matches: the matches of their boxes.
    """
    kinds, targets = _sort(
        boxes_of(truth["annotations"]), boxes_of(results), matches, len(truth["images"])
    )
    hit = np.zeros(len(matches.crowd), dtype=np.bool_)
    hit[matches.objects[matches.objects >= 0]] = True
    unfound = ~hit & ~matches.crowd
    covered = np.zeros_like(hit)
    covered[targets[targets >= 0]] = True
    missed = unfound & ~covered
    before = _ap50(matches, matches.classes, matches.counted[0], matches.hit[0], ~matches.crowd)
    gain = {
        name: _difference(before, after)
        for name, after in _put_right(matches, kinds, targets, hit, missed, unfound)
    }
    counts = {name: int(np.count_nonzero(kinds == k)) for k, name in enumerate(KINDS)}
    counts["missed"] = int(np.count_nonzero(missed))
    return ErrorTypes(before, counts, gain, kinds, missed)


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _sort(objects: Array, found: Array, matches: Matches, images: int) -> tuple[Places, Places]:
    """Kind of each false positive, and the object that a box moved or named would find; -1 none."""
    kinds = np.full(len(found), -1, dtype=np.intp)
    targets = np.full(len(found), -1, dtype=np.intp)
    wrong = matches.counted[0] & ~matches.hit[0]
    sides = by_image(matches.images, images), by_image(matches.object_images, images)
    for here, there in zip(*sides, strict=True):
        here, there = here[wrong[here]], there[~matches.crowd[there]]
        if not len(there):
            kinds[here] = _BKG
            continue
        overlaps = iou(found[here], objects[there])  # (D, G)
        same = matches.classes[here, None] == matches.object_classes[there]
        for d, row, own in zip(here, overlaps, same, strict=True):
            kinds[d], target = _kind(row, own)
            targets[d] = there[target] if target >= 0 else -1
    return kinds, targets


def _kind(overlaps: Array, own: Flags) -> tuple[int, int]:
    """Kind of one false positive, and its target among the objects of the image.

    Args:
        overlaps: (G,) IoU with each object.
        own: (G,) the object has its class.
    """
    mine, other = np.where(own, overlaps, 0.0), np.where(own, 0.0, overlaps)
    if BACKGROUND <= mine.max() < HIT:
        return _LOC, int(mine.argmax())
    if other.max() >= HIT:
        return _CLS, int(other.argmax())
    if mine.max() >= HIT:
        return _DUPE, -1
    return (_BKG if overlaps.max() < BACKGROUND else _BOTH), -1


def _put_right(
    matches: Matches, kinds: Places, targets: Places, hit: Flags, missed: Flags, unfound: Flags
) -> list[tuple[str, float | None]]:
    """AP50 with each kind of error put right."""
    classes, counted, hits = matches.classes, matches.counted[0], matches.hit[0]
    asked = ~matches.crowd
    results: list[tuple[str, float | None]] = []
    for k, name in enumerate(KINDS[:-1]):
        wrong = kinds == k
        won = _winners(matches.scores, wrong, targets, hit)
        named = classes.copy()
        named[won] = matches.object_classes[targets[won]]
        left = counted & (~wrong | won)
        results.append((name, _ap50(matches, named, left, hits | won, asked)))
    results.append(("missed", _ap50(matches, classes, counted, hits, asked & ~missed)))
    results.append(("false positives", _ap50(matches, classes, counted & hits, hits, asked)))
    results.append(("false negatives", _ap50(matches, classes, counted, hits, asked & ~unfound)))
    return results


def _winners(scores: Array, wrong: Flags, targets: Places, hit: Flags) -> Flags:
    """Of the wrong boxes with a target that has no hit, the best of each target: (D,)."""
    won = np.zeros(len(scores), dtype=np.bool_)
    taken: set[int] = set()
    candidates = np.flatnonzero(wrong & (targets >= 0))
    for d in candidates[np.argsort(-scores[candidates], kind="stable")]:
        target = int(targets[d])
        if not hit[target] and target not in taken:
            taken.add(target)
            won[d] = True
    return won


def _ap50(
    matches: Matches, classes: Places, counted: Flags, hit: Flags, asked: Flags
) -> float | None:
    """Mean AP over classes; one with nothing to find is left out unless something was found."""
    values = []
    for k in range(len(matches.names)):
        positives = int(np.count_nonzero(asked & (matches.object_classes == k)))
        own = counted & (classes == k)
        if positives:
            curve = precision_curve(matches.scores[own], hit[own], positives)
            values.append(float(curve.mean()))
        elif own.any() and np.any((matches.object_classes == k) & ~matches.crowd):
            values.append(0.0)  # had objects, and false positives are left
    return float(np.mean(values)) if values else None
