"""Which images each training step takes, in which pass over the data and at which scale.

Everything follows from the seed and the step's number; nothing remembers how far it has come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray

from detkit.config import Config
from detkit.data.dataset import ClassificationDataset, DetectionDataset
from detkit.errors import DataError

# One stream of chance per purpose, so that no two choices share numbers.
_ORDER, _MIX, _SCALE, _VIEW = range(4)
# Steps whose images are sorted by orientation together, where a set has both.
_WINDOW = 16


@dataclass(frozen=True)
class Key:
    """One sample: which image, in which pass over the data, and the shorter side of its view."""

    index: int
    epoch: int
    short_side: int


class TrainPlan:
    """Which images, in which pass, at which scale, make up each step."""

    def __init__(self, dataset: DetectionDataset | ClassificationDataset, config: Config) -> None:
        if not len(dataset):
            raise DataError(f"{dataset.source}: at least one usable image is needed, got none")
        self.count = len(dataset)
        self.batch_size = config.train.batch_size
        self.seed = config.train.seed % 2**64
        self.scales = config.data.multi_scale or (config.data.short_side,)
        self._portrait = _portrait(dataset)
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._window: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def step(self, t: int) -> list[Key]:
        """The samples of step ``t`` over all processes."""
        rng = _generator(self.seed, _SCALE, t)
        short_side = self.scales[int(rng.integers(len(self.scales)))]
        pairs = self._pairs(t)
        return [Key(int(i), int(e), short_side) for e, i in pairs]

    def _pairs(self, t: int) -> NDArray[np.int64]:
        """(batch_size, 2) pass and index of step ``t``'s images."""
        if self._portrait is None:
            return self._taken(t * self.batch_size, (t + 1) * self.batch_size)
        number, place = divmod(t, _WINDOW)
        if self._window[0] != number:
            self._window = (number, self._mixed(number, self._portrait))
        pairs: NDArray[np.int64] = self._window[1][place]
        return pairs

    def _mixed(self, number: int, portrait: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(_WINDOW, batch_size, 2): upright and lying images mostly apart, which saves padding."""
        images = _WINDOW * self.batch_size
        pairs = self._taken(number * images, (number + 1) * images)
        pairs = pairs[np.argsort(portrait[pairs[:, 1]], kind="stable")]
        order = _generator(self.seed, _MIX, number).permutation(_WINDOW)
        return pairs.reshape(_WINDOW, self.batch_size, 2)[order]

    def _taken(self, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start, 2) pass and index at positions of the endless row of shuffled passes."""
        epochs, places = np.divmod(np.arange(start, stop), self.count)
        indices = [self._order(int(e))[p] for e, p in zip(epochs, places, strict=True)]
        return np.stack([epochs, np.array(indices, dtype=np.int64)], axis=1)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            if len(self._orders) > 8:
                self._orders.clear()
            self._orders[epoch] = _generator(self.seed, _ORDER, epoch).permutation(self.count)
        return self._orders[epoch]


def _portrait(dataset: DetectionDataset | ClassificationDataset) -> NDArray[np.bool_] | None:
    """(I,) True where an image is upright, or None where all are alike or are cut square anyway."""
    if isinstance(dataset, ClassificationDataset):
        return None
    upright = dataset.records.sizes[:, 0] > dataset.records.sizes[:, 1]
    return upright if upright.any() and not upright.all() else None


def view_chance(seed: int, epoch: int, index: int) -> Generator:
    """The chance that decides how image ``index`` is shown in pass ``epoch``."""
    return _generator(seed % 2**64, _VIEW, epoch, index)


def _generator(*key: int) -> Generator:
    return Generator(PCG64(SeedSequence(key)))


def train_keys(
    plan: TrainPlan, start: int, rank: int, world: int, parts: int
) -> Iterator[list[Key]]:
    """Endless parts of this rank's share of steps ``start``, ``start + 1``, ..."""
    step = start
    while True:
        share = plan.step(step)[rank::world]
        length = len(share) // parts
        for part in range(parts):
            yield share[part * length : (part + 1) * length]
        step += 1
