"""Batches: which images each step takes, in which view, and the processes that read them.

Nothing here remembers how far it has come. The images of step t and every random choice about them
follow from (seed, t) alone, so resuming is starting at another step, and any number of worker
processes gives the same batches.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detkit.config import Config
from detkit.data import transforms
from detkit.data.dataset import ClassificationDataset, DetectionDataset
from detkit.data.plan import Key, TrainPlan, train_keys, view_chance
from detkit.data.problems import ImageFileError
from detkit.errors import ConfigError, DataError
from detkit.types import Batch, ClassificationBatch, Target

_log = logging.getLogger("detkit.data")

AnyDataset = DetectionDataset | ClassificationDataset
AnyBatch = Batch | ClassificationBatch


def steps_per_epoch(dataset: AnyDataset, config: Config) -> float:
    """Optimiser steps in which as many images are seen as the split has."""
    return len(dataset) / config.train.batch_size


def train_batches(
    dataset: AnyDataset, config: Config, *, start_step: int = 0, rank: int = 0, world: int = 1
) -> Iterator[list[Any]]:
    """Endless training batches from step ``start_step`` on.

    Args:
        dataset: The training split.
        config: ``data`` for size, augmentation and workers; ``train`` for batch size and seed.
        start_step: First step to give.
        rank: This process's number.
        world: How many processes share each batch.

    Yields:
        This rank's share of a step's batch: ``config.train.accumulate`` batches of equal length.

    Raises:
        ConfigError: the batch size cannot be split evenly.
        DataError: no image can be read, or one cannot and ``data.on_bad_image`` is ``fail``.
    """
    parts = config.train.accumulate
    if config.train.batch_size % (world * parts):
        raise ConfigError(
            "train.batch_size: must be a multiple of processes x train.accumulate = "
            f"{world}x{parts}, got {config.train.batch_size}"
        )
    plan = TrainPlan(dataset, config)
    keys = train_keys(plan, start_step, rank, world, parts)
    batches = load(Fetcher(dataset, config, training=True), keys, dataset, config.data.workers)
    return _grouped(batches, parts)


def eval_batches(
    dataset: AnyDataset,
    config: Config,
    *,
    batch_size: int = 1,
    rank: int = 0,
    world: int = 1,
    images: Sequence[int] | None = None,
) -> Iterator[Any]:
    """Every image, or ``images`` by index, once, in order, without augmentation; rank r of w takes
    r, r + w, r + 2w, ...

    A file that turns out damaged is left out, logged and noted in ``dataset`` (``on_bad_image``
    ``fail``: DataError). Detection batches carry no targets; the truth is ``dataset.truth()``.
    """
    indices = (range(len(dataset)) if images is None else images)[rank::world]
    keys = [
        [Key(i, 0, config.data.short_side) for i in indices[k : k + batch_size]]
        for k in range(0, len(indices), batch_size)
    ]
    workers = min(config.data.workers, len(keys))
    return load(Fetcher(dataset, config, training=False), keys, dataset, workers)


def _grouped(batches: Iterator[Any], parts: int) -> Iterator[list[Any]]:
    while True:
        yield [next(batches) for _ in range(parts)]


@dataclass
class Loaded:
    """A batch on its way from a worker, with what went wrong.

    Each tensor costs an open file between processes, so only the big ones are tensors yet.
    """

    images: Tensor | None = None
    sizes: list[tuple[int, int]] = field(default_factory=list)
    shifts: list[NDArray[np.float64]] = field(default_factory=list)
    boxes: list[NDArray[np.float32]] = field(default_factory=list)
    labels: list[NDArray[np.int64]] = field(default_factory=list)
    iscrowd: list[NDArray[np.bool_]] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    image_ids: list[int | str] = field(default_factory=list)
    original_sizes: list[tuple[int, int]] = field(default_factory=list)
    problems: list[tuple[int, ImageFileError]] = field(default_factory=list)
    failure: str = ""


class Fetcher(Dataset[Loaded]):
    """Turns a list of keys into a padded batch; runs in the workers."""

    def __init__(self, dataset: AnyDataset, config: Config, *, training: bool) -> None:
        self.dataset = dataset
        self.config = config
        self.training = training
        if isinstance(dataset, ClassificationDataset) and config.data.resize != "antialias":
            raise ConfigError(
                f"data.resize: must be antialias for classifiers, got {config.data.resize!r}"
            )

    def __getitems__(self, keys: list[Key]) -> Loaded:
        loaded = Loaded()
        try:
            self._fill(loaded, keys)
        except (
            DataError
        ) as error:  # an exception would arrive with the worker's traceback as its message
            loaded.failure = str(error)
        return loaded

    def _fill(self, loaded: Loaded, keys: Sequence[Key]) -> None:
        views = self.views(keys, loaded)
        if views:
            self.place(views, loaded)

    def views(self, keys: Sequence[Key], loaded: Loaded) -> list[Image]:
        """Pixels of the samples that can be read, before normalisation; the rest in ``loaded``."""
        views = [self._view(key, loaded) for key in keys]
        return [view for view in views if view is not None]

    def place(self, views: Sequence[Image], loaded: Loaded) -> None:
        """Normalise ``views`` into a padded batch, ``loaded.images``."""
        if isinstance(self.dataset, DetectionDataset):
            multiple = self.config.data.pad_multiple
            height, width = (
                -(-max(v) // multiple) * multiple for v in zip(*loaded.sizes, strict=True)
            )
        else:
            height, width = loaded.sizes[0]
        loaded.images = torch.zeros(len(views), 3, height, width)
        rows = zip(loaded.images, views, loaded.sizes, loaded.shifts, strict=True)
        for out, view, size, shift in rows:
            mean = np.subtract(self.config.data.mean, shift).tolist()  # a shift of all pixels
            std, channels = self.config.data.std, self.config.data.channels
            if self.config.data.resize == "torchvision":
                transforms.normalise_then_resize_into(out, view, size, mean, std, channels)
            else:
                transforms.normalise_into(out, view, mean, std, channels)

    def _view(self, key: Key, loaded: Loaded) -> Image | None:
        """Pixels of one sample, its truth appended to ``loaded``; None where it is left out.

        Training takes the next image in the place of a damaged one, evaluation none.
        """
        tries = len(self.dataset) if self.training else 1
        for offset in range(tries):
            index = (key.index + offset) % len(self.dataset)
            try:
                return self._sample(Key(index, key.epoch, key.short_side), loaded)
            except ImageFileError as problem:
                if self.dataset.on_bad_image == "fail":
                    raise
                loaded.problems.append((index, problem))
        if self.training:
            raise DataError(
                f"{self.dataset.source}: at least one readable image is needed, got none of {tries}"
            )
        return None

    def _sample(self, key: Key, loaded: Loaded) -> Image:
        if isinstance(self.dataset, DetectionDataset):
            return self._detection(self.dataset, key, loaded)
        return self._classification(self.dataset, key, loaded)

    def _detection(self, dataset: DetectionDataset, key: Key, loaded: Loaded) -> Image:
        data = self.config.data
        source = dataset.size(key.index)
        boxes = dataset.records.boxes(key.index)
        rng = view_chance(self.config.train.seed, key.epoch, key.index)
        geometry = transforms.whole(source, key.short_side, data.long_side, data.resize)
        if self.training:
            geometry = transforms.random_detection(
                rng,
                source,
                boxes,
                short_side=key.short_side,
                long_side=data.train_long_side or data.long_side,
                flip=data.flip,
                min_crop=data.min_crop,
                resize=data.resize,
            )
        if data.resize == "torchvision":  # which resizes after normalising
            image = geometry.cut(dataset.image(key.index))
        else:
            image = geometry.image(dataset.image(key.index, geometry.needed))
        image = self._recoloured(rng, image, loaded)
        if self.training:
            self._append_target(dataset, key.index, geometry, boxes, loaded)
        loaded.sizes.append(geometry.size)
        loaded.files.append(dataset.records.files[key.index])
        loaded.image_ids.append(dataset.records.image_ids[key.index])
        loaded.original_sizes.append(source)
        return image

    def _recoloured(self, rng: Generator, image: Image, loaded: Loaded) -> Image:
        """``image`` in the colours of its view, but for a shift that goes to ``loaded``."""
        data = self.config.data
        if self.training and data.color_jitter:
            image = transforms.jitter(rng, image, data.color_jitter)
        shifted = self.training and data.lighting > 0
        loaded.shifts.append(transforms.lighting(rng, data.lighting) if shifted else np.zeros(3))
        return image

    def _append_target(
        self,
        dataset: DetectionDataset,
        index: int,
        geometry: transforms.Geometry,
        boxes: NDArray[np.float64],
        loaded: Loaded,
    ) -> None:
        r, span = dataset.records, dataset.records.of_image(index)
        left, enough = transforms.still_visible(geometry, boxes)
        # Difficult objects (VOC) and what a cut left over are neither targets nor background, as
        # crowds are.
        ignored = r.iscrowd[span] | r.difficult[span] | ~enough
        loaded.boxes.append(geometry.clipped(boxes)[left].astype(np.float32))
        loaded.labels.append(r.labels[span][left])
        loaded.iscrowd.append(ignored[left])
        if dataset.masks:
            chosen = np.flatnonzero(left) + span.start
            masks = np.empty((len(chosen), *geometry.size), dtype=np.bool_)
            for mask, a in zip(masks, chosen, strict=True):  # a crowd's masks are not held twice
                mask[:] = geometry.mask(r.segmentations[int(a)])
            loaded.masks.append(torch.from_numpy(masks))

    def _classification(self, dataset: ClassificationDataset, key: Key, loaded: Loaded) -> Image:
        data = self.config.data
        source = dataset.size(key.index)
        rng = view_chance(self.config.train.seed, key.epoch, key.index)
        if self.training:
            geometry = transforms.random_classification(
                rng, source, side=key.short_side, flip=data.flip, min_area=data.min_crop
            )
        else:
            geometry = transforms.central(source, side=key.short_side, share=data.eval_crop)
        image = geometry.image(dataset.image(key.index, geometry.needed))
        image = self._recoloured(rng, image, loaded)
        loaded.sizes.append(geometry.size)
        loaded.labels.append(dataset.labels[key.index])
        loaded.files.append(dataset.names[key.index])
        return image


class _Keys:
    """The batch sampler that torch asks for: hands out lists of keys."""

    def __init__(self, keys: Iterable[list[Key]]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.keys)


def load(
    fetcher: Fetcher, keys: Iterable[list[Key]], dataset: AnyDataset, workers: int
) -> Iterator[AnyBatch]:
    """Batches in the order of ``keys``; the workers end when the iterator is closed or dropped."""
    loader = DataLoader(
        fetcher,
        batch_sampler=_Keys(keys),
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # not the global one: its next numbers are the model's
    )
    for loaded in _surviving(iter(loader)):
        if loaded.failure:
            raise DataError(loaded.failure)
        for index, problem in loaded.problems:
            note(dataset, index, problem)
        if loaded.images is not None:
            yield finished(loaded, loaded.images, isinstance(dataset, DetectionDataset))


def _surviving(batches: Iterator[Loaded]) -> Iterator[Loaded]:
    """``batches``; a worker that was killed from outside is an error of ours, not of torch's."""
    while True:
        try:
            loaded = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"data: every loader process must live, got {error}; "
                "if memory ran out, lower data.workers or train.batch_size"
            ) from error
        yield loaded


