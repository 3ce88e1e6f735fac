"""Speed of every operator beside its reference and a peer: one table, and JSON with the hardware.

The peer is torchvision where it has the operator and can be imported (DETKIT_PEER names a folder
that `make peer` made), and torch's own convolution elsewhere. Contestants run in turn, so that a
busy machine slows all of them; the median of each is shown. Times of different runs do not compare,
ratios within one run do.

    python benchmarks/ops.py [--device cuda] [--threads 1] [--only nms,roi_align] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hardware import machine
from torch import Tensor

from detkit import ops
from detkit.ops import _library

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One operator on one size. ``inputs`` get gradients where ``backward`` is set."""

    op: str
    size: str
    inputs: tuple[Tensor, ...]
    ours: Call
    peer_name: str
    peer: Call | None
    backward: bool = False


def load_torchvision() -> Any:
    """torchvision, the one of DETKIT_PEER first; None where there is none."""
    folder = os.environ.get("DETKIT_PEER")
    try:
        if folder:
            sys.path.insert(0, folder)
            return importlib.import_module("torchvision_cpu").load()
        return importlib.import_module("torchvision")
    except ImportError:
        return None


def proposals(n: int, device: str) -> tuple[Tensor, Tensor]:
    """Boxes in clusters around objects, as a proposal network gives them, with scores."""
    torch.manual_seed(0)
    centers = torch.rand(n // 25 + 1, 2) * torch.tensor([1300.0, 780.0])
    sides = 30 + torch.rand(len(centers), 2) * 200
    which = torch.randint(len(centers), (n,))
    center = centers[which] + torch.randn(n, 2) * sides[which] * 0.1
    half = sides[which] * (0.5 + 0.1 * torch.randn(n, 2)).clamp(min=0.1)
    return torch.cat([center - half, center + half], 1).to(device), torch.rand(n).to(device)


def nms_cases(device: str, tv: Any) -> list[Case]:
    """Proposals in one class, detections in 80."""
    cases = []
    peer: Call | None
    for n in (1000, 6000):
        boxes, scores = proposals(n, device)
        peer = (lambda b, s: tv.ops.nms(b, s, 0.7)) if tv else None
        cases.append(
            Case(
                "nms",
                f"{n} boxes",
                (boxes, scores),
                lambda b, s: ops.nms(b, s, 0.7),
                "torchvision",
                peer,
            )
        )
    boxes, scores = proposals(6000, device)
    idxs = torch.randint(80, (6000,), device=device)
    peer = (lambda b, s, i: tv.ops.batched_nms(b, s, i, 0.5)) if tv else None
    case = Case(
        "batched_nms",
        "6000 boxes, 80 classes",
        (boxes, scores, idxs),
        lambda b, s, i: ops.batched_nms(b, s, i, 0.5),
        "torchvision",
        peer,
    )
    return [*cases, case]


def roi_cases(device: str, tv: Any) -> list[Case]:
    """RoIAlign on an FPN level, PS-RoIAlign with the thin map of a light head."""
    boxes, _ = proposals(256, device)
    rois = torch.cat([torch.zeros(256, 1, device=device), boxes], 1)
    cases = []
    for backward in (False, True):
        x = torch.randn(1, 256, 100, 168, device=device, requires_grad=backward)
        align = (lambda x, r: tv.ops.roi_align(x, r, 7, 1 / 8, 2, True)) if tv else None
        cases.append(
            Case(
                "roi_align",
                "256x100x168, 256 RoIs",
                (x, rois),
                lambda x, r: ops.roi_align(x, r, 7, 1 / 8, 2, True),
                "torchvision",
                align,
                backward,
            )
        )
        x = torch.randn(1, 490, 50, 84, device=device, requires_grad=backward)
        pool = (lambda x, r: tv.ops.ps_roi_align(x, r, 7, 1 / 16, 2)) if tv else None
        cases.append(
            Case(
                "ps_roi_align",
                "490x50x84, 256 RoIs",
                (x, rois),
                lambda x, r: ops.ps_roi_align(x, r, 7, 1 / 16, 2),
                "torchvision",
                pool,
                backward,
            )
        )
    return cases


def deformable_peer(tv: Any) -> Call:
    """The deformable convolution of torchvision, offsets set to one scale per image."""

    def run(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        tap = torch.arange(9, device=x.device)
        grid = torch.stack([tap // 3 - 1, tap % 3 - 1], 1).to(x.dtype)  # (9, 2)
        offset = ((scales[:, None] - 1) * grid).flatten(1)  # (N, 18)
        offset = offset[:, :, None, None].expand(-1, -1, *x.shape[2:])
        output: Tensor = tv.ops.deform_conv2d(x, offset, weight, padding=1)
        return output

    return run


def conv_cases(device: str, tv: Any) -> list[Case]:
    """A 3x3 convolution of 256 channels: dilated, at a learnt scale, and split."""
    cases = []
    for backward in (False, True):
        x = torch.randn(1, 256, 50, 84, device=device, requires_grad=backward)
        weight = (torch.randn(256, 256, 3, 3, device=device) / 48).requires_grad_(backward)
        scales = torch.tensor([[2.37, 1.61]], device=device, requires_grad=backward)
        parts = [(torch.randn(128, 256, 3, 3, device=device) / 48) for _ in range(2)]
        parts = [p.requires_grad_(backward) for p in parts]
        size = "256->256, 50x84"
        cases += [
            Case(
                "dilated_conv2d",
                f"{size}, d=2",
                (x, weight),
                lambda x, w: ops.dilated_conv2d(x, w, padding=2, dilation=2),
                "F.conv2d",
                lambda x, w: F.conv2d(x, w, padding=2, dilation=2),
                backward,
            ),
            Case(
                "scaled_conv2d",
                f"{size}, d=(2.37, 1.61)",
                (x, weight, scales),
                ops.scaled_conv2d,
                "torchvision",
                deformable_peer(tv) if tv else None,
                backward,
            ),
            Case(
                "split_conv2d",
                f"{size}, d=1 and 2",
                (x, *parts),
                lambda x, *w: ops.split_conv2d(x, list(w), None, [(1, 1), (2, 2)]),
                "2 x F.conv2d, cat",
                lambda x, a, b: torch.cat(
                    [F.conv2d(x, a, padding=1), F.conv2d(x, b, padding=2, dilation=2)], 1
                ),
                backward,
            ),
        ]
    return cases


def run_once(call: Call, case: Case) -> float:
    """Milliseconds of one forward, or forward and backward, pass."""
    for tensor in case.inputs:
        tensor.grad = None
    if case.inputs[0].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    output = call(*case.inputs)
    if case.backward:
        output.backward(torch.ones_like(output))
    if output.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def contestants(case: Case) -> dict[str, Call]:
    """Name to call, of those that can run here."""

    def reference(*inputs: Tensor) -> Tensor:
        with _library.reference_only():
            return case.ours(*inputs)

    calls: dict[str, Call] = {"reference": reference}
    if case.inputs[0].device.type in _library.KERNELS[case.op]:
        calls["native"] = case.ours
    if case.peer is not None:
        calls["peer"] = case.peer
    return calls


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """One row: the medians of the contestants, run in turn after one unmeasured run each."""
    calls = contestants(case)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.set_grad_enabled(case.backward):
        for call in calls.values():
            run_once(call, case)
        stop = time.perf_counter() + seconds
        rounds = 0
        while rounds < 3 or (rounds < 100 and time.perf_counter() < stop):
            rounds += 1
            for name, call in calls.items():
                times[name].append(run_once(call, case))
    median = {name: statistics.median(values) for name, values in times.items()}
    row: dict[str, Any] = {
        "op": case.op,
        "size": case.size,
        "pass": "fwd+bwd" if case.backward else "fwd",
        "peer": case.peer_name,
        "rounds": rounds,
    }
    for name in ("native", "reference", "peer"):
        row[f"{name}_ms"] = median.get(name)
    for name in ("reference", "peer"):
        ran = name in median and "native" in median
        row[f"{name}_over_native"] = median[name] / median["native"] if ran else None
    return row


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows with ms and how many times longer reference and peer take."""
    columns = ["native_ms", "reference_ms", "peer_ms", "reference_over_native", "peer_over_native"]
    heads = ["native ms", "reference ms", "peer ms", "ref/native", "peer/native"]
    line = "{:<16}{:<32}{:<9}" + "{:>14}" * len(heads) + "  {}"
    print(line.format("op", "size", "pass", *heads, "peer"))
    for row in rows:
        cells = ["-" if row[c] is None else f"{row[c]:.3f}" for c in columns]
        print(line.format(row["op"], row["size"], row["pass"], *cells, row["peer"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0 keeps torch's choice"
    )
    parser.add_argument("--only", default="", help="operators, separated by commas")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time per row, 3 rounds at least"
    )
    parser.add_argument("--json", type=Path, default=None, help="file to write")
    options = parser.parse_args()
    ops.autotune("off")  # what is measured as native is to be ours
    if options.threads:
        torch.set_num_threads(options.threads)
    tv = load_torchvision()
    makers = (nms_cases, roi_cases, conv_cases)
    cases = [case for make in makers for case in make(options.device, tv)]
    only = set(filter(None, options.only.split(",")))
    if only - set(_library.OPS):
        parser.error(
            f"--only: must name operators of {', '.join(_library.OPS)}, got {options.only}"
        )
    facts = machine(options.device)
    rows = [measure(case, options.seconds) for case in cases if not only or case.op in only]
    facts["load_after"] = os.getloadavg()[0]
    print(", ".join(f"{k} {v}" for k, v in facts.items() if k != "extension"))
    print_table(rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"hardware": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
