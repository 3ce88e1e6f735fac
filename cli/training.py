"""What `pretrain` and `finetune` share: options, resume, many processes, progress, results."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from detkit import config as configs
from detkit.cli.options import Common, emit
from detkit.errors import ConfigError

log = logging.getLogger("detkit")


def training_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of both training commands beside the shared ones."""
    function = click.option(
        "--resume",
        metavar="auto|RUN",
        help="Continue a run: `auto` takes --out, else the newest run with these settings, if any.",
    )(function)
    return click.option(
        "--gpus", type=click.IntRange(1), help="Processes to train on, one per GPU."
    )(function)


def run_training(
    kind: str,
    common: Common,
    *,
    resume: str | None,
    gpus: int | None,
    init_from: str | None = None,
    allow_partial: bool = False,
) -> int:
    """Resolve the settings, train, and show where the results are; returns the exit code."""
    from detkit import api  # loads torch, which --help must not

    starts = resume in (None, "auto")
    if kind == "finetune" and starts and init_from is None and _is_bare(common):
        init_from = api.newest_checkpoint("pretrain", required=False)
        found = f"starting from {init_from}" if init_from else "no pretrain run: from scratch"
        log.info("%s", found)
    settings = api.resolve_settings(
        kind, common.layers(), recipe=common.recipe, init_from=init_from, resume=resume
    )
    config = api.with_length(settings.config)
    api.check_metric(kind, config)
    _check_data(config, common)
    if gpus and gpus > 1 and "LOCAL_RANK" not in os.environ:
        return api.launch_processes(gpus, click.get_current_context().obj)
    if common.dry_run:
        _rehearse(kind, common, replace(settings, config=config), resume, init_from, allow_partial)
        return 0
    result = _train(kind, common, config, resume, init_from, allow_partial)
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one reports
        emit(common, result, lambda: _show(result))
    return 0


def _rehearse(
    kind: str,
    common: Common,
    settings: Any,
    resume: str | None,
    init_from: str | None,
    allow_partial: bool,
) -> None:
    from detkit.cli.rehearsal import show
    from detkit.rehearsal import rehearse_training

    found = rehearse_training(
        kind,
        settings.config,
        settings.origins,
        out=common.out,
        device=common.device,
        resume=resume,
        init_from=init_from,
        allow_partial=allow_partial,
    )
    if os.environ.get("RANK", "0") == "0":
        emit(common, found, lambda: show(found))


def _is_bare(common: Common) -> bool:
    """Whether neither data nor settings of a model are given."""
    flags = {key for table in common.flags.values() for key in table}
    return not (common.recipe or common.config_file or {"path", "backbone", "detector"} & flags)


def _check_data(config: configs.Config, common: Common) -> None:
    if config.data.path == "synthetic" and not common.flags.get("data"):
        log.info("training on the built-in synthetic shapes; --data takes your own set")
    elif config.data.path != "synthetic" and not Path(config.data.path).exists():
        hint = configs.suggest_path(config.data.path)
        raise ConfigError(f"--data: must exist, got {config.data.path!r}{hint}")


def _train(
    kind: str,
    common: Common,
    config: configs.Config,
    resume: str | None,
    init_from: str | None,
    allow_partial: bool,
) -> dict[str, Any]:
    from detkit import api
    from detkit.cli.progress import TrainProgress

    with TrainProgress(kind) as progress:
        return api.train(
            kind,
            config,
            out=common.out,
            device=common.device,
            resume=resume,
            init_from=init_from,
            allow_partial=allow_partial,
            on_step=progress,
            on_image=progress.on_image,
        )


def _show(result: dict[str, Any]) -> None:
    from detkit.cli.tables import metrics_table, print_table

    print_table(metrics_table("held-out metrics", result["metrics"]))
    click.echo(f"run        {result['run']}")
    click.echo(f"checkpoint {result['checkpoint']}")
