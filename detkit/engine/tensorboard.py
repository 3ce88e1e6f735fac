"""The lines of ``metrics.jsonl`` as TensorBoard's event files (extra ``[tensorboard]``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detkit.errors import ConfigError
from detkit.storage import writing

FOLDER = "tensorboard"
"""Folder of the event files inside a run folder."""
_TRAIN = ("loss", "lr", "images_per_second", "data_wait")


def require_tensorboard() -> None:
    """Refuse to go on without the package; raises ConfigError."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "train.tensorboard: the package tensorboard must be installed, got none; "
            "pip install 'detkit[tensorboard]'"
        )


class Board:
    """Event files of one run.

    Args:
        run: The run folder.
        step: Events after this step, of a run that went on further, are forgotten.
    """

    def __init__(self, run: Path, step: int) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        with writing(run / FOLDER):
            self._writer = SummaryWriter(run / FOLDER, purge_step=step + 1 if step else None)

    def write(self, line: Mapping[str, Any]) -> None:
        """Write the numbers of a line of ``metrics.jsonl``."""
        for tag, value in scalars(line):
            self._writer.add_scalar(tag, value, line["step"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Tags and values: ``train/lr``, ``losses/<name>``, ``eval/<metric>``, ``scales/<layer>/h``."""
    if line["kind"] == "train":
        yield from ((f"train/{name}", line[name]) for name in _TRAIN)
        yield from ((f"losses/{name}", value) for name, value in line["losses"].items())
    elif line["kind"] == "eval":
        found = line["metrics"].items()
        yield from ((f"eval/{name}", value) for name, value in found if value is not None)
    elif line["kind"] == "scales":
        for path, pair in line["scales"].items():
            yield from zip((f"scales/{path}/h", f"scales/{path}/w"), pair, strict=True)
