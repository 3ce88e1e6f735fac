"""Pages of made-up runs: any number of classes, objects and detections, any names, any size."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_pages import checked
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from detkit.config import Config
from detkit.report.charts import Line, legend, thinned
from detkit.report.confusion import merged
from detkit.report.document import LARGEST, document
from detkit.report.evaluation import Evaluation, evaluation
from detkit.report.pictures import extremes, pictures
from detkit.report.runs import Run, short_names
from detkit.report.svg import INK, inline_svg
from detkit.report.tables import Best, Share, table

EVIL = "\"><script>alert('x')</script>&amp;"


def noise(image_id: int | str) -> Image.Image:
    """The worst case for JPEG."""
    rng = np.random.default_rng(int(image_id))
    return Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8))


def made_up(
    classes: int, *, images: int = 12, objects: int = 4, found: int = 6, masks: bool = False
) -> Evaluation:
    """Random objects of random classes, and detections half of which are near them."""
    rng = np.random.default_rng(classes)
    names = [f"class {k} {EVIL}" for k in range(1, classes + 1)]
    annotations: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []

    def shape(box: list[float]) -> dict[str, Any]:
        x, y, w, h = box
        outline = {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]} if masks else {}
        return {"bbox": box, **outline}

    for image in range(1, images + 1):
        for _ in range(objects):
            box = [float(v) for v in (*rng.uniform(0, 300, 2), *rng.uniform(20, 150, 2))]
            own = {"id": len(annotations) + 1, "image_id": image, "iscrowd": 0}
            annotations.append(
                {
                    **own,
                    **shape(box),
                    "category_id": int(rng.integers(1, classes + 1)),
                    "area": box[2] * box[3],
                }
            )
        for n in range(found):
            near = annotations[-1 - n % objects] if n % 2 and objects else None
            box = [float(v) for v in (*rng.uniform(0, 300, 2), *rng.uniform(20, 150, 2))]
            label = int(rng.integers(1, classes + 1))
            if near is not None:
                box, label = [v + 2 for v in near["bbox"]], near["category_id"]
            own = {"image_id": image, "category_id": label, "score": float(rng.random())}
            rows.append({**own, **shape(box)})
    truth = {
        "images": [
            {"id": i, "width": 640, "height": 480, "file_name": f"{i}{EVIL}.jpg"}
            for i in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for k, name in enumerate(names, 1)],
    }
    return evaluation(f"set{EVIL}", truth, rows, noise)


def run_of(found: Evaluation | None = None, name: str = "run", **more: Any) -> Run:
    return Run(name=name, folder=Path(name), config=Config(), evaluation=found, **more)


@pytest.mark.parametrize(
    "shape",
    [
        {"classes": 1},
        {"classes": 2, "found": 0},
        {"classes": 2, "objects": 0},
        {"classes": 3, "objects": 0, "found": 0},
        {"classes": 2, "images": 1},
        {"classes": 80, "images": 40},
        {"classes": 200},
        {"classes": 3, "masks": True},
    ],
    ids=lambda shape: "-".join(f"{k}{v}" for k, v in shape.items()),
)
def test_any_number_of_classes_objects_and_detections(shape: dict[str, Any]) -> None:
    text, sections = document([run_of(made_up(**shape), name=f"run {EVIL}", log=EVIL)])
    checked(text)
    assert EVIL not in text
    assert escape(EVIL) in text
    assert {"accuracy", "precision", "iou-area", "confusion", "errors"} < set(sections)
    assert ("Masks, COCO metrics" in text) == shape.get("masks", False)


def test_several_runs_on_several_sets() -> None:
    """Classes and images may differ; pictures are of those that saw the first run's images."""
    runs = [run_of(made_up(2), "one"), run_of(made_up(5, images=3), "two"), run_of(None, "three")]
    text, _ = document(runs)
    checked(text)
    assert text.count("one: quality") > 0
    assert "two: quality" not in text


def test_pictures_are_made_as_small_as_the_page_needs() -> None:
    runs = [run_of(made_up(2, images=4), name) for name in ("one", "two")]
    text, sections = document(runs)
    assert "pictures" in sections
    assert len(checked(text).encode()) < LARGEST
    small, large = (pictures(runs, room) for room in (60_000, 4_000_000))
    assert small and large
    assert len(small.body) < 70_000 < 400_000 < len(large.body)


def test_extremes_are_the_best_and_the_worst() -> None:
    found = made_up(2, images=20)
    worst, best = extremes(found, 4)
    quality = sorted(q for q in found.quality if q is not None)
    assert [found.quality[i] for i in worst] == quality[:4]
    assert [found.quality[i] for i in best] == quality[::-1][:4]
    worst, best = extremes(made_up(2, images=3), 4)
    assert sorted(worst + best) == [0, 1, 2]  # none is both


def test_rare_classes_of_a_confusion_matrix_are_counted_together() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 5, (101, 101))
    names = [str(k) for k in range(100)]
    short, small = merged(names, counts)
    assert len(short) == 80
    assert small.shape == (81, 81)
    assert small.sum() == counts.sum()
    assert small[-1].sum() == counts[-1].sum()
    kept = [int(name) for name in short[:-1]]
    assert (small[:79, :79] == counts[np.ix_(kept, kept)]).all()


def test_drawings_have_the_page_s_colours_and_their_own_ids() -> None:
    figure = Figure(figsize=(3, 2))
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.plot([0, 1], [0.123456, 1], color="#0072B2", marker="o")
    panel.text(0, 0.5, "a < b 0.123456", color=INK)
    first, second = (inline_svg(figure, key, 'label "x"') for key in ("a", "b"))
    assert first == inline_svg(figure, "a", 'label "x"')
    for color in ("#0072b2", INK):
        assert color not in first.lower()
    assert "var(--c0)" in first
    assert "var(--ink)" in first
    assert "a &lt; b 0.123456" in first  # places are shortened, text is not
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    checked(f"{first}{second}")


def test_long_lines_are_thinned_to_means_and_keep_their_gaps() -> None:
    x, y = thinned(range(1000), [None] * 500 + [2.0] * 500, 10)
    assert (x[0], x[-1]) == (49.5, 949.5)
    assert y == [None] * 5 + [2.0] * 5
    assert thinned([1, 2], [3, None]) == ([1, 2], [3, None])


def test_cells_and_names_are_escaped() -> None:
    text = table(EVIL, [EVIL], [[EVIL], [Share(0.5)], [Best(EVIL)]])
    text += legend([Line(name=EVIL, x=[0], y=[0])] * 2)
    assert "<script" not in text
    checked(text)


def test_runs_get_the_shortest_names_that_differ(tmp_path: Path) -> None:
    assert short_names([Path("a/x"), Path("b/y")]) == ["x", "y"]
    assert short_names([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"]
    assert short_names([Path("a"), Path("a")]) == ["a (1)", "a (2)"]
