"""The training loop: one step, and ``fit``, which repeats it until the schedule ends.

A run is exact on the CPU: stopping after any step and resuming gives the same bits as not stopping.
That needs three things: the batches are a function of the step number, the random state of the
model is in the checkpoint and nothing else draws from it, and whatever a step decides depends on
the checkpoint alone (evaluations due, best metric, elapsed time).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from detkit import __version__
from detkit.config import Config, to_plain
from detkit.engine import checkpoint, distributed
from detkit.engine.checkpoint import Checkpoint
from detkit.engine.ema import Ema
from detkit.engine.finite import FiniteFlags, Outcome, named
from detkit.engine.inference import inference
from detkit.engine.memory import explained, reuse_freed_memory
from detkit.engine.optimizer import base_lr, build_optimizer, set_factor
from detkit.engine.progress import Progress, StepInfo, Window
from detkit.engine.run import RunFolder
from detkit.engine.schedule import Length, factor, length
from detkit.engine.signals import InterruptedBySignalError, StopSignals, Watchdog
from detkit.engine.step import Part, StepResult, memory_format, resolve_amp, train_step
from detkit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    TrainingInterrupted,
)
from detkit.types import CategoryMap

__all__ = ["FitResult", "Progress", "StepInfo", "StepResult", "fit", "train_step"]

Batches = Callable[[int], Iterator[Sequence[Part]]]
Evaluate = Callable[[nn.Module], Mapping[str, float | None]]

_log = logging.getLogger("detkit")


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What training leaves.

    Attributes:
        metrics: Metrics of the ``best`` checkpoint; empty without evaluation.
        last_metrics: Metrics of the last evaluation.
        last: ``last.pth``.
        best: ``best.pth``, or ``last.pth`` where no evaluation gave a number.
        steps: Optimiser steps done.
        stopped_early: Whether ``eval.patience`` ended it.
    """

    metrics: dict[str, float | None]
    last_metrics: dict[str, float | None]
    last: Path
    best: Path
    steps: int
    stopped_early: bool


def fit(
    model: nn.Module,
    batches: Batches,
    config: Config,
    *,
    steps_per_epoch: float,
    run: RunFolder,
    kind: str,
    categories: CategoryMap,
    device: torch.device | str,
    evaluate: Evaluate | None = None,
    resume: Checkpoint | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
    kept: Mapping[str, Any] | None = None,
    before_step: Callable[[int], None] | None = None,
) -> FitResult:
    """Train ``model`` for the length the config gives and keep its checkpoints in ``run``.

    Writes ``metrics.jsonl``, ``log.txt``, ``last.pth`` (every ``train.save_every`` steps, at each
    evaluation, at the end and on a signal) and ``best.pth`` (by ``eval.metric``, without optimiser
    state). In several processes (:func:`distributed.process_group`) all of them call it alike and
    rank 0 writes.

    Args:
        model: ``model(batch)`` gives a dict of scalar losses, whatever the mode.
        batches: ``batches(t)`` yields, for step t and on, this process's share of the step's batch
            as a list of parts. What it draws from torch's global generator is undone each time.
        config: The resolved config.
        steps_per_epoch: Steps in one pass, for ``train.epochs`` and the log.
        run: The run folder, made by :func:`run.create_run`.
        kind: Kind of the checkpoints.
        categories: Stored in them.
        device: Where to train.
        evaluate: Metrics of a model, higher is better. It is called with the deployed weights in
            place, by every process; rank 0's answer counts.
        resume: A checkpoint of this run to go on from.
        on_step: Called after each step on rank 0.
        provenance: Where the weights came from, stored beside the versions.
        kept: Entries of every checkpoint beside the usual ones, as they are.
        before_step: Called by every process with t before it does step t (0, 1, ...), after any
            evaluation; what it does must follow from t, or resuming is not exact.

    Raises:
        TrainingInterrupted: SIGTERM or SIGINT; ``last.pth`` is saved.
        NonFiniteError: A loss or gradient is NaN or infinite; nothing of that step is saved.
        StalledError: No step finished within ``train.stall_seconds``.
        CheckpointError: ``resume`` does not fit this model or config.
        ConfigError: The length is not set, or the batch is smaller than the parts.
        StorageError: The disk refused.
    """
    train = config.train
    if train.batch_size < train.accumulate * distributed.world_size():
        raise ConfigError(
            "train.batch_size: must be at least train.accumulate * processes = "
            f"{train.accumulate} * {distributed.world_size()}, got {train.batch_size}"
        )
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            run.remove_leftovers()
            stack.enter_context(run.logging())
        fitting = Fitting(
            model,
            config,
            length(train, steps_per_epoch),
            run,
            {
                "kind": kind,
                "categories": categories.to_plain(),
                "provenance": _origin(provenance),
                **(kept or {}),
            },
            torch.device(device),
            stack.enter_context(StopSignals()),
            stack.enter_context(Watchdog(train.stall_seconds)),
        )
        if resume is not None:
            fitting.restore(resume)
            if distributed.is_main():
                run.trim_metrics(fitting.progress.step, fitting.progress.evaluated_step)
                _log.info("resumed after step %d", fitting.progress.step)
        if train.tensorboard and distributed.is_main():
            stack.enter_context(run.on_board(fitting.progress.step))
        return fitting.train(batches, evaluate, on_step, before_step)


