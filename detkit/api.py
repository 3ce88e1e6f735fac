"""What the commands call and Python users import: build, load, train, evaluate.

This is the only module that puts data, models and engine together.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detkit import config as configs
from detkit import foreign, pod, prediction, supernet
from detkit.catalogue import COCO_CLASSES as COCO_CLASSES
from detkit.catalogue import model_table as model_table
from detkit.config import Config, is_supernet
from detkit.data import (
    DetectionDataset,
    eval_batches,
    open_classification,
    open_detection,
    steps_per_epoch,
    train_batches,
)
from detkit.deploy import Form as Form
from detkit.deploy.fold import fold as fold_norms
from detkit.deploy.metadata import describe
from detkit.engine import checkpoint as checkpoints
from detkit.engine import distributed
from detkit.engine.classification import top1
from detkit.engine.detections import detect_dataset
from detkit.engine.evaluate import evaluate as score
from detkit.engine.memory import reuse_freed_memory
from detkit.engine.run import RunFolder, check_new, create_run, same_run
from detkit.engine.tensorboard import require_tensorboard
from detkit.engine.train import StepInfo, fit
from detkit.errors import ConfigError, DataError
from detkit.loading import (
    KINDS,
    PIXELS,
    check_supernet,
    fixed_layers,
    in_form,
    starting_model,
)
from detkit.loading import Loaded as Loaded
from detkit.loading import build as build
from detkit.loading import load as load
from detkit.loading import pick_device as pick_device
from detkit.models.zoo import WITH_MASKS
from detkit.nas.split import SearchSplit
from detkit.ops import backend
from detkit.scoring import score_file, with_fixes
from detkit.settings import MASK_METRICS, VOC_METRICS, resumable
from detkit.settings import check_metric as check_metric
from detkit.settings import newest_checkpoint as newest_checkpoint
from detkit.settings import resolve_config as resolve_config
from detkit.settings import resolve_settings as resolve_settings
from detkit.settings import with_length as with_length
from detkit.storage import write_whole, writing
from detkit.types import CategoryMap

log = logging.getLogger("detkit")
VERIFY_IMAGES = 20
EXACT = Form()
"""Detectors as they are."""


# -- training


def launch_processes(count: int, arguments: Sequence[str], *, threads: int | None = None) -> int:
    """Run a command line in ``count`` processes of this machine; returns their exit code.

    ``threads`` as of :func:`detkit.engine.distributed.launch`.
    """
    line = [sys.executable, "-m", "detkit.cli", *arguments]
    return distributed.launch(count, line, threads=threads)


def train(
    command: str,
    config: Config,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    resume: str | None = None,
    init_from: str | Path | None = None,
    allow_partial: bool = False,
    on_step: Callable[[StepInfo], None] | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train a classifier or a detector and keep its checkpoints in a run folder.

    Args:
        command: ``pretrain`` (a backbone as a classifier) or ``finetune`` (a detector).
        config: the resolved settings.
        out: the run folder itself; by default a new one under ``runs/<command>``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        resume: ``auto`` (``out``, else the newest run with the same settings, else a new run) or a
            run folder.
        init_from: checkpoint to start from.
        allow_partial: accept missing and left-over weights of ``init_from``.
        on_step: called after each step on the first process.
        on_image: called with (images done, images in all) of its share of an evaluation.

    Returns:
        ``{"run": folder, "checkpoint": file, "metrics": {...}}``.

    Raises:
        DetkitError: see :func:`detkit.engine.train.fit`, and for unusable settings, data or
            checkpoints.
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
        config = ready.config
        run = _run_folder(command, config, out, ready.previous)
        if distributed.is_main():
            with run.logging():  # so that log.txt lists them too
                _tell_operators(place)
                _tell_problems(ready.train_set, config.data.split)
                if ready.val_set.report is not ready.train_set.report:
                    _tell_problems(ready.val_set, config.data.val_split)
            if ready.split is not None:
                supernet.write_split(run, ready.split)
        kept = supernet.entries(command, config, ready.split)
        if ready.layers is not None:
            kept["scales"] = _kept(ready.resumed or ready.source)
        score = partial(_validate, command, ready.val_set, config, place, on_image=on_image)
        evaluate: supernet.Evaluate | None = score
        if is_supernet(config.model.backbone):
            evaluate = supernet.evaluator(command, config, ready.train_set, place, score)
        with pod.collected(run, ready.train_set, config, place):
            result = fit(
                ready.model,
                ready.batches,
                config,
                steps_per_epoch=steps_per_epoch(ready.train_set, config),
                run=run,
                kind=ready.kind,
                categories=ready.train_set.categories,
                device=place,
                evaluate=evaluate,
                resume=ready.resumed,
                on_step=pod.logged(ready.model, run, config, on_step),
                provenance={"init_from": str(init_from)} if init_from else None,
                kept=kept,
                before_step=supernet.follow_paths(ready.model, config),
            )
    return {"run": str(run.path), "checkpoint": str(result.best), "metrics": result.metrics}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A training with all it needs, before anything is written.

    Attributes:
        command: ``pretrain`` or ``finetune``.
        config: The settings, with a length.
        kind: Of its checkpoints.
        train_set: Images to train on.
        val_set: Images to evaluate on.
        split: How the two were parted, if they were one.
        previous: The run to continue.
        resumed: Its ``last.pth``.
        source: The checkpoint to start from.
        layers: The split layers of a fast-deployment net.
        model: The model, with the weights of ``source``.
    """

    command: str
    config: Config
    kind: str
    train_set: Any
    val_set: Any
    split: SearchSplit | None
    previous: RunFolder | None
    resumed: checkpoints.Checkpoint | None
    source: checkpoints.Checkpoint | None
    layers: Any
    model: nn.Module

    def batches(self, step: int) -> Iterator[list[Any]]:
        """This process's share of the training batches from ``step`` on."""
        share = {"rank": distributed.rank(), "world": distributed.world_size()}
        return train_batches(self.train_set, self.config, start_step=step, **share)


