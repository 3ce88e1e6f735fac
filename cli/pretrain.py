"""`detkit pretrain`: train a backbone as a classifier."""

from __future__ import annotations

from typing import Any

import click

from detkit.cli.options import Common, common_options
from detkit.cli.training import run_training, training_options


@click.command("pretrain")
@training_options
@common_options(
    "--backbone",
    "--data",
    "--split",
    "--on-bad-image",
    "--workers",
    "--steps",
    "--epochs",
    "--minutes",
    "--batch-size",
    "--tensorboard",
)
def command(common: Common, **options: Any) -> int:
    """Train a backbone as a classifier on an ImageFolder set (train/<class>/, val/<class>/).

    \b
    Examples:
      detkit pretrain                                  synthetic shapes, tiny recipe
      detkit pretrain --data digits --recipe tiny/pretrain
      detkit pretrain --data digits --backbone detnet59-tiny --epochs 30 --json
    """
    return run_training("pretrain", common, **options)
