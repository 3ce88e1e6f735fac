"""`detkit data`: look at data sets and make the synthetic one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from detkit import config as configs
from detkit.cli.options import Common, common_options, emit
from detkit.errors import ConfigError


@click.group("data")
def command() -> None:
    """Check, repair, convert, draw and make data sets.

    \b
    Examples:
      detkit data check my_set
      detkit data check my_set --fix cleaned
      detkit data convert my_set as_yolo --to yolo
      detkit data show my_set -o sheet.png
      detkit data synth shapes --train 400 --val 100
    """


@command.command("check")
@click.argument("path")
@click.option("--split", help="One split only.")
@click.option("--images", default="", help="Image folder, where an annotation file stands alone.")
@click.option(
    "--fix",
    "target",
    type=click.Path(path_type=Path),
    metavar="DST",
    help="Write a cleaned copy here, with a list of changes.",
)
@click.option("--link", is_flag=True, help="With --fix: hard links to the images, no copies.")
@common_options()
def check_command(
    common: Common, path: str, split: str | None, images: str, target: Path | None, link: bool
) -> None:
    """List every problem of a data set with file, image id, annotation id and rule.

    --fix writes a copy in the same layout in which each is repaired or left out, boxes end at the
    image's border, and changes.json says what was done and why.

    \b
    Examples:
      detkit data check my_set
      detkit data check my_set --split val --json
      detkit data check my_set --fix cleaned
    """
    from detkit.data.check import check

    config = _data(common, images)
    if target is None:
        if link:
            raise ConfigError("--link: must go with --fix, got it alone")
        report = check(path, split, config)
        emit(common, report.to_plain(), lambda: _show(report.to_plain()))
        return
    if split is not None:
        raise ConfigError(f"--fix: must stand without --split, got {split!r}; it cleans them all")
    from detkit.data.convert import fix

    done, report = fix(path, target, link=link, config=config, dry_run=common.dry_run)
    plain = report.to_plain() | {"fixed": done.to_plain()}

    def show() -> None:
        _show(report.to_plain())
        _show_conversion(done.to_plain(), common.dry_run)

    emit(common, plain, show)


def _data(common: Common, images: str) -> configs.DataConfig:
    config = configs.resolve(common.layers()).data
    return replace(config, images=images or config.images)


@command.command("convert")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to", required=True, type=click.Choice(["coco", "voc", "yolo"]), help="Layout to write."
)
@click.option("--split", "only", multiple=True, help="One split only; repeatable.")
@click.option("--images", default="", help="Image folder, where an annotation file stands alone.")
@click.option("--link", is_flag=True, help="Hard links to the images, no copies.")
@click.option("--polygons", is_flag=True, help="With --to yolo: write masks of one polygon.")
@common_options()
def convert_command(
    common: Common,
    source: str,
    target: Path,
    to: str,
    only: tuple[str, ...],
    images: str,
    link: bool,
    polygons: bool,
) -> None:
    """Write the data set SOURCE to the new folder TARGET in another layout.

    What is broken is left out as in training, what the layout cannot hold is counted, and TARGET
    appears when all of it is written.

    \b
    Examples:
      detkit data convert my_set as_yolo --to yolo
      detkit data convert my_set as_voc --to voc --link
      detkit data convert labels.json as_coco --images photos --to coco --json
    """
    from detkit.data.convert import convert

    done = convert(
        source,
        target,
        to,
        only=only,
        link=link,
        polygons=polygons,
        config=_data(common, images),
        dry_run=common.dry_run,
    ).to_plain()
    emit(common, done, lambda: _show_conversion(done, common.dry_run))


def _show_conversion(done: dict[str, Any], dry_run: bool) -> None:
    verb = "would write" if dry_run else "wrote"
    click.echo(f"{verb} {done['target']} ({done['to']}) from {done['source']} ({done['layout']})")
    for name, counts in done["splits"].items():
        click.echo(f"  {name}: {counts['images']} images, {counts['boxes']} boxes")
    titles = {
        "left_out": "left out, being unusable",
        "repaired": "repaired",
        "not_held": f"not in {done['to']} files as it was",
    }
    for key, title in titles.items():
        if done[key]:
            click.echo(f"{title}:")
        for what, count in done[key].items():
            click.echo(f"  {count:>6} {what}")
    for note in done["notes"]:
        click.echo(f"note: {note}")


def _show(report: dict[str, Any]) -> None:
    from detkit.cli.tables import print_table, rows_table

    splits = report["splits"].items()
    for name, split in splits:
        for problem in split["problems"]:
            click.echo(f"{name}: {_place(problem)}: {problem['rule']}, {problem['what']}")
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
    _show_unions(report["unions"])


def _show_unions(names: list[str]) -> None:
    for name in names:
        click.echo(f"not shown: {name}, whose images are all in the others; give --split {name}")


@command.command("show")
@click.argument("path")
@click.option(
    "-o",
    "sheet",
    type=click.Path(path_type=Path),
    metavar="SHEET.png",
    help="Draw images with their boxes here.",
)
@click.option("--split", help="One split only; the sheet is of the first.")
@click.option("--images", default="", help="Image folder, where an annotation file stands alone.")
@click.option(
    "--count", type=click.IntRange(1), default=12, show_default=True, help="Images on the sheet."
)
@common_options()
def show_command(
    common: Common, path: str, sheet: Path | None, split: str | None, images: str, count: int
) -> None:
    """Count images, boxes and sizes class by class, and draw a sheet of images with their boxes.

    The sheet has an image of every class first; --seed draws others at random.

    \b
    Examples:
      detkit data show my_set
      detkit data show my_set -o sheet.png --split val
      detkit data show my_set -o other.png --seed 1 --count 20
    """
    if sheet is not None and common.out is not None:
        raise ConfigError("-o: must stand without --out, got both")
    target = common.out / "sheet.png" if common.out is not None else sheet
    from detkit.data.open import layout, open_classification, open_detection, splits, unions
    from detkit.data.statistics import statistics

    config = _data(common, images)
    kind = layout(path)
    opened = open_classification if kind == "folder" else open_detection
    left_out = unions(path) if split is None else []
    names = [split] if split is not None else [n for n in splits(path) if n not in left_out]
    sets = {name: opened(path, name, config) for name in names}
    found = {name: statistics(dataset) for name, dataset in sets.items()}
    result: dict[str, Any] = {"path": path, "layout": kind, "splits": found, "sheet": None}
    result["unions"] = left_out
    if target is not None and not common.dry_run:
        result["sheet"] = _draw(next(iter(sets.values())), target, count, common.seed)
    emit(common, result, lambda: _show_statistics(result))


def _draw(dataset: Any, target: Path, count: int, seed: int | None) -> str:
    from detkit.prediction import save_picture
    from detkit.report.sheet import contact_sheet

    target.parent.mkdir(parents=True, exist_ok=True)
    save_picture(contact_sheet(dataset, count, seed), target)
    return str(target)


def _place(problem: dict[str, Any]) -> str:
    """Where a problem is, and what is done about it."""
    ids = {"image": problem["image_id"], "annotation": problem["annotation_id"]}
    parts = [problem["file"], *(f"{what} {i}" for what, i in ids.items() if i is not None)]
    return f"{', '.join(parts)} ({problem['action']})"


def _show_statistics(result: dict[str, Any]) -> None:
    from detkit.cli.tables import print_table, rows_table

    for name, split in result["splits"].items():
        size = " x ".join(_range(split[side]) for side in ("width", "height"))
        click.echo(f"{name}: {split['images']} images of {size} pixels ({result['layout']})")
        if "boxes" in split:
            _show_boxes(split)
        rows = {c: row for c, row in split["per_class"].items() if row["images"]}
        columns = [*next(iter(split["per_class"].values()))]
        cells = [[c, *map(_cell, row.values())] for c, row in rows.items()]
        print_table(rows_table("", ["class", *columns], cells))
        missing = [c for c in split["per_class"] if c not in rows]
        if missing:
            click.echo(f"nothing of {len(missing)} classes: {', '.join(missing)}")
    if "side" in columns:
        click.echo("side: square root of the box's area, least · median · most pixels")
    _show_unions(result["unions"])
    if result["sheet"]:
        click.echo(f"drawn in {result['sheet']}")


def _show_boxes(split: dict[str, Any]) -> None:
    median = split["boxes_per_image"][1]
    click.echo(
        f"{split['boxes']} boxes, {_range(split['boxes_per_image'])} an image (median {median}); "
        f"{split['empty_images']} images without"
    )
    flags = {k: split[k] for k in ("masks", "crowd", "difficult") if split[k]}
    if flags:
        click.echo(", ".join(f"{n} {what}" for what, n in flags.items()))


def _range(spread: list[int]) -> str:
    return f"{spread[0]} to {spread[2]}" if spread[0] != spread[2] else str(spread[0])


def _cell(value: Any) -> Any:
    return " · ".join(f"{v:.0f}" for v in value) if isinstance(value, list) else value


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
    """Write the synthetic set (COCO json with masks); the same seed writes the same bytes.

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
