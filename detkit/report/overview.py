"""The start of a report: headline numbers, the runs and what is missing of them; their settings."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from detkit.report.charts import Charts
from detkit.report.page import Section, details
from detkit.report.runs import Run
from detkit.report.svg import PALETTE
from detkit.report.tables import Cell, Html, facts, number, table

HEADLINE = ("AP", "AP50", "AP75")
LOG_LINES = 40


def overview(runs: Sequence[Run], charts: Charts) -> Section:
    """One run as a list of facts, several as a table."""
    body = "".join(f'<p class="note">{escape(text)}</p>' for text in _notes(runs))
    if len(runs) == 1:
        body = _headline(runs[0]) + body + facts(list(runs[0].facts.items()))
    else:
        body += _table(runs)
    return Section("overview", "Overview", body)


def _notes(runs: Sequence[Run]) -> list[str]:
    several = len(runs) > 1
    return [f"{run.name}: {note}" if several else note for run in runs for note in run.notes]


def _headline(run: Run) -> str:
    """The numbers people look for first: measured now, or else those of the best evaluation."""
    numbers: dict[str, float | None] = {}
    if run.evaluation is not None:
        for kind, name in (("bbox", "{}"), ("segm", "mask {}")):
            if kind in run.evaluation.scores:
                scores = run.evaluation.scores[kind]
                numbers |= {name.format(key): scores[key] for key in HEADLINE}
    elif run.of("eval"):
        best = [line for line in run.of("eval") if line.get("best")] or run.of("eval")
        known = best[-1]["metrics"]
        keys = [key for key in (*HEADLINE, "top1", "voc07", "voc12") if key in known]
        numbers = {key: known[key] for key in keys or list(known)[:3]}
    elif run.candidates:
        known = [line["fitness"] for line in run.candidates if line["fitness"] is not None]
        name = f"best {(run.result or {}).get('metric', 'fitness')}"
        numbers = {name: max(known, default=None)}
    items = "".join(
        f"<li><b>{escape(number(value))}</b><span>{escape(name)}</span></li>"
        for name, value in numbers.items()
    )
    return f'<ul class="headline">{items}</ul>' if items else ""


def _table(runs: Sequence[Run]) -> str:
    columns: dict[str, None] = {}
    for run in runs:
        columns |= dict.fromkeys(run.facts)
    rows: list[list[Cell]] = []
    for n, run in enumerate(runs):
        swatch = f'<span class="swatch" style="background:var(--c{n % len(PALETTE)})"></span>'
        rows.append([Html(swatch + escape(run.name)), *(run.facts.get(name) for name in columns)])
    return table("Runs", ["run", *columns], rows, left=len(columns) + 1)


def settings(runs: Sequence[Run], charts: Charts) -> Section:
    """Where the runs' settings differ, all of them, and the ends of the logs."""
    body = ""
    plain = [run.settings() for run in runs]
    if len(runs) > 1:
        keys = sorted({key for one in plain for key in one})
        rows = [
            [key, *(one.get(key, "–") for one in plain)]
            for key in keys
            if len({one.get(key) for one in plain}) > 1
        ]
        columns = ["setting", *(run.name for run in runs)]
        if rows:
            body += table("Settings that differ", columns, rows, left=len(columns))
    for run, own in zip(runs, plain, strict=True):
        name = f"{run.name}: " if len(runs) > 1 else ""
        text = "\n".join(f"{key} = {value}" for key, value in own.items())
        body += details(f"{name}all settings", f"<pre>{escape(text)}</pre>")
        if run.log:
            end = "\n".join(run.log.splitlines()[-LOG_LINES:])
            body += details(f"{name}end of the log", f"<pre>{escape(end)}</pre>")
        scores = run.evaluation.scores if run.evaluation is not None else {}
        if scores.get("normalised"):
            items = "".join(f"<li>{escape(line)}</li>" for line in scores["normalised"])
            body += details(f"{name}repaired or left out of the data set", f"<ul>{items}</ul>")
    return Section("settings", "Settings", body)
