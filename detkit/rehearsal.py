"""What ``--dry-run`` of a training does: prepare it whole, do two steps, tell what it would take.

Nothing is written. Times and memory are measured on these steps and a few evaluated images; what
follows for the whole training is an estimate.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detkit.api import Prepared, prepare, resolve_settings
from detkit.config import Config, Layer, is_supernet, to_plain
from detkit.data import ClassificationDataset, eval_batches, steps_per_epoch
from detkit.data.statistics import statistics
from detkit.engine import distributed
from detkit.engine.classification import top1
from detkit.engine.detections import detect_dataset
from detkit.engine.progress import StepInfo
from detkit.engine.rehearsal import Rehearsal, rehearse
from detkit.engine.schedule import main_points
from detkit.loading import build, pick_device
from detkit.models.count import macs_by_module, shapes_only
from detkit.pod import padded_size
from detkit.supernet import follow_paths

Record = dict[str, Any]
Origins = Mapping[str, Mapping[str, str]]

IMAGES = 5
"""Images evaluated; the first one pays for what happens once, the others are timed."""
_LOG_LINE = 120  # bytes of a line of log.txt beside its numbers


def rehearse_training(
    command: str,
    config: Config,
    origins: Origins,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    resume: str | None = None,
    init_from: str | Path | None = None,
    allow_partial: bool = False,
) -> Record:
    """Do two steps of a training and say what all of it would take.

    Args:
        command: As of :func:`detkit.api.train`, and so are the others.
        config: The resolved settings.
        origins: Where each of them comes from (:func:`detkit.config.origins`).
        out: The run folder.
        device: Where to train.
        resume: ``auto`` or a run folder.
        init_from: Checkpoint to start from.
        allow_partial: Accept missing and left-over weights of ``init_from``.

    Returns:
        The object that ``--dry-run --json`` prints; docs/training.md describes it.

    Raises:
        DetkitError: Whatever the training would refuse, and what its first steps meet.
    """
    with distributed.process_group(pick_device(device)) as place:
        ready = prepare(
            command,
            config,
            place,
            out=out,
            resume=resume,
            init_from=init_from,
            allow_partial=allow_partial,
        )
        done = rehearse(
            ready.model,
            ready.batches,
            ready.config,
            steps_per_epoch=steps_per_epoch(ready.train_set, ready.config),
            kind=ready.kind,
            device=place,
            evaluate=lambda model: _timed_images(ready, model, place),
            resume=ready.resumed,
            before_step=follow_paths(ready.model, ready.config),
        )
        world = distributed.world_size()
    return {
        "dry_run": True,
        "command": command,
        "device": str(place),
        "processes": world,
        "splits": _splits(ready),
        "categories": list(ready.train_set.categories.names),
        **_model(ready),
        "steps": _steps(ready, done),
        "losses": done.losses,
        "memory": done.memory,
        "learning_rate": _learning_rate(ready.config, done),
        "eta": _eta(ready, done, world),
        "disk": _disk(ready, done, out),
        "continues": None if ready.previous is None else str(ready.previous.path),
        "config": to_plain(ready.config),
        "origins": origins,
    }


def rehearse_demo(
    layers: Iterable[Mapping[str, Any]] = (),
    *,
    out: str | Path | None = None,
    device: str = "auto",
) -> Record:
    """Rehearse the trainings of :func:`detkit.demo.demo`, each from fresh weights.

    The last one is of the net that the second one's scales decide, so it is taken to last as long.

    Returns:
        ``{"dry_run", "command", "out", "parts": {"pretrain", "finetune"}, "eta": {"seconds",
        "estimate"}}``; the parts as :func:`rehearse_training` gives them.
    """
    layers, parts = list(layers), dict[str, Record]()
    for part in ("pretrain", "finetune"):
        shape = {} if not parts else {"backbone": parts["pretrain"]["config"]["model"]["backbone"]}
        start = Layer({"model": shape}, "the pretrained backbone")
        settings = resolve_settings(part, [start, *layers], recipe=f"demo/{part}")
        folder = None if out is None else Path(out) / part
        parts[part] = rehearse_training(
            part, settings.config, settings.origins, out=folder, device=device
        )
    seconds = sum(parts[part]["eta"]["seconds"] for part in ("pretrain", "finetune", "finetune"))
    return {
        "dry_run": True,
        "command": "demo",
        "out": str(out or "runs/demo"),
        "parts": parts,
        "eta": {"seconds": seconds, "estimate": True},
    }


# -- what there is


def _splits(ready: Prepared) -> Record:
    """Images, and objects or images of each class, of what is trained on and evaluated on."""
    names = {"train": ready.config.data.split, "val": ready.config.data.val_split}
    if ready.split is not None:
        names["val"] = f"held out of {names['train']}"
    found = {}
    for part, dataset in (("train", ready.train_set), ("val", ready.val_set)):
        counts = statistics(dataset)
        counted = "images" if isinstance(dataset, ClassificationDataset) else "boxes"
        found[part] = {
            "name": names[part],
            "images": len(dataset),
            "boxes": counts.get("boxes"),
            "classes": {name: row[counted] for name, row in counts["per_class"].items()},
        }
    return found


def _model(ready: Prepared) -> Record:
    """Parameters; multiply-adds for one image of the test-time size (of a supernet: one path's)."""
    config, classifier = ready.config, ready.command == "pretrain"
    with shapes_only():
        kind = "backbone" if classifier else "detector"
        model: Any = build(config, ready.train_set.categories, kind, ready.layers).eval()
        side = config.data.short_side
        size = (side, side) if classifier else padded_size(config)
        images = torch.empty(1, 3, *size)
    choose = follow_paths(model, config)
    if choose is not None:
        choose(0)
    if classifier:
        macs = macs_by_module(model, lambda: model.classify(images))
    else:
        macs = macs_by_module(model, lambda: model.run_layers(images, config.rpn.post_nms_test))
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "macs": sum(macs.values()),
        "macs_image": list(size),
    }


