"""What a report counts: curves with pycocotools' areas, confusion, kinds of errors, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from detkit.engine.confusion import confusion, image_quality
from detkit.engine.error_types import KINDS, error_types
from detkit.engine.matches import match, precision_recall, score_curves

NAMES = ("cat", "dog", "cow")


def truth_of(objects: list[tuple[int, int, list[float]]], images: int = 2) -> dict[str, Any]:
    """Ground truth of (image, class, box) rows."""
    return {
        "images": [{"id": i, "width": 400, "height": 400} for i in range(1, images + 1)],
        "categories": [{"id": 10 * k, "name": name} for k, name in enumerate(NAMES, 1)],
        "annotations": [
            {
                "id": n,
                "image_id": image,
                "category_id": 10 * k,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for n, (image, k, box) in enumerate(objects, 1)
        ],
    }


def found(image: int, k: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": 10 * k, "bbox": box, "score": score}


def noisy(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Random objects, crowds among them, and detections near and far, some with equal scores."""
    rng = np.random.default_rng(seed)
    objects, rows = [], []
    for image in range(1, 13):
        for _ in range(int(rng.integers(0, 6))):
            k, box = int(rng.integers(1, 4)), [*rng.uniform(0, 200, 2), *rng.uniform(10, 150, 2)]
            objects.append((image, k, [float(v) for v in box]))
            for _ in range(int(rng.integers(0, 3))):
                moved = [float(v + rng.normal(0, 12)) for v in box[:2]] + box[2:]
                named = k if rng.random() < 0.8 else int(rng.integers(1, 4))
                rows.append(found(image, named, moved, round(float(rng.random()), 1)))
        rows.append(found(image, int(rng.integers(1, 4)), [300, 300, 40, 40], 0.3))
    truth = truth_of(objects, 12)
    for annotation in truth["annotations"][::9]:
        annotation["iscrowd"] = 1
    return truth, rows


@pytest.mark.parametrize("seed", range(4))
def test_curves_have_the_areas_that_pycocotools_gives(seed: int) -> None:
    truth, rows = noisy(seed)
    truth, scores, matches = match(truth, rows)
    for iou, metric in ((0.5, "AP50"), (0.75, "AP75")):
        curves = precision_recall(matches["bbox"], iou)
        for name, curve in zip(NAMES, curves, strict=True):
            expected = scores["per_class"][name][metric]
            assert (None if curve is None else curve.mean()) == pytest.approx(expected, abs=1e-12)
    assert error_types(truth, rows, matches["bbox"]).ap50 == pytest.approx(
        scores["bbox"]["AP50"], abs=1e-12
    )


def test_f1_is_best_between_the_hits_and_the_false_positives() -> None:
    """Two of three objects are found, with 0.8 and 0.6; a false positive has 0.4."""
    truth = truth_of([(1, 1, [0, 0, 50, 50]), (1, 1, [100, 0, 50, 50]), (2, 1, [0, 0, 50, 50])])
    rows = [
        found(1, 1, [0, 0, 50, 50], 0.8),
        found(1, 1, [100, 0, 50, 50], 0.6),
        found(2, 1, [200, 200, 50, 50], 0.4),
    ]
    _, _, matches = match(truth, rows)
    curves = score_curves(matches["bbox"])
    assert curves.classes == (0,)
    assert curves.f1.max() == pytest.approx(2 * 2 / (2 + 3))
    assert curves.threshold == pytest.approx(0.41)
    assert curves.recall[0, [30, 50, 70, 90]] == pytest.approx([2 / 3, 2 / 3, 1 / 3, 0])
    assert curves.precision[0, [30, 50, 70, 90]] == pytest.approx([2 / 3, 1, 1, 1])


