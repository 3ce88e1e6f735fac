"""Run folders: ``runs/<command>/<time>-<name>/`` with everything one training run leaves behind.

``config.toml`` (resolved), ``metrics.jsonl``, ``last.pth``, ``best.pth`` and ``log.txt``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from detkit.config import Config, from_plain, read_toml, write_toml
from detkit.engine.tensorboard import Board
from detkit.errors import ConfigError, DataError
from detkit.storage import writing

_TIME = "%Y%m%d-%H%M%S"
_NAME = re.compile(r"(\d{8}-\d{6})-.+")
_FILES = re.compile(
    r"config\.toml|metrics\.jsonl|log\.txt|search_split\.json|report\.html|tensorboard|detections-.+\.json"
    r"|\..+\.pth\.\d+\.tmp"
)


class RunFolder:
    """Paths and small writes of one run; making the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.last = self.path / "last.pth"
        self.best = self.path / "best.pth"
        self.log = self.path / "log.txt"
        self._board: Board | None = None

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunFolder) and self.path.resolve() == other.path.resolve()

    def __hash__(self) -> int:
        return hash(self.path.resolve())

    @property
    def is_run(self) -> bool:
        """Whether a run was started here."""
        return self.config_path.is_file()

    def checkpoint(self) -> Path | None:
        """The checkpoint to use, ``best.pth`` before ``last.pth``; None where there is neither."""
        return next((path for path in (self.best, self.last) if path.is_file()), None)

    def config(self) -> Config:
        """The resolved config of the run; raises ConfigError where it is missing or unreadable."""
        return from_plain(read_toml(self.config_path))

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one JSON line to ``metrics.jsonl``; raises StorageError when the disk refuses."""
        if self._board is not None:
            self._board.write(line)
        with writing(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last line cut off by a crash is left out."""
        if not self.metrics.is_file():
            return []
        with writing(self.metrics):
            text = self.metrics.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        return [self._parse(i, line) for i, line in enumerate(complete.splitlines(), 1)]

    def _parse(self, number: int, text: str) -> dict[str, Any]:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not {"kind", "step"} <= line.keys():
            raise DataError(
                f"{self.metrics}: line {number} must be a JSON object with kind and step, "
                f"got {text[:40]!r}"
            )
        return line

    def trim_metrics(self, step: int, evaluated_step: int) -> None:
        """Forget the lines after a checkpoint training goes back to, lest steps count twice."""
        limits = {"eval": evaluated_step}
        lines = self.read_metrics()
        kept = [line for line in lines if line["step"] <= limits.get(line["kind"], step)]
        if self.metrics.is_file():
            with writing(self.metrics):
                self.metrics.write_text(
                    "".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8"
                )

    def remove_leftovers(self) -> None:
        """Delete temporary checkpoint files of a process that was killed while writing."""
        with writing(self.path):
            for path in self.path.glob(".*.pth.*.tmp"):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def on_board(self, step: int) -> Iterator[None]:
        """Write every line of metrics to TensorBoard too, meanwhile; ``step`` steps are done."""
        self._board = Board(self.path, step)
        try:
            yield
        finally:
            self._board.close()
            self._board = None

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Append everything detkit logs meanwhile to ``log.txt``."""
        logger = logging.getLogger("detkit")
        with writing(self.log):
            handler = logging.FileHandler(self.log, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        level = logger.level
        if not logger.isEnabledFor(logging.INFO):
            logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            yield
        except BaseException as error:  # the file alone: whoever handles the error tells the user
            message = f"{type(error).__name__}: {error}"
            handler.handle(logger.makeRecord("detkit", logging.ERROR, "", 0, message, (), None))
            raise
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            handler.close()


def create_run(
    command: str,
    name: str,
    config: Config,
    *,
    out: str | Path | None = None,
    root: str | Path = "runs",
    now: datetime | None = None,
) -> RunFolder:
    """Make the folder of a new run and write its ``config.toml``.

    Args:
        command: ``pretrain``, ``finetune``, …
        name: What the run is called after its time, for example the model's name.
        config: The resolved config.
        out: The run folder itself (``--out``), in place of one under ``root``.
        root: Folder of all runs.
        now: Time in the folder's name; None for the clock's.

    Raises:
        ConfigError: ``out`` holds a trained run, or files that are not a run's.
        StorageError: The disk refused.
    """
    if out is not None:
        path = Path(out)
        check_new(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
    else:
        stamp = (now or datetime.now()).strftime(_TIME)
        path = _new_folder(Path(root) / command, f"{stamp}-{_slug(name)}")
    run = RunFolder(path)
    with writing(path):
        for old in (run.metrics, run.log):
            old.unlink(missing_ok=True)
        write_toml(config, run.config_path)
    return run


def _new_folder(parent: Path, name: str) -> Path:
    """Make ``parent/name``, or ``name-2``, ``name-3``, … where runs start in the same second."""
    with writing(parent / name):
        for attempt in range(1, 10_000):
            path = parent / (name if attempt == 1 else f"{name}-{attempt}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            return path
    raise ConfigError(f"run folder {parent / name}: must be new, got ten thousand of them")


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"


def check_new(out: str | Path) -> None:
    """Refuse a folder that :func:`create_run` would not write to; raises ConfigError."""
    path = Path(out)
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"--out {path}: must be a folder, got a dangling link")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--out {path}: must be a folder, got a file")
    if not path.exists():
        return
    with writing(path):
        names = {entry.name for entry in path.iterdir()}
    run = RunFolder(path)
    if run.is_run and run.checkpoint() is not None:
        raise ConfigError(
            f"--out {path}: must be a new folder, got one that holds a trained run; "
            "continue it with --resume auto or name another"
        )
    if names and not (run.is_run and all(_FILES.fullmatch(name) for name in names)):
        raise ConfigError(
            f"--out {path}: must be new, empty or an unfinished run, got a folder with other files "
            f"({', '.join(sorted(names)[:3])}); name another"
        )


def runs(commands: str | Iterable[str], *, root: str | Path = "runs") -> list[RunFolder]:
    """Every run of these commands under ``root``, newest first."""
    commands = (commands,) if isinstance(commands, str) else tuple(commands)
    found = []
    for command in commands:
        for path in (Path(root) / command).glob("*"):
            match = _NAME.fullmatch(path.name)
            if match and RunFolder(path).is_run:
                # The name's time survives copying; the file's own orders the runs of one second.
                written = RunFolder(path).config_path.stat().st_mtime_ns
                found.append(((match.group(1), written, path.name), RunFolder(path)))
    return [run for _, run in sorted(found, key=lambda item: item[0], reverse=True)]


def newest_run(commands: str | Iterable[str], *, root: str | Path = "runs") -> RunFolder | None:
    """The newest run of these commands that has a checkpoint."""
    return next((run for run in runs(commands, root=root) if run.checkpoint()), None)


def same_run(command: str, config: Config, *, root: str | Path = "runs") -> RunFolder | None:
    """The newest run of ``command`` with this very config and a ``last.pth`` to continue."""
    for run in runs(command, root=root):
        with contextlib.suppress(ConfigError):  # a run of another version of detkit is another run
            if run.last.is_file() and run.config() == config:
                return run
    return None


def resumable_run(
    command: str, config: Config, *, out: str | Path | None = None, root: str | Path = "runs"
) -> RunFolder | None:
    """The run ``--resume auto`` continues: ``out`` itself where given, else :func:`same_run`."""
    if out is None:
        return same_run(command, config, root=root)
    run = RunFolder(out)
    return run if run.is_run and run.last.is_file() else None
