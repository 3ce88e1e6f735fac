"""A data set class of your own, trained on by detkit and used by its checkpoint afterwards.

    python examples/own_dataset.py 20 runs/own

For labels in COCO json, VOC or YOLO files nothing of this is needed: `detkit finetune --data`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

import detkit
from detkit import config as configs
from detkit.engine.run import create_run
from detkit.engine.train import fit
from detkit.types import Batch, CategoryMap, Target

SIDE = 96


class Bars(Dataset[tuple[np.ndarray, np.ndarray, np.ndarray]]):
    """Any class with these two methods: bright bars, upright or lying, on noise."""

    categories = CategoryMap(["upright", "lying"])

    def __len__(self) -> int:
        return 500

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8, boxes (G, 4) xyxy in its pixels, labels (G,) from 1."""
        rng = np.random.default_rng(index)
        image = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
        label = int(rng.integers(1, 3))
        height, width = (48, 16) if label == 1 else (16, 48)
        x, y = (int(rng.integers(0, SIDE - side)) for side in (width, height))
        image[y : y + height, x : x + width] += 150
        return image, np.array([[x, y, x + width, y + height]]), np.array([label])


def batches(data: Bars, config: configs.Config, start: int) -> Iterator[list[Batch]]:
    """The batches of step ``start`` and on; the same step always gives the same batch."""
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (config.data.mean, config.data.std))
    step, count = start, config.train.batch_size
    while True:
        samples = [data[i % len(data)] for i in range(step * count, (step + 1) * count)]
        pixels = torch.stack([torch.from_numpy(s[0]).permute(2, 0, 1) for s in samples])
        targets = [
            Target(
                boxes=torch.from_numpy(boxes).float(),
                labels=torch.from_numpy(labels),
                iscrowd=torch.zeros(len(labels), dtype=torch.bool),
            )
            for _, boxes, labels in samples
        ]
        yield [Batch((pixels - mean) / std, torch.full((count, 2), SIDE), targets)]
        step += 1


def main(steps: int = 20, out: str = "runs/own") -> Path:
    recipe = configs.read_toml(configs.recipe_path("tiny/frcnn-fpn"))
    settings = {
        "train": {"steps": steps, "batch_size": 8},
        "data": {"short_side": SIDE, "long_side": SIDE},
    }
    config, data = configs.resolve([recipe, settings]), Bars()
    result = fit(
        detkit.build(config, data.categories),
        lambda start: batches(data, config, start),
        config,
        steps_per_epoch=len(data) / config.train.batch_size,
        run=create_run("finetune", "bars", config, out=out),
        kind="detector",
        categories=data.categories,
        device="cpu",
    )
    found = detkit.load(result.best).predict(data[0][0], score=0.05)
    print(f"{result.best}: {found}, truth {data.categories.name(int(data[0][2][0]))}")
    return result.best


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
