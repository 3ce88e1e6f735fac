"""Two steps of a training, as :func:`detkit.engine.train.fit` would do them, and nothing kept."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detkit.config import Config
from detkit.engine import distributed
from detkit.engine.checkpoint import Checkpoint
from detkit.engine.run import RunFolder
from detkit.engine.schedule import Length, length
from detkit.engine.signals import StopSignals, Watchdog
from detkit.engine.step import Part
from detkit.engine.train import Batches, Fitting

STEPS = 2
"""Steps of a rehearsal: the first one pays for what happens once, the second one is timed."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What the steps of a rehearsal tell.

    Attributes:
        losses: Means over the steps and processes.
        lr: Learning rate after rescaling to the batch, before the schedule's factor.
        done: Steps done before the rehearsal (a run to resume).
        length: Of the schedule.
        step_seconds: Of the last step, waiting for data included.
        wait_seconds: The part of it that data was waited for.
        first_seconds: Of the first step, with the start of the loader.
        evaluation: What ``evaluate`` gave.
        weights_bytes: Of the weights, with those of the moving average.
        optimizer_bytes: Of the optimiser's state.
        memory: Peaks in bytes: ``process``; ``loader``, of the largest loader process (None
            without one); ``gpu``, what torch held of it (None without one).
    """

    losses: dict[str, float]
    lr: float
    done: int
    length: Length
    step_seconds: float
    wait_seconds: float
    first_seconds: float
    evaluation: Any
    weights_bytes: int
    optimizer_bytes: int
    memory: dict[str, int | None]


def rehearse(
    model: nn.Module,
    batches: Batches,
    config: Config,
    *,
    steps_per_epoch: float,
    kind: str,
    device: torch.device,
    evaluate: Callable[[nn.Module], Any],
    resume: Checkpoint | None = None,
    before_step: Callable[[int], None] | None = None,
) -> Rehearsal:
    """Train ``model`` for two steps, then evaluate it; nothing is written.

    Args:
        model: As of :func:`detkit.engine.train.fit`; its weights change.
        batches: As of ``fit``.
        config: As of ``fit``.
        steps_per_epoch: As of ``fit``.
        kind: As of ``fit``; a run to resume must be of it.
        device: Where to train.
        evaluate: Called once with the deployed weights in place; its answer is handed on.
        resume: A checkpoint to go on from.
        before_step: As of ``fit``.

    Raises:
        DetkitError: As of ``fit``, for what two steps and the evaluation meet.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    span = length(config.train, steps_per_epoch)
    with Watchdog(config.train.stall_seconds) as watchdog:
        unwritten = RunFolder("rehearsal")
        fitting = Fitting(
            model, config, span, unwritten, {"kind": kind}, device, StopSignals(), watchdog
        )
        if resume is not None:
            fitting.restore(resume)
        done = fitting.progress.step
        clock = _Clock(batches(done))
        try:
            seconds = [_timed_step(fitting, clock, before_step) for _ in range(STEPS)]
            fitting.settle()
            fitting.window.close()
        finally:
            clock.close()
        found: list[Any] = []

        def keep(net: nn.Module) -> dict[str, float | None]:
            found.append(evaluate(net))
            return {}

        fitting.measure(keep)
    return Rehearsal(
        losses=fitting.window.losses,
        lr=fitting.lr,
        done=done,
        length=span,
        step_seconds=seconds[-1],
        wait_seconds=clock.waits[-1],
        first_seconds=seconds[0],
        evaluation=found[0],
        weights_bytes=_bytes(fitting.weights()),
        optimizer_bytes=_bytes(fitting.optimizer.state_dict()),
        memory=peak_memory(device),
    )


class _Clock:
    """Batches, and how long each was waited for."""

    def __init__(self, batches: Iterator[Sequence[Part]]) -> None:
        self._batches = batches
        self.waits: list[float] = []

    def __iter__(self) -> _Clock:
        return self

    def __next__(self) -> Sequence[Part]:
        begun = time.monotonic()
        batch = next(self._batches)
        self.waits.append(time.monotonic() - begun)
        return batch

    def close(self) -> None:
        """End the loader's processes, which makes their memory known too."""
        if isinstance(self._batches, Generator):
            self._batches.close()


def _timed_step(
    fitting: Fitting, batches: _Clock, before_step: Callable[[int], None] | None
) -> float:
    if before_step is not None:
        before_step(fitting.progress.step)
    begun = time.monotonic()
    fitting.step(batches)
    if fitting.device.type == "cuda":
        torch.cuda.synchronize(fitting.device)
    return time.monotonic() - begun


def _bytes(state: Any) -> int:
    """Size of all tensors in nested dicts and lists, each storage once."""
    sizes: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item)

    visit(state)
    return sum(sizes.values())


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Peaks so far in bytes, the largest over processes; see :class:`Rehearsal`."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    loader = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    gpu = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    numbers = distributed.gather_numbers([own, loader, gpu]).amax(0).long().tolist()
    return {"process": numbers[0], "loader": numbers[1] or None, "gpu": numbers[2] or None}