def prepare(
    command: str,
    config: Config,
    device: torch.device,
    *,
    out: str | Path | None = None,
    resume: str | None = None,
    init_from: str | Path | None = None,
    allow_partial: bool = False,
) -> Prepared:
    """All that :func:`train` does before it makes its folder: refuse, open, build, take weights.

    Args:
        command: as of ``train``, and so are the other arguments and the errors.
        config: the resolved settings.
        device: where to train, inside the group of processes.
        out: the run folder.
        resume: ``auto`` or a run folder.
        init_from: checkpoint to start from.
        allow_partial: accept missing and left-over weights of ``init_from``.
    """
    config = with_length(config)
    check_metric(command, config)
    supernet.check_settings(config)
    if config.train.tensorboard:
        require_tensorboard()
    previous = _to_resume(command, config, out, resume)
    if out is not None and previous is None and distributed.is_main():
        check_new(out)
    resumed = None if previous is None else checkpoints.load(previous.last)
    if resumed is not None:
        check_supernet(resumed, config, str(previous.last if previous else ""))
    source = None if init_from is None else foreign.load(init_from)
    train_set, val_set, split = _open_both(command, config, resumed, source)
    _same_categories(train_set.categories, val_set.categories)
    _require_masks(val_set, config)
    torch.manual_seed(config.train.seed)
    layers = fixed_layers(resumed or source)
    model = starting_model(
        config,
        train_set.categories,
        _net(command),
        layers=layers,
        source=source,
        name=str(init_from),
        allow_partial=allow_partial,
    )
    if config.model.norm == "frozen_bn" and not (init_from or resume):
        log.warning("model.norm=frozen_bn normalises nothing without --init-from; take bn or gn")
    return Prepared(
        command=command,
        config=config,
        kind=_kind(command, config),
        train_set=train_set,
        val_set=val_set,
        split=split,
        previous=previous,
        resumed=resumed,
        source=source,
        layers=layers,
        model=model,
    )


