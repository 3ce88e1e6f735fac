"""Tables that commands print for people."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    """Print on stdout, in parts where its columns do not fit side by side.

    A file or a pipe counts as 160 columns wide, unless COLUMNS says otherwise.
    """
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=160)
    with console.capture() as text:
        for part in _parts(table, console.width):
            console.print(part)
    # Written here, since rich ends the process with code 1 where the reader of a pipe has gone.
    lines = (line.rstrip(" ") for line in text.get().splitlines(keepends=False))
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _parts(table: Table, width: int) -> list[Table]:
    """The table, or tables whose columns fit, about as many in each: twelve metrics come as AP and
    AR. Each begins with the names of the rows.
    """
    if table.box is None:
        return [table]  # its last column wraps
    names = [str(column.header) for column in table.columns]
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    needs = [max(map(cell_len, [name, *c])) + 3 for name, c in zip(names, cells, strict=True)]
    kept = [0] if table.row_count > 1 else []
    room = width - 1 - sum(needs[i] for i in kept)
    others = range(len(kept), len(names))
    count = len(_packed(others, needs, room, len(names)))
    if count <= 1:
        return [table]
    parts = [[*kept, *part] for part in _packed(others, needs, room, -(-len(others) // count))]
    rows = list(zip(*cells, strict=True))
    return [
        rows_table(
            "" if n else str(table.title or ""),
            [names[i] for i in part],
            [[row[i] for i in part] for row in rows],
        )
        for n, part in enumerate(parts)
    ]


def _packed(columns: Sequence[int], needs: Sequence[int], room: int, most: int) -> list[list[int]]:
    """Columns in order, in groups that fit ``room`` and have at most ``most``."""
    groups: list[list[int]] = []
    left = 0
    for i in columns:
        if not groups or len(groups[-1]) == most or needs[i] > left:
            groups.append([])
            left = room
        groups[-1].append(i)
        left -= needs[i]
    return groups


def rows_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A plain table; the first column is left-aligned, the others right-aligned."""
    table = Table(title=title or None, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(number(value) for value in row))
    return table


def slim_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table without lines, for many columns in 80; the first is whole, the last wraps."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    last = len(columns) - 1
    for i, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if i in (0, last) else "right"
        table.add_column(column, justify=justify, no_wrap=i < last)
    for row in rows:
        table.add_row(*(number(value) for value in row))
    return table


def amount(value: float) -> str:
    """``25.6 M``, ``4.09 G``: three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def metrics_table(title: str, metrics: Mapping[str, Any]) -> Table:
    """The scalar metrics, as a row of names above a row of values."""
    scalars = {k: v for k, v in metrics.items() if v is None or isinstance(v, int | float)}
    return rows_table(title, list(scalars), [list(scalars.values())])


def number(value: Any) -> str:
    """Three decimals for a float, a dash for an undefined value, thousands separated."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
