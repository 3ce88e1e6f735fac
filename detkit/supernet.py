"""Training of supernets (DetNAS, arXiv 1903.10979, section 3): one path per step, images held out
for the search, evaluation of paths with norms of their own.

What `detkit pretrain` and `detkit finetune` do beyond plain training when the backbone is a
supernet; paths, norms and splits themselves are in :mod:`detkit.nas`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import torch
from torch import nn

from detkit.config import Config
from detkit.data import ClassificationDataset, DetectionDataset, train_batches
from detkit.engine import checkpoint as checkpoints
from detkit.engine import distributed
from detkit.engine.checkpoint import Checkpoint
from detkit.engine.run import RunFolder
from detkit.errors import ConfigError
from detkit.loading import build, search_split_of
from detkit.models.backbones.shuffle_supernet import find_supernet
from detkit.models.search_space import Genes, SearchSpace
from detkit.models.zoo import supernet_space
from detkit.nas.calibrate import calibrate, statistics
from detkit.nas.paths import (
    EVAL_PATHS,
    PathSampler,
    Sampling,
    generator,
    path_sampler,
    random_genes,
)
from detkit.nas.split import SearchSplit
from detkit.storage import writing
from detkit.types import Batch, CategoryMap, ClassificationBatch

Metrics = Mapping[str, float | None]
Evaluate = Callable[[nn.Module], Metrics]
AnyDataset = DetectionDataset | ClassificationDataset

log = logging.getLogger("detkit")
SPLIT_FILE = "search_split.json"
"""File of a run folder: ids of the images trained on and of those for the search."""


# -- settings


def check_settings(config: Config) -> None:
    """Refuse, before anything is opened, settings that a supernet's training would ignore.

    Raises:
        ConfigError: A space that is not there, a sampling it does not have, or evaluations that
            would evaluate nothing.
    """
    space = supernet_space(config)
    if space is None:
        return
    _sampler(space, config)
    if not config.nas.eval_paths:
        for key in ("every", "patience"):
            if getattr(config.eval, key):
                raise ConfigError(
                    f"eval.{key}: must be 0 where nas.eval_paths is 0 and nothing is evaluated, "
                    f"got {getattr(config.eval, key)}"
                )


def entries(command: str, config: Config, split: SearchSplit | None) -> dict[str, Any]:
    """What the checkpoints of a supernet hold beside those of other nets; nothing for other nets.

    Args:
        command: ``pretrain`` or ``finetune``.
        config: The resolved settings.
        split: The images held out.
    """
    space = supernet_space(config)
    if space is None:
        return {}
    found: dict[str, Any] = {"space": space.to_plain(), "stage": command}
    return found if split is None else found | {"search_split": split.to_plain()}


def _sampler(space: SearchSpace, config: Config) -> PathSampler:
    return path_sampler(cast(Sampling, config.nas.sampling), space, config.train.seed)


# -- paths


def follow_paths(model: nn.Module, config: Config) -> Callable[[int], None] | None:
    """What sets the path of step t, the same in every process; None where there is no supernet."""
    space = supernet_space(config)
    if space is None:
        return None
    supernet = find_supernet(model)
    sampler = _sampler(space, config)
    return lambda step: supernet.set_path(sampler(step))


def eval_paths(space: SearchSpace, config: Config) -> list[Genes]:
    """The paths that evaluate a supernet while it trains: the same at every evaluation."""
    rng = generator(config.train.seed, EVAL_PATHS, 0)
    return [random_genes(space, rng) for _ in range(config.nas.eval_paths)]


# -- data


def hold_out(
    dataset: DetectionDataset,
    config: Config,
    resumed: Checkpoint | None = None,
    source: Checkpoint | None = None,
) -> tuple[DetectionDataset, DetectionDataset, SearchSplit]:
    """Part the training split into images to train on and images for the search.

    Args:
        dataset: The whole training split.
        config: The resolved settings.
        resumed: Checkpoint of the run to go on with, whose split stays.
        source: Checkpoint to start from. If its split is of these images, it stays too, so that no
            image for the search was ever trained on.

    Returns:
        Images to train on, images for the search, and which they are.

    Raises:
        CheckpointError: The run to go on with was trained on other images.
        DataError: Too few images.
    """
    ids = dataset.image_ids
    split = None if resumed is None else search_split_of(resumed)
    if split is None and source is not None:
        split = search_split_of(source)
        if split is not None and not split.covers(ids):
            log.warning(
                "the supernet to start from was trained on another set of images; images for the "
                "search are drawn anew, and it may have seen some if the sets overlap"
            )
            split = None
    if split is None:
        split = SearchSplit.draw(ids, config.nas.search_images, config.train.seed)
    train, search = split.indices(ids)
    log.info("%d training images, %d held out for the search", len(train), len(search))
    return dataset.take(train), dataset.take(search), split


def write_split(run: RunFolder, split: SearchSplit) -> None:
    """Keep ``search_split.json`` in the run folder; raises StorageError."""
    path = run.path / SPLIT_FILE
    with writing(path):
        path.write_text(split.to_json(), encoding="utf-8")


# -- evaluation


def evaluator(
    command: str,
    config: Config,
    dataset: AnyDataset,
    device: torch.device,
    score: Evaluate,
) -> Evaluate | None:
    """What evaluates a supernet: the mean metrics of a few fixed paths, each with its own norms.

    A path's statistics are averaged over the first ``nas.eval_calibration`` training batches, with
    augmentation, of one process's size; those of the supernet itself mix all paths. None
    where ``nas.eval_paths`` is 0.

    Args:
        command: ``pretrain`` or ``finetune``.
        config: The resolved settings.
        dataset: The images to train on.
        device: Where the model is.
        score: Metrics of a model that runs one path; called by every process alike.
    """
    space = supernet_space(config)
    if space is None or not config.nas.eval_paths:
        return None
    paths = eval_paths(space, config)

    def evaluate(model: nn.Module) -> Metrics:
        model = _with_local_norms(model, command, config, dataset.categories, device)
        supernet, found = find_supernet(model), []
        for genes in paths:
            supernet.set_path(genes)
            with _calibration_batches(dataset, config, device) as batches:
                own = calibrate(model, batches, seed=config.train.seed)
            with statistics(model, own):
                found.append(score(model))
            shown = found[-1].get(config.eval.metric)
            text = "undefined" if shown is None else f"{shown:.4f}"
            log.info("path %s: %s %s", space.text(genes), config.eval.metric, text)
        return _mean(found)

    return evaluate


@contextlib.contextmanager
def _calibration_batches(
    dataset: AnyDataset, config: Config, device: torch.device
) -> Iterator[Iterator[Batch | ClassificationBatch]]:
    """The batches that norms are averaged over: the same for every path and in every process."""
    steps = train_batches(dataset, config, rank=0, world=distributed.world_size())
    try:
        parts = (part.to(device) for step in steps for part in step)
        yield islice(parts, config.nas.eval_calibration * config.train.accumulate)
    finally:
        close = getattr(steps, "close", None)
        if close is not None:
            close()  # ends the loader's processes now


def _with_local_norms(
    model: nn.Module,
    command: str,
    config: Config,
    categories: CategoryMap,
    device: torch.device,
) -> nn.Module:
    """``model``, or a copy whose norms do not wait for other processes where there are some."""
    names = {"norm": config.model.norm, "head_norm": config.model.head_norm}
    if distributed.world_size() == 1 or "sync_bn" not in names.values():
        return model
    local = {key: "bn" if name == "sync_bn" else name for key, name in names.items()}
    config = replace(config, model=replace(config.model, **cast(Any, local)))
    kind = "backbone" if command == "pretrain" else "detector"
    copy = build(config, categories, kind).to(device)
    checkpoints.load_weights(copy, model.state_dict(), "evaluation")
    return copy


def _mean(found: list[Metrics]) -> dict[str, float | None]:
    """Mean of each metric over the paths where it is defined."""
    means: dict[str, float | None] = {}
    for name in found[0]:
        values = [v for metrics in found if (v := metrics[name]) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means
