"""What learnt scales cost beside plain convolutions: the operators, and whole detectors.

POD's Table 4 (Peng et al., ICCV 2019) has 1.50 to 1.70 times the plain detector's time with scales
learnt per image and 1.01 after decomposition. Contestants run in turn, in an order that moves on
each round; a ratio is the median over rounds of a contestant's time over the plain one's in the
same round, so that load from elsewhere touches both. Layers are those of ResNet-50 on an image of
800x1344 pixels; detectors have random weights, batch norms folded, and the scales of the paper's
Table 3 for FPN.

    python benchmarks/pod_speed.py [--threads 1,2] [--seconds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit import ops, scales
from detkit.bench.machine import machine
from detkit.config import resolve
from detkit.deploy import fold
from detkit.models import build_detector
from detkit.ops import _library

Pair = tuple[float, float]
Call = Callable[[], object]


@dataclass(frozen=True)
class Layer:
    """A 3x3 convolution: channels, height, width and stride, and its label's scales in Table 3."""

    name: str
    channels: int
    height: int
    width: int
    stride: int
    scales: Pair


LAYERS = (
    Layer("conv3", 128, 100, 168, 1, (1.19, 1.15)),
    Layer("conv4", 256, 50, 84, 1, (1.41, 1.39)),
    Layer("conv5", 512, 25, 42, 1, (2.81, 3.68)),
    Layer("conv4.1, stride 2", 256, 100, 168, 2, (0.77, 0.82)),
)
SAMPLED = (2.37, 1.61)  # what the sampled convolutions run at
FROZEN = (0.46, 0.89)

TABLE_3 = {"R31": (0.89, 0.93), "R34": (1.19, 1.15), "R41": (0.77, 0.82), "R46": (1.41, 1.39)}
TABLE_3 |= {"R51": (0.46, 0.89), "R53": (2.81, 3.68)}
"""Mean (d_h, d_w) of Faster R-CNN with FPN and ResNet-50 on training images."""

DETECTORS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "frcnn-fpn resnet50, 256x416": (
        {"model": {"detector": "frcnn-fpn", "backbone": "resnet50"}},
        (256, 416),
    ),
    "frcnn-fpn resnet50-tiny, 128x192": (
        {
            "model": {"detector": "frcnn-fpn", "backbone": "resnet50-tiny", "neck_channels": 64},
            "rpn": {"post_nms_test": 100},
            "box": {"channels": 128},
        },
        (128, 192),
    ),
}
CLASSES = 80


