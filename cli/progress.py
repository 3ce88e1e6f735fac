"""Progress: one live screen on a terminal; elsewhere the log's lines show it."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import Progress
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from detkit.cli.logs import Screen, screen

if TYPE_CHECKING:
    from detkit.detnas import SearchProgress
    from detkit.engine.train import StepInfo

log = logging.getLogger("detkit")


class LiveScreen(ABC):
    """A part of the terminal that is drawn anew four times a second; a context manager.

    Without a screen (:func:`detkit.cli.logs.screen`) it draws nothing.
    """

    def __init__(self) -> None:
        self._screen: Screen | None = screen()
        self._live: Live | None = None
        if self._screen is not None:
            self._live = Live(
                console=self._screen.console, get_renderable=self.render, transient=True
            )

    @abstractmethod
    def render(self) -> RenderableType:
        """What the screen shows now."""

    def __enter__(self) -> Self:
        if self._live is not None and self._screen is not None:
            self._screen.live = True
            self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._live is not None and self._screen is not None:
            self._live.stop()
            self._screen.live = False


class TrainProgress(LiveScreen):
    """The steps of one training, or of several in a row: call it with each StepInfo."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._begun = time.monotonic()
        self._told = self._begun  # when _info came
        self._info: StepInfo | None = None
        self._images: tuple[int, int] | None = None
        super().__init__()  # which draws once

    def __call__(self, info: StepInfo) -> None:
        """Show one step; losses and speeds are those of the last logging step."""
        self._info, self._told, self._images = info, time.monotonic(), None

    def on_image(self, done: int, total: int) -> None:
        """Show how far an evaluation is."""
        self._images = (done, total) if done < total else None

    def render(self) -> RenderableType:
        """A bar, and a line per quantity."""
        if self._info is None:
            return Text(f"{self._title}: preparing, {_clock(time.monotonic() - self._begun)}")
        return Group(self._bar(self._info), _rows(self._info, self._images))

    def _bar(self, info: StepInfo) -> Table:
        now = time.monotonic()
        row = Table.grid(padding=(0, 1, 0, 0), expand=False)
        steps = f"step {info.step}" + (f"/{info.total}" if info.total else "")
        left = max(0.0, info.eta_seconds - (now - self._told))
        row.add_row(
            Text(self._title, style="bold"),
            ProgressBar(total=1.0, completed=info.progress, width=24),
            Text(f"{info.progress:.0%}"),
            Text(steps),
            Text(f"{_clock(left)} left"),
            Text(f"{_clock(now - self._begun)} passed", style="dim"),
        )
        return row


def _rows(info: StepInfo, images: tuple[int, int] | None) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    losses = ", ".join(f"{name} {value:.4f}" for name, value in info.losses.items())
    table.add_row("  loss", f"{sum(info.losses.values()):.4f} ({losses})" if losses else "-")
    table.add_row("  rate", f"{info.lr:.3g}")
    wait = f"{info.data_wait:.0%} of the time waiting for data"
    table.add_row("  speed", f"{info.images_per_second:.1f} images/s, {wait}")
    value, best = ("-" if v is None else f"{v:.4f}" for v in (info.value, info.best))
    evaluating = f", evaluating image {images[0]} of {images[1]}" if images else ""
    table.add_row(f"  {info.metric}", f"{value}, best {best}{evaluating}")
    return table


class SearchBar(LiveScreen):
    """How far a search is: call it with each SearchProgress."""

    def __init__(self) -> None:
        self._now: SearchProgress | None = None
        super().__init__()

    def __call__(self, now: SearchProgress) -> None:
        """Show one evaluation."""
        self._now = now

    def render(self) -> RenderableType:
        """A bar, and the newest network below."""
        now = self._now
        if now is None:
            return Text("search: reading images")
        row = Table.grid(padding=(0, 1, 0, 0))
        best = "none yet" if now.best is None else f"{now.best:.4f}"
        row.add_row(
            Text("search", style="bold"),
            ProgressBar(total=max(1, now.total), completed=now.done, width=24),
            Text(f"{now.done} of {now.total} networks"),
            Text(f"best {best}"),
            Text(f"{now.left} left"),
        )
        fitness = now.line["fitness"]
        shown = "failed" if fitness is None else f"{fitness:.4f}"
        newest = f"  newest {now.line['genes']}: {shown}, {now.line['macs'] / 1e6:.1f} M MACs"
        return Group(row, Text(newest, style="dim"))


@contextmanager
def image_progress() -> Iterator[Callable[[int, int], None]]:
    """The function that shows images done of all: a bar on a terminal, events in JSON."""
    where = screen()
    if where is None:
        yield _ImageEvents()
        return
    with Progress(console=where.console) as bar:
        task = bar.add_task("images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _ImageEvents:
    """Events of kind ``images``, at most one per second and the last."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last >= 1:
            self._last = now
            event = {"kind": "images", "done": done, "total": total}
            log.info("image %d of %d", done, total, extra={"event": event, "json_only": True})


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
