"""Ways to compute the same thing on a GPU, beside each other: which kernel should be the default.

Convolutions by columns, fused on tensor cores and by the vendor; RoI pooling of either layout;
gradients by atomics and gathered; NMS with and without its one wait, and in a CUDA graph. Every way
must agree with the first of its case. Ways run in turn; medians by CUDA events.

    python benchmarks/cuda_ways.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit import ops
from detkit.bench.boxes import proposals
from detkit.bench.machine import machine

Ways = dict[str, Callable[[], Tensor]]
ROUNDS, CALLS = 15, 10


def conv_ways(
    dtype: torch.dtype, channels: int, height: int, width: int
) -> Iterator[tuple[str, Ways]]:
    """A 3x3 convolution as dilated, scaled and split; FD's split at half of the channels."""
    native = torch.ops.detkit
    x = torch.randn(1, channels, height, width, device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, device="cuda", dtype=dtype) / (9 * channels) ** 0.5
    w = w.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(channels, device="cuda", dtype=dtype)
    scales = torch.tensor([[2.37, 1.61]], device="cuda")
    parts = [p.contiguous(memory_format=torch.channels_last) for p in w.chunk(2)]
    halves = bias.chunk(2)
    one, two = [1, 1], [2, 2]
    size = f"{channels}x{height}x{width} {str(dtype).removeprefix('torch.')}"
    ways: Ways = {
        "columns": lambda: native.dilated_conv2d(x, w, bias, one, two, two, 1),
        "vendor": lambda: F.conv2d(x, w, bias, 1, 2, 2),
        "fused": lambda: native.dilated_conv2d(x, w, bias, one, two, two, 1, 1),
    }
    yield f"dilated_conv2d {size}", ways
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


def roi_ways(dtype: torch.dtype) -> Iterator[tuple[str, Ways]]:
    """RoIAlign of one level and PS-RoIAlign of a thin map, 1000 boxes."""
    native = torch.ops.detkit
    boxes = proposals(1000)[0].cuda()
    rois = torch.cat([torch.zeros(1000, 1, device="cuda"), boxes], 1)
    name = str(dtype).removeprefix("torch.")
    x = torch.randn(1, 256, 200, 272, device="cuda", dtype=dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    align = (rois, 0.25, 7, 7, 2, True)
    grad = torch.randn(1000, 256, 7, 7, device="cuda", dtype=dtype)
    back = (grad, rois, 0.25, 7, 7, *x.shape, 2, True)
    yield (
        f"roi_align 256x200x272 {name}",
        {
            "planes": lambda: native.roi_align(x, *align),
            "channels_last": lambda: native.roi_align(last, *align),
            "planes, copied": lambda: native.roi_align(
                x.contiguous(memory_format=torch.channels_last), *align
            ),
        },
    )
    yield (
        f"roi_align backward 256x200x272 {name}",
        {
            "atomics": lambda: native._roi_align_backward(*back, False),
            "gathered": lambda: native._roi_align_backward(*back, True),
        },
    )
    thin = (1, 490, 50, 84)
    grad = torch.randn(1000, 10, 7, 7, device="cuda", dtype=dtype)
    none = torch.empty(0, dtype=torch.int32, device="cuda")
    ps = (grad, rois, none, 1 / 16, 7, 7, 2, False, 0.5, *thin)
    yield (
        f"ps_roi_align backward 490x50x84 {name}",
        {
            "atomics": lambda: native._ps_roi_align_backward(*ps, False),
            "gathered": lambda: native._ps_roi_align_backward(*ps, True),
        },
    )


def nms_ways(n: int, classes: int) -> Iterator[tuple[str, Ways]]:
    """The first 1000 survivors: waiting for their number, not waiting, and in a graph."""
    boxes, scores = (t.cuda() for t in proposals(n))
    idxs = torch.randint(classes, (n,), device="cuda")

    def waiting() -> Tensor:
        kept = ops.batched_nms(boxes, scores, idxs, 0.7)[:1000]
        return F.pad(kept, (0, 1000 - len(kept)), value=-1)

    def padded() -> Tensor:
        return ops.nms_padded(boxes, scores, 0.7, 1000, idxs)[0]

    padded()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = padded()

    def replayed() -> Tensor:
        graph.replay()
        return static

    ways: Ways = {"waiting": waiting, "padded": padded, "graph": replayed}
    yield f"batched_nms {n} boxes, {classes} classes", ways


def cases() -> Iterator[tuple[str, Ways]]:
    for dtype in (torch.bfloat16, torch.float16):
        for channels, height, width in ((128, 100, 168), (256, 50, 84), (512, 25, 42)):
            yield from conv_ways(dtype, channels, height, width)
    for dtype in (torch.float32, torch.float16):
        yield from roi_ways(dtype)
    for n, classes in ((1000, 1), (12000, 1), (12000, 80), (50000, 1)):
        yield from nms_ways(n, classes)


def error(output: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number."""
    scale = max(float(expected.double().abs().max()), 1e-30)
    return float((output.double() - expected.double()).abs().max()) / scale


def milliseconds(way: Callable[[], Tensor]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        way()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / CALLS


def measure(ways: Ways) -> dict[str, dict[str, float]]:
    """Each way's median time, and its error against the first."""
    outputs = {name: way().clone() for name, way in ways.items()}
    expected = next(iter(outputs.values()))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            times[name].append(milliseconds(way))
    return {
        name: {"ms": statistics.median(times[name]), "error": error(outputs[name], expected)}
        for name in ways
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("cuda_ways: needs a CUDA device, got none")
    rows, wrong = [], []
    for name, ways in cases():
        measured = measure(ways)
        rows.append({"case": name, "ways": measured})
        cells = [f"{way} {m['ms']:.4f} ms ({m['error']:.1e})" for way, m in measured.items()]
        print(f"{name}: {', '.join(cells)}", flush=True)
        wrong += [f"{name}, {way}" for way, m in measured.items() if not m["error"] <= 2**-6]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = machine("cuda")
        options.json.write_text(json.dumps({"hardware": facts, "rows": rows}, indent=1) + "\n")
    if wrong:
        sys.exit(f"cuda_ways: ways must agree, but not: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
