"""Figures of matplotlib as SVG inside a page: small, without styles of their own, in its colours.

Text stays text, in the page's font. Colours become the page's variables, so that one drawing serves
a light and a dark page.
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6D3B", "#5D5D9E")
"""Colours that stay apart without colour vision (Okabe and Ito, without black and yellow, and two
more); the page gives each its shade."""

INK, QUIET, GRID, SHADE = "#222222", "#666666", "#dddddd", "#eeeeee"

_VARIABLES = {color.lower(): f"var(--c{i})" for i, color in enumerate(PALETTE)} | {
    INK: "var(--ink)",
    QUIET: "var(--quiet)",
    GRID: "var(--grid)",
    SHADE: "var(--shade)",
}
_COLOR = re.compile(r"(fill|stroke): (#[0-9a-f]{6})")
_FONT = re.compile(r"font: ([^;\"']*?)([\d.]+px) [^;\"]*")
_DIGITS = re.compile(r"(\.\d\d)\d+")
_TAG = re.compile(r"<[^>]*>")
_ID = re.compile(r' id="([^"]*)"')
_REFERENCE = re.compile(r'(href="#|url\(#)([^")]+)')


def inline_svg(figure: Figure, key: str, label: str) -> str:
    """The figure as an ``<svg>`` element.

    Args:
        figure: what is drawn in the colours of this module, or in others that suit both a light and
            a dark page.
        key: begins the ids inside; another for each figure of a page.
        label: what a screen reader says.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _COLOR.sub(lambda m: f"{m[1]}: {_VARIABLES.get(m[2], m[2])}", svg)
    svg = _FONT.sub(r"font: \1\2 var(--font)", svg)
    svg = _TAG.sub(lambda tag: _DIGITS.sub(r"\1", tag[0]), svg)  # places, and no text
    svg = re.sub(r">\s+<", "><", _own_ids(svg, key))
    box = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(label)}">'
    return opening + svg[svg.index(">") + 1 :].strip()


def _own_ids(svg: str, key: str) -> str:
    """Ids that are referred to begin with the key; the others go."""
    used = {found[1] for found in _REFERENCE.findall(svg)}
    svg = _ID.sub(lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", svg)
    return _REFERENCE.sub(rf"\1{key}-\2", svg)
