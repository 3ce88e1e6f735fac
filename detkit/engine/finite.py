"""Stopping on numbers that are not finite, without making the device wait."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from detkit.engine.step import Part, StepResult
from detkit.errors import NonFiniteError


class Report(NamedTuple):
    """One process's account of a bad step; ``losses`` tells whether its own losses are at fault."""

    step: int
    text: str
    losses: bool
    files: list[str]


@dataclass(frozen=True)
class Outcome:
    """One step's result with the names of its images."""

    step: int
    result: StepResult
    files: list[str]

    def report(self) -> Report:
        """What is not finite; waits for the device."""
        losses = {name: float(loss) for name, loss in self.result.losses.items()}
        bad = [f"{name}={value}" for name, value in losses.items() if not math.isfinite(value)]
        norm = float(self.result.grad_norm)
        text = ", ".join(bad) or f"a gradient norm of {norm} with finite losses"
        return Report(self.step, text, bool(bad), self.files)


@contextmanager
def named(step: int, parts: Sequence[Part]) -> Iterator[None]:
    """Name step and images where an operator refuses a number that is not finite."""
    try:
        yield
    except NonFiniteError as error:
        files = ", ".join(name for part in parts for name in part.files) or "unnamed"
        raise NonFiniteError(
            f"training step {step}: {error}; nothing of this step is saved, look at its images: "
            f"{files}"
        ) from error


class FiniteFlags:
    """Whether steps were finite, without making a CUDA device wait for the answer.

    On CUDA a step's flag is copied to the host behind the step and read one step later, when it has
    long arrived; the CPU knows at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: tuple[Outcome, Tensor, torch.cuda.Event] | None = None

    def note(self, outcome: Outcome) -> Outcome | None:
        """Take in a step; returns it if it is bad, on CUDA the step before it."""
        if self._device.type != "cuda":
            return None if bool(outcome.result.finite) else outcome
        before = self.settle()
        flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        flag.copy_(outcome.result.finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._pending = (outcome, flag, event)
        return before

    def settle(self) -> Outcome | None:
        """Wait for the last step's answer; returns that step where it was bad."""
        if self._pending is None:
            return None
        outcome, flag, event = self._pending
        self._pending = None
        event.synchronize()
        return None if bool(flag) else outcome
