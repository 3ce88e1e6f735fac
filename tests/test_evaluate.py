"""Evaluation: equal to pycocotools on clean input, right where it is silently wrong, VOC, top-1.

pycocotools itself, used as its own README does, is the reference; hand-computed cases stand beside.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coder
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from detkit import rle
from detkit.engine import evaluate as evaluation
from detkit.engine.classification import top1
from detkit.engine.detections import detect_dataset
from detkit.engine.evaluate import evaluate, normalise_truth
from detkit.engine.results import read_results
from detkit.engine.voc import evaluate_voc
from detkit.errors import DataError
from detkit.types import Batch, CategoryMap, ClassificationBatch

Record = dict[str, Any]

NUMBERS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
NAN = float("nan")


# --- inputs and the reference ---------------------------------------------------------------------


def random_truth(rng: np.random.Generator, images: int = 12, classes: int = 4) -> Record:
    """Images with up to eight boxes of 6 to 200 px; ids with gaps, one box in twelve a crowd."""
    annotations: list[Record] = []
    for image in range(images):
        for _ in range(rng.integers(0, 9)):
            w, h = np.exp(rng.uniform(np.log(6), np.log(200), 2))
            x, y = rng.uniform(0, 400), rng.uniform(0, 300)
            annotations.append(
                {
                    "id": 10 + 3 * len(annotations),
                    "image_id": 5 + 2 * image,
                    "category_id": int(rng.integers(classes)) * 7 + 2,
                    "bbox": [x, y, w, h],
                    "area": float(w * h * rng.uniform(0.5, 1)),
                    "iscrowd": int(rng.random() < 1 / 12),
                }
            )
    return {
        "images": [{"id": 5 + 2 * i, "width": 640, "height": 480} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": 7 * c + 2, "name": f"class {c}"} for c in range(classes)],
    }


def perturbed(truth: Record, rng: np.random.Generator) -> list[Record]:
    """Detections as a detector makes them: near the truth, repeated, mistaken, and some tied."""
    ids = [c["id"] for c in truth["categories"]]
    results = []
    for a in truth["annotations"]:
        for _ in range(rng.choice([0, 1, 1, 2, 4])):
            x, y, w, h = a["bbox"]
            dx, dy, dw, dh = rng.normal(0, 0.12, 4)
            results.append(
                {
                    "image_id": a["image_id"],
                    "category_id": a["category_id"] if rng.random() < 0.9 else int(rng.choice(ids)),
                    "bbox": [x + dx * w, y + dy * h, w * math.exp(dw), h * math.exp(dh)],
                    "score": round(float(rng.random()), 2),
                }
            )
    return results


def with_masks(truth: Record, results: list[Record], rng: np.random.Generator) -> list[Record]:
    """The results with an ellipse of their box as mask."""
    sizes = {i["id"]: (i["height"], i["width"]) for i in truth["images"]}
    for r in results:
        height, width = sizes[r["image_id"]]
        x, y, w, h = r["bbox"]
        rows, columns = np.mgrid[:height, :width] + 0.5
        inside = ((columns - x - w / 2) / w) ** 2 + ((rows - y - h / 2) / h) ** 2 <= 0.25
        code = coder.encode(np.asfortranarray(inside.astype(np.uint8)))
        r["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    return results


def pycocotools_eval(truth: Record, results: list[Record], kind: str = "bbox") -> COCOeval:
    """pycocotools with its own calls on its own copies."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        scorer = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer


def stats_of(scorer: COCOeval, category: int) -> list[float]:
    """The twelve numbers of one class, by letting pycocotools summarise that class alone."""
    k = scorer.params.catIds.index(category)
    alone = copy.copy(scorer)
    alone.eval = {**scorer.eval}
    alone.eval["precision"] = scorer.eval["precision"][:, :, [k]]
    alone.eval["recall"] = scorer.eval["recall"][:, [k]]
    with contextlib.redirect_stdout(io.StringIO()):
        alone.summarize()
    return list(alone.stats)


def assert_equal_numbers(ours: Record, theirs: Any) -> None:
    assert list(ours) == NUMBERS
    values = [-1.0 if v is None else v for v in ours.values()]
    np.testing.assert_allclose(values, theirs, rtol=0, atol=1e-9)


def assert_equals_pycocotools(truth: Record, results: list[Record]) -> Record:
    kept = copy.deepcopy((truth, results))
    ours = evaluate(truth, results)
    assert (truth, results) == kept, "evaluate must leave its input as it is"
    assert ours["normalised"] == []
    assert (ours["images"], ours["detections"]) == (len(truth["images"]), len(results))
    scorer = pycocotools_eval(truth, results)
    assert_equal_numbers(ours["bbox"], scorer.stats)
    for category in truth["categories"]:
        assert_equal_numbers(ours["per_class"][category["name"]], stats_of(scorer, category["id"]))
    return ours


