"""Ways to compute the same thing on a GPU, beside each other: which kernel should be the default.

Convolutions by columns, fused on tensor cores and by the vendor, with and without a ReLU; RoI
pooling of either layout; gradients by atomics and gathered; NMS with and without its one wait, and
in a CUDA graph. Every way must agree with the first of its case; one that fails is told of, and the
others run. Ways run in turn; medians by CUDA events. With `--device cpu` those ways run that a CPU
has, to try the script.

    python benchmarks/cuda_ways.py [--device cuda] [--small] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit import ops
from detkit.bench.boxes import proposals
from detkit.bench.machine import machine
from detkit.bench.timing import clock

Ways = dict[str, Callable[[], Tensor]]
Case = tuple[str, Ways]
ROUNDS, CALLS = 15, 10
ON_CUDA_ALONE = ("fused", "cudnn with relu", "graph")
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}


def allow_tf32(allowed: bool) -> None:
    """In convolutions and matrix products alike, so that all ways multiply the same numbers."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def conv_ways(
    device: torch.device, name: str, channels: int, height: int, width: int
) -> Iterator[Case]:
    """A 3x3 convolution as dilated, scaled and split; FD's split at half of the channels."""
    native, dtype = torch.ops.detkit, FLOATS[name]
    allow_tf32(name == "tf32")
    x = torch.randn(1, channels, height, width, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype) / (9 * channels) ** 0.5
    w = w.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(channels, device=device, dtype=dtype)
    scales = torch.tensor([[2.37, 1.61]], device=device)
    parts = [p.contiguous(memory_format=torch.channels_last) for p in w.chunk(2)]
    halves = bias.chunk(2)
    one, two = [1, 1], [2, 2]
    size = f"{channels}x{height}x{width} {name}"
    ways: Ways = {
        "columns": lambda: native.dilated_conv2d(x, w, bias, one, two, two, 1),
        "vendor": lambda: F.conv2d(x, w, bias, 1, 2, 2),
        "fused": lambda: native.dilated_conv2d(x, w, bias, one, two, two, 1, 1),
    }
    yield f"dilated_conv2d {size}", ways
    ways = {
        "columns": lambda: native.dilated_conv2d(x, w, bias, one, two, two, 1, 0, True),
        "vendor, then relu": lambda: F.conv2d(x, w, bias, 1, 2, 2).relu_(),
        "cudnn with relu": lambda: torch.cudnn_convolution_relu(x, w, bias, one, two, two, 1),
        "fused": lambda: native.dilated_conv2d(x, w, bias, one, two, two, 1, 1, True),
    }
    yield f"dilated_conv2d with relu {size}", ways
    yield (
        f"scaled_conv2d {size}",
        {
            "columns": lambda: native.scaled_conv2d(x, w, scales, bias, one, 1),
            "fused": lambda: native.scaled_conv2d(x, w, scales, bias, one, 1, 1),
        },
    )
    yield (
        f"split_conv2d {size}",
        {
            "columns": lambda: native.split_conv2d(x, parts, bias, [*one, *two], one, 1),
            "vendor": lambda: torch.cat(
                [F.conv2d(x, parts[i], halves[i], 1, i + 1, i + 1) for i in range(2)], 1
            ),
            "fused": lambda: native.split_conv2d(x, parts, bias, [*one, *two], one, 1, 1),
        },
    )


