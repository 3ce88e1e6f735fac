"""What the commands call and Python users import: build, load, train, evaluate.

This is the only module that puts data, models and engine together.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detkit import __version__
from detkit import config as configs
from detkit.config import Config
from detkit.data import (
    eval_batches,
    open_classification,
    open_detection,
    steps_per_epoch,
    train_batches,
)
from detkit.engine import checkpoint as checkpoints
from detkit.engine import distributed
from detkit.engine.classification import top1
from detkit.engine.evaluate import detect_dataset
from detkit.engine.evaluate import evaluate as score
from detkit.engine.results import read_results
from detkit.engine.run import RunFolder
from detkit.engine.train import StepInfo, fit
from detkit.errors import CheckpointError, ConfigError, DataError
from detkit.models import build_classifier, build_detector
from detkit.models.weights import load_initial
from detkit.types import CategoryMap

log = logging.getLogger("detkit")
DEFAULT_EPOCHS = 12.0  # the field's "1x", where neither steps, epochs nor minutes are given


@dataclass(frozen=True)
class Loaded:
    """A model rebuilt from one checkpoint file, in eval mode, with what it was built from."""

    model: nn.Module
    config: Config
    categories: CategoryMap
    kind: str


def build(config: Config, categories: CategoryMap | int, kind: str = "detector") -> nn.Module:
    """A freshly initialised detector, or classifier for ``kind="backbone"``.

    Args:
        config: the resolved settings.
        categories: the category map, or the number of classes K.
        kind: ``detector`` or ``backbone``.
    """
    count = categories if isinstance(categories, int) else len(categories)
    return (build_classifier if kind == "backbone" else build_detector)(config, count)


def load(path: str | Path, device: str = "cpu") -> Loaded:
    """Rebuild the model of a checkpoint with its deployed weights (the EMA copy where there is one).

    Raises:
        CheckpointError: the file is no detkit checkpoint, or its weights do not fit its own config.
    """
    stored = checkpoints.load(path)
    config = configs.from_plain(stored["config"])
    categories = CategoryMap.from_plain(stored["categories"])
    model = build(config, categories, stored["kind"])
    checkpoints.load_weights(model, checkpoints.deployed(stored), path)
    return Loaded(model.to(pick_device(device)).eval(), config, categories, stored["kind"])


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the process's own GPU where there is one, else the CPU.

    Raises:
        ConfigError: an unknown name, or a GPU that is not there.
    """
    if name == "auto":
        index = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device: must be auto, cpu, cuda or cuda:<index>, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device: {name} needs a GPU that torch can use, got none; `detkit doctor` says why")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device: must be auto, cpu, cuda or cuda:<index>, got {name!r}")
    return device


# -------------------------------------------------------------------------------------------------- settings


def resolve_config(
    layers: Iterable[Mapping[str, Any]], init_from: str | Path | None = None
) -> Config:
    """Apply the layers in order; where they name no architecture, take it from ``init_from``.

    Raises:
        CheckpointError: the layers name another architecture than the checkpoint has.
    """
    layers = list(layers)
    if init_from is None:
        return configs.resolve(layers)
    stored = checkpoints.load(init_from)
    shape_tables = ("model",) if stored["kind"] == "backbone" else ("model", "anchors", "rpn", "box")
    base = {table: dict(stored["config"][table]) for table in shape_tables}
    if stored["kind"] == "backbone":
        base["model"] = {key: base["model"][key] for key in ("backbone", "norm")}
    config = configs.resolve([base, *layers])
    for key, ours in base["model"].items():
        got = getattr(config.model, key)
        if key in ("backbone", "detector") and got != ours:
            raise CheckpointError(
                f"{init_from}: model.{key} must agree with the checkpoint's {ours!r}, got {got!r}"
            )
    return config


def newest_checkpoint(command: str, *, required: bool = True) -> str | None:
    """Path of the newest run's ``best.pth``, else ``last.pth``, under ``runs/<command>``."""
    found = RunFolder.newest_checkpoint(command)
    if found is None and required:
        raise CheckpointError(
            f"no checkpoint given and no run under runs/{command}; give a file or run `detkit {command}` first"
        )
    return None if found is None else str(found)


def training_plan(kind: str, config: Config) -> dict[str, Any]:
    """What ``--dry-run`` tells: data set sizes and length, without training a step."""
    config = with_length(config)
    train_set, val_set = _open(kind, config, config.data.split), _open(kind, config, config.data.val_split)
    return {
        "command": kind,
        "categories": list(train_set.categories.names),
        "train_images": len(train_set),
        "val_images": len(val_set),
        "steps_per_epoch": steps_per_epoch(train_set, config),
    }


def with_length(config: Config) -> Config:
    """``config`` with the default length where it gives none."""
    length = config.train
    if length.steps or length.epochs or length.minutes:
        return config
    log.info("no --steps, --epochs or --minutes given: training for %g epochs", DEFAULT_EPOCHS)
    return replace(config, train=replace(length, epochs=DEFAULT_EPOCHS))


# -------------------------------------------------------------------------------------------------- training


def _open(kind: str, config: Config, split: str) -> Any:
    opener = open_classification if kind == "pretrain" else open_detection
    return opener(config.data.path, split, config.data)
