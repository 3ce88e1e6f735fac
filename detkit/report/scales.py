"""Learnt scales layer by layer, as figure 6 of POD (Peng et al., ICCV 2019) has them.

matplotlib draws it; it is the optional extra ``plots`` and is loaded when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from detkit.report.analysis import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

_AXES = (("d_h (height)", "#0072B2", "o", "-"), ("d_w (width)", "#D55E00", "s", "--"))
"""Name, colour, marker and dash: told apart without colour vision, and in grey."""

_INK, _GRID, _QUIET = "#222222", "#dddddd", "#666666"


def draw_scales(nets: Mapping[str, Sequence[Record]]) -> Figure:
    """Mean scale of each layer with its deviation over images, one panel per net.

    A line at 1 is the plain convolution; bands in grey are layers of stride 2.

    Args:
        nets: name to the ``layers`` of ``detkit decompose``, in the network's order.

    Raises:
        ConfigError: matplotlib is not installed.
        ValueError: no net.
    """
    if not nets:
        raise ValueError("draw_scales: must be at least one net, got none")
    require_matplotlib("--plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    longest = max(len(layers) for layers in nets.values())
    size = (max(6.0, 1.5 + 0.5 * longest), 1.2 + 3.2 * len(nets))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(nets), 1, squeeze=False)[:, 0]
    for panel, (name, layers) in zip(panels, nets.items(), strict=True):
        _draw_panel(panel, layers)
        panel.set_title(name, fontsize=11, color=_INK)
    panels[-1].set_xlabel("layer; grey: stride 2", fontsize=10, color=_INK)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=10,
    )
    return figure


def _draw_panel(panel: Axes, layers: Sequence[Record]) -> None:
    places = range(len(layers))
    panel.axhline(1, color=_QUIET, linewidth=1)
    for place, layer in zip(places, layers, strict=True):
        if max(layer["stride"]) > 1:
            panel.axvspan(place - 0.4, place + 0.4, color="#eeeeee", zorder=0)
    for index, (name, color, marker, dashes) in enumerate(_AXES):
        means = [layer["mean"][index] for layer in layers]
        stds = [layer["std"][index] for layer in layers]
        low = [m - s for m, s in zip(means, stds, strict=True)]
        high = [m + s for m, s in zip(means, stds, strict=True)]
        panel.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0)
        panel.plot(places, means, color=color, marker=marker, ls=dashes, label=name)
    panel.set_xticks(list(places), [layer["label"] for layer in layers], rotation=60)
    panel.set_ylabel("scale in pixels", fontsize=10, color=_INK)
    largest = max(value for layer in layers for value in layer["mean"])
    panel.set_ylim(0, max(1.5, 1.15 * largest))  # scales of 1 do not draw on the frame
    panel.grid(axis="y", color=_GRID, linewidth=0.8)
    panel.tick_params(colors=_QUIET, labelsize=9)
    for side, spine in panel.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_QUIET)
