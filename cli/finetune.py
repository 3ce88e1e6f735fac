"""`detkit finetune`: train a detector, or measure the scales that a trained one learnt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from detkit.cli.options import Common, common_options, emit
from detkit.cli.training import run_training, training_options
from detkit.errors import ConfigError


@click.command("finetune")
@click.option(
    "--init-from",
    metavar="FILE",
    help="Checkpoint to start from: a backbone's fills the backbone, a detector's all of the net.",
)
@click.option(
    "--allow-partial", is_flag=True, help="Accept missing and left-over weights of --init-from."
)
@click.option(
    "--collect-scales",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Train nothing: measure the learnt scales of a run, or of one checkpoint, again.",
)
@training_options
@common_options(
    "--detector",
    "--backbone",
    "--scales",
    "--data",
    "--split",
    "--images",
    "--on-bad-image",
    "--workers",
    "--steps",
    "--epochs",
    "--minutes",
    "--batch-size",
    "--tensorboard",
)
def command(common: Common, collect_scales: Path | None, **options: Any) -> int:
    """Train a detector on a COCO, VOC or YOLO set, or on synthetic shapes.

    Without arguments it starts from the newest pretrain run and the synthetic set.

    \b
    Examples:
      detkit finetune
      detkit finetune --data cells --recipe tiny/frcnn-fpn --minutes 15
      detkit finetune --data cells --detector frcnn-fpn --backbone detnet59 --init-from backbone.pth
      detkit finetune --data cells --resume auto
      detkit finetune --data cells --scales learn --out gsl
      detkit finetune --collect-scales gsl
    """
    if collect_scales is not None:
        return _collect(common, collect_scales, options)
    return run_training("finetune", common, **options)


def _collect(common: Common, source: Path, options: dict[str, Any]) -> int:
    layers = common.layers()
    given = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    given |= {"--recipe": common.recipe, "--out": common.out}
    given |= dict.fromkeys(_unused(layers), True)
    for name, value in given.items():
        if value:
            raise ConfigError(f"--collect-scales: must stand without {name}, got both")
    if common.dry_run:
        emit(common, {"dry_run": True, "collect_scales": str(source)}, lambda: click.echo(source))
        return 0
    from detkit.cli.progress import image_progress
    from detkit.pod import collect_scales

    with image_progress() as show:
        result = collect_scales(source, overrides=layers, device=common.device, on_image=show)
    if os.environ.get("RANK", "0") == "0":
        emit(common, result, lambda: _show(result))
    return 0


def _unused(layers: list[Any]) -> list[str]:
    """Settings that measuring does not use: all but the data, what to measure, and the seed."""
    return [
        f"{table}.{key}"
        for layer in layers
        for table, values in layer.items()
        for key in values
        if table not in ("data", "scales") and (table, key) != ("train", "seed")
    ]


def _show(result: dict[str, Any]) -> None:
    from detkit.cli.tables import print_table, rows_table

    rows = [
        [path, *(f"{m:.3f} ± {s:.3f}" for m, s in zip(v["mean"], v["std"], strict=True))]
        for path, v in result["scales"].items()
    ]
    title = f"learnt scales in pixels over {result['images']} images"
    print_table(rows_table(title, ["layer", "h", "w"], rows))
    for file in result["checkpoints"]:
        click.echo(f"checkpoint {file}")
