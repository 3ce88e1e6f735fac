"""`detkit doctor`: what is installed and which operator runs where, and why."""

from __future__ import annotations

from typing import Any

import click

from detkit.cli.options import Common, common_options, emit


@click.command("doctor")
@common_options()
def command(common: Common) -> None:
    r"""Show what is installed, which operator runs on which kernel and why, and what to do.

    \b
    Example:
      detkit doctor
    """
    from detkit import doctor

    report = doctor.report()
    emit(common, report, lambda: _show(report))


def _show(report: dict[str, Any]) -> None:
    from detkit.cli.tables import print_table, rows_table

    ops = report.pop("ops")
    rows = [[op, facts["backend"], facts["why"]] for op, facts in ops.items()]
    print_table(rows_table("operators", ["operator", "runs", "why"], rows))
    advice = report.pop("advice")
    facts = [[name, str(value)] for name, value in _flat(report)]
    print_table(rows_table("installation", ["what", "found"], facts))
    for line in advice:
        click.echo(f"to do: {line}")


def _flat(report: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in report.items():
        nested = [(f"{name} {k}", v) for k, v in value.items()] if isinstance(value, dict) else []
        rows += nested or [(name, value)]
    return rows
