"""COCO metrics, class by class too, and AP and AR by IoU and size (DetNet, tables 3 and 4)."""

from __future__ import annotations

from collections.abc import Sequence

from detkit.engine.analysis import AREAS, PAPER_COLUMNS, THRESHOLDS
from detkit.engine.summary import NUMBERS
from detkit.report.analysis import COLUMNS, ROWS
from detkit.report.charts import Charts, Line
from detkit.report.evaluation import Evaluation
from detkit.report.page import Section, beside, details, panels, paragraph
from detkit.report.runs import Run
from detkit.report.tables import Cell, Share, best_of, table

Scored = Sequence[tuple[int, Run, Evaluation]]

MOST_OPEN = 25
"""Longer tables of classes start closed."""


def scored(runs: Sequence[Run]) -> list[tuple[int, Run, Evaluation]]:
    """Runs with detections, each with its place among all runs."""
    return [(n, run, run.evaluation) for n, run in enumerate(runs) if run.evaluation is not None]


def accuracy(runs: Sequence[Run], charts: Charts) -> Section | None:
    """Tables of metrics; best values stand out where there are several runs."""
    found = scored(runs)
    if not found:
        return None
    body = "".join(_numbers(found, kind) for kind in ("bbox", "segm"))
    return Section("accuracy", "Accuracy", body + _classes(found))


def _numbers(found: Scored, kind: str) -> str:
    rows = [(run, e.scores[kind]) for _, run, e in found if kind in e.scores]
    if not rows:
        return ""
    columns = [best_of([scores[name] for _, scores in rows]) for name in NUMBERS]
    cells = [[run.name, *(column[i] for column in columns)] for i, (run, _) in enumerate(rows)]
    title = {"bbox": "Boxes, COCO metrics", "segm": "Masks, COCO metrics"}[kind]
    return table(title, ["run", *NUMBERS], cells)


def _classes(found: Scored) -> str:
    if len(found) == 1:
        return _fold(len(found[0][2].matches["bbox"].names), _one_run(found[0][2]))
    names: dict[str, None] = {}
    for _, _, e in found:
        names |= dict.fromkeys(e.matches["bbox"].names)
    rows: list[list[Cell]] = []
    for name in names:
        values = [e.scores["per_class"].get(name, {}).get("AP") for _, _, e in found]
        rows.append([name, *best_of(values)])
    columns = ["class", *(run.name for _, run, _ in found)]
    return _fold(len(names), table("AP of each class", columns, rows))


def _fold(count: int, content: str) -> str:
    return content if count <= MOST_OPEN else details(f"{count} classes", content)


def _one_run(e: Evaluation) -> str:
    matches, curves = e.matches["bbox"], e.curves
    positives, best = matches.positives(), curves.best
    place = {k: row for row, k in enumerate(curves.classes)}
    numbers = ("AP50", "AP75", "APs", "APm", "APl", "AR100")
    rows: list[list[Cell]] = []
    for k, name in enumerate(matches.names):
        own = e.scores["per_class"][name]
        row = place.get(k)
        chosen = (
            [None] * 3
            if row is None
            else [float(c[row, best]) for c in (curves.precision, curves.recall, curves.f1)]
        )
        rows.append(
            [name, int(positives[k]), Share(own["AP"]), *(own[n] for n in numbers), *chosen]
        )
    columns = ["class", "objects", "AP", *numbers, "precision", "recall", "F1"]
    note = (
        f"Precision, recall and F1 at IoU 0.5 for detections with a score from "
        f"{curves.threshold:g}, where the mean F1 is best."
    )
    return table("Boxes, class by class", columns, rows) + paragraph(note, "quiet")


def by_iou_and_area(runs: Sequence[Run], charts: Charts) -> Section | None:
    """AP and AR by IoU threshold and object size."""
    found = scored(runs)
    if not found:
        return None
    figures = _one_figures(found[0][2], charts) if len(found) == 1 else _figures(found, charts)
    tables = beside([_table(found, quantity) for quantity in ROWS])
    note = paragraph(
        "As in tables 3 and 4 of DetNet: a detector that places boxes well keeps its AP towards "
        "high IoU. Small is below 32² pixels, large above 96².",
        "quiet",
    )
    return Section("iou-area", "By IoU and size", note + panels(figures) + tables)


def _one_figures(e: Evaluation, charts: Charts) -> list[str]:
    figures = []
    for quantity, title in ROWS.items():
        areas = e.scores["analysis"][quantity]
        lines = [_over_iou(areas[area], area, n) for n, area in enumerate(AREAS)]
        figures.append(_chart(charts, title, lines))
    return figures


def _figures(found: Scored, charts: Charts) -> list[str]:
    figures = []
    for quantity in ("AP", "AR"):
        for area in AREAS:
            lines = [
                _over_iou(e.scores["analysis"][quantity][area], run.name, n) for n, run, e in found
            ]
            figures.append(_chart(charts, f"{quantity}, {COLUMNS[area]}", lines))
    return figures


def _chart(charts: Charts, title: str, lines: Sequence[Line]) -> str:
    ranges = {"x_range": (0.49, 0.96), "y_range": (0, 1)}
    return charts.lines(title, lines, x_label="IoU threshold", **ranges)


def _over_iou(values: dict[str, float | None], name: str, style: int) -> Line:
    heights = [values[f"{t:g}"] for t in THRESHOLDS]
    return Line(name=name, x=THRESHOLDS, y=heights, style=style, dots=True)


def _table(found: Scored, quantity: str) -> str:
    several = len(found) > 1
    rows: list[list[Cell]] = []
    for area in AREAS:
        values = [e.scores["analysis"][quantity][area] for _, _, e in found]
        columns = [best_of([v[iou] for v in values]) for iou in PAPER_COLUMNS]
        for i, (_, run, _) in enumerate(found):
            names = [area, run.name] if several else [area]
            rows.append([*names, *(column[i] for column in columns)])
    head = ["size", *(["run"] if several else []), *PAPER_COLUMNS]
    return table(f"{ROWS[quantity]} by size and IoU", head, rows, left=2 if several else 1)
