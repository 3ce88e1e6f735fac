"""Curves of a training: losses, learning rate, validation metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detkit.report.charts import Charts, Line, thinned
from detkit.report.page import Section, panels, paragraph
from detkit.report.runs import Record, Run
from detkit.report.tables import table

GROUPS = (
    ("top1",),
    ("AP", "AP50", "AP75"),
    ("segm_AP", "segm_AP50", "segm_AP75"),
    ("APs", "APm", "APl"),
    ("AR1", "AR10", "AR100"),
    ("voc07", "voc12"),
)
"""Metrics that share a chart where there is one run."""

SINGLES = ("top1", "AP", "AP50", "AP75", "segm_AP", "segm_AP50", "AR100", "voc07", "voc12")
"""Metrics that have a chart of their own where there are several."""


def training(runs: Sequence[Run], charts: Charts) -> Section | None:
    """Loss, its parts, learning rate, metrics; several runs share the axes."""
    trained = [(n, run) for n, run in enumerate(runs) if run.of("train") or run.of("eval")]
    if not trained:
        return None
    figures = _validation(trained, charts) + _losses(trained, charts)
    lines = [_line(run.name, n, run.of("train"), "lr") for n, run in trained]
    figures.append(charts.lines("Learning rate", lines, x_label="step"))
    lines = [_line(run.name, n, run.of("train"), "images_per_second") for n, run in trained]
    figures.append(charts.lines("Images per second", lines, x_label="step", y_range=(0, None)))
    body = panels(figures)
    if not any(run.of("eval") for _, run in trained):
        body = paragraph("No evaluation yet.") + body
    elif not _is_curve(trained):
        body += _last(trained)
    return Section("training", "Training", body)


def _is_curve(trained: Sequence[tuple[int, Run]]) -> bool:
    return any(len(run.of("eval")) > 1 for _, run in trained)


def _last(trained: Sequence[tuple[int, Run]]) -> str:
    """The one evaluation of each run as a table: there is no curve to draw."""
    found = [(run, run.of("eval")[-1]) for _, run in trained if run.of("eval")]
    known = {key for _, line in found for key in line["metrics"]}
    names = [key for group in GROUPS for key in group if key in known]
    rows = [
        [run.name, line["step"], *(line["metrics"].get(name) for name in names)]
        for run, line in found
    ]
    return table("Evaluated while training", ["run", "step", *names], rows)


def _line(name: str, style: int, lines: Sequence[Record], key: str) -> Line:
    kept = [line for line in lines if key in line]
    x, y = thinned([line["step"] for line in kept], [line[key] for line in kept])
    return Line(name=name, x=x, y=y, style=style)


def _losses(trained: Sequence[tuple[int, Run]], charts: Charts) -> list[str]:
    """The sum, then its parts: in one chart, or one chart for each with a line per run."""
    sums = [_line(run.name, n, run.of("train"), "loss") for n, run in trained]
    figures = [charts.lines("Loss", sums, x_label="step", logarithmic=True)]
    names: dict[str, None] = {}
    for _, run in trained:
        for line in run.of("train"):
            names |= dict.fromkeys(line["losses"])
    if len(names) < 2:
        return figures
    if len(trained) == 1:
        (_, run), lines = trained[0], []
        for style, name in enumerate(names):
            lines.append(_part(run, name, name.replace("_", " "), style))
        return [
            *figures,
            charts.lines("Loss, part by part", lines, x_label="step", logarithmic=True),
        ]
    for name in names:
        lines = [_part(run, name, run.name, n) for n, run in trained]
        lines = [line for line in lines if len(line.x)]
        title = f"Loss: {name.replace('_', ' ')}"
        figures.append(charts.lines(title, lines, x_label="step", logarithmic=True))
    return figures


def _part(run: Run, key: str, name: str, style: int) -> Line:
    lines = [line for line in run.of("train") if key in line["losses"]]
    x, y = thinned([line["step"] for line in lines], [line["losses"][key] for line in lines])
    return Line(name=name, x=x, y=y, style=style)


def _validation(trained: Sequence[tuple[int, Run]], charts: Charts) -> list[str]:
    """Charts of the metrics, over all steps trained."""
    if not _is_curve(trained):
        return []
    known = {key for _, run in trained for line in run.of("eval") for key in line["metrics"]}
    axes: dict[str, Any] = {
        "x_label": "step",
        "x_range": (0, max(line["step"] for _, run in trained for line in run.lines)),
        "y_range": (0, 1),
    }
    figures = []
    if len(trained) == 1:
        run = trained[0][1]
        for group in GROUPS:
            lines = [_metric(run, key, key, n) for n, key in enumerate(group) if key in known]
            if lines:
                names = ", ".join(line.name for line in lines)
                figures.append(charts.lines(f"Validation: {names}", lines, **axes))
        return figures
    for key in SINGLES:
        lines = [_metric(run, key, run.name, n) for n, run in trained]
        lines = [line for line in lines if len(line.x)]
        if lines:
            figures.append(charts.lines(f"Validation: {key}", lines, **axes))
    return figures


def _metric(run: Run, key: str, name: str, style: int) -> Line:
    lines = [line for line in run.of("eval") if key in line["metrics"]]
    heights = [line["metrics"][key] for line in lines]
    return Line(name=name, x=[line["step"] for line in lines], y=heights, style=style, dots=True)
