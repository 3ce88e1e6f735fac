"""Recipes to train what a search found, from pre-training on (DetNAS, arXiv 1903.10979, step 4).

The winner starts afresh, with the hyper-parameters of its supernet: one recipe for `detkit
pretrain`, one for `detkit finetune`. Only what differs from the defaults is written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from detkit import config as configs
from detkit import foreign
from detkit.config import Config
from detkit.detnas import SearchFolder
from detkit.engine import checkpoint as checkpoints
from detkit.engine.checkpoint import Checkpoint
from detkit.errors import ConfigError
from detkit.models.search_space import SearchSpace, network_tables
from detkit.storage import writing

log = logging.getLogger("detkit")

Record = dict[str, Any]
Tables = dict[str, dict[str, Any]]

NORM_MOMENTUM = 0.01
"""Of the running statistics of a single network in a detector; supernets have 0.1."""
_OF_SUPERNETS = ("nas", "space", "search")


def export(run: str | Path, target: str | Path, *, recipe: str | None = None) -> Record:
    """Write the recipes for the best network of a search.

    Args:
        run: Folder of the search; one that is not finished gives its best so far.
        target: Recipe for `detkit pretrain`, a ``.toml`` file; that for `detkit finetune` gets
            ``-finetune`` added to its name.
        recipe: Hyper-parameters of pre-training, by the name of a recipe; None takes those of the
            supernet's own pre-training.

    Returns:
        ``{"pretrain": file, "finetune": file or None, "backbone", "genes", "fitness", "metric"}``;
        the second is None after a search for classification, which knows no detector.

    Raises:
        ConfigError: No search, none of its networks was evaluated, no such place, or nothing is
            known of the supernet's pre-training and ``recipe`` is None.
        CheckpointError: Its supernet is not there any more.
        StorageError: The disk refused.
    """
    folder, target = SearchFolder(run), Path(target)
    if not folder.is_search:
        raise ConfigError(f"{run}: must be the folder of a search, got none")
    if target.suffix != ".toml" or not target.parent.is_dir():
        raise ConfigError(f"--export: must be a .toml file in a folder that exists, got {target}")
    found = folder.read()
    if not found["best"]:
        raise ConfigError(f"{run}: must hold an evaluated network, got none yet; let it go on")
    if not found["finished"]:
        log.warning("%s is not finished: this is its best network so far", run)
    stored = foreign.load(found["supernet"]["file"])
    space = SearchSpace.from_plain(found["space"])
    network = network_tables(space, space.parse(found["best"]["genes"]))
    about = _about(found, folder)
    pretrain = _single(_pretraining(found, stored, recipe), network)
    _write(target, pretrain, f"{about}#\n#   detkit pretrain --recipe {target}\n")
    record = {
        "pretrain": str(target),
        "finetune": None,
        "backbone": found["best"]["backbone"],
        "genes": found["best"]["genes"],
        "fitness": found["best"]["fitness"],
        "metric": found["metric"],
    }
    if found["fitness"] == "classification":
        return record
    second = target.with_name(f"{target.stem}-finetune.toml")
    own = checkpoints.config_of(stored)
    detector = _single(own, network)
    detector["model"] = {
        "detector": own.model.detector,
        **detector["model"],
        "norm_momentum": NORM_MOMENTUM,
    }
    usage = f"#\n#   detkit finetune --recipe {second} --init-from BACKBONE/best.pth\n"
    _write(second, detector, about + usage)
    return record | {"finetune": str(second)}


def _about(found: Mapping[str, Any], folder: SearchFolder) -> str:
    best = found["best"]
    return (
        f"# {best['genes']}, found by the {found['method']} search in {folder.run.path}:\n"
        f"# {found['metric']} {best['fitness']:.4f} as a path of its supernet, "
        f"{best['macs']:,} multiply-adds.\n"
    )


def _pretraining(found: Mapping[str, Any], stored: Checkpoint, recipe: str | None) -> Config:
    """Settings of ``recipe``, else those that the supernet was pre-trained with."""
    if recipe is not None:
        return configs.resolve([configs.read_toml(configs.recipe_path(recipe))])
    if found["fitness"] == "classification":
        return checkpoints.config_of(stored)
    source = stored["provenance"].get("init_from")
    what = f"{source} is gone" if source else "it was started from nothing"
    if source and Path(source).is_file():
        first = foreign.load(source)
        if first["kind"] == "supernet" and first["stage"] == "pretrain":
            return checkpoints.config_of(first)
        what = f"{source} is none"
    raise ConfigError(
        f"{found['supernet']['file']}: the pre-trained supernet it was started from must be known, "
        f"got none ({what}); give --recipe with the hyper-parameters of pre-training"
    )


def _single(config: Config, network: Mapping[str, Mapping[str, Any]]) -> Tables:
    """Settings of a supernet's training as they are for one of its networks, without defaults."""
    plain = configs.to_plain(config)
    for table in _OF_SUPERNETS:
        plain.pop(table)
    for table, values in network.items():
        plain[table] = plain.get(table, {}) | dict(values)
    detector = {"model": {"detector": config.model.detector}}
    default = configs.to_plain(configs.resolve([detector]))
    kept = {
        table: {k: v for k, v in values.items() if v != default[table][k]}
        for table, values in plain.items()
    }
    return {table: values for table, values in kept.items() if values}


def _write(path: Path, tables: Tables, header: str) -> None:
    with writing(path):
        path.write_text(f"{header}\n{tomli_w.dumps(tables)}", encoding="utf-8")
