"""POD on detkit's detectors: scales logged while training, measured at its end, decomposed.

What `detkit finetune --scales learn`, `detkit finetune --collect-scales` and `detkit decompose` do
beyond plain training; arithmetic and layers are in :mod:`detkit.scales`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from detkit import __version__, foreign
from detkit import config as configs
from detkit.config import Config, suggest
from detkit.data import DetectionDataset, eval_batches, open_detection
from detkit.engine import checkpoint as checkpoints
from detkit.engine import distributed
from detkit.engine.checkpoint import Checkpoint
from detkit.engine.inference import inference
from detkit.engine.memory import explained
from detkit.engine.run import RunFolder
from detkit.engine.train import StepInfo
from detkit.errors import (
    CheckpointError,
    ConfigError,
    DetkitError,
    NonFiniteError,
    TrainingInterrupted,
)
from detkit.loading import KINDS, build, pick_device, restore
from detkit.models import build_detector
from detkit.models.count import macs_by_module, shapes_only
from detkit.models.weights import init_backbone
from detkit.scales import (
    Plan,
    ScaleLayer,
    ScaleStatistics,
    apply,
    latest_scales,
    layers_of,
    plan,
    rebuild,
    recording,
    weights_hash,
)
from detkit.types import CategoryMap

Record = dict[str, Any]
OnStep = Callable[[StepInfo], None]
OnImage = Callable[[int, int], None]

log = logging.getLogger("detkit")


# -- while training


def logged(model: nn.Module, run: RunFolder, config: Config, then: OnStep | None) -> OnStep | None:
    """``then``, preceded by a line with the scale of each layer every ``scales.log_every`` steps.

    Lines of ``metrics.jsonl``: ``{"kind": "scales", "step", "scales": {path: [h, w]}}``, means in
    pixels over the first process's images of the step. Without learners it is ``then`` itself.
    """
    if config.model.scales != "learn":
        return then
    labels = {layer.path: layer.label for layer in layers_of(model)}

    def on_step(info: StepInfo) -> None:
        if info.step % config.scales.log_every == 0 or info.progress >= 1:
            scales = latest_scales(model)
            _require_finite(info.step, scales)
            line = {"kind": "scales", "step": info.step, "scales": scales}
            run.append_metrics(line)
            shown = sorted((d, labels[path]) for path, pair in scales.items() for d in pair)
            ends = [f"{d:.3f} ({label})" for d, label in (shown[0], shown[-1])]
            log.info("step %d: scales from %s to %s", info.step, *ends, extra={"event": line})
        if then is not None:
            then(info)

    return on_step


def _require_finite(step: int, scales: Mapping[str, Sequence[float]]) -> None:
    for path, values in scales.items():
        if not all(math.isfinite(value) for value in values):
            raise NonFiniteError(
                f"training step {step}: scales must be finite, got {list(values)} of {path}"
            )


@contextmanager
def collected(
    run: RunFolder, dataset: DetectionDataset, config: Config, device: torch.device
) -> Iterator[None]:
    """Collect the statistics of the run's checkpoints when the training inside the block ends.

    Also where a signal ended it; then a failure is told and does not replace the interruption.
    Without learners it does nothing.
    """
    try:
        yield
    except TrainingInterrupted:
        if config.model.scales == "learn":
            try:
                _collect(run.path, dataset, config, device)
            except DetkitError as error:
                log.error("scales were not collected: %s; run `%s`", error, _remedy(run.path))
        raise
    if config.model.scales == "learn":
        _collect(run.path, dataset, config, device)


# -- statistics


def collect_scales(
    source: str | Path,
    *,
    overrides: Iterable[Mapping[str, Any]] = (),
    device: str = "auto",
    on_image: OnImage | None = None,
) -> Record:
    """Measure the scales of a run's checkpoints on training images and store them in the files.

    Batch size 1, evaluation mode, deployed weights, the test-time transform, no flip; a subset
    drawn with ``train.seed`` where there are more than ``scales.images``.

    Args:
        source: run folder, or one checkpoint.
        overrides: layers of settings on top of the checkpoint's: tables ``data``, ``scales``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        on_image: called with (images done, images in all).

    Returns:
        ``{"checkpoints": files, "images": n, "scales": {path: {"mean", "std", ...}}}`` of the first
        file.

    Raises:
        CheckpointError: no checkpoint with scale learners.
        DetkitError: unusable settings or data.
    """
    config = configs.resolve(overrides, checkpoints.config_of(_learnt(_files(source)[0])))
    with distributed.process_group(pick_device(device)) as place:
        dataset = open_detection(config.data.path, config.data.split, config.data)
        found = _collect(source, dataset, config, place, on_image)
    first = next(iter(found.values()))
    return {
        "checkpoints": list(found),
        "images": first["meta"]["images"],
        "scales": first["stats"],
    }


def _files(source: str | Path) -> list[Path]:
    """``best.pth`` and ``last.pth`` of a run folder, or the file itself."""
    path = Path(source)
    if not path.is_dir():
        return [path]
    run = RunFolder(path)
    found = [file for file in (run.best, run.last) if file.is_file()]
    if not found:
        raise CheckpointError(
            f"{path}: must be a run folder with best.pth or last.pth, got neither"
        )
    return found


def _learnt(path: Path) -> Checkpoint:
    try:
        return checkpoints.load(path, kinds=("gsl",))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; `detkit finetune --scales learn` trains a net of kind gsl"
        ) from error


def _remedy(path: str | Path) -> str:
    return f"detkit finetune --collect-scales {path}"


def _collect(
    source: str | Path,
    dataset: DetectionDataset,
    config: Config,
    device: torch.device,
    on_image: OnImage | None = None,
) -> dict[str, Record]:
    """Statistics of each file, written into it by the first process."""
    # Asked of the first process: when it answers, it has written the files.
    files = distributed.broadcast([str(f) for f in _files(source)] if distributed.is_main() else [])
    known: dict[str, Record] = {}
    found: dict[str, Record] = {}
    for file in map(Path, files):
        stored = _learnt(file)
        name = weights_hash(checkpoints.deployed(stored))
        if name not in known:
            known[name] = _measured(stored, file, name, dataset, config, device, on_image)
        if distributed.is_main():
            checkpoints.save(file, cast(Checkpoint, {**stored, "scales": known[name]}))
        found[str(file)] = known[name]
    return found


def _measured(
    stored: Checkpoint,
    file: Path,
    name: str,
    dataset: DetectionDataset,
    config: Config,
    device: torch.device,
    on_image: OnImage | None,
) -> Record:
    """What a checkpoint keeps under ``scales``; processes share the images."""
    model = restore(stored, str(file), device).model
    layers = layers_of(model)
    images = _subset(len(dataset), config)
    log.info("%s: collecting scales on %d training images", file, len(images))
    rank, world = distributed.rank(), distributed.world_size()
    own, count = ScaleStatistics([layer.path for layer in layers]), 0
    with inference(model), recording(model) as recorder:
        for batch in eval_batches(dataset, config, images=images, rank=rank, world=world):
            with explained("collecting scales", [batch], training=False):
                model.detect(batch.images.to(device), batch.sizes)  # type: ignore[operator]
            own.add(recorder.take())
            count += 1
            if on_image is not None:
                on_image(count, len(images[rank::world]))
    everyone = distributed.gather((own, count))
    merged = ScaleStatistics([layer.path for layer in layers])
    for part, _ in everyone:
        merged.merge(part)
    return {
        "layers": [layer.to_plain() for layer in layers],
        "stats": merged.to_plain(),
        "meta": {
            "data": config.data.path,
            "split": config.data.split,
            "images": sum(number for _, number in everyone),
            "seed": config.train.seed,
            "short_side": config.data.short_side,
            "long_side": config.data.long_side,
            "proposals": config.rpn.post_nms_test if hasattr(model, "rpn") else 0,
            "weights": name,
            "step": stored.get("progress", {}).get("step", 0),
        },
    }


def _subset(total: int, config: Config) -> list[int]:
    """Images to measure on, in order: all, or as many as ``scales.images`` at random."""
    count = min(total, config.scales.images)
    return sorted(random.Random(config.train.seed).sample(range(total), count))


# -- decomposition


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """How to decompose; see :func:`detkit.scales.plan` and :func:`detkit.scales.apply`.

    Attributes:
        tol: Distance to a whole number up to which a scale counts as whole.
        align: Upper parts have a multiple of so many channels.
        ways: Most convolutions per layer, 2 to 4.
        zero_dilation: ``center`` or ``sum``.
        weights: ``transfer`` (cut those of the learnt net), ``none`` (start afresh), or the file of
            a backbone whose weights are cut instead.
        seed: Of fresh weights; None takes the training's.
    """

    tol: float = 0.05
    align: int = 1
    ways: int = 2
    zero_dilation: str = "center"
    weights: str = "transfer"
    seed: int | None = None


def decompose(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    options: Decomposition | None = None,
    dry_run: bool = False,
) -> Record:
    """Turn a detector with learnt scales into one of plain convolutions; same input, same bytes.

    Args:
        checkpoint: file of kind ``gsl`` with its statistics.
        output: file to write; ``X-fd.pth`` beside ``X.pth`` by default.
        options: how; the paper's way by default.
        dry_run: plan only.

    Returns:
        ``{"layers", "totals", "warnings", "output"}`` as ``detkit decompose --json`` prints them.

    Raises:
        CheckpointError: another kind of file; statistics that are missing or of other weights; a
            scale that is not finite and positive.
        ConfigError: an option out of range.
    """
    options, source = options or Decomposition(), Path(checkpoint)
    target = source.with_name(f"{source.stem}-fd.pth") if output is None else Path(output)
    if target.resolve() == source.resolve():
        raise ConfigError(f"-o: must be another file than the checkpoint, got {target}")
    stored = _learnt(source)
    layers, stats = _statistics(stored, source)
    config = checkpoints.config_of(stored)
    classes = len(stored["categories"]["names"])
    image = padded_size(config)
    plain = replace(config, model=replace(config.model, scales="off"))
    before, sizes = _costs(plain, classes, image, [layer.path for layer in layers])
    found = plan(
        layers,
        {path: values["mean"] for path, values in stats.items()},
        stds={path: values["std"] for path, values in stats.items()},
        sizes=sizes,
        tol=options.tol,
        align=options.align,
        ways=options.ways,
    )
    result = found.to_plain()
    after, _ = _costs(plain, classes, image, [layer.path for layer in layers], result["layers"])
    result["totals"] |= _totals(before, after, image, config.rpn.post_nms_test)
    fast = _fast_net(stored, source, plain, found, options)
    if not dry_run:
        checkpoints.save(target, _payload(stored, source, fast, result["layers"], options))
    return result | {"output": None if dry_run else str(target)}


def _statistics(stored: Checkpoint, path: Path) -> tuple[list[ScaleLayer], dict[str, Record]]:
    """Layers and statistics of a checkpoint, refused where they are not of its weights."""
    scales, remedy = stored.get("scales"), f"run `{_remedy(path)}`"
    if scales is None:
        raise CheckpointError(f"{path}: scale statistics must be in the file, got none; {remedy}")
    weights = weights_hash(checkpoints.deployed(stored))
    try:
        if scales["meta"]["weights"] != weights:
            raise CheckpointError(
                f"{path}: scale statistics must be of the weights in the file ({weights[:12]}), "
                f"got those of others ({str(scales['meta']['weights'])[:12]}); {remedy}"
            )
        layers = [ScaleLayer.from_plain(plain) for plain in scales["layers"]]
        return layers, dict(scales["stats"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: scales must hold layers, stats and meta, got an entry that does not fit "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error


def padded_size(config: Config) -> tuple[int, int]:
    """Height and width of a padded landscape image of the test-time size."""
    step = config.data.pad_multiple
    height, width = (-(-n // step) * step for n in (config.data.short_side, config.data.long_side))
    return height, width


@dataclass
class _Cost:
    """Parameters and multiply-adds of the whole net, multiply-adds of the layers of a plan."""

    params: int
    macs: int
    layers: int


def _costs(
    config: Config,
    classes: int,
    image: tuple[int, int],
    paths: Sequence[str],
    rows: Sequence[Mapping[str, Any]] = (),
) -> tuple[_Cost, dict[str, tuple[int, int]]]:
    """Cost of the plain detector, or with its layers split as ``rows`` say, and the layers' input
    maps; nothing is computed.
    """
    with shapes_only():
        model = rebuild(build_detector(config, classes), rows).eval()
        images = torch.empty(1, 3, *image)
    modules = {path: model.get_submodule(path) for path in paths}
    sizes: dict[str, tuple[int, int]] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: sizes.update({path: (*inputs[0].shape[2:],)})

    handles = [m.register_forward_pre_hook(note(path)) for path, m in modules.items()]
    run = cast(Callable[[Tensor, int], object], model.run_layers)
    macs = macs_by_module(model, lambda: run(images, config.rpn.post_nms_test))
    for handle in handles:
        handle.remove()
    params = sum(p.numel() for p in model.parameters())
    inside = sum(macs[m] for m in {*modules.values()})
    return _Cost(params, sum(macs.values()), inside), sizes


def _totals(before: _Cost, after: _Cost, image: tuple[int, int], proposals: int) -> Record:
    """Multiply-adds for one image before and after, RoIs included, and the detector's costs."""
    return {
        "macs": [before.layers, after.layers],
        "detector": {
            "params": [before.params, after.params],
            "macs": [before.macs, after.macs],
        },
        "image": list(image),
        "proposals": proposals,
    }


