"""Networks of a search space as strips of blocks, as figures 4 and 5 of DetNAS have them.

matplotlib draws it; it is the optional extra ``plots`` and is loaded when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from detkit.models.search_space import Genes, SearchSpace
from detkit.report.analysis import require_matplotlib, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Nets = Mapping[str, tuple[SearchSpace, Genes]]

STYLES = {
    "shuffle3": ("shuffle 3x3", "3", "#C6DBEF", "#111111"),
    "shuffle5": ("shuffle 5x5", "5", "#6BAED6", "#111111"),
    "shuffle7": ("shuffle 7x7", "7", "#08519C", "#ffffff"),
    "xception": ("xception 3x3", "x", "#E39E00", "#111111"),
}
"""Block to its name, the letter in its cell, the cell's colour and the letter's: larger kernels are
darker, and letters tell the blocks apart without colour."""

_INK, _QUIET = "#222222", "#666666"
_GAP = 0.5
"""Between two stages, in cells."""
_ROW, _HEAD = 1.35, 1.8
"""Height of a network's row and of the stages' names above, in cells."""
_CELL, _LETTER = 0.27, 0.09
"""Side of a cell and room for a letter of a network's name, in inches."""
_LEGEND = (5.5, 0.4)
"""Width and height of the legend, in inches."""


def draw_architectures(nets: Nets, path: str | Path) -> None:
    """Write :func:`architecture_figure` in the format of the file's suffix.

    Args:
        nets: name to space and genes, from the top.
        path: the picture.

    Raises:
        ConfigError: matplotlib is not installed, or genes are not of their space.
        StorageError: the file cannot be written.
        ValueError: no net.
    """
    save_figure(architecture_figure(nets), path)


def architecture_figure(nets: Nets) -> Figure:
    """One row of cells per network, a cell per block, wider gaps between stages.

    Networks with the same blocks per stage stand together, below the names of their stages' maps
    and strides.

    Args:
        nets: name to space and genes, from the top.

    Raises:
        ConfigError: matplotlib is not installed, or genes are not of their space.
        ValueError: no net.
    """
    if not nets:
        raise ValueError("architecture_figure: must be at least one network, got none")
    require_matplotlib("--picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    groups: dict[tuple[int, ...], dict[str, tuple[SearchSpace, Genes]]] = {}
    for name, (space, genes) in nets.items():
        groups.setdefault(space.blocks, {})[name] = space, space.check(genes)
    cells = max(_width(blocks) for blocks in groups)
    rows = sum(_HEAD + _ROW * len(group) for group in groups.values())
    names = _LETTER * max(map(len, nets))
    width, height = max(names + _CELL * (cells + 0.3), _LEGEND[0]), _CELL * rows + _LEGEND[1]
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    low = _LEGEND[1] / height
    panel = figure.add_axes((names / width, low, 1 - names / width, 1 - low))
    panel.set(xlim=(0, (width - names) / _CELL), ylim=(rows, 0))
    panel.set_axis_off()
    top = _HEAD
    for blocks, group in groups.items():
        _draw_group(panel, blocks, group, top)
        top += _ROW * len(group) + _HEAD
    used = {op for space, _ in nets.values() for op in space.ops}
    handles = [
        Patch(facecolor=color, label=f"{letter}: {label}")
        for op, (label, letter, color, _) in STYLES.items()
        if op in used
    ]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _width(blocks: tuple[int, ...]) -> float:
    return sum(blocks) + _GAP * (len(blocks) - 1)


def _draw_group(panel: Axes, blocks: tuple[int, ...], group: Nets, top: float) -> None:
    """A row per network from ``top`` down, the stages' names above."""
    left = 0.0
    for number, count in enumerate(blocks, 2):
        text = f"C{number}\nstride {2**number}"
        middle = left + count / 2
        panel.text(middle, top - 0.2, text, ha="center", fontsize=7.5, color=_QUIET)
        left += count + _GAP
    for row, (name, (space, genes)) in enumerate(group.items()):
        y = top + _ROW * row
        panel.text(-0.3, y + 0.5, name, ha="right", va="center", fontsize=9, color=_INK)
        for position, gene in zip(space.positions(), genes, strict=True):
            before = sum(blocks[: position.stage - 2]) + position.index
            _draw_cell(panel, before + _GAP * (position.stage - 2), y, space.ops[gene])


def _draw_cell(panel: Axes, left: float, top: float, op: str) -> None:
    from matplotlib.patches import Rectangle

    _, letter, color, ink = STYLES[op]
    panel.add_patch(Rectangle((left + 0.04, top), 0.92, 1, facecolor=color))
    panel.text(left + 0.5, top + 0.5, letter, ha="center", va="center", fontsize=8, color=ink)
