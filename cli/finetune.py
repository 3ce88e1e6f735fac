"""`detkit finetune`: train a detector."""

from __future__ import annotations

from typing import Any

import click

from detkit.cli.options import Common, common_options
from detkit.cli.training import run_training, training_options


@click.command("finetune")
@click.option(
    "--init-from",
    metavar="FILE",
    help="Checkpoint to start from: a backbone's fills the backbone, a detector's all of the net.",
)
@click.option(
    "--allow-partial", is_flag=True, help="Accept missing and left-over weights of --init-from."
)
@training_options
@common_options(
    "--detector",
    "--backbone",
    "--data",
    "--split",
    "--images",
    "--on-bad-image",
    "--workers",
    "--steps",
    "--epochs",
    "--minutes",
    "--batch-size",
)
def command(common: Common, **options: Any) -> int:
    r"""Train a detector on a COCO, VOC or YOLO set, or on synthetic shapes.

    Without arguments it starts from the newest pretrain run and the synthetic set.

    \b
    Examples:
      detkit finetune
      detkit finetune --data cells --recipe tiny/frcnn-fpn --minutes 15
      detkit finetune --data cells --detector frcnn-fpn --backbone detnet59 --init-from backbone.pth
      detkit finetune --data cells --resume auto
    """
    return run_training("finetune", common, **options)