def roi_ways(
    device: torch.device, dtype: torch.dtype, count: int, height: int, width: int
) -> Iterator[Case]:
    """RoIAlign of one level and PS-RoIAlign of a thin map."""
    native = torch.ops.detkit
    boxes = proposals(count)[0].to(device)
    rois = torch.cat([torch.zeros(count, 1, device=device), boxes], 1)
    name = str(dtype).removeprefix("torch.")
    x = torch.randn(1, 256, height, width, device=device, dtype=dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    align = (rois, 0.25, 7, 7, 2, True)
    grad = torch.randn(count, 256, 7, 7, device=device, dtype=dtype)
    back = (grad, rois, 0.25, 7, 7, *x.shape, 2, True)
    yield (
        f"roi_align 256x{height}x{width} {name}",
        {
            "planes": lambda: native.roi_align(x, *align),
            "channels_last": lambda: native.roi_align(last, *align),
            "planes, copied": lambda: native.roi_align(
                x.contiguous(memory_format=torch.channels_last), *align
            ),
        },
    )
    yield (
        f"roi_align backward 256x{height}x{width} {name}",
        {
            "atomics": lambda: native._roi_align_backward(*back, False),
            "gathered": lambda: native._roi_align_backward(*back, True),
        },
    )
    thin = (1, 490, 50, 84)
    grad = torch.randn(count, 10, 7, 7, device=device, dtype=dtype)
    none = torch.empty(0, dtype=torch.int32, device=device)
    ps = (grad, rois, none, 1 / 16, 7, 7, 2, False, 0.5, *thin)
    yield (
        f"ps_roi_align backward 490x50x84 {name}",
        {
            "atomics": lambda: native._ps_roi_align_backward(*ps, False),
            "gathered": lambda: native._ps_roi_align_backward(*ps, True),
        },
    )


def nms_ways(device: torch.device, n: int, classes: int) -> Iterator[Case]:
    """The first 1000 survivors: waiting for their number, not waiting, and in a graph."""
    boxes, scores = (t.to(device) for t in proposals(n))
    idxs = torch.randint(classes, (n,), device=device)

    def waiting() -> Tensor:
        kept = ops.batched_nms(boxes, scores, idxs, 0.7)[:1000]
        return F.pad(kept, (0, 1000 - len(kept)), value=-1)

    def padded() -> Tensor:
        return ops.nms_padded(boxes, scores, 0.7, 1000, idxs)[0]

    captured: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []

    def replayed() -> Tensor:  # captured on the first call, which is not timed
        if not captured:
            padded()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured.append((graph, padded()))
        captured[0][0].replay()
        return captured[0][1]

    ways: Ways = {"waiting": waiting, "padded": padded, "graph": replayed}
    yield f"batched_nms {n} boxes, {classes} classes", ways


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    sizes = ((16, 10, 12),) if small else ((128, 100, 168), (256, 50, 84), (512, 25, 42))
    for name in FLOATS:
        for size in sizes:
            yield from conv_ways(device, name, *size)
    allow_tf32(False)
    for dtype in (torch.float32, torch.float16):
        yield from roi_ways(device, dtype, *((20, 20, 27) if small else (1000, 200, 272)))
    counts = ((1000, 3),) if small else ((1000, 1), (12000, 1), (12000, 80), (50000, 1))
    for n, classes in counts:
        yield from nms_ways(device, n, classes)


def error(output: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number."""
    scale = max(float(expected.double().abs().max()), 1e-30)
    return float((output.double() - expected.double()).abs().max()) / scale


def milliseconds(way: Callable[[], Tensor], device: torch.device) -> float:
    return clock(lambda _: way(), device, 0, CALLS)


def measure(ways: Ways, device: torch.device, rounds: int) -> dict[str, dict[str, Any]]:
    """Each way's median time, and its error against the first; or why it failed."""
    outputs: dict[str, Tensor] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        try:
            outputs[name] = way().clone()
        except Exception as reason:  # the others are to run
            found[name] = {"failed": str(reason).partition("\n")[0]}
    times: dict[str, list[float]] = {name: [] for name in outputs}
    for _ in range(rounds):
        for name in outputs:
            times[name].append(milliseconds(ways[name], device))
    for name, output in outputs.items():
        expected = next(iter(outputs.values()))
        found[name] = {"ms": statistics.median(times[name]), "error": error(output, expected)}
    return found


def shown(way: str, measured: dict[str, Any]) -> str:
    if "failed" in measured:
        return f"{way} failed: {measured['failed']}"
    return f"{way} {measured['ms']:.4f} ms ({measured['error']:.1e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--small", action="store_true", help="tiny sizes, two rounds")
    parser.add_argument("--json", type=Path, default=None, help="file to write after each case")
    options = parser.parse_args()
    device = options.device
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("cuda_ways: needs a CUDA device, got none")
    rows, wrong, facts = [], [], machine(str(device))
    for name, ways in cases(device, options.small):
        there = {w: f for w, f in ways.items() if device.type == "cuda" or w not in ON_CUDA_ALONE}
        measured = measure(there, device, 2 if options.small else ROUNDS)
        rows.append({"case": name, "ways": measured})
        print(f"{name}: {', '.join(shown(w, m) for w, m in measured.items())}", flush=True)
        # also where there is no number
        wrong += [f"{name}, {w}" for w, m in measured.items() if not m.get("error", 1) <= 2**-6]
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"hardware": facts, "rows": rows}, indent=1)
            options.json.write_text(text + "\n", encoding="utf-8")
    if wrong:
        sys.exit(f"cuda_ways: ways must agree, but not: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
