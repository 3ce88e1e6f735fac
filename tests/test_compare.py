"""Two sides on the same images: the numbers are evaluate's, the intervals an honest bootstrap's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_evaluate import found, one_class, perturbed, random_truth, with_masks

from detkit.cli.main import run
from detkit.engine.compare import METRICS, compare, draw_weights, rank, weighted_ap
from detkit.engine.evaluate import evaluate
from detkit.errors import DataError
from detkit.report.analysis import draw_analysis

Record = dict[str, Any]


def moved(truth: Record, rng: np.random.Generator, shift: float) -> list[Record]:
    """One detection per object that is no crowd, off by about ``shift`` of its sides."""
    results = []
    for a in truth["annotations"]:
        if not a.get("iscrowd"):
            x, y, w, h = a["bbox"]
            dx, dy = rng.normal(0, shift, 2)
            box = [x + dx * w, y + dy * h, w, h]
            results.append(found(box, float(rng.random()), a["image_id"], a["category_id"]))
    return results


def drawn_ap(truth: Record, results: list[Record], weights: list[int], kind: str) -> Record:
    """The compared numbers where each image counts as often as ``weights`` says."""
    collected = {}
    evaluate(truth, results, on_matches=collected.__setitem__)
    images = len(truth["images"])
    rows = [collected[kind][i : i + images] for i in range(0, len(collected[kind]), images)]
    rankings = [[rank(row) for row in rows[i : i + 4]] for i in range(0, len(rows), 4)]
    values = weighted_ap(rankings, np.array([weights]))[0]  # (K, A, T)
    places = {"AP": (0, slice(None)), "AP50": (0, 0), "AP75": (0, 5)}
    places |= {f"AP{size}": (a, slice(None)) for a, size in enumerate("sml", 1)}
    means = {m: values[:, a, t] for m, (a, t) in places.items()}
    return {m: None if np.isnan(v).all() else float(np.nanmean(v)) for m, v in means.items()}


def assert_same(ours: Record, theirs: Record) -> None:
    for metric in METRICS:
        assert ours[metric] == pytest.approx(theirs[metric], abs=1e-9), metric


# --- accumulation with weights --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_weights_of_one_give_the_ordinary_numbers(seed: int) -> None:
    """And so do weights of two: precision and recall are ratios."""
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    results = perturbed(truth, rng)
    ordinary = evaluate(truth, results)["bbox"]
    assert 0.1 < ordinary["AP"] < 0.9
    for weight in (1, 2):
        assert_same(drawn_ap(truth, results, [weight] * len(truth["images"]), "bbox"), ordinary)


@pytest.mark.parametrize(("name", "kind"), [("coco_mini", "bbox"), ("nuts_seg", "segm")])
def test_weights_of_one_give_the_ordinary_numbers_on_real_truth(
    real_data: Path, name: str, kind: str
) -> None:
    """coco_mini: crowds, absent classes, objects of no class detected; nuts_seg: masks."""
    truth = json.loads((real_data / name / "annotations" / "instances_val.json").read_text())
    rng = np.random.default_rng(0)
    results = perturbed(truth, rng)
    if kind == "segm":
        results = with_masks(truth, results, rng)
    ordinary = evaluate(truth, results)[kind]
    assert_same(drawn_ap(truth, results, [1] * len(truth["images"]), kind), ordinary)


def test_weights_are_copies_of_images() -> None:
    """Scores without ties: the same as a truth that really holds each image that often."""
    rng = np.random.default_rng(5)
    truth = random_truth(rng, images=8)
    results = perturbed(truth, rng)
    for n, row in enumerate(rng.permutation(results)):
        row["score"] = (n + 1) / (len(results) + 1)
    weights = [3, 0, 1, 0, 2, 1, 0, 1]
    copies: Record = {**truth, "images": [], "annotations": []}
    copied: list[Record] = []
    for image, weight in zip(truth["images"], weights, strict=True):
        for _ in range(weight):
            new = len(copies["images"]) + 1
            copies["images"].append({**image, "id": new})
            for source, target in (
                (truth["annotations"], copies["annotations"]),
                (results, copied),
            ):
                target += [{**r, "image_id": new} for r in source if r["image_id"] == image["id"]]
    copies["annotations"] = [{**a, "id": n} for n, a in enumerate(copies["annotations"], 1)]
    assert_same(drawn_ap(truth, results, weights, "bbox"), evaluate(copies, copied)["bbox"])


def test_draws_take_as_many_images_as_there_are() -> None:
    weights = draw_weights(50, 400, seed=3)
    assert weights.shape == (400, 50)
    assert (weights.sum(1) == 50).all()
    assert weights.mean(0) == pytest.approx(np.ones(50), abs=0.25)
    np.testing.assert_array_equal(weights, draw_weights(50, 400, seed=3))
    assert (weights != draw_weights(50, 400, seed=4)).any()


# --- intervals ------------------------------------------------------------------------------------


def test_the_same_detections_differ_by_nothing() -> None:
    rng = np.random.default_rng(1)
    truth = random_truth(rng)
    results = perturbed(truth, rng)
    kept = copy.deepcopy((truth, results))
    answer = compare(truth, results, results, resamples=50)
    assert (truth, results) == kept
    assert answer["a"] == answer["b"] == evaluate(truth, results)
    none = {"value": 0, "low": 0, "high": 0}
    assert answer["difference"]["bbox"] == dict.fromkeys(METRICS, none)
    assert answer["difference"]["per_class"]["class 2"] == {"AP": none}
    assert (answer["images"], answer["resamples"], answer["seed"]) == (12, 50, 0)


def test_clearly_better_is_clearly_above_zero() -> None:
    """And the other way round it is the mirror image; the same seed gives the same limits."""
    rng = np.random.default_rng(2)
    truth = random_truth(rng, images=40)
    rough, near = moved(truth, rng, 0.15), moved(truth, rng, 0.03)
    spread = compare(truth, rough, near, resamples=200)["difference"]["bbox"]
    mirror = compare(truth, near, rough, resamples=200)["difference"]["bbox"]
    for metric in ("AP", "AP75"):
        value, low, high = spread[metric].values()
        assert 0.05 < low < value < high < 0.95
        assert list(mirror[metric].values()) == pytest.approx([-value, -high, -low])


def test_two_of_a_kind_cannot_be_told_apart() -> None:
    rng = np.random.default_rng(3)
    truth = random_truth(rng, images=40)
    pair = [moved(truth, rng, 0.08) for _ in range(2)]
    spread = compare(truth, *pair, resamples=200)["difference"]["bbox"]["AP"]
    assert spread["low"] < 0 < spread["high"]


def test_the_interval_is_as_wide_as_its_images_allow() -> None:
    """AP here is the share f of images found; over N images it deviates by sqrt(f (1 - f) / N)."""
    images, hits = 400, 100
    truth = one_class([[0, 0, 50, 50]] * images, images=images)
    b = [found([0, 0, 50, 50], 0.9, image=n) for n in range(1, hits + 1)]
    spread = compare(truth, [], b, resamples=1000)["difference"]["bbox"]["AP50"]
    half = 1.96 * (0.25 * 0.75 / images) ** 0.5
    assert spread["high"] - spread["low"] == pytest.approx(2 * half, rel=0.15)
    assert (spread["high"] + spread["low"]) / 2 == pytest.approx(0.25, abs=0.01)


def test_no_truth_of_an_area_is_undefined() -> None:
    answer = compare(one_class([[0, 0, 50, 50]]), [], [found([0, 0, 50, 50], 0.5)], resamples=5)
    undefined = {"value": None, "low": None, "high": None}
    assert answer["difference"]["bbox"]["APl"] == undefined
    assert answer["difference"]["bbox"]["AP"] == pytest.approx({"value": 1, "low": 1, "high": 1})
    json.dumps(answer, allow_nan=False)


def test_masks_are_compared_where_both_have_them(real_data: Path) -> None:
    truth = json.loads((real_data / "nuts_seg/annotations/instances_val.json").read_text())
    rng = np.random.default_rng(1)
    masks = with_masks(truth, moved(truth, rng, 0.02), rng)
    boxes = moved(truth, rng, 0.02)
    both = compare(truth, masks, masks[::2], resamples=20)["difference"]
    assert set(both) == {"bbox", "segm", "per_class"}
    assert both["segm"]["AP"]["high"] < 0
    answer = compare(truth, masks, boxes, resamples=20)
    assert set(answer["difference"]) == {"bbox", "per_class"}
    assert "segm" in answer["a"]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        compare(one_class([[0, 0, 5, 5]]), [], [], resamples=0)
    with pytest.raises(DataError, match="at least one image"):
        compare({**one_class([]), "images": []}, [], [])


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def results(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with rough.json and near.json, detections of bccd's validation split."""
    truth = json.loads((real_data / "bccd/annotations/instances_val.json").read_text())
    rng = np.random.default_rng(0)
    for name, shift in (("rough", 0.12), ("near", 0.04)):
        (tmp_path / f"{name}.json").write_text(json.dumps(moved(truth, rng, shift)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command_compares_results_files(
    results: Path, real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", "--compare", "rough.json", "near.json", "--data", str(real_data / "bccd")]
    line += ["--resamples", "100", "--seed", "7"]
    assert run([*line, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    keys = ("images", "resamples", "seed")
    assert [answer[k] for k in keys] == [87, 100, 7]
    for side, name in (("a", "rough"), ("b", "near")):
        alone = ["eval", "--detections", f"{name}.json", "--data", str(real_data / "bccd")]
        assert run([*alone, "--json"]) == 0
        assert answer[side] == json.loads(capsys.readouterr().out)
    spread = answer["difference"]["bbox"]["AP"]
    assert spread["value"] == pytest.approx(answer["b"]["bbox"]["AP"] - answer["a"]["bbox"]["AP"])
    assert 0 < spread["low"] < spread["value"] < spread["high"]
    assert set(answer["difference"]["per_class"]) == set(answer["a"]["per_class"])
    assert run(line) == 0
    shown = capsys.readouterr().out
    assert f"{spread['value']:+.3f}" in shown
    assert f"{spread['low']:+.3f} … {spread['high']:+.3f}" in shown
    assert "100 draws of 87 images, seed 7" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rough.json", "gone.json"], "gone.json: must be a run folder, a .pth checkpoint or a"),
        (["rough.json", "."], "must be a run folder with best.pth or last.pth, got neither"),
        (["rough.json", "near.json", "best.pth"], "--compare: must stand without a checkpoint"),
        (["rough.json", "near.json", "--metric", "voc07"], "without --metric voc07"),
        (["rough.json", "near.json", "--detections", "near.json"], "without --detections"),
        (["rough.json", "near.json", "--save-detections", "x"], "without --save-detections"),
    ],
)
def test_command_refuses(
    results: Path,
    real_data: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert run(["eval", "--data", str(real_data / "bccd"), "--compare", *options]) in (2, 3)
    assert message in capsys.readouterr().err
    assert run(["eval", "--resamples", "5"]) == 2
    assert "--resamples: must go with --compare" in capsys.readouterr().err


# --- the picture ----------------------------------------------------------------------------------


def drawn_figure(names: list[str]) -> tuple[Any, Record]:
    rng = np.random.default_rng(0)
    truth = random_truth(rng)
    truth["annotations"] = [a for a in truth["annotations"] if a["area"] < 96**2]
    analysis = evaluate(truth, moved(truth, rng, 0.05), analysis=True)["analysis"]
    pytest.importorskip("matplotlib", reason="pictures need the extra detkit[plots]")
    return draw_analysis(dict.fromkeys(names, analysis)), analysis


def test_picture_shows_the_analysis() -> None:
    """Twelve panels of one scale: each line is its area's row of the analysis."""
    figure, analysis = drawn_figure(["one", "other"])
    panels = np.array(figure.axes).reshape(3, 4)
    for row, quantity in zip(panels, analysis.values(), strict=True):
        for panel, values in zip(row, quantity.values(), strict=True):
            assert panel.get_ylim() == (0, 1)
            assert len(panel.get_lines()) == 2
            for line in panel.get_lines():
                expected = [values[f"{t / 100:g}"] for t in range(50, 100, 5)]
                expected = [float("nan") if v is None else v for v in expected]
                np.testing.assert_array_equal(line.get_ydata(), expected)
            mean = values["mean"]
            shown = "no objects" if mean is None else f"mean {mean:.3f}"
            assert [text.get_text() for text in panel.texts] == [shown, shown]
    assert panels[0, 3].texts[0].get_text() == "no objects"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "other"]


def test_picture_labels_do_not_overlap() -> None:
    """Axis labels, titles and means as they are laid out, for names as long as they get."""
    figure, _ = drawn_figure(["A: " + "x" * 45, "B: " + "y" * 45])
    figure.canvas.draw()
    texts = [t for p in figure.axes for t in (*p.texts, p.title, p.xaxis.label, p.yaxis.label)]
    texts += [*figure.legends[0].get_texts(), figure._suptitle]
    boxes = [t.get_window_extent() for t in texts if t.get_text()]
    assert len(boxes) > 30
    edges = figure.bbox
    for n, box in enumerate(boxes):
        assert edges.x0 <= box.x0 < box.x1 <= edges.x1
        assert edges.y0 <= box.y0 < box.y1 <= edges.y1
        assert not any(box.overlaps(other) for other in boxes[:n])


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_command_draws(
    results: Path, real_data: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra detkit[plots]")
    line = ["eval", "--compare", "rough.json", "near.json", "--data", str(real_data / "bccd")]
    line += ["--picture", f"curves.{suffix}", "--resamples", "2", "--json"]
    assert run(line) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["picture"] == f"curves.{suffix}"
    assert answer["b"]["analysis"]["AP"]["all"]["0.5"] == answer["b"]["bbox"]["AP50"]
    if suffix == "svg":
        assert "<svg" in (results / "curves.svg").read_text()
    else:
        pixels = np.asarray(Image.open(results / "curves.png").convert("RGB"))
        for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
            assert (pixels == color).all(2).sum() > 1000, "both lines must be there"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--picture: must go with --analysis or --compare, got neither"),
        (["--analysis", "--metric", "voc07"], "--picture: must go with --metric coco, got 'voc07'"),
        (["--analysis", "--picture", "x.jpg"], "must be a .png, .svg or .pdf file in a folder"),
        (["--analysis", "--picture", "gone/x.png"], "in a folder that exists, got gone/x.png"),
    ],
)
def test_pictures_that_cannot_be_drawn_are_refused(
    results: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(["eval", "--detections", "near.json", "--picture", "x.png", *options]) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_nothing_is_started(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data set is not looked for: the message is about matplotlib."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = ["eval", "--detections", "near.json", "--data", "gone", "--analysis"]
    assert run([*line, "--picture", "x.png"]) == 2
    assert "matplotlib must be installed, got none; run `pip install detkit[plots]`" in (
        capsys.readouterr().err
    )