def _fast_net(
    stored: Checkpoint, source: Path, plain: Config, found: Plan, options: Decomposition
) -> nn.Module:
    """The net of plain convolutions with the weights that ``options`` ask for."""
    zero = {"zero_dilation": options.zero_dilation}
    if options.weights == "transfer":
        if options.seed is not None:
            raise ConfigError("--seed: must go with --weights none or a file, got it with transfer")
        return apply(restore(stored, str(source)).model, found, **zero)
    seed = plain.train.seed if options.seed is None else options.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(plain, CategoryMap.from_plain(stored["categories"]))
        if options.weights == "none":
            return apply(model, found, weights="none", **zero)
        backbone = _backbone(options.weights)
        report = init_backbone(model, checkpoints.deployed(backbone), options.weights)
    log.info("%s: %s", options.weights, report)
    return apply(model, found, **zero)


def _backbone(weights: str) -> Checkpoint:
    if not Path(weights).is_file():
        raise ConfigError(
            f"--weights: must be transfer, none or the file of a backbone, got {weights!r}"
            f"{suggest(weights, ('transfer', 'none'))}"
        )
    stored = foreign.load(weights)
    if stored["kind"] != "backbone":
        raise CheckpointError(f"--weights {weights}: must be a backbone, got {stored['kind']!r}")
    return stored


def _payload(
    stored: Checkpoint,
    source: Path,
    fast: nn.Module,
    rows: Sequence[Record],
    options: Decomposition,
) -> Checkpoint:
    """The fast-deployment checkpoint: no time, no path: equal input gives equal bytes."""
    config = {table: dict(values) for table, values in stored["config"].items()}
    config["model"]["scales"] = "split"
    weights = options.weights
    provenance = {
        "detkit": __version__,
        "torch": str(torch.__version__),
        "gsl": _file_hash(source),
        "tol": options.tol,
        "align": options.align,
        "ways": options.ways,
        "zero_dilation": options.zero_dilation,
        "weights": weights if weights in ("transfer", "none") else _file_hash(Path(weights)),
        "seed": options.seed,
    }
    payload = {
        "format": checkpoints.FORMAT,
        "kind": KINDS["split"],
        "config": config,
        "categories": stored["categories"],
        "model": fast.state_dict(),
        "scales": {
            "layers": list(rows),
            "stats": stored["scales"]["stats"],
            "meta": stored["scales"]["meta"],
        },
        "provenance": provenance,
    }
    return cast(Checkpoint, payload)


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