def layer_calls(layer: Layer) -> tuple[dict[str, Call], dict[str, Call]]:
    """Forward, and forward and backward, of the layer by contestant, ``plain`` first."""
    torch.manual_seed(0)
    c, stride = layer.channels, layer.stride
    x = torch.randn(1, c, layer.height, layer.width)
    conv = nn.Conv2d(c, c, 3, stride, 1, bias=False)
    sampled, small = torch.tensor([SAMPLED]), torch.tensor([FROZEN])
    learner = scales.GlobalScaleConv2d(copy.deepcopy(conv))
    frozen = learner.freeze(FROZEN)
    split = fast_layer(conv, layer.scales)
    weight = conv.weight.detach()
    forward: dict[str, Call] = {
        "plain": lambda: F.conv2d(x, weight, None, stride, 2, 2),
        "F.conv2d, d=1": lambda: F.conv2d(x, weight, None, stride, 1, 1),
        "scaled_conv2d": lambda: ops.scaled_conv2d(x, weight, sampled, None, stride),
        "scaled_conv2d, d<1": lambda: ops.scaled_conv2d(x, weight, small, None, stride),
        "frozen d<1": lambda: frozen(x),
        "split_conv2d": lambda: split(x),
        "dilated_conv2d": lambda: ops.dilated_conv2d(x, weight, None, stride, 2, 2),
    }
    inputs = [t.clone().requires_grad_() for t in (x, weight, sampled)]
    grad = torch.randn_like(F.conv2d(x, weight, None, stride, 2, 2))

    def with_gradients(output: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
        def run() -> None:
            for tensor in inputs:
                tensor.grad = None
            output(*inputs).backward(grad)

        return run

    both = {
        "plain": with_gradients(lambda x, w, _: F.conv2d(x, w, None, stride, 2, 2)),
        "scaled_conv2d": with_gradients(lambda x, w, d: ops.scaled_conv2d(x, w, d, None, stride)),
    }
    return forward, both


def fast_layer(conv: nn.Conv2d, means: Pair) -> nn.Module:
    """The convolution decomposed at these scales."""
    holder = nn.Sequential(copy.deepcopy(conv))
    layers = scales.insert(holder, ["0"])
    return scales.apply(holder, scales.plan(layers, {"0": means})).eval()


def table_3(label: str) -> Pair:
    """Scales of a layer; the table has the first block of each stage and one of the others."""
    stage, block = label[1], label[2:]
    return TABLE_3[f"R{stage}1" if block == "1" else {"3": "R34", "4": "R46", "5": "R53"}[stage]]


def variants(config: dict[str, Any]) -> dict[str, nn.Module]:
    """A detector as it is, with scales learnt per image, and decomposed at the same scales."""
    torch.manual_seed(0)
    plain = build_detector(resolve([config]), CLASSES).eval()
    learnt = copy.deepcopy(plain)
    layers = scales.insert(learnt)
    means = {layer.path: table_3(layer.label) for layer in layers}
    for path, learner in scales.learners(learnt).items():
        with torch.no_grad():  # the map of a learner is 1 + r above 0 and exp(r) below
            start = [d - 1 if d > 1 else math.log(d) for d in means[path]]
            learner.scale.bias.copy_(torch.tensor(start))
            nn.init.normal_(learner.scale.weight, std=1e-4)  # a little different on each image
    fast = scales.apply(copy.deepcopy(learnt), scales.plan(layers, means))
    return {"plain": fold(plain), "learnt": fold(learnt), "decomposed": fold(fast)}


def detector_calls(name: str) -> tuple[dict[str, Call], dict[str, Call]]:
    """Backbone and whole ``detect`` of the variants of a detector."""
    config, (height, width) = DETECTORS[name]
    images, sizes = torch.rand(1, 3, height, width), torch.tensor([[height, width]])

    def detect(model: Any) -> Call:
        return lambda: model.detect(images, sizes)

    def backbone(model: Any) -> Call:
        return lambda: model.backbone(images)

    models = variants(config)
    return {k: backbone(m) for k, m in models.items()}, {k: detect(m) for k, m in models.items()}


def measure(calls: Mapping[str, Call], seconds: float) -> dict[str, dict[str, float]]:
    """Median milliseconds of each call, and median ratio to ``plain``, after one unmeasured run."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for call in calls.values():
        call()
    stop, rounds = time.perf_counter() + seconds, 0
    while rounds < 5 or time.perf_counter() < stop:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            begun = time.perf_counter()
            calls[name]()
            times[name].append(1e3 * (time.perf_counter() - begun))
        rounds += 1
    return {
        name: {
            "ms": statistics.median(values),
            "ratio": statistics.median(v / p for v, p in zip(values, times["plain"], strict=True)),
            "rounds": rounds,
        }
        for name, values in times.items()
    }


def rows_of(threads: int, seconds: float) -> list[dict[str, Any]]:
    """Everything at this number of threads."""
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []

    def add(what: str, part: str, calls: Mapping[str, Call], grad: bool) -> None:
        with torch.set_grad_enabled(grad):
            for name, values in measure(calls, seconds).items():
                row = {"what": what, "pass": part, "threads": threads, "contestant": name}
                rows.append(row | values)

    for layer in LAYERS:
        forward, both = layer_calls(layer)
        add(layer.name, "forward", forward, False)
        add(layer.name, "forward+backward", both, True)
    for name in DETECTORS:
        backbone, detect = detector_calls(name)
        add(name, "backbone", backbone, False)
        add(name, "detect", detect, False)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The ratios as tables: a line per layer or detector and pass, a column per contestant."""
    threads = sorted({row["threads"] for row in rows})
    lines = []
    for passes in (("forward",), ("forward+backward",), ("backbone", "detect")):
        chosen = [row for row in rows if row["pass"] in passes]
        names = list(dict.fromkeys(r["contestant"] for r in chosen if r["contestant"] != "plain"))
        lines += [f"| {passes[-1]} | plain ms | {' | '.join(names)} |"]
        lines += ["|---|" + "---|" * (len(names) + 1)]
        for what, part in dict.fromkeys((row["what"], row["pass"]) for row in chosen):
            cells = []
            for name in ("plain", *names):
                found = [
                    row
                    for t in threads
                    for row in chosen
                    if (row["what"], row["pass"], row["threads"], row["contestant"])
                    == (what, part, t, name)
                ]
                shown = (
                    f"{r['ms']:.1f}" if name == "plain" else f"{r['ratio']:.2f}" for r in found
                )
                cells.append(" / ".join(shown))
            title = f"{what}, {part}" if len(passes) > 1 else what
            lines.append(f"| {title} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", default="1,2", help="numbers of threads, one after another")
    parser.add_argument("--seconds", type=float, default=4.0, help="time per group of contestants")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if not _library.BUILD_INFO:
        parser.error("the compiled operators must be built; run `make build`")
    facts = machine()
    rows = [row for n in options.threads.split(",") for row in rows_of(int(n), options.seconds)]
    facts["load_after"] = os.getloadavg()[0]
    print(", ".join(f"{k} {v}" for k, v in facts.items() if k != "extension"), "\n")
    print(markdown(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"hardware": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
