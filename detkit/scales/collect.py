"""Statistics of learnt scales over images (POD, Peng et al., ICCV 2019, section 3.2), and the hash
of the weights they belong to.

Scales themselves are averaged, not what they are mapped from; the RoIs of an image are averaged
before its number counts. Everything is float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from detkit.errors import CheckpointError, NonFiniteError
from detkit.scales.learner import GlobalScaleConv2d, learners

Pair = tuple[float, float]


@dataclass
class Running:
    """Mean, deviation and range of pairs (h, w), updated one by one (Welford) and merged by counts.

    Attributes:
        count: Pairs seen.
        mean: Their means.
        squares: Sums of their squared distances to the mean.
        low: Smallest.
        high: Largest.
    """

    count: int = 0
    mean: Pair = (0.0, 0.0)
    squares: Pair = (0.0, 0.0)
    low: Pair = (math.inf, math.inf)
    high: Pair = (-math.inf, -math.inf)

    def add(self, value: Pair) -> None:
        """Count one pair in."""
        self.merge(Running(1, value, (0.0, 0.0), value, value))

    def merge(self, other: Running) -> None:
        """Count in what ``other`` saw, as if this had seen it."""
        if other.count == 0:
            return
        total = self.count + other.count
        mean, squares = [], []
        for axis in (0, 1):
            step = other.mean[axis] - self.mean[axis]
            mean.append(self.mean[axis] + step * other.count / total)
            between = step * step * self.count * other.count / total
            squares.append(self.squares[axis] + other.squares[axis] + between)
        self.count = total
        self.mean, self.squares = (mean[0], mean[1]), (squares[0], squares[1])
        self.low = min(self.low[0], other.low[0]), min(self.low[1], other.low[1])
        self.high = max(self.high[0], other.high[0]), max(self.high[1], other.high[1])

    @property
    def std(self) -> Pair:
        """Population deviations; raises ValueError before the first pair."""
        if self.count == 0:
            raise ValueError("Running: must have seen a pair, got none")
        return math.sqrt(self.squares[0] / self.count), math.sqrt(self.squares[1] / self.count)

    def to_plain(self) -> dict[str, Any]:
        """``{"mean", "std", "min", "max", "count"}`` for a checkpoint."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "min": list(self.low),
            "max": list(self.high),
            "count": self.count,
        }

    def __iadd__(self, other: Running) -> Self:
        self.merge(other)
        return self


class ScaleStatistics:
    """Statistics of each learner of a model by path.

    Args:
        paths: Paths of the learners, in the network's order.
    """

    def __init__(self, paths: Iterator[str] | list[str]) -> None:
        self.layers = {path: Running() for path in paths}

    def add(self, scales: Mapping[str, Tensor]) -> None:
        """Count one image in.

        Args:
            scales: Rows (n, 2) of each layer, one, or one per RoI; they are averaged. A layer that
                saw no RoI of this image is missing or has no rows and does not count it.

        Raises:
            NonFiniteError: A scale is not finite; the message names its layer.
        """
        for path, rows in scales.items():
            if len(rows) == 0:
                continue
            h, w = rows.double().mean(0).tolist()
            if not (math.isfinite(h) and math.isfinite(w)):
                raise NonFiniteError(f"{path}: scales must be finite, got {[h, w]}")
            self.layers[path].add((h, w))

    def merge(self, other: ScaleStatistics) -> None:
        """Count in what another process saw; its learners must be the same."""
        if self.layers.keys() != other.layers.keys():
            raise ValueError(
                f"ScaleStatistics: learners must be {', '.join(self.layers)}, got "
                f"{', '.join(other.layers)}"
            )
        for path, running in other.layers.items():
            self.layers[path].merge(running)

    def to_plain(self) -> dict[str, dict[str, Any]]:
        """Statistics by path for a checkpoint.

        Raises:
            CheckpointError: A layer has seen no image.
        """
        unseen = [path for path, running in self.layers.items() if running.count == 0]
        if unseen:
            raise CheckpointError(
                f"scales: every layer must have seen an image, got none for {', '.join(unseen)}"
            )
        return {path: running.to_plain() for path, running in self.layers.items()}


class ScaleRecorder:
    """What :func:`recording` yields: the scales of all calls since the last image was taken."""

    def __init__(self, paths: Mapping[GlobalScaleConv2d, str]) -> None:
        self._paths = paths
        self._rows: dict[str, list[Tensor]] = {}

    def note(self, learner: nn.Module, _: object, __: object) -> None:
        """Keep the scales of a learner's call; a forward hook."""
        if isinstance(learner, GlobalScaleConv2d) and learner.last_scales is not None:
            self._rows.setdefault(self._paths[learner], []).append(learner.last_scales)

    def take(self) -> dict[str, Tensor]:
        """Rows (n, 2) of each learner called since the last time, on the CPU; starts anew."""
        rows = {path: torch.cat(parts).cpu() for path, parts in self._rows.items()}
        self._rows = {}
        return rows


@contextmanager
def recording(model: nn.Module) -> Iterator[ScaleRecorder]:
    """Record the scales of every learner of ``model`` inside the block.

    Run one image, in evaluation mode, then pass ``recorder.take()`` to
    :meth:`ScaleStatistics.add`; a learner that runs several times per image keeps all its rows.
    """
    paths = {learner: path for path, learner in learners(model).items()}
    recorder = ScaleRecorder(paths)
    handles: list[RemovableHandle] = []
    try:
        handles += [learner.register_forward_hook(recorder.note) for learner in paths]
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values of a state dict, whatever its order and device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        head = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0"
        digest.update(head.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