def _open(command: str, config: Config, split: str) -> Any:
    data = config.data
    if command == "pretrain":
        return open_classification(data.path, split, data)
    masks = config.model.detector in WITH_MASKS and split == data.split  # scoring needs no targets
    return open_detection(data.path, split, data, masks=masks)


def _open_both(
    command: str,
    config: Config,
    resumed: checkpoints.Checkpoint | None,
    source: checkpoints.Checkpoint | None,
) -> tuple[Any, Any, SearchSplit | None]:
    """Images to train on, images to evaluate on, and how the two were parted if they were one.

    A detector on a supernet is evaluated on images held out of the training split: the validation
    split is not opened before the search has its result.
    """
    train_set, split = _open(command, config, config.data.split), None
    if command == "finetune" and is_supernet(config.model.backbone):
        train_set, val_set, split = supernet.hold_out(train_set, config, resumed, source)
    else:
        val_set = _open(command, config, config.data.val_split)
    if command == "finetune" and config.data.skip_empty:
        whole, train_set = train_set, train_set.with_objects()
        log.info("%d images without an object are not trained on", len(whole) - len(train_set))
    return train_set, val_set, split


def _require_masks(dataset: Any, config: Config) -> None:
    """Refuse to choose the best checkpoint by masks that the validation split lacks."""
    if config.eval.metric in MASK_METRICS and not dataset.has_masks:
        raise DataError(
            f"{dataset.source}: objects must have masks for eval.metric = "
            f"{config.eval.metric!r}, got none in split {config.data.val_split!r}"
        )


def _tell_operators(device: torch.device) -> None:
    """Which kernel each operator runs on the device."""
    kernels: dict[str, list[str]] = {}
    for op, kernel in backend(device.type).items():
        kernels.setdefault(kernel, []).append(op)
    told = "; ".join(f"{kernel}: {', '.join(ops)}" for kernel, ops in kernels.items())
    log.info("operators on %s: %s", device, told)


def _tell_problems(dataset: Any, split: str) -> None:
    """Count what was repaired or left out of a split, and list the files that are not used."""
    report = dataset.report
    if report.counts:
        log.warning("%s split: %s; `detkit data check` tells all", split, report.summary())
    for problem in report.skipped_files:
        log.warning("not used: %s", problem)


def _same_categories(ours: CategoryMap, theirs: CategoryMap) -> None:
    if ours.names != theirs.names:
        raise DataError(
            f"data: both splits must have the same categories, got {list(ours.names)} "
            f"and {list(theirs.names)}"
        )


def _run_folder(
    command: str, config: Config, out: str | Path | None, previous: RunFolder | None
) -> RunFolder:
    """The run to write to, made by the first process where none is continued."""
    found: str | None = None
    if distributed.is_main():
        run = previous or create_run(command, _run_name(command, config), config, out=out)
        log.info("%s %s", "continuing" if previous else "run folder", run.path)
        found = str(run.path)
    return RunFolder(Path(str(distributed.broadcast(found))))


def _kept(stored: checkpoints.Checkpoint | None) -> dict[str, Any] | None:
    """How the layers of a fast-deployment net are split, for the checkpoints of its training."""
    return None if stored is None else stored["scales"]


def _net(command: str) -> str:
    """What a command trains: ``backbone`` (as a classifier) or ``detector``."""
    return "backbone" if command == "pretrain" else "detector"


def _kind(command: str, config: Config) -> str:
    """Kind of the checkpoints of a training."""
    if is_supernet(config.model.backbone):
        return "supernet"
    return "backbone" if command == "pretrain" else KINDS[config.model.scales]


def _run_name(command: str, config: Config) -> str:
    backbone = config.model.backbone
    return backbone if command == "pretrain" else f"{backbone}-{config.model.detector}"


