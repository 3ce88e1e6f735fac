"""`detkit doctor`: what is installed and which operator runs where, and why."""

from __future__ import annotations

from typing import Any

import click

from detkit.cli.options import Common, common_options, emit


@click.command("doctor")
@common_options()
def command(common: Common) -> None:
    """Show what is installed, which operator runs on which kernel and why, and what to do.

    \b
    Example:
      detkit doctor
    """
    from detkit import doctor

    report = doctor.report()
    emit(common, report, lambda: _show(report))


def _show(report: dict[str, Any]) -> None:
    from detkit.cli.tables import print_table, rows_table

    for title, value in report.items():
        if isinstance(value, dict):
            print_table(rows_table(title, ["", ""], [(k, str(v)) for k, v in value.items()]))
        elif isinstance(value, list):
            click.echo(f"{title}:")
            for line in value:
                click.echo(f"  {line}")
        else:
            click.echo(f"{title}: {value}")
