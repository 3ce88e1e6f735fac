"""Fitness of the paths of a supernet: norms of their own, then a score on held-out images.

Nothing of one path is left when the next one comes: what a path scores depends on the supernet,
the batches and the path alone (DetNAS, arXiv 1903.10979, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from detkit.models.backbones.shuffle_supernet import find_supernet
from detkit.models.search_space import Genes
from detkit.nas.calibrate import calibrate, statistics
from detkit.types import Batch, ClassificationBatch

Score = Callable[[nn.Module], Mapping[str, float]]
"""Metrics of a model in evaluation mode that runs one path."""


class PathFitness:
    """Metrics of the paths of one supernet, which is left as it was, bit for bit.

    Args:
        model: Classifier or detector with a supernet inside, on its device.
        calibration: Training batches that each path's norms are averaged over; gone through once
            per path, the same every time.
        score: Metrics of the model when it runs a path with its own norms.
        momentum: As of :func:`detkit.nas.calibrate.calibrate`.
        seed: For the sampling of RoIs and for dropout while averaging.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Iterable[Batch | ClassificationBatch],
        score: Score,
        *,
        momentum: float | None = None,
        seed: int = 0,
    ) -> None:
        self._model = model
        self._supernet = find_supernet(model)
        self._calibration = calibration
        self._score = score
        self._momentum = momentum
        self._seed = seed

    def __call__(self, genes: Genes) -> Mapping[str, float]:
        """Metrics of a path; raises NonFiniteError where a statistic is not finite."""
        self._supernet.set_path(genes)
        device = next(self._model.parameters()).device
        batches = (batch.to(device) for batch in self._calibration)
        found = calibrate(self._model, batches, momentum=self._momentum, seed=self._seed)
        with torch.no_grad(), statistics(self._model, found):
            return self._score(self._model)