def one_class(boxes: list[list[float]], images: int = 1) -> Record:
    """Truth of one class "a"; boxes go to the images in turn."""
    return {
        "images": [{"id": i, "width": 1000, "height": 1000} for i in range(1, images + 1)],
        "annotations": [
            {
                "id": n,
                "image_id": (n - 1) % images + 1,
                "category_id": 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for n, box in enumerate(boxes, 1)
        ],
        "categories": [{"id": 1, "name": "a"}],
    }


def found(box: list[float], score: float, image: int = 1, category: int = 1) -> Record:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


# --- equal to pycocotools -------------------------------------------------------------------------


def nasty(rng: np.random.Generator) -> tuple[Record, list[Record]]:
    """Ties everywhere: boxes on a coarse grid, a few scores, areas on the limits, crowds."""

    def box() -> list[float]:
        sides = rng.integers(0 if rng.random() < 0.1 else 1, 7, 2)
        return [8.0 * float(v) for v in (*rng.integers(0, 6, 2), *sides)]

    classes, images = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    truth = one_class([], images) | {
        "categories": [{"id": k + 1, "name": f"c{k}"} for k in range(classes)]
    }
    truth["images"] = [{"id": i + 1, "width": 100, "height": 100} for i in range(images)]
    for n in range(int(rng.integers(0, 30))):
        x, y, w, h = box()
        truth["annotations"].append(
            {
                "id": n + 1,
                "image_id": int(rng.integers(images)) + 1,
                "category_id": int(rng.integers(classes)) + 1,
                "bbox": [x, y, w or 8.0, h or 8.0],
                "area": float(rng.choice([w * h, 1024, 9216])),
                "iscrowd": int(rng.random() < 0.2),
            }
        )
    results = []
    for _ in range(int(rng.integers(0, 150))):
        score = float(rng.choice([0.5, 0.25, 0, -1, rng.random()]))
        image, category = int(rng.integers(images)) + 1, int(rng.integers(classes)) + 1
        results.append(found(box(), score, image, category))
    return truth, results


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_both_libraries_give_the_same_tables(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, so that installing the extra changes no number."""
    pytest.importorskip("hotcoco")
    assert evaluation.matching_library() == "hotcoco"
    rng = np.random.default_rng(0)
    for _ in range(25):
        truth, results = nasty(rng)
        known = evaluation._Known(normalise_truth(truth)[0], kind)
        for categories in (True, False):
            tables = []
            for library in ("pycocotools", "hotcoco"):
                monkeypatch.setattr(evaluation, "matching_library", lambda name=library: name)
                tables.append(known.tables(results, categories))
            for key in ("precision", "recall"):
                np.testing.assert_array_equal(tables[0][key], tables[1][key])


def test_matches_are_those_of_pycocotools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports and comparisons read them by place."""
    truth, results = nasty(np.random.default_rng(3))
    lists: list[Any] = []
    with_extra = evaluate(truth, results, on_matches=lambda kind, rows: lists.append(rows))
    monkeypatch.setattr(evaluation, "matching_library", lambda: "pycocotools")
    assert with_extra == evaluate(truth, results)
    assert len(lists[0]) == len(truth["images"]) * len(truth["categories"]) * 4


@pytest.mark.parametrize("wrong", [True, 1.0])
def test_an_id_of_the_wrong_type_is_refused_among_many(wrong: object) -> None:
    """Both equal 1, so a set of the ids does not tell."""
    results = [found([0.0, 0.0, 10.0, 10.0], 0.5) for _ in range(3)]
    results[2]["image_id"] = wrong
    with pytest.raises(DataError, match="row 2: image_id"):
        evaluate(one_class([[0.0, 0.0, 10.0, 10.0]]), results)


@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools_on_random_truth(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    ours = assert_equals_pycocotools(truth, perturbed(truth, rng))
    assert 0.1 < ours["bbox"]["AP"] < 0.9, "the case must not be trivial"


@pytest.mark.parametrize(
    ("name", "split"), [("bccd", "val"), ("coco_mini", "val"), ("coco_mini", "train")]
)
def test_equals_pycocotools_on_real_truth(real_data: Path, name: str, split: str) -> None:
    """bccd has many small boxes per image; coco_mini has id gaps, crowds and absent classes."""
    truth = json.loads((real_data / name / "annotations" / f"instances_{split}.json").read_text())
    rng = np.random.default_rng(0)
    ours = assert_equals_pycocotools(truth, perturbed(truth, rng))
    absent = {c["id"] for c in truth["categories"]} - {
        a["category_id"] for a in truth["annotations"]
    }
    for category in truth["categories"]:
        undefined = ours["per_class"][category["name"]]["AP"] is None
        assert undefined == (category["id"] in absent)


def test_more_than_a_hundred_detections_and_text_ids() -> None:
    """pycocotools keeps the best hundred per image and class; text ids sort as text."""
    rng = np.random.default_rng(3)
    truth = random_truth(rng, images=3, classes=1)
    results = [r for _ in range(40) for r in perturbed(truth, rng)]
    assert len(results) > 3 * 100
    for row in [*truth["annotations"], *results]:
        row["image_id"] = f"img {row['image_id']}"
    truth["images"] = [{**i, "id": f"img {i['id']}"} for i in truth["images"]]
    assert_equals_pycocotools(truth, results)


@pytest.mark.parametrize("keep_boxes", [True, False])
def test_masks_equal_pycocotools(real_data: Path, keep_boxes: bool) -> None:
    path = real_data / "nuts_seg" / "annotations" / "instances_val.json"
    truth = json.loads(path.read_text())
    rng = np.random.default_rng(1)
    results = with_masks(truth, perturbed(truth, rng), rng)
    if not keep_boxes:
        results = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    ours = evaluate(truth, results)
    assert ours["normalised"] == []
    assert_equal_numbers(ours["segm"], pycocotools_eval(truth, results, "segm").stats)
    assert_equal_numbers(ours["bbox"], pycocotools_eval(truth, results, "bbox").stats)
    assert 0.1 < ours["segm"]["AP"] < 0.9
    only = evaluate(truth, results, iou_types=("segm",))
    assert "bbox" not in only
    assert only["segm"] == ours["segm"]


def test_crowd_run_lengths_equal_pycocotools(real_data: Path) -> None:
    """coco_mini's crowds are uncompressed run lengths."""
    path = real_data / "coco_mini" / "annotations" / "instances_val.json"
    truth = json.loads(path.read_text())
    assert any(a["iscrowd"] for a in truth["annotations"])
    rng = np.random.default_rng(2)
    results = with_masks(truth, perturbed(truth, rng), rng)
    ours = evaluate(truth, results)
    assert_equal_numbers(ours["segm"], pycocotools_eval(truth, results, "segm").stats)


def test_rows_without_a_mask_count_with_their_box() -> None:
    truth = one_class([[100, 100, 60, 40], [300, 300, 50, 50]])
    truth["annotations"][0]["segmentation"] = [[100, 100, 160, 100, 160, 140, 100, 140]]
    rectangle = [[300, 300, 350, 300, 350, 350, 300, 350]]
    results = [found([100, 100, 60, 40], 0.9), found([300, 300, 50, 50], 0.8)]
    results[1]["segmentation"] = rectangle
    ours = evaluate(truth, results)
    assert ours["segm"]["AP"] == 1
    assert ours["normalised"] == [
        "annotations without a mask, their box taken as one: 1",
        "detections without a mask, their box taken as one: 1",
    ]


def test_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    truth = random_truth(rng)
    evaluate(truth, perturbed(truth, rng), analysis=True)
    assert capsys.readouterr() == ("", "")


# --- where pycocotools is silently wrong ----------------------------------------------------------


def test_annotation_id_zero() -> None:
    """pycocotools stores the matched annotation's id and reads 0 as no match."""
    truth = one_class([[0, 0, 50, 50], [100, 100, 50, 50]])
    truth["annotations"][0]["id"] = 0
    results = [found([0, 0, 50, 50], 0.9), found([100, 100, 50, 50], 0.8)]
    assert pycocotools_eval(truth, results).stats[0] < 0.6
    ours = evaluate(truth, results)
    assert ours["bbox"]["AP"] == 1
    assert ours["normalised"] == [
        "annotation ids missing, repeated or 0, all renumbered: 1 (ids 0)"
    ]


def test_duplicate_annotation_ids() -> None:
    """pycocotools keeps the last annotation of an id, and counts it once for each."""
    truth = one_class([[0, 0, 50, 50], [100, 100, 50, 50]])
    truth["annotations"][1]["id"] = 1
    results = [found([0, 0, 50, 50], 0.9), found([100, 100, 50, 50], 0.8)]
    assert pycocotools_eval(truth, results).stats[0] < 0.6
    ours = evaluate(truth, results)
    assert ours["bbox"]["AP"] == 1
    assert "renumbered: 1 (ids 1)" in ours["normalised"][0]


def test_the_same_object_twice_under_one_id_is_one_object() -> None:
    truth = one_class([[0, 0, 50, 50]])
    truth["annotations"] *= 2
    results = [found([0, 0, 50, 50], 0.9)]
    assert pycocotools_eval(truth, results).stats[8] == 0.5  # AR100: the copy can never be found
    assert evaluate(truth, results)["bbox"]["AR100"] == 1


def test_nan_truth_box() -> None:
    """fmin and fmax pass over NaN: in pycocotools a box at x = NaN overlaps whatever its x is."""
    truth = one_class([[0, 0, 50, 50], [NAN, 500, 50, 50]])
    results = [found([700, 500, 50, 50], 0.9)]  # there is nothing there
    assert pycocotools_eval(truth, results).stats[0] > 0.4
    ours = evaluate(truth, results)
    assert ours["bbox"]["AP"] == 0
    assert ours["normalised"] == [
        "annotations dropped, box is not four finite numbers of positive size: 1 (ids 2)"
    ]


def test_nan_detection_is_a_false_positive() -> None:
    truth = one_class([[0, 0, 50, 50]])
    results = [found([NAN, NAN, 5, 5], 0.9), found([0, 0, 50, 50], 0.8)]
    assert pycocotools_eval(truth, results).stats[0] > 0.99  # NaN took the truth box
    ours = evaluate(truth, results)
    assert ours["bbox"]["AP"] == pytest.approx(0.5)  # precision 1/2 at every recall
    assert ours["detections"] == 2
    assert "counted as false positives: 1 (rows 0)" in ours["normalised"][0]


@pytest.mark.parametrize("box", [[math.inf, 0, 5, 5], [0, 0, -50, 50], [50, 50, -50, -50]])
def test_impossible_detections_are_false_positives(box: list[float]) -> None:
    truth = one_class([[0, 0, 50, 50]])
    ours = evaluate(truth, [found(box, 0.9), found([0, 0, 50, 50], 0.8)])
    assert ours["bbox"]["AP50"] == pytest.approx(0.5)
    assert len(ours["normalised"]) == 1


def test_missing_iscrowd_and_area() -> None:
    """pycocotools stops with KeyError on both; the area is the box's, or the mask's."""
    rng = np.random.default_rng(5)
    truth = random_truth(rng)
    for a in truth["annotations"]:
        a.update(iscrowd=0, area=a["bbox"][2] * a["bbox"][3])
    results = perturbed(truth, rng)
    bare = copy.deepcopy(truth)
    for a in bare["annotations"]:
        del a["iscrowd"], a["area"]
    with pytest.raises(KeyError):
        pycocotools_eval(bare, results)
    ours = evaluate(bare, results)
    assert ours["bbox"] == evaluate(truth, results)["bbox"]
    assert [line.split(":")[0] for line in ours["normalised"]] == [
        "annotations without iscrowd 0 or 1, taken as 0",
        "annotations without a usable area, taken from the mask or the box",
    ]


def test_iscrowd_is_zero_or_one() -> None:
    truth = one_class([[0, 0, 50, 50]] * 5)
    for a, value in zip(truth["annotations"], [0, 1, 2, NAN, "1"], strict=True):
        a["iscrowd"] = value
    clean, notes = normalise_truth(truth)
    assert [a["iscrowd"] for a in clean["annotations"]] == [0, 1, 0, 0, 0]
    assert notes == ["annotations without iscrowd 0 or 1, taken as 0: 3 (ids 3, 4, 5)"]


def test_missing_area_comes_from_the_mask() -> None:
    """A right triangle of 60 x 40 has 1200 pixels; its box has 2400."""
    truth = one_class([[0, 0, 60, 40]])
    truth["annotations"][0].update(area=NAN, segmentation=[[0, 0, 60, 0, 0, 40]])
    assert normalise_truth(truth)[0]["annotations"][0]["area"] == 1200


def test_no_detections() -> None:
    """pycocotools stops with IndexError on an empty list."""
    truth = one_class([[0, 0, 50, 50]])
    truth["categories"].append({"id": 2, "name": "absent"})
    with pytest.raises(IndexError):
        pycocotools_eval(truth, [])
    ours = evaluate(truth, [], analysis=True)
    medium = {"APs": None, "APl": None, "ARs": None, "ARl": None}
    assert ours["bbox"] == {**dict.fromkeys(NUMBERS, 0), **medium}
    assert ours["per_class"]["a"] == ours["bbox"]
    assert ours["per_class"]["absent"] == dict.fromkeys(NUMBERS)
    assert ours["analysis"]["AP"]["all"]["mean"] == 0
    assert ours["analysis"]["AR_class_agnostic"]["small"]["0.5"] is None


def test_no_truth_at_all() -> None:
    truth = {**one_class([]), "images": [{"id": 1}]}
    ours = evaluate(truth, [found([0, 0, 5, 5], 0.5)])
    assert ours["bbox"] == dict.fromkeys(NUMBERS)
    assert evaluate({**truth, "images": []}, [])["images"] == 0


def test_polygon_of_two_points_is_not_a_box() -> None:
    """pycocotools takes four numbers for [x, y, width, height] and stops on a list of them."""
    with pytest.raises(TypeError):
        coder.frPyObjects([[10, 10, 30, 30]], 100, 100)
    truth = one_class([[10, 10, 20, 20]])
    truth["annotations"][0]["segmentation"] = [[10, 10, 30, 30]]
    clean, notes = normalise_truth(truth)
    assert "segmentation" not in clean["annotations"][0]
    assert notes == ["segmentations cut to what is usable: 1 (ids 1)"]


def test_outlines_far_outside_the_image() -> None:
    """pycocotools crashes the process on these; the part inside the image counts."""
    truth = one_class([[0, 0, 1000, 1000]])
    far = [-1e30, -1e30, 1e30, -1e30, 1e30, 1e30, -1e30, 1e30]
    truth["annotations"][0]["segmentation"] = [far]
    results = [{**found([-1e25, -1e25, 1e26, 1e26], 0.5), "segmentation": [far]}]
    assert evaluate(truth, results)["segm"]["AP"] == pytest.approx(1)


def test_unusable_truth_is_named() -> None:
    truth = one_class([[0, 0, 50, 50], [0, 0, 50, 50], [0, 0, 0, 50], [0, 0, 9, 9]])
    truth["annotations"][1]["image_id"] = 77
    truth["annotations"][3]["category_id"] = 9
    truth["images"] *= 2
    clean, notes = normalise_truth(truth)
    assert [a["id"] for a in clean["annotations"]] == [1]
    assert [line.split(": ", 1) for line in notes] == [
        ["images dropped, id listed twice", "1 (ids 1)"],
        ["annotations dropped, unknown image", "1 (ids 2)"],
        ["annotations dropped, box is not four finite numbers of positive size", "1 (ids 3)"],
        ["annotations dropped, unknown category", "1 (ids 4)"],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "must be an object with the list 'images'"),
        ({"categories": []}, "at least one category"),
        ({"categories": [{"id": "1"}]}, r"categories\[0\] must have an integer id"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "must be unique"),
        ({"images": [{"file_name": "x"}]}, r"images\[0\] must have an integer or text id"),
        ({"annotations": [3]}, r"annotations\[0\] must be an object"),
    ],
)
def test_hopeless_truth_is_refused(change: Record, message: str) -> None:
    with pytest.raises(DataError, match=message):
        normalise_truth({**one_class([[0, 0, 5, 5]]), **change})


# --- by hand --------------------------------------------------------------------------------------

THREE = [[0.0, 0.0, 50.0, 50.0], [0.0, 100.0, 50.0, 50.0], [0.0, 200.0, 50.0, 50.0]]
HIT_MISS_HIT_MISS = [
    found(THREE[0], 0.9),
    found([500, 500, 50, 50], 0.8),
    found(THREE[1], 0.7),
    found([600, 600, 50, 50], 0.6),
]
"""Recall 1/3 1/3 2/3 2/3, precision 1 1/2 2/3 1/2, made non-increasing 1 2/3 2/3 1/2."""


def test_average_precision_by_hand() -> None:
    """101 recalls: 0 to .33 (34 of them) have precision 1, .34 to .66 (33) have 2/3, the rest 0."""
    scores = evaluate(one_class(THREE), HIT_MISS_HIT_MISS)["bbox"]
    by_hand = (34 + 33 * 2 / 3) / 101
    assert scores["AP"] == pytest.approx(by_hand, abs=1e-12)
    assert scores["AP50"] == scores["AP75"] == scores["APm"] == pytest.approx(by_hand, abs=1e-12)
    assert scores["AR1"] == pytest.approx(1 / 3)
    assert scores["AR10"] == scores["AR100"] == scores["ARm"] == pytest.approx(2 / 3)
    assert scores["APs"] is scores["APl"] is scores["ARs"] is scores["ARl"] is None


def test_iou_thresholds_by_hand() -> None:
    """IoU 0.62 is a hit at .50, .55 and .60 only: three of ten."""
    scores = evaluate(one_class([[0, 0, 100, 100]]), [found([0, 0, 100, 62], 0.5)], analysis=True)
    assert scores["bbox"]["AP"] == pytest.approx(0.3)
    assert (scores["bbox"]["AP50"], scores["bbox"]["AP75"]) == (pytest.approx(1), 0)
    row = scores["analysis"]["AR"]["large"]
    assert row["mean"] == pytest.approx(0.3)
    assert [row[f"{t / 100:g}"] for t in range(50, 100, 5)] == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_class_agnostic_recall_by_hand() -> None:
    """The wrong class is a miss within classes and a hit across them."""
    truth = one_class(THREE[:2])
    truth["categories"].append({"id": 2, "name": "b"})
    truth["annotations"][1]["category_id"] = 2
    results = [found(THREE[0], 0.9), found(THREE[1], 0.8)]  # both called "a"
    analysis = evaluate(truth, results, analysis=True)["analysis"]
    assert analysis["AR"]["all"]["mean"] == 0.5  # mean of 1 for a and 0 for b
    assert analysis["AR_class_agnostic"]["all"]["mean"] == 1


def test_crowd_takes_any_number_without_counting() -> None:
    truth = one_class([THREE[0], [200, 200, 200, 200]])
    truth["annotations"][1]["iscrowd"] = 1
    inside = [found([210 + 40 * n, 210, 30, 30], 0.95) for n in range(4)]
    assert evaluate(truth, [*inside, found(THREE[0], 0.9)])["bbox"]["AP"] == pytest.approx(1)


# --- analysis -------------------------------------------------------------------------------------


def test_analysis_equals_the_arrays() -> None:
    """Means of pycocotools' precision and recall, indexed as tables 3 and 4 ask."""
    rng = np.random.default_rng(7)
    truth = random_truth(rng, images=20)
    results = perturbed(truth, rng)
    ours = evaluate(truth, results, analysis=True)["analysis"]
    assert list(ours) == ["AP", "AR", "AR_class_agnostic"]
    scorer = pycocotools_eval(truth, results)
    precision, recall = scorer.eval["precision"], scorer.eval["recall"]
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.params.useCats = 0
        scorer.evaluate()
        scorer.accumulate()
    agnostic = scorer.eval["recall"]
    columns = {f"{(50 + 5 * t) / 100:g}": [t] for t in range(10)} | {"mean": range(10)}
    for name, array in (("AP", precision), ("AR", recall), ("AR_class_agnostic", agnostic)):
        assert list(ours[name]) == ["all", "small", "medium", "large"]
        for a, area in enumerate(ours[name]):
            assert set(ours[name][area]) == set(columns)
            for iou, thresholds in columns.items():
                values = [v for t in thresholds for v in array[t, ..., a, 2].ravel() if v > -1]
                assert ours[name][area][iou] == pytest.approx(sum(values) / len(values), abs=1e-9)


# --- properties -----------------------------------------------------------------------------------

ODD_NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, NAN, math.inf, -math.inf, True, None, "3", 1e30, 10**400, 0.5]),
    st.floats(0, 64),
)
ODD_BOXES = st.one_of(st.lists(ODD_NUMBERS, min_size=0, max_size=5), st.none(), st.just("box"))
BOXES = st.lists(st.integers(1, 60), min_size=4, max_size=4)
SEGMENTATIONS = st.one_of(
    st.sampled_from([None, [], [[1, 2, 3, 4]], {"size": [64, 64], "counts": [4000]}, "x"]),
    st.sampled_from([{"size": [64, 64], "counts": [96, 4000]}, {"counts": "l"}, [[0, 0, 9, 0, 0]]]),
    st.lists(st.lists(ODD_NUMBERS, min_size=6, max_size=6), max_size=2),
)
SOUND_ANNOTATIONS = st.fixed_dictionaries(
    {
        "id": st.integers(1, 4),
        "image_id": st.sampled_from([1, 2, "c"]),
        "category_id": st.sampled_from([0, 5]),
        "bbox": BOXES,
        "area": st.floats(1, 20_000),
        "iscrowd": st.integers(0, 1),
    },
    optional={"segmentation": st.just([[2, 2, 40, 2, 40, 40]])},
)
ODD_FIELDS = st.one_of(
    st.tuples(st.just("id"), st.sampled_from([0, -4, None, "a", 1.5, True])),
    st.tuples(st.just("image_id"), st.sampled_from([None, 99, "1", True, [1]])),
    st.tuples(st.just("category_id"), st.sampled_from([None, 17, "5", [5]])),
    st.tuples(st.just("bbox"), ODD_BOXES),
    st.tuples(st.just("area"), ODD_NUMBERS),
    st.tuples(st.just("iscrowd"), ODD_NUMBERS),
    st.tuples(st.just("segmentation"), SEGMENTATIONS),
)
ANNOTATIONS = st.builds(
    lambda sound, odd, missing: {
        k: v for k, v in {**sound, **dict(odd)}.items() if k not in missing
    },
    SOUND_ANNOTATIONS,
    st.lists(ODD_FIELDS, max_size=2),
    st.sets(st.sampled_from(["id", "image_id", "bbox", "area", "iscrowd"]), max_size=1),
)
RESULTS = st.fixed_dictionaries(
    {
        "image_id": st.sampled_from([1, 2, "c"]),
        "category_id": st.sampled_from([0, 5]),
        "bbox": BOXES
        | st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=4, max_size=4),
        "score": st.floats(-1, 2),
    },
    optional={"segmentation": st.just({"size": [64, 64], "counts": [96, 4000]})},
)
FUZZ = settings(deadline=None, derandomize=True, max_examples=100)


