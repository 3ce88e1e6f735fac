"""Searches for architectures: best so far, fitness against cost, and the networks themselves
(DetNAS, Chen et al., NeurIPS 2019, figures 2, 4 and 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from detkit.models.search_space import Genes, SearchSpace
from detkit.report.architectures import architecture_figure
from detkit.report.charts import Charts, Line
from detkit.report.page import Section, panels, paragraph
from detkit.report.runs import Record, Run
from detkit.report.tables import Cell, table

COSTS = {"macs": ("multiply-adds", 1e6, "M"), "latency_ms": ("latency", 1.0, "ms")}
"""Cost to its name, the unit it is shown in and that unit's name."""
MOST_DRAWN = 12
"""Networks drawn as strips, the best of all searches among them."""


def search(runs: Sequence[Run], charts: Charts) -> Section | None:
    """Searches of one metric share their axes, whatever their method."""
    found = [(n, run) for n, run in enumerate(runs) if run.candidates]
    if not found:
        return None
    curves = "".join(_curves(alike, charts) for alike in _by_metric(found))
    note = paragraph(
        "A dot is an evaluated network, the line the best so far. Networks that failed or were "
        "dropped early have no dot.",
        "quiet",
    )
    body = note + curves + _table(found) + _strips(found, charts) + _top(found)
    return Section("search", "Search", body)


def _curves(found: Sequence[tuple[int, Run]], charts: Charts) -> str:
    figures = [_best_so_far(found, charts)]
    figures += [chart for cost in COSTS if (chart := _against(found, cost, charts))]
    return panels(figures)


def _alive(run: Run) -> list[Record]:
    return [line for line in run.candidates if line["fitness"] is not None]


def metric(found: Sequence[tuple[int, Run]]) -> str:
    """What the fitness is, where all searches agree."""
    names = {_metric_of(run) for _, run in found}
    return names.pop() if len(names) == 1 else "fitness"


def _metric_of(run: Run) -> str:
    return str((run.result or {}).get("metric", "fitness"))


def _by_metric(found: Sequence[tuple[int, Run]]) -> list[list[tuple[int, Run]]]:
    """An AP and a top-1 say nothing beside each other."""
    groups: dict[str, list[tuple[int, Run]]] = {}
    for n, run in found:
        groups.setdefault(_metric_of(run), []).append((n, run))
    return list(groups.values())


def _best_so_far(found: Sequence[tuple[int, Run]], charts: Charts) -> str:
    lines: list[Line] = []
    for n, run in found:
        best, heights = None, []
        for line in run.candidates:
            fitness = line["fitness"]
            best = fitness if best is None else max(best, fitness if fitness is not None else best)
            heights.append(best)
        count = range(1, len(heights) + 1)
        dots = [line["fitness"] for line in run.candidates]
        lines.append(Line(x=list(count), y=dots, style=n, opacity=0.3, joined=False))
        name = _name(run)
        lines.append(Line(name=name, x=list(count), y=heights, style=n, width=2.2, steps=True))
    return charts.lines("Best so far", lines, x_label="evaluations", y_label=metric(found))


def _name(run: Run) -> str:
    method = (run.result or {}).get("method")
    return f"{run.name} ({method})" if method and method not in run.name else run.name


def _against(found: Sequence[tuple[int, Run]], cost: str, charts: Charts) -> str:
    """A dot for each network, its cost against its fitness; dashes for a limit."""
    title, unit, short = COSTS[cost]
    lines: list[Line] = []
    limits: dict[float, None] = {}
    for n, run in found:
        kept = [line for line in _alive(run) if cost in line]
        if kept:
            x = [line[cost] / unit for line in kept]
            y = [line["fitness"] for line in kept]
            lines.append(Line(name=run.name, x=x, y=y, style=n, opacity=0.6, joined=False))
            limit = (run.result or {}).get("limits", {}).get(cost)
            if limit:
                limits[limit / unit] = None
    if not lines:
        return ""
    text = f"Fitness against {title}" + ("; dashed: the limit" if limits else "")
    axes = {"x_label": f"{title} in {short}", "y_label": metric(found)}
    return charts.lines(text, lines, marks=list(limits), **axes)


def _table(found: Sequence[tuple[int, Run]]) -> str:
    rows: list[list[Cell]] = []
    for _, run in found:
        alive, result = _alive(run), run.result or {}
        best = max(alive, key=lambda line: line["fitness"]) if alive else None
        dropped = sum(bool(line.get("dropped")) for line in run.candidates)
        seconds = sum(line.get("seconds", 0.0) for line in run.candidates)
        rows.append(
            [
                run.name,
                str(result.get("method", "–")),
                str(result.get("fitness", "–")),
                "yes" if result.get("finished") else "no",
                None if best is None else best["fitness"],
                "–" if best is None else _cost(best),
                len(run.candidates),
                len(run.candidates) - len(alive) - dropped,
                dropped,
                f"{3600 * len(run.candidates) / seconds:,.0f}" if seconds else "–",
            ]
        )
    columns = ["run", "method", "fitness by", "finished", f"best {metric(found)}", "its cost"]
    columns += ["evaluated", "failed", "dropped early", "per hour and process"]
    return table("Searches", columns, rows, left=4)


def _cost(line: Record) -> str:
    parts = [
        f"{line[cost] / unit:.1f} {short}"
        for cost, (_, unit, short) in COSTS.items()
        if cost in line
    ]
    return ", ".join(parts) or "–"


def _ranked(run: Run) -> list[Record]:
    return sorted(_alive(run), key=lambda line: (-line["fitness"], line["index"]))


def _top(found: Sequence[tuple[int, Run]]) -> str:
    several = len(found) > 1
    rows: list[list[Cell]] = []
    for _, run in found:
        for place, line in enumerate(_ranked(run)[:10], 1):
            names: list[Cell] = [run.name] if several else []
            cost = _cost(line)
            rows.append(
                [line["genes"], *names, place, line["fitness"], cost, int(line["generation"])]
            )
    columns = ["network", *(["run"] if several else []), "place", metric(found), "cost"]
    left = 2 if several else 1
    return table("Fittest networks", [*columns, "generation"], rows, left=left)


def _strips(found: Sequence[tuple[int, Run]], charts: Charts) -> str:
    """The fittest networks as rows of blocks."""
    each = max(1, MOST_DRAWN // len(found))
    nets: dict[str, tuple[SearchSpace, Genes]] = {}
    for _, run in found:
        if run.space is None:
            continue
        for place, line in enumerate(_ranked(run)[:each], 1):
            name = f"{run.name} {place}" if len(found) > 1 else f"{place}"
            nets[f"{name}: {line['fitness']:.3f}"] = run.space, run.space.parse(line["genes"])
    if not nets:
        return ""
    figure = architecture_figure(nets)
    title = "Fittest networks, block by block"
    below = f'<p class="quiet">{escape("From the image on the left to the head on the right.")}</p>'
    return charts.figure(figure, title, below, wide=True)