# -- what it would take


def _steps(ready: Prepared, done: Rehearsal) -> Record:
    """Steps in all, rehearsed, and of an epoch; without a fixed number as many as the time lets."""
    total = done.length.steps
    per_epoch = steps_per_epoch(ready.train_set, ready.config)
    return {
        "total": _expected_steps(done) if total is None else total,
        "exact": total is not None,
        "per_epoch": per_epoch,
        "done_before": done.done,
        "seconds": done.step_seconds,
        "data_wait_seconds": done.wait_seconds,
        "images_per_second": ready.config.train.batch_size / done.step_seconds,
    }


def _expected_steps(done: Rehearsal) -> int:
    if done.length.steps is not None:
        return done.length.steps
    return done.done + max(1, math.floor((done.length.seconds or 0) / done.step_seconds))


def _learning_rate(config: Config, done: Rehearsal) -> Record:
    points = [
        {**asdict(point), "lr": done.lr * point.factor}
        for point in main_points(config.optim, done.length)
    ]
    return {
        "for_16_images": config.optim.lr,
        "batch_size": config.train.batch_size,
        "used": done.lr,
        "schedule": config.optim.schedule,
        "points": points,
    }


def _timed_images(ready: Prepared, model: nn.Module, device: torch.device) -> tuple[float, float]:
    """Seconds until the first image was evaluated, and of each after it."""
    count = min(IMAGES, len(ready.val_set))
    spread = [i * len(ready.val_set) // count for i in range(count)]
    times = [time.monotonic()]

    def noted(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.monotonic())

    batches = noted(eval_batches(ready.val_set, ready.config, images=spread))
    if ready.command == "pretrain":
        top1(model, batches, device)
    else:
        detect_dataset(model, batches, ready.val_set.categories, device)
    first = times[1] - times[0]
    return first, (times[-1] - times[1]) / (len(times) - 2) if len(times) > 2 else first


def _eta(ready: Prepared, done: Rehearsal, processes: int) -> Record:
    """Seconds of training, of evaluations, and of measuring scales at the end."""
    config, total = ready.config, _expected_steps(done)
    once = _evaluation_seconds(ready, done, processes)
    count = _evaluations(config, total) - _evaluations(config, done.done, last=False)
    scales = 0.0
    if config.model.scales == "learn":  # best.pth and last.pth, each on its own
        images = min(len(ready.train_set), config.scales.images)
        scales = 2 * images * done.evaluation[1] / processes
    training = (total - done.done) * done.step_seconds
    whole = training + count * once + scales
    if done.length.seconds is not None:  # the budget holds for the loop with its evaluations
        whole = done.length.seconds + once + scales
    return {
        "seconds": whole,
        "training_seconds": training,
        "evaluations": count,
        "evaluation_seconds": once,
        "scales_seconds": scales,
        "estimate": True,
    }


def _evaluations(config: Config, steps: int, *, last: bool = True) -> int:
    """Evaluations of a run of so many steps, or before its last one."""
    every = config.eval.every
    if is_supernet(config.model.backbone) and not config.nas.eval_paths:
        return 0
    regular = steps // every if every else 0
    return regular + int(last and not (every and steps % every == 0))


def _evaluation_seconds(ready: Prepared, done: Rehearsal, processes: int) -> float:
    """Seconds of one evaluation of the whole split, all processes together."""
    config, (start, each) = ready.config, done.evaluation
    once = start + each * max(0, math.ceil(len(ready.val_set) / processes) - 1)
    if not is_supernet(config.model.backbone):
        return float(once)
    # A forward pass is about a third of a step.
    norms = config.nas.eval_calibration * done.step_seconds / 3
    return float(config.nas.eval_paths * (norms + once))


def _disk(ready: Prepared, done: Rehearsal, out: str | Path | None) -> Record:
    """Bytes of the run folder, and more while ``last.pth`` is replaced."""
    config, total = ready.config, _expected_steps(done)
    last, best = done.weights_bytes + done.optimizer_bytes, done.weights_bytes
    if is_supernet(config.model.backbone) and not config.nas.eval_paths:
        best = 0
    line = StepInfo(
        step=total,
        total=total,
        progress=1 / 3,
        losses=done.losses,
        lr=done.lr,
        images_per_second=1 / 3,
        data_wait=1 / 3,
        eta_seconds=1 / 3,
        metric=config.eval.metric,
        value=None,
        best=None,
    )
    per_line = 2 * len(json.dumps(line.line())) + _LOG_LINE
    logs = per_line * max(1, (total - done.done) // config.train.log_every)
    folder = Path(out or f"runs/{ready.command}") if ready.previous is None else ready.previous.path
    return {
        "folder": str(folder),
        "last": last,
        "best": best,
        "logs": logs,
        "total": last + best + logs,
        "peak": 2 * last + best + logs,
        "free": _free(folder),
    }


def _free(folder: Path) -> int:
    """Bytes free where ``folder`` is or would be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