@FUZZ
@given(annotations=st.lists(ANNOTATIONS, max_size=6), results=st.lists(RESULTS, max_size=6))
def test_odd_input_never_breaks(annotations: list[Record], results: list[Record]) -> None:
    truth = {
        "images": [{"id": i, "width": 64, "height": 64} for i in (1, 2, "c")],
        "annotations": annotations,
        "categories": [{"id": 0, "name": "zero"}, {"id": 5, "name": "five"}],
    }
    clean, _ = normalise_truth(truth)
    assert normalise_truth(clean) == (clean, []), "normalising twice must change nothing more"
    ours = evaluate(truth, results, analysis=True)
    values = [v for kind in ("bbox", "segm") if kind in ours for v in ours[kind].values()]
    values += [
        v for table in ours["analysis"].values() for row in table.values() for v in row.values()
    ]
    values += [evaluate(truth, results, metric=year)[year]["mAP"] for year in ("voc07", "voc12")]
    assert all(v is None or 0 <= v <= 1 for v in values)
    counted = [a for a in clean["annotations"] if not a["iscrowd"] and a["area"] <= 1e10]
    assert (ours["bbox"]["AP"] is not None) == bool(counted)
    json.dumps(ours, allow_nan=False)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(seed=st.integers(0, 1000))