def _origin(provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"detkit": __version__, "torch": str(torch.__version__), **(provenance or {})}


class Fitting:
    """State and steps of one :func:`fit`, or of its :func:`detkit.engine.rehearsal.rehearse`."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        length: Length,
        run: RunFolder,
        identity: dict[str, Any],
        device: torch.device,
        signals: StopSignals,
        watchdog: Watchdog,
    ) -> None:
        self.config = config
        self.length = length
        self.run = run
        self.identity = identity
        self.device = device
        self.signals = signals
        self.watchdog = watchdog
        torch.manual_seed(config.train.seed + distributed.rank())
        if device.type == "cpu":
            reuse_freed_memory()
        self.model = model.to(device).train()
        self.amp = resolve_amp(config.train.amp, device)
        self.layout = memory_format(model, device, self.amp)
        self.model.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(model, config.optim, config.train.batch_size)
        self.lr = base_lr(config.optim, config.train.batch_size)
        self.scaler = GradScaler(device.type, enabled=self.amp == "fp16")
        self.ema = Ema(model, config.train.ema) if config.train.ema else None
        self.parallel = distributed.wrap(model, device)
        self.progress = Progress()
        self.saved_step = -1
        self.window = Window()
        self.finite = FiniteFlags(device)
        self.started = time.monotonic()

    # -- the loop

    def train(
        self,
        batches: Batches,
        evaluate: Evaluate | None,
        on_step: Callable[[StepInfo], None] | None,
        before_step: Callable[[int], None] | None,
    ) -> FitResult:
        """Go on from where ``progress`` stands to the end of the schedule."""
        self.started = time.monotonic() - self.progress.elapsed_seconds
        first = self.progress.step + 1
        iterator = iter(batches(self.progress.step))
        try:
            while True:
                if evaluate is not None and self._evaluation_due():
                    self._evaluate(evaluate)
                if self._finished():
                    break
                if before_step is not None:
                    before_step(self.progress.step)
                lr = self.step(iterator)
                self._report(lr, first, on_step)
                if self.progress.step % self.config.train.save_every == 0:
                    self._save()
        finally:
            if isinstance(iterator, Generator):
                iterator.close()  # ends its loader processes now and not at garbage collection
        if self.saved_step != self.progress.step:
            self._save()
        return self._result()

    def step(self, iterator: Iterator[Sequence[Part]]) -> float:
        """Do one step; returns its learning rate."""
        begun, state = time.monotonic(), self.progress
        done = self.length.progress(state.step, state.elapsed_seconds)
        lr = set_factor(self.optimizer, self.lr, factor(self.config.optim, done, state.step))
        fetching = time.monotonic()
        parts = self._fetch(iterator)
        waited = time.monotonic() - fetching
        images = int(distributed.gather_numbers([sum(len(p.images) for p in parts)]).sum())
        step = state.step + 1
        with named(step, parts), explained(f"training step {step}", parts, training=True):
            result = train_step(
                self.parallel,
                parts,
                self.optimizer,
                self.scaler,
                images=images,
                device=self.device,
                amp=self.amp,
                clip=self.config.train.clip,
                layout=self.layout,
            )
        if self.ema is not None:
            self.ema.update(self.model, state.step)
        state.step += 1
        state.images_seen += images
        self.window.add(result.losses, images, time.monotonic() - begun, waited)
        self._agree(Outcome(state.step, result, [name for part in parts for name in part.files]))
        self.watchdog.beat(state.step)
        return lr

    def _fetch(self, iterator: Iterator[Sequence[Part]]) -> Sequence[Part]:
        try:
            with torch.random.fork_rng(devices=[]):
                return next(iterator)
        except StopIteration:
            raise DataError(
                f"training: batches must not end, got none for step {self.progress.step}"
            ) from None
        except Exception:
            if self.signals.received is None or distributed.world_size() > 1:
                raise
            self._interrupt(self.signals.received)  # the signal reached a loader process too
            raise

    def _agree(self, outcome: Outcome) -> None:
        """Let all processes take the same decisions after a step: go on, stop or fail."""
        bad = self.finite.note(outcome)
        elapsed = time.monotonic() - self.started
        answers = distributed.gather_numbers([bad is not None, self.signals.received or 0, elapsed])
        spoilt, stop, self.progress.elapsed_seconds = answers.amax(0).tolist()
        if spoilt:
            self._fail(bad)
        if stop:
            self._interrupt(int(stop))

    def settle(self) -> None:
        """Wait for the device's answer on the last step, before anything is saved or shown."""
        bad = self.finite.settle()
        if distributed.gather_numbers([bad is not None]).any():
            self._fail(bad)

    def _fail(self, bad: Outcome | None) -> NoReturn:
        found = distributed.gather(None if bad is None else bad.report())
        reports = [report for report in found if report is not None]
        # One process's bad loss spoils the gradients of all: blame its images, not theirs.
        reports = [report for report in reports if report.losses] or reports
        values = ", ".join(dict.fromkeys(report.text for report in reports))
        files = ", ".join(name for report in reports for name in report.files) or "unnamed"
        raise NonFiniteError(
            f"training step {reports[0].step}: losses and gradients must be finite, got {values}; "
            f"nothing of this step is saved, look at its images: {files}"
        )

    def _interrupt(self, signal_number: int) -> NoReturn:
        self._save()
        name = signal.Signals(signal_number).name
        raise TrainingInterrupted(
            f"training: stopped by {name} after step {self.progress.step}, "
            f"{self.run.last} is saved; continue with --resume auto",
            signal_number,
        )

    def _finished(self) -> bool:
        state, patience = self.progress, self.config.eval.patience
        ran_out = self.length.progress(state.step, state.elapsed_seconds) >= 1
        return ran_out or 0 < patience <= state.evaluations_without_gain

    # -- evaluation

    def _evaluation_due(self) -> bool:
        step, every = self.progress.step, self.config.eval.every
        if step == self.progress.evaluated_step:
            return False
        return self._finished() or (every > 0 and step % every == 0)

    def _evaluate(self, evaluate: Evaluate) -> None:
        self._save()  # what follows may take long or fail
        metrics = self.measure(evaluate)
        state, name = self.progress, self.config.eval.metric
        if name not in metrics:
            raise ConfigError(f"eval.metric: must be one of {', '.join(metrics)}, got {name!r}")
        value = metrics[name]
        better = value is not None and (state.best is None or value > state.best)
        state.metrics, state.evaluated_step = metrics, state.step
        state.evaluations_without_gain = 0 if better else state.evaluations_without_gain + 1
        if better:
            state.best, state.best_step, state.best_metrics = value, state.step, metrics
            self._write(self.run.best, {})
        if distributed.is_main():
            line = {"kind": "eval", "step": state.step, "metrics": metrics, "best": better}
            self.run.append_metrics(line)
            shown = "undefined" if value is None else f"{value:.4f}"
            best = " (best)" if better else ""
            _log.info("step %d: %s %s%s", state.step, name, shown, best, extra={"event": line})
        self._save()

    def measure(self, evaluate: Evaluate) -> dict[str, float | None]:
        """Metrics of the deployed weights; training's weights, mode and random state come back."""
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.watchdog.paused())
                stack.enter_context(torch.random.fork_rng(devices=devices))
                stack.enter_context(inference(self.model))
                if self.ema is not None:
                    stack.enter_context(self.ema.applied(self.model))
                distributed.broadcast_buffers(self.model)
                if distributed.world_size() == 1:  # together, processes finish what they began
                    stack.enter_context(self.signals.interrupts())
                metrics = distributed.broadcast(dict(evaluate(self.model)))
        except InterruptedBySignalError:
            self._interrupt(self.signals.received or signal.SIGTERM)
        return {
            name: float(value) if value is not None and math.isfinite(value) else None
            for name, value in metrics.items()
        }

    # -- reports

    def _report(self, lr: float, first: int, on_step: Callable[[StepInfo], None] | None) -> None:
        state = self.progress
        due = state.step == first or state.step % self.config.train.log_every == 0
        if due or self._finished():
            self.settle()
            self.window.close()
            if distributed.is_main():
                self._write_line(self._info(lr))
        if on_step is not None and distributed.is_main():
            on_step(self._info(lr))

    def _info(self, lr: float) -> StepInfo:
        state, window = self.progress, self.window
        eta = self.length.eta_seconds(state.step, state.elapsed_seconds, window.seconds_per_step)
        return StepInfo(
            step=state.step,
            total=self.length.steps,
            progress=min(1.0, self.length.progress(state.step, state.elapsed_seconds)),
            losses=window.losses,
            lr=lr,
            images_per_second=window.images_per_second,
            data_wait=window.data_wait,
            eta_seconds=eta,
            metric=self.config.eval.metric,
            value=state.metrics.get(self.config.eval.metric),
            best=state.best,
        )

    def _write_line(self, info: StepInfo) -> None:
        loss = sum(info.losses.values())
        elapsed = self.progress.elapsed_seconds
        line = {"kind": "train", **info.line(), "loss": loss, "elapsed_seconds": elapsed}
        self.run.append_metrics(line)
        _log.info(
            "step %d%s: loss %.4f (%s), lr %.3g, %.1f img/s, %.0f %% data wait, %s left",
            info.step,
            f"/{info.total}" if info.total else "",
            loss,
            ", ".join(f"{name} {value:.4f}" for name, value in info.losses.items()),
            info.lr,
            info.images_per_second,
            100 * info.data_wait,
            timedelta(seconds=round(info.eta_seconds)),
            extra={"event": line},
        )

    def _result(self) -> FitResult:
        state = self.progress
        return FitResult(
            metrics=state.best_metrics or state.metrics,
            last_metrics=state.metrics,
            last=self.run.last,
            best=self.run.best if state.best is not None else self.run.last,
            steps=state.step,
            stopped_early=self.length.progress(state.step, state.elapsed_seconds) < 1,
        )

    # -- checkpoints

    def _save(self) -> None:
        self.settle()
        states = distributed.gather(_random_state(self.device))
        extra: dict[str, Any] = {"optimizer": self.optimizer.state_dict(), "rng": {"ranks": states}}
        if self.scaler.is_enabled():
            extra["scaler"] = self.scaler.state_dict()
        self._write(self.run.last, extra)
        self.saved_step = self.progress.step

    def _write(self, path: Path, extra: dict[str, Any]) -> None:
        if not distributed.is_main():
            return
        payload = {
            "format": checkpoint.FORMAT,
            **self.identity,
            "config": to_plain(self.config),
            **self.weights(),
            **extra,
            "progress": asdict(self.progress),
        }
        with self.watchdog.paused():
            checkpoint.save(path, cast(Checkpoint, payload))

    def weights(self) -> dict[str, Any]:
        """What every checkpoint holds of the model: ``model``, and ``ema`` where there is one."""
        ema = {} if self.ema is None else {"ema": self.ema.state}
        return {"model": self.model.state_dict(), **ema}

    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint of :meth:`_save`."""
        for part in ("optimizer", "rng", "progress", *(["ema"] if self.ema else [])):
            if part not in saved:
                raise CheckpointError(
                    f"resume: the checkpoint must hold {part!r}, got {', '.join(saved)}; "
                    "resume from last.pth of the same run"
                )
        if saved["kind"] != self.identity["kind"]:
            raise CheckpointError(
                f"resume: must be of kind {self.identity['kind']!r}, got {saved['kind']!r}"
            )
        checkpoint.load_weights(self.model, saved["model"], "resume")
        if self.ema is not None:
            checkpoint.check_weights(self.ema.state, saved["ema"], "resume")
            self.ema.load(saved["ema"])
        try:
            # The optimiser keeps and changes what it loads; the caller's checkpoint stays as it is.
            self.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(saved.get("scaler", {}))
            self.progress = Progress(**saved["progress"])
            _set_random_state(saved["rng"]["ranks"], self.device)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"resume: the training state must fit this run, got one that does not ({reason})"
            ) from error
        self.saved_step = self.progress.step


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(states: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
    own = distributed.rank()
    if own >= len(states):
        _log.warning("resumed with more processes than before: process %d draws anew", own)
        return
    torch.set_rng_state(states[own]["cpu"])
    if device.type == "cuda" and "cuda" in states[own]:
        torch.cuda.set_rng_state(states[own]["cuda"], device)
