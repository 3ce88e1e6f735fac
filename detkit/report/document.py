"""The report of one or several runs: which sections, in which order."""

from __future__ import annotations

from collections.abc import Sequence

from detkit.report.accuracy import accuracy, by_iou_and_area
from detkit.report.analysis import require_matplotlib
from detkit.report.charts import Charts
from detkit.report.confusion import confusion
from detkit.report.errors import errors
from detkit.report.learnt_scales import learnt_scales
from detkit.report.overview import overview, settings
from detkit.report.page import render
from detkit.report.pictures import pictures
from detkit.report.precision import precision
from detkit.report.runs import Run
from detkit.report.search import search
from detkit.report.training import training

LARGEST = 5_000_000
"""Bytes of a page."""

BUILDERS = (
    overview,
    search,
    training,
    accuracy,
    precision,
    by_iou_and_area,
    confusion,
    errors,
    learnt_scales,
)


def document(runs: Sequence[Run], *, footer: str = "") -> tuple[str, list[str]]:
    """The page, and the anchors of its sections.

    Args:
        runs: at least one, each with a name of its own.
        footer: its last line.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib("detkit report")
    charts = Charts()
    sections = [section for build in BUILDERS if (section := build(runs, charts)) is not None]
    last = settings(runs, charts)
    title = (
        f"detkit report: {runs[0].name}" if len(runs) == 1 else f"detkit report: {len(runs)} runs"
    )
    subtitle = ", ".join(dict.fromkeys(e.source for run in runs if (e := run.evaluation)))
    size = len(render(title, subtitle, [*sections, last], footer).encode())
    shown = pictures(runs, int(0.96 * (LARGEST - size)))
    sections += [shown] if shown is not None else []
    sections.append(last)
    return render(title, subtitle, sections, footer), [section.key for section in sections]
