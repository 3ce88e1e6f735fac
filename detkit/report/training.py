"""Curves of a training: losses, learning rate, validation metrics."""

from __future__ import annotations

from collections.abc import Sequence

from detkit.report.charts import Charts, Line, thinned
from detkit.report.page import Section, panels, paragraph
from detkit.report.runs import Record, Run

GROUPS = (
    ("top1",),
    ("AP", "AP50", "AP75"),
    ("segm_AP", "segm_AP50", "segm_AP75"),
    ("APs", "APm", "APl"),
    ("AR1", "AR10", "AR100"),
    ("voc07", "voc12"),
)
"""Metrics that share a chart where there is one run."""


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
    note = "" if any(run.of("eval") for _, run in trained) else "No evaluation yet."
    return Section("training", "Training", (paragraph(note) if note else "") + panels(figures))


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
    known = {key for _, run in trained for line in run.of("eval") for key in line["metrics"]}
    groups = [[key for key in group if key in known] for group in GROUPS]
    figures = []
    for group in filter(None, groups):
        if len(trained) == 1:
            lines = [_metric(trained[0][1], key, key, style) for style, key in enumerate(group)]
            title = f"Validation: {', '.join(group)}"
            figures.append(charts.lines(title, lines, x_label="step", y_range=(0, 1)))
            continue
        for key in group[:2] if group[0] in ("AP", "segm_AP") else group[:1]:
            lines = [_metric(run, key, run.name, n) for n, run in trained]
            lines = [line for line in lines if len(line.x)]
            figures.append(
                charts.lines(f"Validation: {key}", lines, x_label="step", y_range=(0, 1))
            )
    return figures


def _metric(run: Run, key: str, name: str, style: int) -> Line:
    lines = [line for line in run.of("eval") if key in line["metrics"]]
    heights = [line["metrics"][key] for line in lines]
    return Line(name=name, x=[line["step"] for line in lines], y=heights, style=style, dots=True)