def test_order_does_not_matter(seed: int) -> None:
    """With distinct scores no order matters: of images and their ids, annotations, results."""
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, images=5)
    results = perturbed(truth, rng)
    for r, score in zip(results, rng.permutation(len(results)), strict=True):
        r["score"] = (score + 1) / (len(results) + 1)
    new_ids = {i["id"]: n for n, i in enumerate(rng.permutation(np.array(truth["images"])), 1)}
    shuffled = {
        **truth,
        "images": [
            {**i, "id": new_ids[i["id"]]} for i in rng.permutation(np.array(truth["images"]))
        ],
        "annotations": [
            {**a, "image_id": new_ids[a["image_id"]]}
            for a in rng.permutation(np.array(truth["annotations"]))
        ],
    }
    rows = [{**r, "image_id": new_ids[r["image_id"]]} for r in rng.permutation(np.array(results))]
    before, after = (evaluate(t, r, analysis=True) for t, r in ((truth, results), (shuffled, rows)))
    assert json.dumps(before) == json.dumps(after)
    assert evaluate(truth, results, metric="voc12") == evaluate(shuffled, rows, metric="voc12")


@FUZZ
@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.0, 0.001, 0.5, 1.0]))
def test_run_lengths_read_as_pycocotools_writes_them(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    mask = (rng.random(rng.integers(1, 90, 2)) < density).astype(np.uint8)
    code = coder.encode(np.asfortranarray(mask))
    text = {"size": code["size"], "counts": code["counts"].decode()}
    assert rle.fits(text, *mask.shape)
    assert rle.mask_area(text) == mask.sum()
    np.testing.assert_array_equal(rle.decode(text), mask)
    assert not rle.fits({**text, "size": [mask.shape[0] + 1, mask.shape[1]]}, *mask.shape)
    assert not rle.fits(text, mask.shape[0] + 1, mask.shape[1])


@pytest.mark.parametrize("counts", ["", "P", "~~", "`" * 30, [-1, 101], [50], [True, 99], None, 7])
def test_run_lengths_that_do_not_fit(counts: object) -> None:
    assert not rle.fits({"size": [10, 10], "counts": counts}, 10, 10)


# --- results files --------------------------------------------------------------------------------

GOOD = found([0, 0, 5, 5], 0.5)


def test_results_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([GOOD, found([1, 2, 3, 4], 1)]))
    assert read_results(path, one_class([])) == [GOOD, found([1, 2, 3, 4], 1)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "row 1: must be an object, got 'text'"),
        ({k: v for k, v in GOOD.items() if k != "score"}, "row 1: must have 'score', got the keys"),
        (
            {k: v for k, v in GOOD.items() if k != "bbox"},
            "row 1: must have 'bbox' or 'segmentation'",
        ),
        ({**GOOD, "image_id": 9}, "row 1: image_id must be one of the 1 in the truth, got 9"),
        ({**GOOD, "image_id": "1"}, "got '1'; write the id as a number"),
        (
            {**GOOD, "image_id": [1]},
            r"row 1: image_id must be one of the 1 in the truth, got \[1\]",
        ),
        ({**GOOD, "category_id": 0}, "row 1: category_id must be one of the 1 in the truth, got 0"),
        ({**GOOD, "category_id": True}, "got True"),
        ({**GOOD, "score": NAN}, "row 1: score must be a finite number, got nan"),
        ({**GOOD, "score": 10**400}, "row 1: score must be a finite number"),
        ({**GOOD, "score": "0.5"}, "row 1: score must be a finite number, got '0.5'"),
        ({**GOOD, "bbox": [1, 2, 3]}, r"row 1: bbox must be four numbers .*, got \[1, 2, 3\]"),
        ({**GOOD, "bbox": [1, 2, 3, None]}, "row 1: bbox must be four numbers"),
        ({**GOOD, "segmentation": [[1, 2, 3, 4]]}, "row 1: polygons must have three points"),
        (
            {**GOOD, "segmentation": {"size": [5, 5], "counts": [25]}},
            r"row 1: segmentation must be run lengths that fill its image's size \[1000, 1000\], "
            r"got size \[5, 5\]",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: object, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([GOOD, row]))
    with pytest.raises(DataError, match=f"results.json: .*{message}"):
        read_results(path, one_class([]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must be a list of detections, got an object"),
        ("[1", "must be valid JSON"),
        ("[" * 100_000, "must be valid JSON"),
        (None, "must be a readable results file, got No such file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=f"results.json: {message}"):
        read_results(path, one_class([]))


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="metric must be one of coco, voc07, voc12, got 'map'"):
        evaluate(one_class([]), [], metric="map")
    with pytest.raises(ValueError, match="iou_types must be bbox and/or segm"):
        evaluate(one_class([]), [], iou_types=("boxes",))
    with pytest.raises(DataError, match="image 1 must have height and width"):
        evaluate({**one_class([]), "images": [{"id": 1}]}, [GOOD], iou_types=("segm",))


# --- VOC ------------------------------------------------------------------------------------------


def test_voc_by_hand() -> None:
    """11 points: recall 0 to .3 precision 1, .4 to .6 2/3, then 0. Area: 1/3 * 1 + 1/3 * 2/3."""
    truth = one_class(THREE)
    by_year = {m: evaluate(truth, HIT_MISS_HIT_MISS, metric=m) for m in ("voc07", "voc12")}
    assert by_year["voc07"]["voc07"]["mAP"] == pytest.approx((4 * 1 + 3 * 2 / 3) / 11, abs=1e-12)
    assert by_year["voc12"]["voc12"]["mAP"] == pytest.approx(5 / 9, abs=1e-12)
    assert by_year["voc12"]["per_class"] == {"a": {"AP": pytest.approx(5 / 9, abs=1e-12)}}
    assert (by_year["voc07"]["images"], by_year["voc07"]["detections"]) == (1, 4)


def test_voc_recall_points_are_exact() -> None:
    """Three of ten found reach recall 0.3, though 0.1 * 3 > 0.3 in floats: 4 of 11 points."""
    truth = one_class([[0, 60 * n, 50, 50] for n in range(10)])
    results = [found([0, 60 * n, 50, 50], 0.9 - 0.1 * n) for n in range(3)]
    assert evaluate_voc(truth, results, year=2007)["mAP"] == pytest.approx(4 / 11, abs=1e-12)


def test_voc_difficult_duplicates_and_threshold() -> None:
    """IoU of exactly 1/2 is a hit; a box found again is false, a difficult one nothing."""
    truth = one_class([[0, 0, 100, 100], [300, 0, 100, 100]])
    truth["annotations"][1]["difficult"] = 1
    results = [found([0, 0, 100, 50], 0.9), found([0, 0, 100, 99], 0.8)]
    assert evaluate_voc(truth, results, year=2012)["mAP"] == 1
    truth["annotations"].append({**truth["annotations"][0], "id": 3, "bbox": [0, 300, 50, 50]})
    results += [found([300, 0, 100, 100], 0.7), found([0, 300, 50, 50], 0.6)]
    # hit, duplicate, (difficult), hit: recall 1/2 1/2 1, precision 1 1/2 2/3
    assert evaluate_voc(truth, results, year=2012)["mAP"] == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)


def test_voc_undefined_and_zero() -> None:
    truth = one_class(THREE)
    truth["categories"].append({"id": 2, "name": "b"})
    scores = evaluate_voc(truth, [found(THREE[0], 0.5, category=2)], year=2012)
    assert scores == {"mAP": 0, "per_class": {"a": {"AP": 0}, "b": {"AP": None}}}


def slow_voc(truth: Record, results: list[Record], year: int) -> float:  # noqa: C901
    """The rules of the development kit as loops over plain lists."""
    scores = []
    for category in truth["categories"]:
        known = [a for a in truth["annotations"] if a["category_id"] == category["id"]]
        positives = sum(not a["iscrowd"] for a in known)
        if not positives:
            continue
        mine = [r for r in results if r["category_id"] == category["id"]]
        used: list[int] = []
        curve, hits, misses = [], 0, 0
        for r in sorted(mine, key=lambda r: r["score"], reverse=True):
            best, best_iou = None, -1.0
            for a in known:
                if a["image_id"] != r["image_id"]:
                    continue
                w = min(a["bbox"][0] + a["bbox"][2], r["bbox"][0] + r["bbox"][2])
                w -= max(a["bbox"][0], r["bbox"][0])
                h = min(a["bbox"][1] + a["bbox"][3], r["bbox"][1] + r["bbox"][3])
                h -= max(a["bbox"][1], r["bbox"][1])
                common = w * h if w > 0 and h > 0 else 0.0
                both = a["bbox"][2] * a["bbox"][3] + r["bbox"][2] * r["bbox"][3] - common
                if common / both > best_iou:
                    best, best_iou = a, common / both
            if best is not None and best_iou >= 0.5:
                if best["iscrowd"]:
                    continue
                if best["id"] not in used:
                    used.append(best["id"])
                    hits += 1
                else:
                    misses += 1
            else:
                misses += 1
            curve.append((hits / positives, hits / (hits + misses)))
        if year == 2007:
            heights = [
                max([p for recall, p in curve if recall >= tenth / 10], default=0.0)
                for tenth in range(11)
            ]
            scores.append(sum(heights) / 11)
        else:
            area, before = 0.0, 0.0
            for n, (recall, _) in enumerate(curve):
                area += (recall - before) * max(p for _, p in curve[n:])
                before = recall
            scores.append(area)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize("seed", range(3))
def test_voc_equals_a_slow_loop(seed: int, year: int) -> None:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    results = perturbed(truth, rng)
    ours = evaluate_voc(truth, results, year=year)["mAP"]
    assert 0.1 < ours < 0.95
    assert ours == pytest.approx(slow_voc(truth, results, year), abs=1e-9)


# --- models ---------------------------------------------------------------------------------------


class ToyDetector(nn.Module):
    """Gives back the detections it was made with; has a part that is always in eval mode."""

    def __init__(self, answers: list[Record]) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm2d(3).eval()
        self.weight = nn.Parameter(torch.ones(1))
        self.answers = answers
        self.seen: list[tuple[bool, bool, Tensor | None]] = []

    def detect(
        self, images: Tensor, sizes: Tensor, output_sizes: Tensor | None = None
    ) -> list[Record]:
        self.seen.append((self.training, torch.is_grad_enabled(), output_sizes))
        scaled = [{**a, "scores": a["scores"] * self.weight} for a in self.answers]
        return scaled[len(self.seen) * len(images) - len(images) :][: len(images)]


def answer(boxes: list[list[float]], labels: list[int], **more: Tensor) -> Record:
    scores = torch.linspace(0.9, 0.5, len(labels))
    table = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": table, "labels": torch.tensor(labels), "scores": scores, **more}


def test_detect_dataset_asks_for_the_pixels_of_the_files() -> None:
    categories = CategoryMap(["cat", "dog"], [17, 3])
    model = ToyDetector([answer([[4, 6, 44, 36], [360, 120, 400, 150]], [2, 1]), answer([], [])])
    model.train()
    model.frozen.eval()
    batch = Batch(
        torch.zeros(2, 3, 64, 128),
        torch.tensor([[50, 100], [64, 128]]),
        image_ids=[8, "b"],
        original_sizes=torch.tensor([[150, 400], [64, 128]]),
    )
    calls: list[Batch] = []
    results = detect_dataset(model, [batch], categories, "cpu", on_batch=calls.append)
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in results] == [
        (8, 3, [4, 6, 40, 30]),
        (8, 17, [360, 120, 40, 30]),
    ]
    assert [r["score"] for r in results] == pytest.approx([0.9, 0.5])
    assert calls == [batch]
    assert [(s[0], s[1]) for s in model.seen] == [(False, False)]
    assert model.seen[0][2] is batch.original_sizes
    assert model.training
    assert not model.frozen.training
    json.dumps(results)


