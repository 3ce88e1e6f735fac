"""Tables of a report: escaped, scrollable on small screens, numbers as commands print them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Cell = object


@dataclass(frozen=True)
class Share:
    """A number in 0..1 drawn as a bar behind its digits."""

    value: float | None


@dataclass(frozen=True)
class Best:
    """A cell to stand out among those of its column."""

    value: Cell


@dataclass(frozen=True)
class Html:
    """Markup that is safe already."""

    text: str


def number(value: Cell) -> str:
    """Three decimals for a fraction, thousands separated, a dash for an undefined value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, left: int = 1
) -> str:
    """A table; the first column names the rows and stays in sight while the others scroll.

    Args:
        title: its caption; empty for none.
        columns: names.
        rows: cells: text and numbers, or one of the classes of this module.
        left: columns from the left that hold text.
    """
    head = "".join(
        f'<th scope="col"{_side(i, left)}>{escape(name)}</th>' for i, name in enumerate(columns)
    )
    body = "".join(f"<tr>{_row(row, left)}</tr>" for row in rows)
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    return scroll(
        title or "table",
        f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
    )


def scroll(label: str, content: str) -> str:
    """A region that scrolls sideways, also by keyboard."""
    opening = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
    return f"{opening}{content}</div>"


def facts(rows: Sequence[tuple[str, Cell]]) -> str:
    """Names and values as a list."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(number(value))}</dd></div>"
        for name, value in rows
    )
    return f'<dl class="facts">{items}</dl>'


def best_of(values: Sequence[float | None]) -> list[Cell]:
    """The values, the largest marked where there are several to choose from."""
    known = [v for v in values if v is not None]
    if len(known) < 2 or min(known) == max(known):
        return list(values)
    return [Best(v) if v == max(known) else v for v in values]


def _row(row: Sequence[Cell], left: int) -> str:
    first, *rest = row
    cells = [f'<th scope="row">{_content(first)}</th>']
    cells += [_cell(cell, i < left) for i, cell in enumerate(rest, 1)]
    return "".join(cells)


def _cell(cell: Cell, text: bool) -> str:
    side = ' class="text"' if text else ""
    if isinstance(cell, Best):
        return f'<td class="best">{_content(cell.value)}</td>'
    if isinstance(cell, Share) and cell.value is not None:
        width = 100 * min(max(cell.value, 0.0), 1.0)
        return f'<td class="share" style="--v:{width:.1f}%">{_content(cell.value)}</td>'
    return f"<td{side}>{_content(cell.value if isinstance(cell, Share) else cell)}</td>"


def _content(cell: Cell) -> str:
    return cell.text if isinstance(cell, Html) else escape(number(cell))


def _side(column: int, left: int) -> str:
    return ' class="text"' if column < left else ""
