"""What a path of a trained supernet is worth, on images that no weight was trained on.

Opens a supernet and the images held out for its search, and scores its paths on them: norms of
their own (:mod:`detkit.nas.fitness`), then detections or classes against the truth.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.random import PCG64, Generator, SeedSequence
from torch import nn

from detkit import config as configs
from detkit import foreign
from detkit.config import Config, SearchConfig
from detkit.data import ClassificationDataset, DetectionDataset, open_classification, open_detection
from detkit.data.cache import MIB, CachedBatches, evaluation_keys, training_keys
from detkit.engine import checkpoint as checkpoints
from detkit.engine import distributed
from detkit.engine.checkpoint import Checkpoint
from detkit.engine.classification import top1
from detkit.engine.detections import detect_dataset
from detkit.engine.evaluate import Scorer
from detkit.engine.run import RunFolder
from detkit.engine.summary import NUMBERS
from detkit.errors import CheckpointError, ConfigError, DataError
from detkit.loading import PIXELS, check_supernet, restore, search_split_of
from detkit.models.search_space import Genes, SearchSpace
from detkit.models.zoo import WITH_MASKS
from detkit.nas.candidates import Candidate, Dropped
from detkit.nas.early_stop import EARLY, EarlyStop
from detkit.nas.fitness import PathFitness
from detkit.nas.split import SearchSplit

Record = dict[str, Any]
Metrics = Mapping[str, float]
AnyDataset = DetectionDataset | ClassificationDataset

log = logging.getLogger("detkit")

STAGES = {"detection": "finetune", "classification": "pretrain"}
"""Stage of the supernet that a fitness needs."""
_VOC = ("voc07", "voc12")


# -- what is searched


@dataclass(frozen=True)
class Opened:
    """A supernet with the images it is searched on.

    Attributes:
        file: Its checkpoint.
        stored: What the checkpoint holds.
        config: Its settings, those of the search on top.
        space: Its space.
        training: Images that the norms of a path are averaged over, as the supernet saw them.
        images: Images that score a path.
        metric: Which metric is the fitness.
    """

    file: str
    stored: Checkpoint
    config: Config
    space: SearchSpace
    training: AnyDataset
    images: AnyDataset
    metric: str


def open_supernet(
    file: str | Path, overrides: Iterable[Mapping[str, Any]] = (), *, data: str | None = None
) -> Opened:
    """Open a supernet and its images.

    Args:
        file: Checkpoint of a supernet, or a run folder with one.
        overrides: Layers of settings on top of the checkpoint's: ``search``, ``data``, ``eval``.
        data: Where the data set lies that the supernet was trained on, if elsewhere now.

    Raises:
        CheckpointError: No supernet, one of another stage, or no images were held out.
        ConfigError: A setting that would change the supernet, or does not go with the fitness.
        DataError: Unusable data.
    """
    path = Path(file)
    if path.is_dir():
        path = RunFolder(path).checkpoint() or path
    stored = _accept(str(path))
    own = checkpoints.config_of(stored)
    where: list[Mapping[str, Any]] = [{"data": {"path": data}}] if data else []
    config = configs.resolve([*overrides, *where], own)
    _refuse_others(own, config)
    check_supernet(stored, config, str(path))
    _check_stage(stored, config.search, str(path))
    space = SearchSpace.from_plain(stored["space"])
    classes = config.search.fitness == "classification"
    metric = "top1" if classes else _known_metric(config)
    training: AnyDataset
    images: AnyDataset
    if classes:
        training, images = _classification_sets(config)
    else:
        training, images = _detection_sets(stored, config, str(path))
    for dataset in (training, images):
        _same_names(stored, dataset)
    return Opened(str(path), stored, config, space, training, images, metric)


def _known_metric(config: Config) -> str:
    metric, masks = config.eval.metric, config.model.detector in WITH_MASKS
    known = (*NUMBERS, *_VOC, *((f"segm_{name}" for name in NUMBERS) if masks else ()))
    if metric not in known:
        raise ConfigError(
            f"eval.metric: must be one of {', '.join(known)}, got {metric!r}"
            f"{configs.suggest(metric, known)}"
        )
    return metric


def _accept(file: str) -> Checkpoint:
    stored = foreign.load(file)
    if stored["kind"] != "supernet":
        raise CheckpointError(
            f"{file}: must be of kind 'supernet', got {stored['kind']!r}; `detkit pretrain "
            "--backbone detnas-supernet20` and `detkit finetune` train one"
        )
    return stored


def _check_stage(stored: Checkpoint, search: SearchConfig, file: str) -> None:
    wanted, got = STAGES[search.fitness], stored["stage"]
    if wanted == got:
        return
    advice = {
        "finetune": f"`detkit finetune --init-from {file}` makes one, and --fitness classification "
        "searches this one",
        "pretrain": "--fitness detection searches this one",
    }
    raise CheckpointError(
        f"{file}: stage of the supernet must be {wanted!r} for the fitness {search.fitness!r}, "
        f"got {got!r}; {advice[wanted]}"
    )


def _refuse_others(own: Config, config: Config) -> None:
    """Refuse settings that would describe another supernet than the checkpoint holds."""
    ours, theirs = configs.to_plain(config), configs.to_plain(own)
    kept = (*PIXELS, "pad_multiple")
    for table, values in ours.items():
        for key, value in values.items():
            free = table in ("search", "eval") or (table == "data" and key not in kept)
            if value != theirs[table][key] and not free:
                raise ConfigError(
                    f"{table}.{key}: must stay the supernet's own {theirs[table][key]!r} in a "
                    f"search, got {value!r}; data, search and eval.metric can be set"
                )
    if config.search.fitness == "classification" and config.search.early_stop:
        raise ConfigError(
            "search.early_stop: must be 0 for the fitness classification, whose images are "
            f"evaluated in one go, got {config.search.early_stop}"
        )


def _detection_sets(
    stored: Checkpoint, config: Config, file: str
) -> tuple[DetectionDataset, DetectionDataset]:
    """Images the supernet was trained on, and those for the search."""
    data, wanted = config.data, config.search.split
    split = search_split_of(stored)
    if wanted.endswith(".json"):
        split = _split_file(wanted)
    if split is None:
        raise CheckpointError(
            f"{file}: must hold which images were kept for the search (search_split), got none; "
            "give --split FILE.json with ids of both parts"
        )
    masks = config.model.detector in WITH_MASKS
    whole = open_detection(data.path, data.split, data, masks=masks)
    try:
        train, held = split.indices(whole.image_ids)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if wanted and not wanted.endswith(".json"):
        if wanted == data.val_split:
            log.warning(
                "searching on the split %r: what is found was chosen by it, so a score there says "
                "little",
                wanted,
            )
        return whole.take(train), open_detection(data.path, wanted, data)
    # Truth with masks leaves out objects without one, and scoring needs all of them.
    plain = open_detection(data.path, data.split, data) if masks else whole
    return whole.take(train), plain.take(split.indices(plain.image_ids)[1] if masks else held)


def _split_file(path: str) -> SearchSplit:
    try:
        plain = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--split {path}: must be a search split as JSON, got {error}") from error
    return SearchSplit.from_plain(plain)


def _classification_sets(config: Config) -> tuple[ClassificationDataset, ClassificationDataset]:
    data = config.data
    held = config.search.split or data.val_split
    return open_classification(data.path, data.split, data), open_classification(
        data.path, held, data
    )


def _same_names(stored: Checkpoint, dataset: AnyDataset) -> None:
    ours = checkpoints.categories_of(stored).names
    if dataset.categories.names != ours:
        raise DataError(
            f"data: must have the supernet's categories {list(ours)}, got "
            f"{list(dataset.categories.names)}"
        )


# -- what a path is worth


class Fitness:
    """Metrics of the paths of an opened supernet, from its own images.

    Images are read once and kept; see ``search.cache_mib``.

    Args:
        opened: The supernet.
        device: Where it runs.
    """

    def __init__(self, opened: Opened, device: torch.device) -> None:
        config, search = opened.config, opened.config.search
        local = {k: "bn" for k in ("norm", "head_norm") if getattr(config.model, k) == "sync_bn"}
        loaded = restore(opened.stored, opened.file, device, [{"model": local}])
        limit = search.cache_mib * MIB // distributed.local_world_size()
        seen = replace(config, train=replace(config.train, batch_size=search.calibration_batch))
        log.info(
            "reading %d batches of %d training images for the norms",
            search.calibration_steps,
            search.calibration_batch,
        )
        keys = training_keys(opened.training, seen, search.calibration_steps)
        calibration = CachedBatches(opened.training, seen, keys, training=True, limit=limit)
        log.info("reading %d images that score networks", len(opened.images))
        left = limit - calibration.kept_bytes
        self.scoring_seconds = 0.0  # of the newest network, without the norms
        self.score: _TopOne | _Detections
        if isinstance(opened.images, ClassificationDataset):
            self.score = _TopOne(opened.images, config, device, left)
        else:
            self.score = _Detections(opened.images, config, device, left)
        self._paths = PathFitness(
            loaded.model,
            calibration,
            self._timed_score,
            momentum=search.calibration_momentum or None,
            seed=config.train.seed,
        )

    def __call__(self, genes: Genes) -> Metrics:
        """Metrics of a path; raises :class:`Dropped` where an early stop found it hopeless."""
        return self._paths(genes)

    def _timed_score(self, model: nn.Module) -> Metrics:
        begun = time.monotonic()
        try:
            return self.score(model)
        finally:
            self.scoring_seconds = time.monotonic() - begun

    def begin(self, earlier: Sequence[Candidate]) -> None:
        """Set the bound of the early stop from the candidates of earlier generations."""
        self.score.begin(earlier)


class _TopOne:
    """Top-1 of a classifier on the held-out images."""

    def __init__(
        self, images: ClassificationDataset, config: Config, device: torch.device, limit: int
    ) -> None:
        keys = evaluation_keys(images, config, config.search.batch_size)
        self._batches = CachedBatches(images, config, keys, training=False, limit=limit)
        self._device = device

    def begin(self, earlier: Sequence[Candidate]) -> None:
        """Nothing: all images are always looked at."""

    def __call__(self, model: nn.Module) -> Metrics:
        return {"top1": float(top1(model, self._batches, self._device)["top1"])}


class _Detections:
    """Box metrics of a detector on the held-out images, masks' too where it is measured by them.

    With an early stop a first part of the images, drawn from the seed, decides whether the others
    are looked at.
    """

    def __init__(
        self, images: DetectionDataset, config: Config, device: torch.device, limit: int
    ) -> None:
        search = config.search
        self._device = device
        self._metric = config.eval.metric
        self._categories = images.categories
        self._stop = EarlyStop(search.early_quantile, search.early_margin)
        self._bound = -math.inf
        parts = _parts(len(images), search.early_stop, config.train.seed)
        self._parts: list[CachedBatches] = []
        for part in parts:
            keys = evaluation_keys(images, config, search.batch_size, part)
            batches = CachedBatches(images, config, keys, training=False, limit=limit)
            limit -= batches.kept_bytes
            self._parts.append(batches)
        truth = images.truth()
        first = {images.image_ids[i] for i in parts[0]}
        self._scorers = [self._scorer(truth)]
        if len(parts) == 2:
            self._scorers.insert(0, self._scorer(_restricted(truth, first)))

    def begin(self, earlier: Sequence[Candidate]) -> None:
        self._bound = self._stop.bound(earlier)

    def __call__(self, model: nn.Module) -> Metrics:
        rows: list[Record] = []
        early: dict[str, float] = {}
        for batches, scorer in zip(self._parts, self._scorers, strict=True):
            rows += detect_dataset(model, batches, self._categories, self._device)
            metrics = self._metrics(scorer(rows))
            if scorer is self._scorers[-1]:
                break
            if self._metric in metrics:
                early = {EARLY: metrics[self._metric]}
                if early[EARLY] < self._bound:
                    raise Dropped(early)
        return metrics | early

    def _scorer(self, truth: Record) -> Scorer:
        if self._metric in _VOC:
            return Scorer(truth, metric=self._metric)
        masks = self._metric.startswith("segm_")
        return Scorer(truth, iou_types=("bbox", "segm") if masks else ("bbox",))

    def _metrics(self, scores: Record) -> dict[str, float]:
        if self._metric in _VOC:
            found = {self._metric: scores[self._metric]["mAP"]}
        else:
            found = scores["bbox"] | {f"segm_{k}": v for k, v in scores.get("segm", {}).items()}
        return {name: math.nan if value is None else value for name, value in found.items()}


def _parts(count: int, share: float, seed: int) -> list[list[int]]:
    """Indices of all images, or of those looked at first and of the rest."""
    if not share or count < 2:
        return [list(range(count))]
    order = Generator(PCG64(SeedSequence([seed]))).permutation(count).tolist()
    first = min(max(1, round(count * share)), count - 1)
    return [sorted(order[:first]), sorted(order[first:])]


def _restricted(truth: Record, image_ids: set[Any]) -> Record:
    """The truth of some images alone."""
    images = [image for image in truth["images"] if image["id"] in image_ids]
    annotations = [a for a in truth["annotations"] if a["image_id"] in image_ids]
    return {**truth, "images": images, "annotations": annotations}
