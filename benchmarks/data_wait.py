"""Share of a training run's time that its steps wait for their batches, on real data.

`detkit bench train` on each data set: the tiny recipes, whose steps are the shortest there are, and
Faster R-CNN ResNet-50-FPN at short side 320. Beside it what making a batch costs: processor time
of one loader process for one image, decoded, resized, normalised and laid into the batch.

    python benchmarks/data_wait.py FOLDER [--steps 10] [--json FILE]

FOLDER holds the data sets bccd, raccoon_voc and nuts_seg; the last has masks.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from detkit import api
from detkit.bench.machine import machine
from detkit.bench.training import bench_train
from detkit.data import open_detection
from detkit.data.loader import Fetcher
from detkit.data.plan import TrainPlan

LARGE = ("torchvision/frcnn-fpn", {"data": {"short_side": 320}, "train": {"batch_size": 4}})
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("bccd", "tiny/light-head", {}),
    ("bccd", *LARGE),
    ("raccoon_voc", "tiny/light-head", {}),
    ("raccoon_voc", "tiny/frcnn-fpn", {}),
    ("nuts_seg", "tiny/maskrcnn-fpn", {}),
]
BATCHES = 8


def image_ms(recipe: str, layer: dict[str, Any]) -> float:
    """Processor milliseconds of an image in a training batch."""
    config = api.resolve_config("finetune", [layer], recipe=recipe)
    masks = config.model.detector.startswith("maskrcnn")
    dataset = open_detection(config.data.path, config.data.split, config.data, masks=masks)
    fetcher, plan = Fetcher(dataset, config, training=True), TrainPlan(dataset, config)
    fetcher.__getitems__(plan.step(0))
    begun = time.process_time()
    for t in range(1, BATCHES + 1):
        fetcher.__getitems__(plan.step(t))
    return 1e3 * (time.process_time() - begun) / (BATCHES * config.train.batch_size)


def measure(folder: Path, steps: int) -> list[dict[str, Any]]:
    rows = []
    for name, recipe, given in CASES:
        layer = {**given, "data": {**given.get("data", {}), "path": str(folder / name)}}
        layer["train"] = {**given.get("train", {}), "steps": steps}
        row = bench_train(recipe=recipe, overrides=[layer])
        del row["hardware"]
        row |= {"data": name, "image_ms": image_ms(recipe, layer)}
        rows.append(row)
        print(
            f"{name:12} {recipe:22} {row['data_wait']:7.2%} waited  "
            f"{row['images_per_second']:6.2f} images/s  {row['image_ms']:5.1f} ms per image",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    facts = machine()
    rows = measure(options.folder, options.steps)
    facts["load_after"] = os.getloadavg()[0]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"hardware": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
