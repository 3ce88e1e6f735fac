"""How long training lasts, and the learning rate along the way.

Progress runs from 0 to 1 over the given steps, epochs or wall minutes; everything is a pure
function of it, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from detkit.config import OptimConfig, TrainConfig
from detkit.errors import ConfigError

WARMUP_SHARE = 0.1
"""Largest share of the schedule that warm-up may take."""


@dataclass(frozen=True, kw_only=True)
class Length:
    """Length of a schedule, in steps or in wall seconds of the training loop."""

    steps: int | None = None
    seconds: float | None = None

    def progress(self, step: int, elapsed_seconds: float) -> float:
        """Share of the schedule done after ``step`` steps; at least 1 means finished."""
        if self.steps is not None:
            return step / self.steps
        if self.seconds is not None:
            return elapsed_seconds / self.seconds
        raise ValueError("length: steps or seconds must be given, got neither")

    def eta_seconds(self, step: int, elapsed_seconds: float, seconds_per_step: float) -> float:
        """Wall seconds that are left."""
        if self.steps is not None:
            return max(0, self.steps - step) * seconds_per_step
        return max(0.0, (self.seconds or 0.0) - elapsed_seconds)


def length(train: TrainConfig, steps_per_epoch: float) -> Length:
    """The length that ``train.steps``, ``train.epochs`` or ``train.minutes`` asks for.

    Raises:
        ConfigError: None of the three is set.
    """
    if train.steps:
        return Length(steps=train.steps)
    if train.epochs:
        return Length(steps=max(1, round(train.epochs * steps_per_epoch)))
    if train.minutes:
        return Length(seconds=60 * train.minutes)
    raise ConfigError(
        "train: one of steps, epochs and minutes must be set, got none; for example --steps 1000"
    )


def factor(optim: OptimConfig, progress: float, step: int) -> float:
    """Factor on the base learning rate for the step after ``step`` steps, at ``progress``."""
    return _warmup(optim, progress, step) * _decay(optim, progress)


@dataclass(frozen=True, kw_only=True)
class SchedulePoint:
    """Where the learning rate turns.

    Attributes:
        share: Share of the schedule done.
        step: Steps done; None under a time budget.
        factor: On the base learning rate, of the step that follows.
        what: ``start``, ``warm-up ends``, ``milestone``, ``half-way`` or ``end``.
    """

    share: float
    step: int | None
    factor: float
    what: str


def main_points(optim: OptimConfig, length: Length) -> list[SchedulePoint]:
    """Where the schedule starts, turns and ends, in order."""
    total = length.steps
    warm = WARMUP_SHARE if total is None else min(WARMUP_SHARE, optim.warmup_steps / total)
    found = [(0.0, "start")]
    if optim.warmup_steps and optim.warmup_factor < 1:
        found.append((warm, "warm-up ends"))
    if optim.schedule == "step":
        found += [(share, "milestone") for share in sorted(optim.milestones)]
    else:
        found.append((0.5, "half-way"))
    points = []
    for share, what in [*found, (1.0, "end")]:
        step = None if total is None else math.ceil(share * total)
        done = share if step is None or not total else step / total
        # Under a time budget warm-up is taken to end by its share: steps are not known yet.
        steps = (0 if share < warm else optim.warmup_steps) if step is None else step
        points.append(
            SchedulePoint(share=done, step=step, factor=factor(optim, done, steps), what=what)
        )
    return points


def _warmup(optim: OptimConfig, progress: float, step: int) -> float:
    # Whichever ends first: the steps asked for or a tenth of the schedule. Under a time budget the
    # number of steps is unknown, so the second limit is in progress, not in steps.
    by_steps = step / optim.warmup_steps if optim.warmup_steps else 1.0
    done = min(1.0, max(by_steps, progress / WARMUP_SHARE))
    return optim.warmup_factor + (1 - optim.warmup_factor) * done


def _decay(optim: OptimConfig, progress: float) -> float:
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if optim.schedule == "linear":
        return 1 - min(1.0, progress)
    return float(optim.gamma ** sum(progress >= milestone for milestone in optim.milestones))
