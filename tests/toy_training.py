"""A small classifier with everything that makes resuming hard, and batches by step number.

Run as a script it trains in a process of its own, for tests that end it from outside:
``python toy_training.py SCENARIO FOLDER``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detkit.config import Config, resolve
from detkit.engine import checkpoint, distributed, signals
from detkit.engine.run import RunFolder, create_run
from detkit.engine.train import FitResult, fit
from detkit.errors import DetkitError
from detkit.types import CategoryMap, ClassificationBatch

CATEGORIES = CategoryMap(["a", "b", "c", "d"])


class Toy(nn.Module):
    """Convolution, batch norm and dropout: weights, buffers, counters and random draws."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.spare = nn.Linear(8, 1)  # takes part only where a batch holds label 3

    def features(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(images))).mean((2, 3))  # (N, 8)
        return F.dropout(x, 0.2, self.training)

    def forward(self, batch: ClassificationBatch) -> dict[str, Tensor]:
        x = self.features(batch.images)
        losses = {"class": F.cross_entropy(self.head(x), batch.labels)}
        if bool((batch.labels == 3).any()):
            losses["spare"] = self.spare(x).square().mean()
        return losses


class Plain(nn.Module):
    """No batch norm, no draws: the loss of a batch is the mean of the losses of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        self.spare = nn.Linear(8, 1)

    def forward(self, batch: ClassificationBatch) -> dict[str, Tensor]:
        x = torch.relu(self.conv(batch.images)).mean((2, 3))
        losses = {"class": F.cross_entropy(self.head(x), batch.labels)}
        # As a detector's box loss: over the images that hold something, zero where none does.
        found = batch.labels == 3
        if bool(found.any()):
            losses["spare"] = self.spare(x[found]).square().sum() / len(found)
        else:
            losses["spare"] = x.sum() * 0
        return losses


def batch_of(step: int, images: int = 4, *, files: str = "step") -> ClassificationBatch:
    """The images of a step: a function of its number."""
    own = torch.Generator().manual_seed(step)
    return ClassificationBatch(
        torch.randn(images, 3, 8, 8, generator=own),
        torch.randint(0, 4, (images,), generator=own),
        [f"{files}{step}-{i}.png" for i in range(images)],
    )


def split(batch: ClassificationBatch, sizes: list[int]) -> list[ClassificationBatch]:
    """A batch in consecutive parts."""
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [
        ClassificationBatch(batch.images[a:b], batch.labels[a:b], batch.files[a:b])
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]


def batches(start: int) -> Iterator[list[ClassificationBatch]]:
    """Steps from ``start`` on; draws from the global generator, as a loader's start does."""
    torch.rand(1)
    step = start
    while True:
        yield [batch_of(step)]
        step += 1


def toy_config(**tables: dict[str, Any]) -> Config:
    """Six steps of four images."""
    train = {"steps": 6, "batch_size": 4, "log_every": 2, "seed": 5}
    optim = {"lr": 0.8, "warmup_steps": 2}
    evaluation = {"metric": "top1"}
    base = {"train": train, "optim": optim, "eval": evaluation}
    return resolve([base, tables])


def train(
    run: RunFolder,
    config: Config,
    *,
    model: Callable[[], nn.Module] = Toy,
    source: Callable[[int], Iterator[list[ClassificationBatch]]] = batches,
    **options: Any,
) -> FitResult:
    """Fit a freshly seeded model on the CPU."""
    torch.manual_seed(config.train.seed)
    return fit(
        model(),
        source,
        config,
        steps_per_epoch=4,
        run=run,
        kind="backbone",
        categories=CATEGORIES,
        device="cpu",
        **options,
    )


def new_run(folder: Path, config: Config) -> RunFolder:
    return create_run("pretrain", "toy", config, out=folder)


def _slow(run: RunFolder) -> None:
    """Long enough to be stopped by a signal; says on stdout when it is under way."""

    def on_step(info: Any) -> None:
        if info.step == 3:
            print("running", flush=True)
        if info.step >= 3:
            time.sleep(0.02)

    config = toy_config(train={"steps": 40, "ema": 0.9})
    resume = checkpoint.load(run.last) if run.last.is_file() else None
    train(run if resume else new_run(run.path, config), config, on_step=on_step, resume=resume)


