"""The confusion matrix of a run as a table of counts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from detkit.engine.confusion import Counts
from detkit.report.accuracy import scored
from detkit.report.charts import Charts
from detkit.report.evaluation import Evaluation
from detkit.report.page import Section, beside, details, paragraph
from detkit.report.runs import Run
from detkit.report.tables import scroll, table

MOST_CLASSES = 80
"""Of more, those with the fewest objects and detections are counted together."""
MOST_PAIRS = 12
MOST_OPEN = 30
NOWHERE, UNSEEN, OTHERS = "no object", "not detected", "other classes"


def confusion(runs: Sequence[Run], charts: Charts) -> Section | None:
    """A matrix for each run: rows are the truth, columns what was detected."""
    found = scored(runs)
    if not found:
        return None
    note = paragraph(
        "Rows are what is there, columns what was detected, in numbers of boxes: IoU from 0.5 "
        "regardless of class, scores from where the run's mean F1 is best. The last row counts "
        "detections where there is no object, the last column objects that were not detected.",
        "quiet",
    )
    parts = []
    for _, run, e in found:
        parts.append(_matrix(e, run.name, len(found) > 1) + _pairs(e))
    body = beside([f"<div>{part}</div>" for part in parts])
    return Section("confusion", "Confusion matrix", note + body)


def _matrix(e: Evaluation, name: str, several: bool) -> str:
    names, counts = merged(list(e.matches["bbox"].names), e.table)
    label = f"{name}, scores from {e.curves.threshold:g}"
    caption = label if several else f"Scores from {e.curves.threshold:g}"
    columns = [*names, UNSEEN]
    head = "".join(f'<th scope="col" class="up">{escape(column)}</th>' for column in columns)
    rows = []
    for row, own in enumerate([*names, NOWHERE]):
        total = int(counts[row].sum())
        cells = "".join(_cell(int(n), row == i, total) for i, n in enumerate(counts[row]))
        rows.append(f'<tr><th scope="row">{escape(own)}</th>{cells}</tr>')
    content = (
        f'<table class="confusion"><caption>{escape(caption)}</caption><thead><tr>'
        f'<th scope="col" class="text">truth ↓ detected →</th>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )
    content = scroll(label, content)
    return content if len(columns) <= MOST_OPEN else details(f"{len(names)} classes", content)


def _cell(count: int, right: bool, total: int) -> str:
    if count == 0:
        return '<td class="zero">0</td>'
    tone, share = ("--c2" if right else "--c1"), 8 + 62 * count / total
    return f'<td style="--tone:var({tone});--v:{share:.0f}%">{count:,}</td>'


def merged(names: list[str], counts: Counts) -> tuple[list[str], Counts]:
    """The matrix with its rarest classes as one, where there are more than `MOST_CLASSES`."""
    if len(names) <= MOST_CLASSES:
        return names, counts
    size = counts[:-1].sum(1) + counts[:, :-1].sum(0)
    kept = np.sort(np.argsort(-size, kind="stable")[: MOST_CLASSES - 1])
    group = np.full(len(names) + 1, MOST_CLASSES - 1)
    group[kept] = np.arange(MOST_CLASSES - 1)
    group[-1] = MOST_CLASSES
    small = np.zeros((MOST_CLASSES + 1, MOST_CLASSES + 1), dtype=counts.dtype)
    np.add.at(small, (group[:, None], group[None, :]), counts)
    others = f"{OTHERS} ({len(names) - MOST_CLASSES + 1})"
    return [*(names[k] for k in kept), others], small


def _pairs(e: Evaluation) -> str:
    """What is most often taken for something else."""
    names, wrong = e.matches["bbox"].names, e.table[:-1, :-1].copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    places = [divmod(int(place), len(names)) for place in order]
    rows = [
        [names[t], names[d], int(wrong[t, d]), float(wrong[t, d] / e.table[t].sum())]
        for t, d in places
        if wrong[t, d]
    ]
    if not rows:
        return ""
    columns = ["is", "taken for", "objects", "share of its objects"]
    return table("Most frequent mix-ups", columns, rows, left=2)
