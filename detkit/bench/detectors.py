"""Latency and memory of one detector: in the forms it can be deployed in, and part by part."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detkit import api
from detkit.bench.machine import machine
from detkit.bench.timing import Call, clock, compare, peak_mib
from detkit.deploy.fold import fold
from detkit.deploy.form import DeployedDetector, Form
from detkit.engine.memory import reuse_freed_memory
from detkit.errors import ConfigError
from detkit.loading import build, load, pick_device
from detkit.models.detector import image_size
from detkit.prediction import require_detector

CLASSES = 80
"""Of a model with random weights."""

FAST = "folded, channels_last"
"""The form that fixed sizes, the compiler and graphs go on from."""


def bench_model(
    checkpoint: str | Path | None = None,
    *,
    recipe: str | None = None,
    overrides: Iterable[Mapping[str, Any]] = (),
    device: str = "auto",
    size: tuple[int, int] | None = None,
    batch: int = 1,
    rounds: int = 9,
    threads: int | None = None,
    compile: bool = False,
    cuda_graph: bool = False,
) -> dict[str, Any]:
    """Time ``detect`` of a detector on noise, in turn in every form, and its parts.

    Args:
        checkpoint: The detector; without one it has random weights and 80 classes.
        recipe: Settings of a detector without checkpoint.
        overrides: Layers of settings on top.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        size: Height and width; by default the sides of the config.
        batch: Images at once.
        rounds: Times of each part, and least times of each form.
        threads: CPU threads, by default torch's choice.
        compile: Time the form through ``torch.compile`` too, and both where graphs are asked for.
        cuda_graph: Time the form by CUDA graphs too.

    Returns:
        ``model``, ``size``, ``batch``, ``variants`` (``variant``, ``ms``, ``images_per_second``,
        ``ratio`` to the eager one's time in the same round, ``first_s``: seconds of the first call
        of a form that is compiled or captured then, else None), ``failed`` (why a form is left
        out), ``parts_of`` (the quickest fp32 form in ordinary sizes) and its ``parts`` in ms,
        ``peak_mib`` of one call of that, and ``hardware``.

    Raises:
        DetkitError: An unusable checkpoint or setting; a form asked for that does not go with the
            detector or the device.
    """
    place = pick_device(device)
    reuse_freed_memory()  # as `detkit predict` and `detkit eval` do
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    facts = machine(str(place))
    try:
        name, model, default = _model(checkpoint, recipe, overrides)
        height, width = size or default
        images = torch.randn(batch, 3, *(-(-side // 32) * 32 for side in (height, width)))
        images[:, :, height:], images[:, :, :, width:] = 0, 0
        sizes = torch.tensor([[height, width]] * batch)
        asked = Form(compile=compile, cuda_graph=cuda_graph)
        result = _measure(model.to(place).eval(), images.to(place), sizes, rounds, asked)
    finally:
        torch.set_num_threads(before)
    facts["load_after"] = os.getloadavg()[0]
    head = {"model": name, "size": [height, width], "batch": batch}
    return head | result | {"hardware": facts}


def _model(
    checkpoint: str | Path | None, recipe: str | None, overrides: Iterable[Mapping[str, Any]]
) -> tuple[str, nn.Module, tuple[int, int]]:
    """Name, detector, and its usual size of image."""
    if checkpoint is not None:
        loaded = load(checkpoint, "cpu", overrides)
        require_detector(loaded.kind, str(checkpoint))
        config, model, name = loaded.config, loaded.model, str(checkpoint)
    else:
        config = api.resolve_config("finetune", overrides, recipe=recipe)
        torch.manual_seed(config.train.seed)
        model = build(config, CLASSES)
        name = recipe or f"{config.model.detector} {config.model.backbone}"
    return name, model, (config.data.short_side, config.data.long_side)


@torch.inference_mode()
def _measure(
    model: nn.Module, images: Tensor, sizes: Tensor, rounds: int, asked: Form
) -> dict[str, Any]:
    folded = fold(model)
    other: nn.Module = copy.deepcopy(folded).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = images.contiguous(memory_format=torch.channels_last)
    forms: dict[str, tuple[nn.Module, Tensor, bool]] = {
        "eager": (model, images, False),
        "folded": (folded, images, False),
        FAST: (other, last, False),
        "folded, bf16": (folded, images, True),
        f"{FAST}, bf16": (other, last, True),
    }
    calls = {name: _detect(*form, sizes) for name, form in forms.items()}
    deployed, refused = _in_fixed_sizes(other, asked)
    fixed = {name: _detect(net, last, False, sizes) for name, net in deployed.items()}
    # Those after plain fixed sizes are made on their first call, which no round may count.
    first = {name: _seconds(fixed[name], images.device) for name in list(fixed)[1:]}
    timings, failures = compare(calls | fixed, images.device, 0.02 * rounds)
    variants = [
        {
            "variant": name,
            "ms": timing.ms,
            "images_per_second": 1e3 * len(images) / timing.ms,
            "ratio": timing.ratio,
            "spread": timing.spread,
            "first_s": first.get(name),
        }
        for name, timing in timings.items()
    ]
    whole = [name for name in timings if name in forms and not forms[name][2]]
    best = min(whole, key=lambda name: timings[name].ms)
    net, pixels, _ = forms[best]
    return {
        "variants": variants,
        "failed": refused | failures,
        "parts_of": best,
        "parts": _parts(net, pixels, sizes, rounds),
        "peak_mib": peak_mib(calls[best], images.device),
    }


def _in_fixed_sizes(
    detector: Any, asked: Form
) -> tuple[dict[str, DeployedDetector], dict[str, str]]:
    """The forms that run in fixed sizes, or why there are none where none was asked for."""
    forms = {"fixed sizes": Form(fixed=True)}
    if asked.compile:
        forms["compiled"] = Form(compile=True)
    if asked.cuda_graph:
        forms["CUDA graph"] = Form(cuda_graph=True)
    if asked.compile and asked.cuda_graph:
        forms["compiled, CUDA graph"] = asked
    try:
        made = {f"{FAST}, {name}": DeployedDetector(detector, form) for name, form in forms.items()}
    except ConfigError as error:
        if asked != Form():
            raise
        return {}, {f"{FAST}, fixed sizes": str(error)}
    return made, {}


def _seconds(call: Call, device: torch.device) -> float:
    begun = time.perf_counter()
    call(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _detect(model: Any, images: Tensor, bf16: bool, sizes: Tensor) -> Call:
    def run(_: int) -> object:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            return model.detect(images, sizes)

    return run


def _parts(model: Any, images: Tensor, sizes: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of each part, each run alone on what the one before gave."""
    maps = model.backbone(images)
    features = model.neck(maps)
    parts: dict[str, Callable[[], object]] = {
        "backbone": lambda: model.backbone(images),
        "neck": lambda: model.neck(maps),
    }
    if hasattr(model, "rpn"):
        parts |= _two_stage_parts(model, features, sizes, image_size(images))
    else:
        output = model.head(features, image_size(images))
        parts["head"] = lambda: model.head(features, image_size(images))
        parts["post-processing"] = lambda: model.head.detect(output, sizes)
    times: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 1):
        for name, run in parts.items():
            spent = clock(lambda _, run=run: run(), images.device, 0, 1)  # type: ignore[misc]
            if turn:
                times[name].append(spent)
    found = {name: statistics.median(values) for name, values in times.items()}
    if "head and post-processing" in found:
        rest = found.pop("head and post-processing") - found["head"]
        found["post-processing"] = max(0.0, rest)
    return found


def _two_stage_parts(
    model: Any, features: Mapping[str, Tensor], sizes: Tensor, image: tuple[int, int]
) -> dict[str, Callable[[], object]]:
    config = model.rpn.config
    limits = (config.pre_nms_test, config.post_nms_test)
    output = model.rpn(features, image)
    boxes = model.rpn.proposals(output, sizes, *limits)
    parts: dict[str, Callable[[], object]] = {
        "rpn": lambda: model.rpn(features, image),
        "proposals": lambda: model.rpn.proposals(output, sizes, *limits),
        "head": lambda: model.head(features, boxes),
        "head and post-processing": lambda: model.head.detect(features, boxes, sizes),
    }
    if model.mask_head is not None:
        found = model.head.detect(features, boxes, sizes)
        parts["mask head"] = lambda: model.mask_head.detect(features, found)
    return parts
