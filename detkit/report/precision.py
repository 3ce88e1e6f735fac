"""Precision against recall, and F1 against the score from which detections count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detkit.engine.matches import RECALLS, SCORES, Matches, precision_recall
from detkit.report.accuracy import scored
from detkit.report.charts import Charts, Line
from detkit.report.evaluation import Evaluation
from detkit.report.page import Section, panels, paragraph
from detkit.report.runs import Run

MOST_NAMED = 10
"""With more classes their lines are thin and without names, and the mean stands out."""
IOUS = (0.5, 0.75)
_TITLES = {"bbox": "boxes", "segm": "masks"}


def precision(runs: Sequence[Run], charts: Charts) -> Section | None:
    """Curves of each class for one run, of the mean over classes for several."""
    found = scored(runs)
    if not found:
        return None
    figures = []
    for kind, title in _TITLES.items():
        for iou in IOUS:
            lines = [
                line
                for n, run, e in found
                if kind in e.matches
                for line in _recall_lines(e.matches[kind], iou, n, run.name, len(found) == 1)
            ]
            if lines:
                text = f"Precision and recall, {title}, IoU {iou:g}"
                ranges = {"x_range": (0, 1), "y_range": (0, 1.02)}
                axes = {"x_label": "recall", "y_label": "precision", **ranges}
                figures.append(charts.lines(text, lines, **axes))
    lines = [line for n, run, e in found for line in _f1_lines(e, n, run.name, len(found) == 1)]
    ranges = {"x_range": (0, 1), "y_range": (0, 1.02)}
    figures.append(charts.lines("F1 of boxes, IoU 0.5", lines, x_label="lowest score", **ranges))
    best = "; ".join(_best(e, run.name if len(found) > 1 else "") for _, run, e in found)
    note = f"Best mean F1: {best}. The means are over classes that have objects."
    return Section("precision", "Precision and recall", panels(figures) + paragraph(note, "quiet"))


def _best(e: Evaluation, name: str) -> str:
    value = float(e.curves.f1.mean(0)[e.curves.best]) if len(e.curves.classes) else float("nan")
    text = f"{value:.3f} with scores from {e.curves.threshold:g}"
    return f"{name}: {text}" if name else text


def _recall_lines(matches: Matches, iou: float, style: int, name: str, alone: bool) -> list[Line]:
    curves = precision_recall(matches, iou)
    known = {k: curve for k, curve in enumerate(curves) if curve is not None}
    if not known:
        return []
    mean = np.mean(list(known.values()), axis=0)
    x = RECALLS.tolist()
    if not alone:
        return [Line(name=name, x=x, y=mean.tolist(), style=style)]
    lines = [
        _class_line(x, curve.tolist(), matches.names[k], i, len(known))
        for i, (k, curve) in enumerate(known.items())
    ]
    if len(known) > 1:
        lines.append(Line(name="mean", x=x, y=mean.tolist(), style=0, width=2.6))
    return lines


def _f1_lines(e: Evaluation, style: int, name: str, alone: bool) -> list[Line]:
    classes = e.curves.classes
    if not classes:
        return []
    x, mean = SCORES.tolist(), e.curves.f1.mean(0).tolist()
    if not alone:
        return [Line(name=name, x=x, y=mean, style=style)]
    names = e.matches["bbox"].names
    lines = [
        _class_line(x, e.curves.f1[i].tolist(), names[k], i, len(classes))
        for i, k in enumerate(classes)
    ]
    if len(classes) > 1:
        lines.append(Line(name="mean", x=x, y=mean, style=0, width=2.6))
    return lines


def _class_line(
    x: Sequence[float], y: Sequence[float], name: str, place: int, classes: int
) -> Line:
    if classes > MOST_NAMED:
        return Line(x=x[::2], y=y[::2], style=place + 1, width=0.6, opacity=0.4)
    return Line(name=name, x=x, y=y, style=place + (classes > 1), width=1.3)