def _unchanged(loaded: Any) -> Any:
    return loaded


def _init_worker(_: int) -> None:
    # Ctrl-C in a terminal reaches every process of the foreground group; the workers must outlive
    # it, so that the main process can finish its step.
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def note(dataset: AnyDataset, index: int, problem: ImageFileError) -> None:
    """Report a file that turned out damaged, once."""
    if index in dataset.damaged:
        return
    dataset.damaged.add(index)
    image_id = dataset.records.image_ids[index] if isinstance(dataset, DetectionDataset) else None
    dataset.report.add(problem.rule, problem.file, problem.what, "skip", image_id)
    _log.warning("left out: %s", problem)


def finished(loaded: Loaded, images: Tensor, detection: bool) -> AnyBatch:
    """The batch of ``images`` (N, 3, H, W) and what was read with them."""
    if not detection:
        labels = torch.tensor(np.array(loaded.labels, dtype=np.int64))
        return ClassificationBatch(images, labels, loaded.files)
    targets = [
        Target(
            torch.from_numpy(boxes),
            torch.from_numpy(loaded.labels[i]),
            torch.from_numpy(loaded.iscrowd[i]),
            loaded.masks[i] if loaded.masks else None,
        )
        for i, boxes in enumerate(loaded.boxes)
    ]
    return Batch(
        images,
        torch.tensor(loaded.sizes, dtype=torch.int64),
        targets,
        loaded.files,
        loaded.image_ids,
        torch.tensor(loaded.original_sizes, dtype=torch.int64),
    )
