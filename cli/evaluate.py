"""`detkit eval`: score a detector, or a file of detections."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from detkit.cli.options import Common, Tables, common_options, emit
from detkit.errors import ConfigError

_COCO_TREE = """annotations/instances_train2017.json
annotations/instances_val2017.json
train2017/*.jpg
val2017/*.jpg"""


@click.command("eval")
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option(
    "--coco", is_flag=False, flag_value="", default=None, metavar="[DIR]", help="COCO 2017 folder."
)
@click.option(
    "--data", metavar="PATH", help="Data set; by default the one the checkpoint was trained on."
)
@click.option("--split", default="val", show_default=True, help="Split to score on.")
@click.option("--images", default="", help="Image folder, where an annotation file stands alone.")
@click.option(
    "--detections", type=click.Path(path_type=Path), help="COCO results file to score; no model."
)
@click.option(
    "--save-detections", type=click.Path(path_type=Path), help="Write the detections here."
)
@click.option("--analysis", is_flag=True, help="Also AP and AR by IoU and area.")
@click.option(
    "--metric",
    type=click.Choice(["coco", "voc07", "voc12"]),
    default="coco",
    show_default=True,
    help="COCO's metrics, or VOC mAP by 11 points (voc07) or by area (voc12).",
)
@common_options("--workers", "--on-bad-image")
def command(
    common: Common,
    checkpoint: Path | None,
    coco: str | None,
    data: str | None,
    split: str,
    images: str,
    **options: Any,
) -> None:
    r"""Score CHECKPOINT, by default the newest detector run, on a data set.

    \b
    Examples:
      detkit eval
      detkit eval runs/finetune/.../best.pth --data cells --json
      detkit eval best.pth --coco /sets/coco --analysis
      detkit eval --detections results.json --data cells --metric voc07
    """
    from detkit import api

    if coco is not None and coco.endswith(".pth") and checkpoint is None:
        checkpoint, coco = (
            Path(coco),
            "",
        )  # `--coco best.pth`: the value was meant as the checkpoint
    path = data if coco is None else _coco_folder(coco)
    if checkpoint is None and options["detections"] is None:
        checkpoint = Path(str(api.newest_checkpoint("finetune")))
        click.echo(f"using {checkpoint}", err=True)
    overrides: list[Any] = [*common.layers(), *([{"data": {"images": images}}] if images else [])]
    if common.dry_run:
        plan = {"checkpoint": str(checkpoint), "data": path, "split": split, **_plain(options)}
        emit(common, {"dry_run": True, **plan}, lambda: click.echo(plan))
        return
    result = _evaluate(common, checkpoint, path, split, overrides, options)
    emit(common, result, lambda: _show(result))


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}


def _evaluate(
    common: Common,
    checkpoint: Path | None,
    path: str | None,
    split: str,
    overrides: list[Tables],
    options: dict[str, Any],
) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import Progress

    from detkit import api

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=None)
        show: Callable[[int, int], None] = lambda done, total: bar.update(  # noqa: E731 - one line, used once
            task, completed=done, total=total
        )
        return api.evaluate(
            checkpoint,
            data=path,
            split=split,
            overrides=overrides,
            device=common.device,
            on_image=show,
            **options,
        )


def _coco_folder(value: str) -> str:
    folder = value or os.environ.get("DETKIT_COCO") or "data/coco"
    if not Path(folder).exists():
        tree = "\n  ".join(_COCO_TREE.splitlines())
        raise ConfigError(
            f"--coco: must be a folder with the COCO 2017 layout, got {folder!r}, not there;"
            f" give --coco DIR or set DETKIT_COCO to a folder with\n  {tree}"
        )
    return folder


def _show(result: dict[str, Any]) -> None:
    from detkit.cli.tables import metrics_table, print_table, rows_table

    for title in ("bbox", "segm", "voc07", "voc12"):
        if title in result:
            print_table(metrics_table(title, result[title]))
    per_class = result["per_class"]
    columns = list(next(iter(per_class.values()), {}))
    rows = [[name, *values.values()] for name, values in per_class.items()]
    print_table(rows_table("per class", ["class", *columns], rows))
    for quantity, areas in result.get("analysis", {}).items():
        ious = list(next(iter(areas.values())))
        rows = [[area, *values.values()] for area, values in areas.items()]
        print_table(rows_table(f"{quantity} by area and IoU", ["area", *ious], rows))
    click.echo(f"{result['images']} images, {result['detections']} detections")
    for line in result.get("normalised", []):
        click.echo(f"normalised: {line}")
