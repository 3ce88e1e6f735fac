"""Batches gone through again and again: their pixels are decoded and resized once.

Kept are the pixels as bytes; a batch is normalised when it is asked for, by the loader's own code,
so it holds the very numbers that the loader would give. What does not fit into the memory allowed
is read again at every pass, by the loader's workers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detkit.config import Config
from detkit.data import transforms
from detkit.data.dataset import DetectionDataset
from detkit.data.loader import AnyDataset, Fetcher, Loaded, finished, load, note
from detkit.data.plan import Key, TrainPlan

log = logging.getLogger("detkit.data")

MIB = 2**20
_CHUNK = 16  # batches read between looks at the memory

OnBatch = Callable[[int, int], None]
"""Called with batches read and batches in all."""


class CachedBatches:
    """The same batches at each pass over them.

    Files that cannot be read are noted in the data set when this is made, so its truth is complete
    from then on.

    Args:
        dataset: The split.
        config: ``data`` for size, augmentation and workers; ``train.seed``.
        keys: Samples of each batch.
        training: Whether to show them as in training, with targets.
        limit: Bytes of pixels to keep.
        on_batch: Told about the progress of reading.

    Raises:
        DataError: No image can be read, or one cannot and ``data.on_bad_image`` is ``fail``.
    """

    def __init__(
        self,
        dataset: AnyDataset,
        config: Config,
        keys: Iterable[Sequence[Key]],
        *,
        training: bool,
        limit: int,
        on_batch: OnBatch | None = None,
    ) -> None:
        self._dataset = dataset
        self._workers = config.data.workers
        self._fetcher = Fetcher(dataset, config, training=training)
        self._keys = [list(batch) for batch in keys]
        self._kept: list[tuple[Loaded, list[NDArray[np.uint8]]]] = []
        self.kept_bytes = 0
        read = self._keep(limit, on_batch)
        self._rest = self._keys[read:]
        if self._rest:
            log.warning(
                "%d of %d batches do not fit into the %d MiB left of search.cache_mib and will be "
                "read again for every network",
                len(self._rest),
                len(self._keys),
                limit // MIB,
            )
            if not training:
                self._note_damaged()

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Any]:
        detection = isinstance(self._dataset, DetectionDataset)
        for loaded, pixels in self._kept:
            batch = replace(loaded)
            self._fetcher.place([Image.fromarray(view) for view in pixels], batch)
            if batch.images is not None:
                yield finished(batch, batch.images, detection)
        if self._rest:
            workers = min(self._workers, len(self._rest))
            yield from load(self._fetcher, self._rest, self._dataset, workers)

    def _keep(self, limit: int, on_batch: OnBatch | None) -> int:
        """Read batches until the next one would not fit; returns how many fitted."""
        done = 0
        with ThreadPoolExecutor(max(1, self._workers)) as pool:  # decoding frees Python's lock
            for start in range(0, len(self._keys), _CHUNK):
                chunk = self._keys[start : start + _CHUNK]
                for loaded, views in pool.map(self._read, chunk):
                    size = sum(view.nbytes for view in views)
                    size += sum(mask.nbytes for mask in loaded.masks)
                    if self.kept_bytes + size > limit:
                        return done
                    self._take(loaded, views)
                    self.kept_bytes += size
                    done += 1
                    if on_batch is not None:
                        on_batch(done, len(self._keys))
        return done

    def _read(self, keys: list[Key]) -> tuple[Loaded, list[NDArray[np.uint8]]]:
        loaded = Loaded()
        views = self._fetcher.views(keys, loaded)
        return loaded, [np.asarray(view) for view in views]

    def _take(self, loaded: Loaded, views: list[NDArray[np.uint8]]) -> None:
        for index, problem in loaded.problems:
            note(self._dataset, index, problem)
        if views:
            self._kept.append((loaded, views))

    def _note_damaged(self) -> None:
        """Read what is not kept once, for the files that cannot be."""
        for _ in load(self._fetcher, self._rest, self._dataset, self._workers):
            pass
        damaged = self._dataset.damaged
        left = [[key for key in keys if key.index not in damaged] for keys in self._rest]
        self._rest = [keys for keys in left if keys]


def training_keys(dataset: AnyDataset, config: Config, steps: int) -> list[list[Key]]:
    """Samples of the first ``steps`` batches of a training with ``config``."""
    plan = TrainPlan(dataset, config)
    return [plan.step(step) for step in range(steps)]


def evaluation_keys(
    dataset: AnyDataset, config: Config, batch_size: int, images: Iterable[int] | None = None
) -> list[list[Key]]:
    """Batches of all images, or of ``images`` by index, of one padded size each.

    So an image is padded as it would be alone, whatever it is batched with.
    """
    short_side, groups = config.data.short_side, dict[tuple[int, int], list[Key]]()
    for index in range(len(dataset)) if images is None else images:
        key = Key(index, 0, short_side)
        groups.setdefault(_padded_size(dataset, config, key), []).append(key)
    batches = []
    for group in groups.values():
        rest = iter(group)
        while batch := list(islice(rest, batch_size)):
            batches.append(batch)
    return batches


def _padded_size(dataset: AnyDataset, config: Config, key: Key) -> tuple[int, int]:
    if not isinstance(dataset, DetectionDataset):
        return key.short_side, key.short_side
    data = config.data
    size = transforms.whole(dataset.size(key.index), key.short_side, data.long_side, data.resize)
    multiple = data.pad_multiple
    height, width = (-(-side // multiple) * multiple for side in size.size)
    return height, width
