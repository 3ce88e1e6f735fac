"""Dropping hopeless networks before all images have been looked at, and what that costs.

After a share of the images a network is dropped where its metric so far is well below the middle of
what networks of earlier generations had there. Earlier generations, and not all networks so far:
then the answer does not depend on who is evaluated first, or by which process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from detkit.nas.candidates import FAILED, Candidate

EARLY = "early"
"""Name, among a candidate's metrics, of the fitness after the first share of the images."""


@dataclass(frozen=True)
class EarlyStop:
    """When a network counts as hopeless.

    Attributes:
        quantile: Of the early metrics of earlier generations ...
        margin: ... by more than which a network must be below.
    """

    quantile: float
    margin: float

    def bound(self, earlier: Iterable[Candidate]) -> float:
        """The early metric below which a network is dropped; ``-inf`` at the start."""
        known = [v for c in earlier if (v := c.metrics.get(EARLY)) is not None]
        return float(np.quantile(known, self.quantile)) - self.margin if known else -math.inf


@dataclass(frozen=True)
class RankingError:
    """What early stopping would have done to a search whose networks were all evaluated.

    Attributes:
        dropped: Share of the networks it would have dropped.
        lost: Share of the ``keep`` fittest among them.
        best_lost: Whether the fittest is one of them.
        tau: Rank correlation (Kendall's) of early and final metric; 1 where both order alike.
        keep: Fittest networks looked at.
    """

    dropped: float
    lost: float
    best_lost: bool
    tau: float
    keep: int


def ranking_error(history: Sequence[Candidate], stop: EarlyStop, keep: int = 10) -> RankingError:
    """Measure an early stop on a search that recorded the early metrics and dropped nobody.

    Args:
        history: Its candidates; those without an early metric or a fitness are left out.
        stop: The early stop to measure.
        keep: Fittest networks that should stay.

    Raises:
        ValueError: Fewer than two networks with both numbers.
    """
    known = [c for c in history if c.fitness > FAILED and c.metrics.get(EARLY) is not None]
    if len(known) < 2:
        raise ValueError(
            f"ranking error: must have two networks with both metrics, got {len(known)}"
        )
    early = [float(c.metrics[EARLY] or 0) for c in known]
    bounds = {
        generation: stop.bound(c for c in known if c.generation < generation)
        for generation in {c.generation for c in known}
    }
    dropped = {
        c.index for c, value in zip(known, early, strict=True) if value < bounds[c.generation]
    }
    best = sorted(known, key=lambda c: (-c.fitness, c.index))[:keep]
    lost = [c for c in best if c.index in dropped]
    return RankingError(
        dropped=len(dropped) / len(known),
        lost=len(lost) / len(best),
        best_lost=best[0].index in dropped,
        tau=kendall_tau(early, [c.fitness for c in known]),
        keep=len(best),
    )


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-b of two series of equal length; 0 where one of them is constant."""
    a, b = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(f"tau: must have two series of one length, got {len(a)} and {len(b)}")
    upper = np.triu_indices(len(a), 1)
    signs = [np.sign(v[:, None] - v[None, :])[upper] for v in (a, b)]
    norm = math.sqrt(float((signs[0] ** 2).sum()) * float((signs[1] ** 2).sum()))
    return float((signs[0] * signs[1]).sum()) / norm if norm else 0.0
