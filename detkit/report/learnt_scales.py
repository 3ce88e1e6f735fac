"""Scales that 3x3 convolutions have learnt, layer by layer and step by step, and what they became
(POD, Peng et al., ICCV 2019, figure 6).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from detkit.report.charts import Charts, Line, thinned
from detkit.report.page import Section, panels, paragraph
from detkit.report.runs import Record, Run
from detkit.report.scales import draw_scales
from detkit.report.tables import Cell, table

_AXES = ("d_h (height)", "d_w (width)")


def learnt_scales(runs: Sequence[Run], charts: Charts) -> Section | None:
    """Figure 6 of the paper, the course over training, and the numbers."""
    parts = [_one(run, charts, len(runs) > 1) for run in runs]
    body = "".join(parts)
    if not body:
        return None
    note = paragraph(
        "How far apart the taps of each 3x3 convolution lie, in pixels of its input; 1 is a plain "
        "convolution.",
        "quiet",
    )
    return Section("scales", "Learnt scales", note + body)


def _one(run: Run, charts: Charts, several: bool) -> str:
    layers = layer_rows(run.scales) if run.scales else []
    course = run.of("scales")
    if not layers and not course:
        return ""
    body = f"<h3>{escape(run.name)}</h3>" if several else ""
    if layers:
        known = [layer for layer in layers if layer["std"] is not None]
        if known:
            title = "Mean over training images, band: one deviation"
            body += charts.figure(draw_scales({"": known}), title, wide=True)
    if course:
        body += panels(_course(course, run.labels, charts))
    return body + (_table(layers) if layers else "")


def layer_rows(scales: Record) -> list[Record]:
    """Layers of a checkpoint's ``scales``, each with the mean and deviation of its scale.

    Layers of a fast-deployment net have them already; those of a net that learns have them in
    the statistics. Layers without are left out.
    """
    stats = scales.get("stats", {})
    rows = []
    for layer in scales.get("layers", []):
        own = stats.get(layer["path"], layer)
        if own.get("mean") is not None:
            rows.append({**layer, "mean": own["mean"], "std": own.get("std")})
    return rows


def _course(lines: Sequence[Record], labels: Mapping[str, str], charts: Charts) -> list[str]:
    """A line for each layer, the layers of a stage in one colour."""
    paths = list(lines[-1]["scales"])
    stages = {path: _stage(labels.get(path, path)) for path in paths}
    order = list(dict.fromkeys(stages.values()))
    figures = []
    for axis, title in enumerate(_AXES):
        drawn, named = [], set()
        for path in paths:
            kept = [line for line in lines if path in line["scales"]]
            steps = [line["step"] for line in kept]
            x, y = thinned(steps, [line["scales"][path][axis] for line in kept], 150)
            stage = stages[path]
            name = "" if stage in named else stage
            named.add(stage)
            style = order.index(stage)
            drawn.append(Line(name=name, x=x, y=y, style=style, width=1.1, opacity=0.85))
        text = f"Course over training: {title}"
        figures.append(charts.lines(text, drawn, x_label="step", y_label="scale in pixels"))
    return figures


def _stage(label: str) -> str:
    match = re.fullmatch(r"R(\d).*", label)
    return f"conv{match[1]}" if match else "other layers"


def _table(layers: Sequence[Record]) -> str:
    """Scales, and the convolutions of layers that were split."""
    split = any("parts" in layer for layer in layers)
    rows: list[list[Cell]] = []
    for layer in layers:
        std = layer["std"] or [None, None]
        row: list[Cell] = [layer["label"], layer["path"], *layer["mean"], *std]
        if split:
            row += [" + ".join(map(_part, layer["parts"])), layer["macs_ratio"]]
        rows.append(row)
    columns = ["layer", "module", "d_h", "d_w", "deviation of d_h", "of d_w"]
    columns += ["channels · kernel @ dilation", "multiply-adds"] if split else []
    return table("Layers", columns, rows, left=2)


def _part(part: Record) -> str:
    kernel, dilation = ("×".join(map(str, part[key])) for key in ("kernel", "dilation"))
    return f"{part['channels']} · {kernel} @ {dilation}"
