"""Tables that commands print for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    """Print on stdout; wide enough not to cut columns when stdout is a file."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    with console.capture() as text:
        console.print(table)
    # Written here, since rich ends the process with code 1 where the reader of a pipe has gone.
    sys.stdout.write(text.get())
    sys.stdout.flush()


def rows_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A plain table; the first column is left-aligned, the others right-aligned."""
    table = Table(title=title, title_justify="left")
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
    """One row of the scalar metrics."""
    scalars = {k: v for k, v in metrics.items() if v is None or isinstance(v, int | float)}
    return rows_table(title, list(scalars), [list(scalars.values())])


def number(value: Any) -> str:
    """Three decimals for a float, a dash for an undefined value, thousands separated."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
