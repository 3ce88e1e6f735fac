"""Six kinds of errors and what putting each right would give (TIDE, Bolya et al., ECCV 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from detkit.engine.error_types import BACKGROUND, HIT, KINDS
from detkit.report.accuracy import MOST_OPEN, scored
from detkit.report.charts import Charts
from detkit.report.evaluation import Evaluation
from detkit.report.page import Section, beside, details, panels, paragraph
from detkit.report.runs import Run
from detkit.report.tables import Cell, Html, table

MEANING = {
    "classification": f"the right place (IoU from {HIT:g}), the wrong class",
    "localisation": f"the right class, IoU from {BACKGROUND:g} to below {HIT:g}",
    "both": f"the wrong class, IoU from {BACKGROUND:g} to below {HIT:g}",
    "duplicate": "a better detection has the object already",
    "background": f"no object there (IoU below {BACKGROUND:g})",
    "missed": "an object with no detection, not even misplaced or misnamed",
    "false positives": "all detections that are no hits, left out",
    "false negatives": "all objects without a hit, not asked for",
}
_SUMS = ("false positives", "false negatives")


def errors(runs: Sequence[Run], charts: Charts) -> Section | None:
    """A bar and a row for each kind; several runs stand side by side."""
    found = scored(runs)
    if not found:
        return None
    gains = {name: [e.errors.gain[name] for _, _, e in found] for name in (*KINDS, *_SUMS)}
    names = [run.name for _, run, _ in found]
    title = "AP50 won by putting right one kind alone"
    chart = charts.bars(title, gains, names, x_label="AP50 won")
    several = len(found) > 1
    columns = ["kind", "meaning"]
    for name in names:
        columns += [f"{f'{name}: ' if several else ''}{c}" for c in ("errors", "AP50 won")]
    rows: list[list[Cell]] = []
    for kind in (*KINDS, *_SUMS):
        row: list[Cell] = [kind, Html(f'<span class="wrap">{escape(MEANING[kind])}</span>')]
        for _, _, e in found:
            row += [e.errors.counts.get(kind), e.errors.gain[kind]]
        rows.append(row)
    note = paragraph(
        "The kinds of TIDE, of boxes at IoU 0.5 and at all scores. "
        + "; ".join(_total(run.name if several else "", e) for _, run, e in found)
        + ". The gains do not add up: putting one kind right changes what the others cost.",
        "quiet",
    )
    body = note + beside([panels([chart]), table("Kinds of errors", columns, rows, left=2)])
    if not several:
        body += _by_class(found[0][2])
    return Section("errors", "Kinds of errors", body)


def _total(name: str, e: Evaluation) -> str:
    text = f"AP50 is {e.errors.ap50:.3f}" if e.errors.ap50 is not None else "AP50 is undefined"
    return f"{name}: {text}" if name else text


def _by_class(e: Evaluation) -> str:
    matches, found = e.matches["bbox"], e.errors
    size = len(matches.names)
    columns = [
        np.bincount(matches.classes[found.kinds == k], minlength=size)
        for k in range(len(KINDS) - 1)
    ]
    columns.append(np.bincount(matches.object_classes[found.missed], minlength=size))
    rows = [[name, *(int(column[k]) for column in columns)] for k, name in enumerate(matches.names)]
    content = table(
        "Errors by class of the detection, or of the missed object", ["class", *KINDS], rows
    )
    return content if size <= MOST_OPEN else details(f"{size} classes", content)
