"""Every detector trained for the same time on one data set, side by side: AP, AP50, latency.

Each is `detkit finetune --recipe tiny/<detector> --minutes M`, then `detkit eval`. When all are
trained, their latencies are taken in turn, image by image (batch 1, network to final detections,
without decoding), so that a busy machine slows all of them; the median of each is shown.

    python benchmarks/train_detectors.py --data SET [--minutes 8] [--only rfcn,light-head] \
        [--out DIR] [--json FILE]

Detectors that DIR already holds are not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from detkit import api, config
from detkit.bench.machine import machine
from detkit.data import eval_batches, open_detection
from detkit.models import DETECTORS


def detkit(*arguments: str) -> dict[str, Any]:
    """The JSON that a detkit command prints; what it says on the way goes to the screen."""
    command = [sys.executable, "-m", "detkit.cli", *arguments, "--json"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def train(detector: str, data: str, minutes: float, out: Path) -> None:
    """A finished run in ``out``; nothing to do where there is one."""
    if (out / "eval.json").is_file():
        return
    recipe = f"tiny/{detector}"
    length = ("--minutes", str(minutes), "--out", str(out))
    detkit("finetune", "--data", data, "--recipe", recipe, *length)
    scores = detkit("eval", str(out / "best.pth"), "--data", data)
    (out / "eval.json").write_text(json.dumps(scores), encoding="utf-8")


def row(detector: str, out: Path) -> dict[str, Any]:
    """What the table shows of a finished run, without its latency."""
    scores = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    steps = [json.loads(line).get("step", 0) for line in (out / "metrics.jsonl").open()]
    loaded = api.load(out / "best.pth")
    return {
        "detector": detector,
        "backbone": loaded.config.model.backbone,
        "params": sum(p.numel() for p in loaded.model.parameters()),
        "steps": max(steps),
        **{name: scores["bbox"][name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")},
        **({"segm_AP": scores["segm"]["AP"]} if "segm" in scores else {}),
    }


def latencies(runs: dict[str, Path], data: str, images: int) -> dict[str, float]:
    """Median milliseconds per image of each detector."""
    models = {name: api.load(out / "best.pth") for name, out in runs.items()}
    seen: dict[str, list[float]] = {name: [] for name in models}
    batches = {
        name: eval_batches(open_detection(data, "val", m.config.data), m.config)
        for name, m in models.items()
    }
    with torch.inference_mode():
        for parts in islice(zip(*batches.values(), strict=True), images):
            for (name, loaded), batch in zip(models.items(), parts, strict=True):
                begun = time.perf_counter()
                loaded.model.detect(batch.images, batch.sizes)  # type: ignore[operator]
                seen[name].append(1000 * (time.perf_counter() - begun))
    return {name: statistics.median(times) for name, times in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", default="", help="detectors, separated by commas")
    parser.add_argument("--images", type=int, default=40, help="images that latencies are taken on")
    parser.add_argument("--out", type=Path, default=Path("runs/detectors"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tiny = [name for name in DETECTORS if f"tiny/{name}" in config.recipes()]
    names = [name for name in options.only.split(",") if name] or tiny
    runs = {name: options.out / name for name in names}
    for name, out in runs.items():
        train(name, options.data, options.minutes, out)
    times = latencies(runs, options.data, options.images)
    rows = [row(name, out) | {"latency_ms": times[name]} for name, out in runs.items()]
    for line in rows:
        print(
            f"{line['detector']:16} {line['backbone']:16} {line['params'] / 1e6:6.2f}M "
            f"{line['steps']:5d} steps  AP {line['AP']:.3f}  AP50 {line['AP50']:.3f}  "
            f"{line['latency_ms']:6.1f} ms"
        )
    if options.json:
        result = {"machine": machine(), "minutes": options.minutes, "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