def _to_resume(
    command: str, config: Config, out: str | Path | None, resume: str | None
) -> RunFolder | None:
    """The run to go on from, chosen by the first process."""
    found: RunFolder | None = None
    if resume is not None and distributed.is_main():
        if resume != "auto":
            found = resumable(resume)
        elif out is not None:
            found = RunFolder(out) if RunFolder(out).last.is_file() else None
        else:
            found = same_run(command, config)
    path = distributed.broadcast(None if found is None else str(found.path))
    return None if path is None else RunFolder(path)


def _validate(
    command: str,
    dataset: Any,
    config: Config,
    device: torch.device,
    model: nn.Module,
    on_image: Callable[[int, int], None] | None = None,
) -> dict[str, float | None]:
    """Scalar metrics on the validation split; each process takes its share of the images."""
    rank, world = distributed.rank(), distributed.world_size()
    batches = eval_batches(dataset, config, rank=rank, world=world)
    count = _counting(on_image, len(range(rank, len(dataset), world)))
    if command == "pretrain":
        own = len(dataset) > distributed.rank()  # with more processes than images some have none
        found = top1(model, batches, device, on_batch=count) if own else None
        parts = [p for p in distributed.gather(found) if p]
        images = sum(part["images"] for part in parts)
        return {"top1": sum(part["top1"] * part["images"] for part in parts) / images}
    rows = detect_dataset(model, batches, dataset.categories, device, on_batch=count)
    results = [row for part in distributed.gather(rows) for row in part]
    for damaged in distributed.gather(dataset.damaged):
        dataset.damaged |= damaged
    if not distributed.is_main():
        return {}
    metric = config.eval.metric
    if metric in VOC_METRICS:
        return {metric: score(dataset.truth(), results, metric=metric)[metric]["mAP"]}
    masks = config.model.detector in WITH_MASKS and dataset.has_masks
    kinds = ("bbox", "segm") if masks else ("bbox",)
    scores = score(dataset.truth(), results, iou_types=kinds)
    return dict(scores["bbox"]) | {f"segm_{k}": v for k, v in scores.get("segm", {}).items()}


# -- evaluation


