"""`detkit report`: one HTML page about one or several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from detkit.cli.options import Common, common_options, emit
from detkit.errors import ConfigError


@click.command("report")
@click.argument("runs", metavar="[RUN]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="The page.  [default: report.html in the first run's folder]",
)
@click.option(
    "--data", metavar="PATH", help="Data set; by default the one each run was trained on."
)
@click.option("--split", help="Split to detect on; by default each run's validation split.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    help="Detect on N images, evenly spaced over the split.  [default: all]",
)
@common_options("--workers", "--on-bad-image")
def command(
    common: Common,
    runs: tuple[Path, ...],
    output: Path | None,
    data: str | None,
    split: str | None,
    limit: int | None,
) -> None:
    """Write one self-contained HTML page about RUNs, by default the newest.

    Curves, accuracy, kinds of errors, learnt scales, searches, pictures; several runs stand side
    by side. Detections are made once and kept in the run's folder.

    \b
    Examples:
      detkit report
      detkit report runs/finetune/one runs/finetune/other -o both.html
      detkit report runs/finetune/one --data cells --split test --limit 500
    """
    _refuse(common)
    if common.out is not None:
        if output is not None:
            raise ConfigError("-o: must stand without --out, got both")
        output = common.out / "report.html"
    given: dict[str, Any] = {"data": data, "split": split, "images": limit, "output": output}
    if common.dry_run:
        plan: dict[str, Any] = {"dry_run": True, "runs": [str(run) for run in runs] or "the newest"}
        plan |= {key: None if value is None else str(value) for key, value in given.items()}
        emit(common, plan, lambda: click.echo(plan))
        return
    if common.out is not None:
        common.out.mkdir(parents=True, exist_ok=True)
    from detkit.cli.progress import image_progress
    from detkit.reporting import write_report

    with image_progress() as show:
        result = write_report(
            runs, overrides=common.layers(), device=common.device, on_image=show, **given
        )
    emit(common, result, lambda: _show(result))


def _refuse(common: Common) -> None:
    if common.recipe is not None:
        raise ConfigError(
            f"--recipe: must not be given to report, whose runs have their settings, "
            f"got {common.recipe!r}"
        )
    if common.seed is not None:
        raise ConfigError("--seed: must not be given to report, which draws nothing, got one")


def _show(result: dict[str, Any]) -> None:
    for run in result["runs"]:
        for note in run["notes"]:
            click.echo(f"{run['name']}: {note}")
    click.echo(f"report {result['report']} ({result['bytes'] / 1e6:.1f} MB)")