@pytest.mark.parametrize("original", [(20, 30), None])
def test_detect_dataset_encodes_masks(original: tuple[int, int] | None) -> None:
    """A mask of the whole file, or where its size is not known of the padded image, cut to size."""
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, 4:8, 6:16] = True
    given = mask if original is None else mask[:, :20, :30]
    model = ToyDetector([answer([[6, 4, 16, 8]], [1], masks=given)])
    batch = Batch(torch.zeros(1, 3, 32, 32), torch.tensor([[20, 30]]), image_ids=[1])
    batch.original_sizes = None if original is None else torch.tensor([original])
    (result,) = detect_dataset(model, [batch], CategoryMap(["a"]), "cpu")
    assert result["bbox"] == [6, 4, 10, 4]
    assert result["segmentation"]["size"] == [20, 30]
    assert (coder.decode(result["segmentation"]) == mask[0, :20, :30].numpy()).all()
    json.dumps(result)


def test_detect_dataset_refuses_impossible_answers() -> None:
    batch = Batch(torch.zeros(1, 3, 8, 8), torch.tensor([[8, 8]]), image_ids=[1])
    with pytest.raises(ValueError, match=r"labels must be in 1\.\.1, got 0\.\.0"):
        detect_dataset(ToyDetector([answer([[0, 0, 1, 1]], [0])]), [batch], CategoryMap("a"), "cpu")
    with pytest.raises(ValueError, match="each of 1 images must have an id and detections"):
        detect_dataset(ToyDetector([]), [batch], CategoryMap("a"), "cpu")


class ToyClassifier(nn.Module):
    """Answers with the first channel's first pixels as logits."""

    def classify(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, :3]


def test_top1_by_hand() -> None:
    """Class 0: 2 of 2, class 1: 0 of 2 (one of them NaN), class 2: none."""
    images = torch.zeros(4, 3, 1, 3)
    images[0, 0, 0] = torch.tensor([2.0, 1, 0])
    images[1, 0, 0] = torch.tensor([2.0, 1, 0])
    images[2, 0, 0] = torch.tensor([2.0, 1, 0])
    images[3, 0, 0] = torch.tensor([0.0, NAN, 0])
    labels = torch.tensor([0, 0, 1, 1])
    batches = [
        ClassificationBatch(images[:3], labels[:3]),
        ClassificationBatch(images[3:], labels[3:]),
    ]
    assert top1(ToyClassifier(), batches, "cpu", names=["x", "y", "z"]) == {
        "top1": 0.5,
        "images": 4,
        "per_class": {
            "x": {"top1": 1.0, "images": 2},
            "y": {"top1": 0.0, "images": 2},
            "z": {"top1": None, "images": 0},
        },
    }
    with pytest.raises(DataError, match="at least one image"):
        top1(ToyClassifier(), [], "cpu")
