"""`detkit data`: look at data sets and make the synthetic one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from detkit import config as configs
from detkit.cli.options import Common, common_options, emit


@click.group("data")
def command() -> None:
    r"""Check and make data sets.

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
    r"""List every problem of a data set with file, image id, annotation id and rule.

    \b
    Examples:
      detkit data check my_set
      detkit data check my_set --split val --json
    """
    from dataclasses import replace

    from detkit.data.check import check

    config = configs.resolve(common.layers()).data
    report = check(path, split, replace(config, images=images or config.images))
    emit(common, report.to_plain(), lambda: _show(report.to_plain()))


def _show(report: dict[str, Any]) -> None:
    from detkit.cli.tables import print_table, rows_table

    columns = ["rule", "action", "file", "image_id", "annotation_id", "what"]
    splits = report["splits"].items()
    rows = [
        [name, *(str(p[c]) for c in columns)] for name, split in splits for p in split["problems"]
    ]
    if rows:
        print_table(rows_table("problems", ["split", *columns], rows))
    sizes = [[name, s["images"], s["annotations"], sum(s["counts"].values())] for name, s in splits]
    print_table(
        rows_table(
            f"{report['path']} ({report['layout']})",
            ["split", "images", "boxes", "problems"],
            sizes,
        )
    )
    for rule, what in report["rules"].items():
        click.echo(f"{rule}: {what}")


@command.command("synth")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--train", "images_train", default=400, show_default=True, help="Training images.")
@click.option("--val", "images_val", default=100, show_default=True, help="Validation images.")
@click.option("--size", default=256, show_default=True, help="Side of the images in pixels.")
@click.option(
    "--sides",
    type=(int, int),
    metavar="LOW HIGH",
    help="Draw the longer sides of objects log-uniformly between these pixels.",
)
@common_options()
def synth_command(
    common: Common,
    folder: Path,
    images_train: int,
    images_val: int,
    size: int,
    sides: tuple[int, int] | None,
) -> None:
    r"""Write the synthetic set (COCO json with masks); the same seed writes the same bytes.

    \b
    Examples:
      detkit data synth shapes --train 400 --val 100 --seed 1
      detkit data synth shapes --size 128 --sides 8 128
    """
    from detkit.data import synthetic

    result = {"folder": str(folder), "train": images_train, "val": images_val, "size": size}
    result |= {"sides": None if sides is None else list(sides)}
    if not common.dry_run:
        synthetic.write(
            folder,
            images_train=images_train,
            images_val=images_val,
            size=size,
            sides=sides,
            seed=common.seed or 0,
        )
    emit(
        common,
        result,
        lambda: click.echo(f"wrote {images_train} + {images_val} images to {folder}"),
    )
