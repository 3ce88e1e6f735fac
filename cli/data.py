"""`detkit data`: look at data sets and make the synthetic one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from detkit.cli.options import Common, common_options, emit


@click.group("data")
def command() -> None:
    """Check and make data sets.

    \b
    Examples:
      detkit data check my_set
      detkit data synth shapes --train 400 --val 100
    """


@command.command("check")
@click.argument("path")
@click.option("--split", help="One split only.")
@click.option("--images", default="", help="Image folder, where an annotation file stands alone.")
@common_options()
def check_command(common: Common, path: str, split: str | None, images: str) -> None:
    """List every problem of a data set with file, image id, annotation id and rule.

    \b
    Examples:
      detkit data check my_set
      detkit data check my_set --split val --json
    """
    from detkit.data.check import check

    report = check(path, split, images=images)
    emit(common, report.to_plain(), lambda: _show(report.to_plain()))


def _show(report: dict[str, Any]) -> None:
    from detkit.cli.tables import print_table, rows_table

    columns = ["rule", "action", "file", "image id", "annotation id", "what"]
    rows = [[p[c.replace(" ", "_")] for c in columns] for p in report["problems"]]
    if rows:
        print_table(rows_table("problems", columns, [[str(v) for v in row] for row in rows]))
    print_table(rows_table("splits", ["split", "images", "usable", "boxes"], report["splits"]))


@command.command("synth")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--train", "images_train", default=400, show_default=True, help="Training images.")
@click.option("--val", "images_val", default=100, show_default=True, help="Validation images.")
@click.option("--size", default=256, show_default=True, help="Side of the images in pixels.")
@common_options()
def synth_command(common: Common, folder: Path, images_train: int, images_val: int, size: int) -> None:
    """Write the synthetic set (COCO json with masks); the same seed writes the same bytes.

    \b
    Example:
      detkit data synth shapes --train 400 --val 100 --seed 1
    """
    from detkit.data import synthetic

    result = {"folder": str(folder), "train": images_train, "val": images_val, "size": size}
    if not common.dry_run:
        synthetic.write(
            folder, images_train=images_train, images_val=images_val, size=size, seed=common.seed or 0
        )
    emit(common, result, lambda: click.echo(f"wrote {images_train} + {images_val} images to {folder}"))
