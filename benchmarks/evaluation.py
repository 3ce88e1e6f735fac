"""Time and memory of the evaluation on an input of COCO val's size, beside pycocotools.

A seeded truth of 5,000 images, 36,000 objects and 80 classes, and 500,000 detections as a detector
gives them: near the objects, repeated, mistaken, at most 100 an image. Each contestant runs in its
own process, in turn, from the two JSON files to the twelve numbers: pycocotools as its own README
calls it, `detkit.engine.evaluate`, and the whole command `detkit eval --detections`. Their numbers
must agree to 1e-9.

    python benchmarks/evaluation.py [--rounds 3] [--images 5000] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]

CLASSES = 80
OBJECTS = 7.2  # a COCO val image has 36,000 / 5,000
DETECTIONS = 100
NUMBERS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def make_truth(images: int, rng: np.random.Generator) -> Record:
    """COCO ground truth: sides of 8 to 400 pixels, one object in a hundred a crowd."""
    count = round(images * OBJECTS)
    owner = np.sort(rng.integers(images, size=count)) + 1
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * np.maximum([640, 480] - sides, 1)
    boxes = np.round(np.concatenate([corners, sides], 1), 2).tolist()
    areas = np.round(sides.prod(1) * rng.uniform(0.5, 1, count), 3).tolist()
    classes = (rng.zipf(1.3, count) % CLASSES + 1).tolist()
    crowds = (rng.random(count) < 0.01).astype(int).tolist()
    rows = zip(owner.tolist(), classes, boxes, areas, crowds, strict=True)
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    return {
        "images": [
            {"id": i + 1, "file_name": f"{i + 1:012}.jpg", "width": 640, "height": 480}
            for i in range(images)
        ],
        "annotations": [
            {"id": n} | dict(zip(keys, row, strict=True)) for n, row in enumerate(rows, 1)
        ],
        "categories": [{"id": k + 1, "name": f"class {k + 1}"} for k in range(CLASSES)],
    }


def make_detections(truth: Record, rng: np.random.Generator) -> list[Record]:
    """`DETECTIONS` an image: one in three moved from an object of the image, the rest anywhere."""
    boxes = np.array([a["bbox"] for a in truth["annotations"]])
    classes = np.array([a["category_id"] for a in truth["annotations"]])
    owner = np.array([a["image_id"] for a in truth["annotations"]])
    first = np.searchsorted(owner, np.arange(1, len(truth["images"]) + 2))
    results: list[Record] = []
    for image in range(1, len(truth["images"]) + 1):
        low, high = first[image - 1], first[image]
        own = rng.integers(low, high, DETECTIONS // 3) if high > low else np.zeros(0, int)
        near = boxes[own] + rng.normal(0, 0.1, (len(own), 4)) * np.tile(boxes[own, 2:], 2)
        sides = np.exp(rng.uniform(np.log(8), np.log(400), (DETECTIONS - len(own), 2)))
        far = np.concatenate([rng.uniform(0, 400, sides.shape), sides], 1)
        found = np.round(np.maximum(np.concatenate([near, far]), 0.5), 2).tolist()
        wrong = rng.integers(1, CLASSES + 1, DETECTIONS)
        wrong[: len(own)] = np.where(rng.random(len(own)) < 0.8, classes[own], wrong[: len(own)])
        scores = np.round(rng.beta(1, 4, DETECTIONS) + (np.arange(DETECTIONS) < len(own)) * 0.3, 4)
        results += [
            {"image_id": image, "category_id": k, "bbox": box, "score": s}
            for k, box, s in zip(wrong.tolist(), found, scores.tolist(), strict=True)
        ]
    return results


def run_pycocotools(truth: Path, detections: Path) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = COCO(str(truth))
    scorer = COCOeval(coco, coco.loadRes(str(detections)), "bbox")
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    return [float(v) for v in scorer.stats]


def run_detkit(truth: Path, detections: Path) -> list[float]:
    from detkit.engine.evaluate import evaluate
    from detkit.engine.results import load_results

    read = json.loads(truth.read_text(encoding="utf-8"))
    scores = evaluate(read, load_results(detections))["bbox"]
    return [-1.0 if scores[name] is None else scores[name] for name in NUMBERS]


def run_command(truth: Path, detections: Path) -> list[float]:
    words = ["eval", "--detections", str(detections), "--data", str(truth), "--json"]
    done = subprocess.run([sys.executable, "-m", "detkit.cli", *words], capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    scores = json.loads(done.stdout)["bbox"]
    return [-1.0 if scores[name] is None else scores[name] for name in NUMBERS]


CONTESTANTS = {
    "pycocotools": run_pycocotools,
    "detkit.engine.evaluate": run_detkit,
    "detkit eval --detections": run_command,
}


def measure_here(name: str, truth: Path, detections: Path) -> None:
    """Print one line of JSON: seconds, peak memory of this process or its child, the numbers."""
    begun = time.perf_counter()
    numbers = CONTESTANTS[name](truth, detections)
    seconds = time.perf_counter() - begun
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(who) for who in both]
    answer = {
        "seconds": seconds,
        "cpu_seconds": sum(u.ru_utime + u.ru_stime for u in used),
        "peak_gib": max(u.ru_maxrss for u in used) / 2**20,  # Linux gives KiB
        "numbers": numbers,
    }
    print(json.dumps(answer))


def measure(name: str, truth: Path, detections: Path) -> Record:
    """The contestant's answer from a process of its own."""
    words = [sys.executable, __file__, "--contestant", name]
    done = subprocess.run(
        [*words, "--truth", str(truth), "--detections", str(detections)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    answer: Record = json.loads(done.stdout.splitlines()[-1])
    return answer


def write_input(folder: Path, images: int) -> tuple[Path, Path]:
    """The seeded truth and detections as files."""
    rng = np.random.default_rng(0)
    truth = make_truth(images, rng)
    paths = folder / "truth.json", folder / "detections.json"
    paths[0].write_text(json.dumps(truth), encoding="utf-8")
    paths[1].write_text(json.dumps(make_detections(truth, rng)), encoding="utf-8")
    return paths


def compare(folder: Path, images: int, rounds: int) -> Record:
    """Medians of each contestant over the rounds, and the largest difference of their numbers."""
    truth, detections = write_input(folder, images)
    found: dict[str, list[Record]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name in CONTESTANTS:
            found[name].append(measure(name, truth, detections))
            print(name, {k: v for k, v in found[name][-1].items() if k != "numbers"}, flush=True)
    base = found["pycocotools"]
    rows = {}
    for name, runs in found.items():
        pairs = list(zip(base, runs, strict=True))
        rows[name] = {
            "seconds": statistics.median(r["seconds"] for r in runs),
            "cpu_seconds": statistics.median(r["cpu_seconds"] for r in runs),
            "times_faster": statistics.median(b["seconds"] / r["seconds"] for b, r in pairs),
            "peak_gib": max(r["peak_gib"] for r in runs),
            "largest_difference": max(
                abs(p - q)
                for b, r in pairs
                for p, q in zip(b["numbers"], r["numbers"], strict=True)
            ),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--folder", type=Path, help="keep the two input files here")
    parser.add_argument("--json", type=Path, help="file to write")
    for hidden in ("--contestant", "--truth", "--detections"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        measure_here(options.contestant, Path(options.truth), Path(options.detections))
        return
    from detkit.bench.machine import machine  # here: a contestant's process needs no torch

    facts = machine()
    with tempfile.TemporaryDirectory() as scratch:
        rows = compare(options.folder or Path(scratch), options.images, options.rounds)
    for name, row in rows.items():
        print(f"{name:26}", "  ".join(f"{k} {v:.3g}" for k, v in row.items()))
    if options.json:
        facts["load_after"] = os.getloadavg()[0]
        result = {"images": options.images, "hardware": facts, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
