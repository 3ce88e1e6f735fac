"""`detkit doctor`: what is installed and which operator runs where, and why."""

from __future__ import annotations

from typing import Any

import click

from detkit.cli.options import Common, common_options, emit

_EXTRAS = {
    "hotcoco": "fast-eval",
    "matplotlib": "plots",
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx"),
    "tensorboard": "tensorboard",
}


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
    from detkit.cli.tables import print_table, slim_table

    advice = report.pop("advice")
    for line in advice:
        click.echo(f"problem: {line}")
    if not advice:
        click.echo("no problems found")
    click.echo()
    ops = report.pop("ops")
    rows = [[op, facts["backend"], facts["why"]] for op, facts in ops.items()]
    print_table(slim_table("operators", ["operator", "runs", "why"], rows))
    click.echo()
    missing = [name for name, version in report["packages"].items() if version is None]
    facts = [[name, str(value)] for name, value in _flat(report)]
    print_table(slim_table("installation", ["what", "found"], facts))
    if missing:
        click.echo(f"optional and not installed: {', '.join(missing)}; {_extras(missing)}")


def _extras(missing: list[str]) -> str:
    """The command that installs packages by their extras."""
    names = sorted({_EXTRAS[name] for name in missing})
    return f"pip install 'detkit[{','.join(names)}]'"


def _flat(report: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in report.items():
        nested = [(f"{name} {k}", v) for k, v in value.items()] if isinstance(value, dict) else []
        rows += nested or [(name, value)]
    return rows
