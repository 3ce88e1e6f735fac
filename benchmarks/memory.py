"""Peak memory of one training step of a recipe's detector on an image full of boxes.

    python benchmarks/memory.py [--recipe detnet/resnet50-fpn] [--boxes 3000] [--batch 1] \
        [--size 800x1333] [--steps 1] [--device cpu]

On the CPU the peak is the process's largest resident size, interpreter and libraries included; on a
GPU what torch's allocator reserved at most. Weights are random, optimiser state included.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from torch.amp.grad_scaler import GradScaler

from detkit import config as configs
from detkit.engine.optimizer import build_optimizer
from detkit.engine.step import train_step
from detkit.models import build_detector
from detkit.types import Batch, Target

CLASSES = 80


def crowded(count: int, height: int, width: int) -> Target:
    """Boxes of 8 to 200 pixels all over an image, one in fifty a crowd region."""
    sides = 8 * 25 ** torch.rand(count, 2)
    corner = torch.rand(count, 2) * (torch.tensor([width, height]) - sides)
    boxes = torch.cat([corner, corner + sides], 1)
    return Target(boxes, torch.randint(1, CLASSES + 1, (count,)), torch.arange(count) % 50 == 49)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="detnet/resnet50-fpn")
    parser.add_argument("--boxes", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", default="800x1333")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = configs.resolve([configs.read_toml(configs.recipe_path(options.recipe))])
    device = torch.device(options.device)
    model = build_detector(config, CLASSES).to(device).train()
    optimizer = build_optimizer(model, config.optim, options.batch)
    height, width = (int(v) for v in options.size.split("x"))
    multiple = config.data.pad_multiple
    padded = [-(-side // multiple) * multiple for side in (height, width)]
    batch = Batch(
        torch.randn(options.batch, 3, *padded),
        torch.tensor([[height, width]] * options.batch),
        [crowded(options.boxes, height, width) for _ in range(options.batch)],
    )
    begun = time.monotonic()
    for _ in range(options.steps):
        scaler = GradScaler(device.type, enabled=False)
        train_step(model, [batch], optimizer, scaler, images=options.batch, device=device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux gives KiB
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device) / 2**30
    answer = {**vars(options), "peak_gib": round(peak, 2)}
    print(json.dumps(answer | {"seconds": round(time.monotonic() - begun, 1)}))


if __name__ == "__main__":
    main()
