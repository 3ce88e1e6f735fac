"""AP and AR over IoU thresholds, one panel per object size: DetNet's tables 3 and 4 as a picture.

matplotlib draws it; it is the optional extra ``plots`` and is loaded when a picture is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detkit.engine.analysis import AREAS, THRESHOLDS
from detkit.errors import ConfigError
from detkit.storage import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

ROWS = {"AP": "AP", "AR": "AR", "AR_class_agnostic": "AR, class-agnostic"}
COLUMNS = {
    "all": "all objects",
    "small": "small (below 32² px)",
    "medium": "medium (32² to 96² px)",
    "large": "large (above 96² px)",
}
_STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"))
"""Colour, marker and dash: told apart without colour vision, and in grey."""

_INK, _GRID, _QUIET = "#222222", "#dddddd", "#666666"
_TICKS = (0, 0.25, 0.5, 0.75, 1)


def require_matplotlib(option: str = "--picture") -> None:
    """Refuse ``option``, before any work, without matplotlib; raises ConfigError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            f"{option}: matplotlib must be installed, got none; run `pip install detkit[plots]`"
        )


def draw_analysis(analyses: Mapping[str, Record], *, note: str = "") -> Figure:
    """Small multiples of one or two analyses: a row per quantity, a column per object size.

    Args:
        analyses: name to the ``analysis`` of :func:`detkit.engine.evaluate.evaluate`.
        note: what was scored, for the title.

    Raises:
        ConfigError: matplotlib is not installed.
        ValueError: no analysis, or more than two.
    """
    if not 1 <= len(analyses) <= len(_STYLES):
        raise ValueError(f"draw_analysis: must be one or two analyses, got {len(analyses)}")
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(11.5, 8.6), layout=ConstrainedLayoutEngine(wspace=0.06))
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(ROWS), len(AREAS), sharex=True, sharey=True)
    for row, quantity in enumerate(ROWS):
        for column, area in enumerate(AREAS):
            lines = {name: analysis[quantity][area] for name, analysis in analyses.items()}
            _draw_panel(panels[row, column], lines)
    for column, area in enumerate(AREAS):
        panels[0, column].set_title(COLUMNS[area], fontsize=11, pad=22, color=_INK)
        panels[-1, column].set_xlabel("IoU threshold", fontsize=10, color=_INK)
    for row, title in enumerate(ROWS.values()):
        panels[row, 0].set_ylabel(title, fontsize=11, color=_INK)
    title = "AP and AR by IoU threshold and object size" + (f", {note}" if note else "")
    figure.suptitle(title, fontsize=13, color=_INK)
    handles = panels[0, 0].get_lines()[: len(analyses)]
    figure.legend(
        handles, list(analyses), loc="outside lower center", ncols=2, frameon=False, fontsize=10
    )
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure in the format of the file's suffix; raises StorageError."""
    with writing(path):
        figure.savefig(path, dpi=150, facecolor="white")


def _draw_panel(panel: Axes, lines: Mapping[str, Record]) -> None:
    """Values over the thresholds; their means stand above, where no line can cross them."""
    panel.set(xlim=(0.48, 0.97), ylim=(0, 1), xticks=THRESHOLDS[::2], yticks=_TICKS)
    panel.grid(color=_GRID, linewidth=0.8)
    panel.tick_params(colors=_QUIET, labelsize=9, length=0)
    for side, spine in panel.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_QUIET)
    for n, (values, style) in enumerate(zip(lines.values(), _STYLES, strict=False)):
        color, marker, dashes = style
        defined = values["mean"] is not None
        heights = [values[f"{t:g}"] if defined else float("nan") for t in THRESHOLDS]
        panel.plot(
            THRESHOLDS, heights, color=color, marker=marker, ls=dashes, clip_on=False, zorder=3
        )
        text = f"mean {values['mean']:.3f}" if defined else "no objects"
        place: dict[str, Any] = {"x": 0, "ha": "left"} if n == 0 else {"x": 1, "ha": "right"}
        panel.text(
            **place,
            y=1.04,
            s=text,
            transform=panel.transAxes,
            fontsize=9.5,
            color=color,
            va="bottom",
        )
