"""Training progress: a live bar with ETA on a terminal; elsewhere the log's lines show it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from detkit.detnas import SearchProgress
    from detkit.engine.train import StepInfo


class TrainProgress:
    """Shows the steps of one training; call it with each StepInfo, use it as a context manager."""

    def __init__(self, title: str) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=1.0, text="")

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        if not self._bar.disable:
            _quiet(logging.WARNING)  # the bar says what the log's lines would
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()
        _quiet(logging.NOTSET)

    def __call__(self, info: StepInfo) -> None:
        """Show one step; losses are those of the last logging step."""
        self._bar.update(self._task, completed=info.progress, text=_text(info))


class SearchBar:
    """Shows how far a search is; call it with each SearchProgress, use it as a context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("search"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("search", total=None, text="reading images")

    def __enter__(self) -> SearchBar:
        self._bar.start()
        if not self._bar.disable:
            _quiet(logging.WARNING)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()
        _quiet(logging.NOTSET)

    def __call__(self, now: SearchProgress) -> None:
        """Show one evaluation."""
        best = "none yet" if now.best is None else f"{now.best:.4f}"
        text = f"{now.done} of {now.total} networks, best {best}, {now.left} left"
        self._bar.update(self._task, completed=now.done, total=now.total, text=text)


@contextmanager
def image_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of images on a terminal, as the function that moves it."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _quiet(level: int) -> None:
    for handler in logging.getLogger().handlers:
        handler.setLevel(level)


def _text(info: StepInfo) -> str:
    total = sum(info.losses.values()) if info.losses else float("nan")
    return f"step {info.step}, loss {total:.3f}, {info.images_per_second:.1f} images/s"
