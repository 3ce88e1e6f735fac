"""Training progress: a live bar with ETA on a terminal, plain lines elsewhere, nothing on stdout."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from detkit.engine.train import StepInfo

_LINE_SECONDS = 15.0  # between plain lines


class TrainProgress:
    """Shows the steps of one training; call it with each StepInfo, use it as a context manager."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._log = logging.getLogger("detkit.progress")
        self._last_line = 0.0
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=1.0, text="")

    def __enter__(self) -> TrainProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar:
            self._bar.stop()
        sys.stderr.flush()

    def __call__(self, info: StepInfo) -> None:
        """Show one step; losses are those of the last logging step."""
        if self._bar:
            self._bar.update(self._task, completed=info.progress, text=_text(info))
        elif time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            eta = f", {info.eta_seconds / 60:.1f} min left" if info.eta_seconds is not None else ""
            self._log.info("%s: %3.0f%%, %s%s", self._title, 100 * info.progress, _text(info), eta)


def _text(info: StepInfo) -> str:
    total = sum(info.losses.values()) if info.losses else float("nan")
    return f"step {info.step}, loss {total:.3f}, {info.images_per_second:.1f} images/s"