def _evaluating(run: RunFolder) -> None:
    """Is stopped inside an evaluation that would take long."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        print("running", flush=True)
        time.sleep(120)
        return {"top1": 0.0}

    config = toy_config(eval={"every": 2})
    train(new_run(run.path, config), config, evaluate=evaluate)


def _stalled(run: RunFolder) -> None:
    """A loader that hangs after two steps."""

    def source(start: int) -> Iterator[list[ClassificationBatch]]:
        yield from (item for item, _ in zip(batches(start), range(2), strict=False))
        time.sleep(120)

    config = toy_config(train={"stall_seconds": 1.0})
    train(new_run(run.path, config), config, source=source)


def _deadlocked(run: RunFolder) -> None:
    """A call that no signal gets back from: a mutex locked twice."""
    lock = ctypes.CDLL(None).pthread_mutex_lock
    mutex = ctypes.create_string_buffer(128)
    with signals.Watchdog(0.3, grace_seconds=0.3):
        lock(mutex)
        lock(mutex)


def _killed(run: RunFolder) -> None:
    """Dies while writing over an older checkpoint."""
    config = toy_config()
    train(new_run(run.path, config), config)
    os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    checkpoint.save(run.last, checkpoint.load(run.last))


def _share(start: int) -> Iterator[list[ClassificationBatch]]:
    """This process's half of each step's images, in two parts."""
    rank = distributed.rank()
    for step in range(start, 10**6):
        yield split(batch_of(step, 8), [2, 2, 2, 2])[2 * rank : 2 * rank + 2]


def _together(run: RunFolder) -> None:
    """Two processes: equal to one, and one process's bad batch stops both."""

    def spoilt(start: int) -> Iterator[list[ClassificationBatch]]:
        for step, parts in enumerate(_share(start), start):
            if step == 2 and distributed.rank() == 1:
                parts[1].images[0, 0, 0, 0] = float("nan")
            yield parts

    with distributed.process_group(torch.device("cpu")):
        config = toy_config(train={"batch_size": 8, "accumulate": 2, "ema": 0.9})
        equal = RunFolder(run.path / "equal")
        if distributed.is_main():
            new_run(equal.path, config)
            new_run(run.path / "spoilt", config)
        scores = {"top1": float(distributed.rank())}
        train(equal, config, model=Plain, source=_share, evaluate=lambda model: scores)
        try:
            train(RunFolder(run.path / "spoilt"), config, model=Plain, source=spoilt)
        except DetkitError as error:
            found = {"code": error.exit_code, "message": str(error)}
            (run.path / f"rank{distributed.rank()}.json").write_text(json.dumps(found))
            raise


def _stopped_together(run: RunFolder) -> None:
    """Two processes; the second stops itself with SIGTERM, the first hears of it."""

    def on_fetch(start: int) -> Iterator[list[ClassificationBatch]]:
        for step, parts in enumerate(_share(start), start):
            if step == 3 and distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield parts

    with distributed.process_group(torch.device("cpu")):
        config = toy_config(train={"batch_size": 8, "accumulate": 2, "steps": 100_000})
        if distributed.is_main():
            new_run(run.path, config)
        train(run, config, model=Plain, source=on_fetch)


def _long_together(run: RunFolder) -> None:
    """Two processes that train until they are told to stop."""

    def on_step(info: Any) -> None:
        if info.step == 3:
            print("running", flush=True)

    with distributed.process_group(torch.device("cpu")):
        config = toy_config(train={"batch_size": 8, "accumulate": 2, "steps": 10**6})
        if distributed.is_main():
            new_run(run.path, config)
        train(run, config, model=Plain, source=_share, on_step=on_step)


def _launcher(run: RunFolder) -> None:
    """What ``--gpus 2`` does, around :func:`_long_together`."""
    command = [sys.executable, __file__, "long-together", str(run.path)]
    sys.exit(distributed.launch(2, command))


SCENARIOS = {
    "long-together": _long_together,
    "launcher": _launcher,
    "slow": _slow,
    "evaluating": _evaluating,
    "stalled": _stalled,
    "deadlocked": _deadlocked,
    "killed": _killed,
    "together": _together,
    "stopped-together": _stopped_together,
}


def main() -> int:
    """Exit code of one scenario."""
    try:
        SCENARIOS[sys.argv[1]](RunFolder(sys.argv[2]))
    except DetkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.leave(main())
