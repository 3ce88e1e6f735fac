"""Where training stands and how fast it goes: for checkpoints, logs and progress displays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor

from detkit.engine import distributed


@dataclass
class Progress:
    """Where training stands; stored in each checkpoint under ``progress``."""

    step: int = 0
    elapsed_seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    images_seen: int = 0
    evaluated_step: int = 0
    metrics: dict[str, float | None] = field(default_factory=dict)
    best_metrics: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What a progress display needs to know after a step.

    Attributes:
        step: Steps done.
        total: Steps in all; None under a time budget.
        progress: Share of the schedule done, 0 to 1.
        losses: Means over ranks and steps, as of the last logging step.
        lr: Learning rate of the step.
        images_per_second: Over all ranks, as of the last logging step.
        data_wait: Share of the time in which data was waited for, as of the last logging step.
        eta_seconds: Wall seconds left.
        metric: Which metric ``best.pth`` is best at.
        value: It at the last evaluation; None before the first.
        best: Its best so far.
    """

    step: int
    total: int | None
    progress: float
    losses: dict[str, float]
    lr: float
    images_per_second: float
    data_wait: float
    eta_seconds: float
    metric: str
    value: float | None
    best: float | None

    def line(self) -> dict[str, object]:
        """What a line of ``metrics.jsonl`` holds of it: evaluations have lines of their own."""
        line = asdict(self)
        for name in ("metric", "value", "best"):
            del line[name]
        return line


class Window:
    """Sums since the last logging step; the losses stay on the device until then."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self.images_per_second = 0.0
        self.data_wait = 0.0
        self.seconds_per_step = 0.0
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = self._images = 0
        self._seconds = self._waited = 0.0

    def add(self, losses: Mapping[str, Tensor], images: int, seconds: float, waited: float) -> None:
        """Count one step, of whose seconds some were waited for data."""
        for name, loss in losses.items():
            self._sums[name] = self._sums[name] + loss if name in self._sums else loss
        self._steps += 1
        self._images += images
        self._seconds += seconds
        self._waited += waited

    def close(self) -> None:
        """Turn the sums into means over steps and processes; every process must call it."""
        own = {name: float(total) / self._steps for name, total in self._sums.items()}
        everyone = distributed.gather(own)
        self.losses = {
            name: sum(losses.get(name, 0.0) for losses in everyone) / len(everyone) for name in own
        }
        self.images_per_second = self._images / self._seconds
        self.data_wait = self._waited / self._seconds
        self.seconds_per_step = self._seconds / self._steps
        self._clear()
