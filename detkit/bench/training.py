"""Speed of training: images per second, waiting for data, memory, and the parts of a step."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from detkit import api
from detkit.bench.machine import machine
from detkit.config import Config
from detkit.data import open_detection, train_batches
from detkit.engine.memory import reuse_freed_memory
from detkit.engine.optimizer import build_optimizer
from detkit.engine.step import memory_format, resolve_amp, train_step
from detkit.loading import build, pick_device

WARM_UP = 2
STEPS = 10


def bench_train(
    *,
    recipe: str | None = None,
    overrides: Iterable[Mapping[str, Any]] = (),
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Time the training steps of a detector with random weights, as `detkit finetune` does them.

    Args:
        recipe: Settings, by default the tiny recipe; the data are the config's.
        overrides: Layers of settings on top; ``train.steps`` steps are timed where they set it,
            else ten, after two that are not.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        threads: CPU threads, by default torch's choice.

    Returns:
        ``model``, ``batch``, ``steps``, ``images_per_second``, ``data_wait`` (the share of the time
        that a step waits for its batch), ``parts`` of a step in ms, ``peak_gib`` and ``peak_of``
        (what it is the peak of), and ``hardware``.

    Raises:
        DetkitError: Unusable settings or data.
    """
    layers = list(overrides)
    config = api.resolve_config("finetune", layers, recipe=recipe)
    steps = next((t["train"]["steps"] for t in layers if "steps" in t.get("train", {})), STEPS)
    place, before = pick_device(device), torch.get_num_threads()
    torch.set_num_threads(threads or before)
    facts = machine(str(place))
    try:
        marks, images = _run(config, place, int(steps))
    finally:
        torch.set_num_threads(before)
    facts["load_after"] = os.getloadavg()[0]
    total = sum(marks.seconds.values())
    peak, of = _peak_gib(place)
    return {
        "model": recipe or f"{config.model.detector} {config.model.backbone}",
        "batch": config.train.batch_size,
        "steps": int(steps),
        "images_per_second": images / total,
        "data_wait": marks.seconds["data"] / total,
        "parts": {name: 1e3 * spent / steps for name, spent in marks.seconds.items()},
        "peak_gib": peak,
        "peak_of": of,
        "hardware": facts,
    }


class _Marks:
    """Seconds by part: every mark ends the part it names, whatever ran since the one before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        self.seconds.clear()
        self.last = self._now()

    def end(self, part: str) -> None:
        now = self._now()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _run(config: Config, device: torch.device, steps: int) -> tuple[_Marks, int]:
    """The marks of ``steps`` steps, and their images."""
    masks = config.model.detector.startswith("maskrcnn")
    dataset = open_detection(config.data.path, config.data.split, config.data, masks=masks)
    torch.manual_seed(config.train.seed)
    if device.type == "cpu":
        reuse_freed_memory()
    model = build(config, dataset.categories).to(device).train()
    optimizer = build_optimizer(model, config.optim, config.train.batch_size)
    amp = resolve_amp(config.train.amp, device)
    layout = memory_format(model, device, amp)
    model.to(memory_format=layout)  # type: ignore[call-overload]
    scaler = GradScaler(device.type, enabled=amp == "fp16")
    marks, images = _Marks(device), 0
    _watch(model, optimizer, marks)
    batches = iter(train_batches(dataset, config))
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            marks.restart()
            images = 0
        parts = next(batches)
        marks.end("data")
        count = sum(len(part.images) for part in parts)
        train_step(
            model, parts, optimizer, scaler,
            images=count, device=device, amp=amp, clip=config.train.clip, layout=layout,
        )  # fmt: skip
        marks.end("optimizer")
        images += count
    batches.close()  # type: ignore[attr-defined]  # ends the loader's processes
    return marks, images


def _watch(model: nn.Module, optimizer: Optimizer, marks: _Marks) -> None:
    """End a part wherever the model goes from one of its modules to the next."""
    for name, module in model.named_children():
        if name in ("backbone", "neck", "rpn"):
            module.register_forward_hook(lambda *_, name=name: marks.end(name))
    model.register_forward_hook(lambda *_: marks.end("proposals, heads, losses"))
    optimizer.register_step_pre_hook(lambda *_: marks.end("backward"))


def _peak_gib(device: torch.device) -> tuple[float, str]:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30, "reserved on the GPU"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    return peak / 2**20, "resident in the process"
