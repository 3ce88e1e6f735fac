"""Line and bar charts of a report, all in one style: a small figure with its legend as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count
from typing import TYPE_CHECKING, Any

from detkit.report.svg import GRID, INK, PALETTE, QUIET, inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("solid", "dashed", "dotted", "dashdot")
_ARRAYS = {"solid": "", "dashed": "5 3", "dotted": "1.5 2.5", "dashdot": "6 2.5 1.5 2.5"}
SIZE = (4.2, 2.7)
"""Width and height in inches; text of 8 to 9 points is readable on a telephone."""
MOST_POINTS = 300
"""Longer lines are thinned to the means of so many stretches."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
        name: In the legend; lines without a name are not in it.
        x: Places.
        y: Heights; the line has a gap where one is None.
        style: Place among colours and dashes.
        width: In points.
        opacity: 0 to 1.
        dots: Mark each point.
        steps: Hold each height up to the next point.
        joined: False for dots alone.
    """

    name: str = ""
    x: Sequence[float]
    y: Sequence[float | None]
    style: int = 0
    width: float = 1.6
    opacity: float = 1.0
    dots: bool = False
    steps: bool = False
    joined: bool = True

    @property
    def color(self) -> str:
        """Its place in the palette."""
        return PALETTE[self.style % len(PALETTE)]

    @property
    def dash(self) -> str:
        """Changes when the colours are used up."""
        return DASHES[self.style // len(PALETTE) % len(DASHES)]


class Charts:
    """Makes the charts of one page: gives each its own key.

    Args:
        prefix: begins every key.
    """

    def __init__(self, prefix: str = "f") -> None:
        self._keys = (f"{prefix}{n}" for n in count())

    def lines(self, title: str, lines: Sequence[Line], **axes: Any) -> str:
        """A chart of lines; ``axes`` as :func:`set_axes` takes them."""
        figure, panel = _new()
        for line in lines:
            _draw(panel, line)
        set_axes(panel, lines, **axes)
        return self.figure(figure, title, legend([line for line in lines if line.name]))

    def bars(
        self,
        title: str,
        rows: Mapping[str, Sequence[float | None]],
        names: Sequence[str],
        *,
        x_label: str,
    ) -> str:
        """Horizontal bars: a group for each row, a bar for each of its values, which have names."""
        most = max(len(values) for values in rows.values())
        figure, panel = _new(0.9 + len(rows) * max(0.28, 0.16 * most + 0.1))
        size = 0.76 / most
        for place, values in enumerate(rows.values()):
            for n, value in enumerate(values):
                y = place + (n - (most - 1) / 2) * size
                color = PALETTE[n % len(PALETTE)]
                panel.barh(y, value or 0.0, size * 0.88, color=color, linewidth=0)
                text = "–" if value is None else f"{value:.3f}"
                low = max(value or 0.0, 0.0)
                panel.annotate(
                    text,
                    (low, y),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5 if most < 4 else 6,
                    color=QUIET,
                )
        panel.set_yticks(range(len(rows)), list(rows))
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.margins(x=0.16)
        _frame(panel, x_label, "")
        panel.grid(visible=False, axis="y")
        panel.axvline(0, color=QUIET, linewidth=0.8)
        keys = [Line(name=name, x=(), y=(), style=n) for n, name in enumerate(names)]
        return self.figure(figure, title, legend(keys))

    def figure(self, figure: Figure, title: str, below: str = "", *, wide: bool = False) -> str:
        """Any figure of matplotlib as a ``<figure>``; a wide one scrolls on a small screen."""
        svg = inline_svg(figure, next(self._keys), title)
        if wide:
            inches = figure.get_size_inches()[0]
            least = f"min-width:{5.4 * inches:.0f}rem;" if inches > SIZE[0] else ""
            style = f'style="{least}max-width:{6.5 * inches:.0f}rem"'
            svg = (
                f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
                f"<div {style}>{svg}</div></div>"
            )
        return f"<figure><figcaption>{escape(title)}</figcaption>{svg}{below}</figure>"


def legend(lines: Sequence[Line]) -> str:
    """Names beside a piece of their line; nothing for a single line."""
    if len(lines) < 2:
        return ""
    items = (
        '<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true">'
        f'<path d="M1 4H23" style="stroke:var(--c{line.style % len(PALETTE)});'
        f'stroke-dasharray:{_ARRAYS[line.dash] or "none"}"/></svg>{escape(line.name)}</li>'
        for line in lines
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def thinned(
    x: Sequence[float], y: Sequence[float | None], most: int = MOST_POINTS
) -> tuple[list[float], list[float | None]]:
    """Means of ``most`` stretches of equal length where there are more points."""
    if len(x) <= most:
        return list(x), list(y)
    ends = [round(i * len(x) / most) for i in range(most + 1)]
    xs: list[float] = []
    ys: list[float | None] = []
    for low, high in zip(ends, ends[1:], strict=False):
        known = [v for v in y[low:high] if v is not None]
        xs.append(sum(x[low:high]) / (high - low))
        ys.append(sum(known) / len(known) if known else None)
    return xs, ys


def set_axes(
    panel: Axes,
    lines: Sequence[Line] = (),
    *,
    x_label: str = "",
    y_label: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    logarithmic: bool = False,
    marks: Sequence[float] = (),
) -> None:
    """Labels and ranges, and dashes at ``marks`` of the horizontal axis.

    A logarithmic axis only where all heights are positive and far apart.
    """
    from matplotlib.ticker import LogLocator

    _frame(panel, x_label, y_label)
    heights = [v for line in lines for v in line.y if v is not None and math.isfinite(v)]
    if logarithmic and heights and min(heights) > 0 and max(heights) > 8 * min(heights):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.minorticks_off()
    elif heights and max(map(abs, heights)) < 0.01:
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for mark in marks:
        panel.axvline(mark, color=QUIET, linewidth=1, linestyle="dashed")
    if x_range:
        panel.set_xlim(*x_range)
    if y_range:
        panel.set_ylim(*y_range)


def _new(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _draw(panel: Axes, line: Line) -> None:
    heights = [math.nan if v is None else v for v in line.y]
    known = [v for v in heights if math.isfinite(v)]
    panel.plot(
        list(line.x),
        heights,
        color=line.color,
        linestyle=line.dash if line.joined else "none",
        linewidth=line.width,
        alpha=line.opacity,
        marker="o" if line.dots or not line.joined or len(known) == 1 else "",
        markersize=3.2,
        markeredgewidth=0,
        drawstyle="steps-post" if line.steps else "default",
        solid_capstyle="round",
        clip_on=False,
        zorder=3,
    )


def _frame(panel: Axes, x_label: str, y_label: str) -> None:
    panel.set_xlabel(x_label, fontsize=9, color=INK)
    panel.set_ylabel(y_label, fontsize=9, color=INK)
    panel.grid(color=GRID, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(colors=QUIET, labelsize=8.5, length=0)
    for side, spine in panel.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(QUIET)