def evaluate(
    checkpoint: str | Path | None = None,
    *,
    data: str | None = None,
    split: str = "val",
    detections: str | Path | None = None,
    overrides: Iterable[Mapping[str, Any]] = (),
    analysis: bool = False,
    metric: str = "coco",
    device: str = "auto",
    fold: bool = False,
    form: Form = EXACT,
    save_detections: str | Path | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a detector checkpoint, or a COCO results file, on a data set.

    Args:
        checkpoint: the detector; not needed with ``detections``.
        data: data set path; by default the one the checkpoint was trained on.
        split: split of the data set.
        detections: COCO results file to score; needs no model and no images.
        overrides: layers of settings on top of the checkpoint's.
        analysis: add AP and AR by IoU and area.
        metric: ``coco``, ``voc07`` or ``voc12``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        fold: score the detector with its batch norms folded into its convolutions.
        form: in which form the detector runs.
        save_detections: also write the detections as a COCO results file.
        on_image: called with (images done, images in all).

    Returns:
        The dict that ``detkit eval --json`` prints.

    Raises:
        DetkitError: unusable checkpoint, data set or results file.
    """
    if detections is not None:
        if fold:
            raise ConfigError("--fold: must go with a checkpoint, got a results file alone")
        if form != EXACT:
            raise ConfigError(
                "--fast, --bf16, --compile, --cuda-graph: must go with a checkpoint, got a results "
                "file alone"
            )
        return score_file(
            detections,
            data=data,
            split=split,
            overrides=overrides,
            analysis=analysis,
            metric=metric,
        )
    if checkpoint is None:
        raise ConfigError("evaluate: a checkpoint or a results file must be given, got neither")
    results, dataset = detect_split(
        checkpoint,
        data=data,
        split=split,
        overrides=overrides,
        device=device,
        fold=fold,
        form=form,
        on_image=on_image,
    )
    if save_detections is not None:
        with writing(save_detections):
            Path(save_detections).write_text(json.dumps(results), encoding="utf-8")
    scores = score(dataset.truth(), results, analysis=analysis, metric=metric)
    return with_fixes(scores, dataset)


def detect_split(
    checkpoint: str | Path,
    *,
    data: str | None = None,
    split: str = "val",
    overrides: Iterable[Mapping[str, Any]] = (),
    device: str = "auto",
    fold: bool = False,
    form: Form = EXACT,
    on_image: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, Any]], DetectionDataset]:
    """COCO results of a detector checkpoint on a split, and the split; see :func:`evaluate`."""
    reuse_freed_memory()
    loaded = load(checkpoint, device, overrides)
    prediction.require_detector(loaded.kind, str(checkpoint))
    if fold:
        loaded = replace(loaded, model=fold_norms(loaded.model))
    loaded = in_form(loaded, form)
    config = loaded.config
    dataset = open_detection(data or config.data.path, split, config.data)
    return detect_images(loaded, dataset, on_image), dataset


def predict(
    checkpoint: str | Path,
    images: str | Path | Iterable[str | Path],
    *,
    out: str | Path | None = None,
    score: float = prediction.SCORE,
    batch_size: int = 1,
    device: str = "auto",
    overrides: Iterable[Mapping[str, Any]] = (),
    form: Form = EXACT,
    on_image: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Detect objects in image files: a drawn picture of each, and all detections as COCO results.

    In Python, ``detkit.load(checkpoint).predict(image)`` gives the detections themselves.

    Args:
        checkpoint: the detector.
        images: files, folders (with all below them) and patterns such as ``photos/**/*.jpg``.
        out: new or empty folder to write to; by default a new one under ``runs/predict``.
        score: lowest score of a detection that is kept.
        batch_size: images at once.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        overrides: layers of settings on top of the checkpoint's.
        form: in which form the detector runs.
        on_image: called with (images done, images in all).

    Returns:
        ``{"out", "results", "key", "images", "skipped"}``: the folder; ``detections.json`` in
        COCO's results format; ``images.json``, which says which image and category its ids mean;
        per image ``id, file, height, width, picture, detections``, each of these ``name, score,
        bbox`` (x, y, width, height in pixels of the upright image); and the files left out with
        the reason.

    Raises:
        DetkitError: unusable checkpoint, nothing at a name, no readable image, or ``out`` holds
            files.
    """
    reuse_freed_memory()
    names = [images] if isinstance(images, str | Path) else list(images)
    folder = Path(out) if out else Path("runs/predict") / time.strftime("%Y%m%d-%H%M%S")
    loaded = load(checkpoint, device, overrides)
    prediction.require_detector(loaded.kind, str(checkpoint))
    loaded = in_form(loaded, form)
    return prediction.predict_folder(
        loaded,
        str(checkpoint),
        names,
        folder,
        score=score,
        batch_size=batch_size,
        on_image=on_image,
    )


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    opset: int | None = None,
    size: tuple[int, int] | None = None,
    verify: bool = False,
    data: str | None = None,
    split: str = "val",
    overrides: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write a detector checkpoint as an ONNX file; docs/export.md describes inputs and outputs.

    Args:
        checkpoint: the detector.
        out: the ONNX file; another of that name is replaced.
        opset: version of ONNX's operators.
        size: (height, width) of the images, fixed; None leaves them free.
        verify: write nothing unless ONNX Runtime agrees with PyTorch on real images.
        data: data set of these images; by default the one the checkpoint was trained on.
        split: split of the data set.
        overrides: layers of settings for reading the images; ``data`` only.

    Returns:
        ``{"onnx": file, "bytes": n, "opset": n, "verified": {images, detections, box, score, mask,
        unmatched} or None}``.

    Raises:
        DetkitError: a checkpoint that cannot be exported, a missing package, a difference
            (VerificationError), unusable data, or a file that cannot be written.
    """
    from detkit.deploy import export as exporter  # torch.onnx takes seconds to import

    exporter.require_onnx()
    out, opset = Path(out), opset or exporter.OPSETS[0]
    if not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"{out}: must be a file in a folder that exists, got none")
    loaded = load(checkpoint)
    prediction.require_detector(loaded.kind, str(checkpoint))
    config = configs.resolve(overrides, loaded.config)
    _data_only(config, loaded.config)
    entries = describe(loaded.config, loaded.categories)
    content = exporter.to_onnx(
        loaded.model, loaded.config.data, opset=opset, size=size, entries=entries
    )
    result = {"onnx": str(out), "bytes": len(content), "opset": opset, "verified": None}
    if verify:
        result["verified"] = _verify(content, loaded, config, data, split, size)
    write_whole(out, content)
    return result


def _data_only(config: Config, stored: Config) -> None:
    """Refuse settings that would describe another detector than the checkpoint holds."""
    pixels = (*PIXELS, "pad_multiple")
    same = {key: getattr(stored.data, key) for key in pixels}
    if replace(config, data=stored.data) != stored or same != {
        key: getattr(config.data, key) for key in pixels
    }:
        raise ConfigError(
            "--set: must be of the table data, and none of mean, std, channels and pad_multiple, "
            "got others; the rest is the checkpoint's own"
        )


def _verify(
    content: bytes,
    loaded: Loaded,
    config: Config,
    data: str | None,
    split: str,
    size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Compare an exported file with its checkpoint on the first images of a split."""
    from detkit.deploy import verify

    dataset = open_detection(data or config.data.path, split, config.data)
    batches = islice(eval_batches(dataset, config), VERIFY_IMAGES)
    agreement = verify.compare(content, loaded.model, config, batches, size)
    agreement.check()
    return asdict(agreement)


def detect_images(
    loaded: Loaded,
    dataset: DetectionDataset,
    on_image: Callable[[int, int], None] | None = None,
    images: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """COCO results of a detector on a data set whose categories may differ in ids and order.

    Args:
        loaded: the detector.
        dataset: one split of a detection set.
        on_image: called with (images done, images in all).
        images: places of the images to detect on; None for all.

    Raises:
        DataError: the data set has none of the detector's categories.
    """
    total = len(dataset) if images is None else len(images)
    theirs = dataset.categories
    shared = [name for name in loaded.categories.names if name in theirs.names]
    if not shared:
        raise DataError(
            f"data: must share a category with the checkpoint's {list(loaded.categories.names)}, "
            f"got {list(theirs.names)}"
        )
    unknown = [name for name in theirs.names if name not in shared]
    if unknown:
        log.warning("categories the model never learnt score 0: %s", ", ".join(unknown))
    count = _counting(on_image, total)
    device = next(loaded.model.parameters()).device
    results = detect_dataset(
        loaded.model,
        eval_batches(dataset, loaded.config, images=images),
        loaded.categories,
        device,
        on_batch=count,
    )
    ids = {
        loaded.categories.category_id(k): theirs.ids[theirs.names.index(name)]
        for k, name in enumerate(loaded.categories.names, 1)
        if name in theirs.names
    }
    return [
        row | {"category_id": ids[row["category_id"]]}
        for row in results
        if row["category_id"] in ids
    ]


def _counting(
    on_image: Callable[[int, int], None] | None, total: int
) -> Callable[[Any], None] | None:
    """What to call with each batch, so that ``on_image`` is called with images done and in all."""
    if on_image is None:
        return None
    done = 0

    def count(batch: Any) -> None:
        nonlocal done
        done += len(batch.images)
        on_image(done, total)

    return count
