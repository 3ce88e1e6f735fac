"""Messages on stderr: plain lines, one JSON object per line, or lines above a live screen.

A message that stands for an event carries it as the record's ``event``, a dict with a ``kind``;
the JSON format prints that, the others the message.
"""

from __future__ import annotations

import json
import logging
import os
import sys

from rich.console import Console
from rich.text import Text

FORMATS = ("json", "plain", "rich")
_SHOWN = ("train", "scales", "candidate", "images")  # kinds that a live screen shows by itself


class JsonLines(logging.Formatter):
    """One JSON object per record: its event, or ``{"kind": "log", "level", "message"}``."""

    def format(self, record: logging.LogRecord) -> str:
        """The object on one line, with ``time`` in seconds since 1970."""
        event = getattr(record, "event", None)
        if event is None:
            level, text = record.levelname.lower(), record.getMessage()
            event = {"kind": "log", "level": level, "message": text}
        return json.dumps({"time": round(record.created, 3), **event})


class Screen(logging.Handler):
    """Prints above a live screen on the same console; what ``live`` shows is not printed twice."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.live = False

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        kind = getattr(record, "event", {}).get("kind")
        if not (self.live and kind in _SHOWN):
            self.console.print(Text(self.format(record)), soft_wrap=True)


def configure(log_format: str | None, *, debug: bool = False) -> None:
    """Messages of detkit on stderr; only the first process of a group speaks.

    Args:
        log_format: One of :data:`FORMATS`; None is ``rich`` on a terminal, else ``plain``.
        debug: Whether plain lines say level and module.
    """
    handler = _handler(log_format)
    if not isinstance(handler.formatter, JsonLines):
        handler.setFormatter(
            logging.Formatter("%(levelname)s %(name)s: %(message)s" if debug else None)
        )
        handler.addFilter(lambda record: not getattr(record, "json_only", False))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    speaks = int(os.environ.get("RANK", "0")) == 0
    logging.getLogger("detkit").setLevel(logging.INFO if speaks else logging.ERROR)
    logging.captureWarnings(True)


def _handler(log_format: str | None) -> logging.Handler:
    if log_format == "rich":
        return Screen(Console(stderr=True, force_terminal=True))
    if log_format is None and (console := Console(stderr=True)).is_terminal:
        return Screen(console)
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonLines())
    return handler


def screen() -> Screen | None:
    """The screen that messages go to, if they do."""
    return next((h for h in logging.getLogger().handlers if isinstance(h, Screen)), None)