def one_of_each() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A hit, and after it one error of each kind."""
    truth = truth_of(
        [
            (1, 1, [0, 0, 100, 100]),  # found; a second box on it is a duplicate
            (1, 2, [200, 0, 100, 100]),  # called a cat
            (1, 3, [0, 200, 100, 100]),  # a cow's box that is too small
            (2, 1, [0, 0, 100, 100]),  # a dog's box that is too small
            (2, 2, [200, 0, 100, 100]),  # missed
        ]
    )
    rows = [
        found(1, 1, [0, 0, 100, 100], 0.95),
        found(1, 1, [0, 0, 100, 90], 0.9),
        found(1, 1, [200, 0, 100, 100], 0.85),
        found(1, 3, [0, 200, 100, 30], 0.8),
        found(2, 2, [0, 0, 100, 30], 0.75),
        found(2, 3, [250, 250, 50, 50], 0.7),
    ]
    return truth, rows


def test_each_kind_of_error_is_told_apart() -> None:
    truth, rows = one_of_each()
    truth, _, matches = match(truth, rows)
    errors = error_types(truth, rows, matches["bbox"])
    order = [-1, *(KINDS.index(k) for k in ("duplicate", "classification", "localisation"))]
    assert errors.kinds.tolist() == [*order, KINDS.index("both"), KINDS.index("background")]
    # The cat of image 2 is missed too: a box of another class in the wrong place does not cover it.
    assert errors.missed.tolist() == [False, False, False, True, True]
    assert errors.counts == dict.fromkeys(KINDS, 1) | {"missed": 2}


def test_gains_are_those_of_scoring_the_corrected_detections() -> None:
    """What `detkit eval` gives when the same correction is made by hand."""
    truth, rows = one_of_each()
    before = match(truth, rows)[1]["bbox"]["AP50"]
    corrected = {
        "classification": [*rows[:2], {**rows[2], "category_id": 20}, *rows[3:]],
        "localisation": [*rows[:3], {**rows[3], "bbox": [0, 200, 100, 100]}, *rows[4:]],
        "both": [*rows[:4], *rows[5:]],
        "duplicate": [rows[0], *rows[2:]],
        "background": rows[:5],
        "false positives": rows[:1],
    }
    normal, _, matches = match(truth, rows)
    gain = error_types(normal, rows, matches["bbox"]).gain
    for kind, fixed in corrected.items():
        after = match(truth, fixed)[1]["bbox"]["AP50"]
        assert gain[kind] == pytest.approx(after - before, abs=1e-12), kind
    asked = {**truth, "annotations": [a for a in truth["annotations"] if a["id"] not in (4, 5)]}
    after = match(asked, rows)[1]["bbox"]["AP50"]
    assert gain["missed"] == pytest.approx(after - before, abs=1e-12)


def test_only_the_best_of_several_boxes_gets_the_object() -> None:
    """Two boxes too small for one object: correcting both gives one hit, not two."""
    truth = truth_of([(1, 1, [0, 0, 100, 100])])
    rows = [found(1, 1, [0, 0, 100, 30], 0.9), found(1, 1, [0, 0, 100, 40], 0.8)]
    truth, _, matches = match(truth, rows)
    errors = error_types(truth, rows, matches["bbox"])
    assert errors.counts["localisation"] == 2
    assert errors.gain["localisation"] == pytest.approx(1)


def test_confusion_counts_every_object_and_detection_once() -> None:
    truth, rows = one_of_each()
    truth, _, matches = match(truth, rows)
    table = confusion(truth, rows, matches["bbox"], 0.0)
    expected = [
        [1, 0, 0, 1],  # cats: one found, one not
        [1, 0, 0, 1],  # dogs: one called a cat, one not found
        [0, 0, 0, 1],  # cow: its box is too small
        [1, 1, 2, 0],  # boxes on no object: duplicate; dog on the cat; two cows
    ]
    assert table.tolist() == expected
    assert confusion(truth, rows, matches["bbox"], 0.92).tolist()[0] == [1, 0, 0, 1]


def test_confusion_prefers_the_larger_overlap_and_excuses_crowds() -> None:
    truth = truth_of([(1, 1, [0, 0, 100, 100]), (1, 2, [300, 300, 90, 90])])
    truth["annotations"][1]["iscrowd"] = 1
    rows = [
        found(1, 2, [0, 0, 100, 60], 0.9),
        found(1, 1, [0, 0, 100, 95], 0.2),
        found(1, 2, [310, 310, 20, 20], 0.9),
    ]
    truth, _, matches = match(truth, rows)
    table = confusion(truth, rows, matches["bbox"], 0.0)
    assert table[0].tolist() == [1, 0, 0, 0]
    assert table[-1].tolist() == [0, 1, 0, 0]  # the dog beside the cat; the one in the crowd not


def test_quality_of_an_image() -> None:
    truth = truth_of([(1, 1, [0, 0, 100, 100]), (1, 2, [200, 0, 100, 100])], images=3)
    rows = [
        found(1, 1, [0, 0, 100, 80], 0.9),
        found(2, 1, [0, 0, 10, 10], 0.9),
        found(3, 1, [0, 0, 10, 10], 0.1),
    ]
    truth, _, matches = match(truth, rows)
    quality = image_quality(truth, rows, matches["bbox"], 0.5)
    assert quality[0] == pytest.approx(0.8 / 1.5)  # one hit of IoU 0.8, one miss
    assert quality[1:] == [0, None]  # a false positive alone; nothing there and nothing shown
