"""Tables that commands print for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    """Print on stdout; wide enough not to cut columns when stdout is a file."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def rows_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A plain table; the first column is left-aligned, the others right-aligned."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(number(value) for value in row))
    return table


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
