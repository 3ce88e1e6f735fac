"""What norms of a path's own are worth: AP of paths of a supernet with them and without.

    python benchmarks/recalibration.py SUPERNET [--networks 12] [--steps 12 48] [--json FILE]

Each path is scored with the statistics that the supernet ended its training with, which mix all
paths, and with its own, averaged from reset norms over each number of batches in ``--steps``. The
last of them counts as the truth that the others' order is compared with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detkit import config as configs
from detkit.bench.machine import machine
from detkit.data import eval_batches
from detkit.data.dataset import DetectionDataset
from detkit.engine import checkpoint as checkpoints
from detkit.engine.detections import detect_dataset
from detkit.engine.evaluate import evaluate
from detkit.fitness import Fitness, Opened, open_supernet
from detkit.loading import restore
from detkit.models.backbones.shuffle_supernet import find_supernet
from detkit.nas.early_stop import kendall_tau
from detkit.nas.paths import UniformPaths

WITHOUT = "none"


def without(opened: Opened, genes: list[tuple[int, ...]]) -> list[float]:
    """AP of each path with the statistics in the checkpoint."""
    model, images = restore(opened.stored, opened.file).model.eval(), opened.images
    if not isinstance(images, DetectionDataset):
        raise TypeError("benchmark: the supernet must be a detector")
    found = []
    for path in genes:
        find_supernet(model).set_path(path)
        rows = detect_dataset(model, eval_batches(images, opened.config), images.categories, "cpu")
        found.append(evaluate(images.truth(), rows, iou_types=("bbox",))["bbox"]["AP"])
    return found


def measure(
    file: str, overrides: list[Mapping[str, Any]], networks: int, steps: list[int]
) -> dict[str, Any]:
    """AP of each path in each way, and how each way orders them."""
    opened = open_supernet(file, overrides)
    sampler = UniformPaths(opened.space, 3)
    genes = [sampler(step) for step in range(networks)]
    found = {WITHOUT: without(opened, genes)}
    for count in steps:
        longer = open_supernet(file, [*overrides, {"search": {"calibration_steps": count}}])
        fitness = Fitness(longer, torch.device("cpu"))
        found[str(count)] = [float(fitness(path)["AP"]) for path in genes]
    truth = found[str(steps[-1])]
    return {
        "supernet": file,
        "trained_steps": checkpoints.load(file).get("progress", {}).get("step"),
        "machine": machine(),
        "images": len(opened.images),
        "calibration_batch": opened.config.search.calibration_batch,
        "genes": [opened.space.text(path) for path in genes],
        "AP": found,
        "mean": {way: float(np.mean(values)) for way, values in found.items()},
        "deviation": {way: float(np.std(values)) for way, values in found.items()},
        "tau": {way: kendall_tau(values, truth) for way, values in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("supernet")
    parser.add_argument("--networks", type=int, default=12)
    parser.add_argument("--steps", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    overrides: list[Mapping[str, Any]] = [configs.parse_override(text) for text in options.set]
    text = json.dumps(
        measure(options.supernet, overrides, options.networks, options.steps), indent=1
    )
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
