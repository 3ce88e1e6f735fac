"""Images per second of whole detectors at batch 1 with batch norms folded, in one run.

The protocol of Light-Head R-CNN's Table 8 as far as it is published: one image at a time of fixed
size, batch norms absorbed. Three times per image, the device synchronised around each: the network
with the proposals' NMS, the same with the per-class NMS (whole `detect`), and end to end from a
JPEG in memory. Weights are random and every detector proposes as many boxes as its recipe allows,
so the heads see a full load. Detectors run in turn.

    python benchmarks/speed.py [--device cuda] [--images 500] [--warmup 50] [--amp] [--json FILE] \
        [--case light-head/setting-s-800@800x1200 ...]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from detkit import config as configs
from detkit.deploy import fold
from detkit.models import build_detector

CASES = (
    "light-head/setting-s-700@700x1100",
    "light-head/setting-s-800@800x1200",
    "light-head/setting-l@800x1200",
    "light-head/rfcn-b2@800x1200",
    "light-head/faster-rcnn@800x1200",
    "detnet/resnet101-fpn@800x1200",
    "detnet/detnet59-fpn@800x1200",
)
CLASSES = 80


@dataclass
class Case:
    """One recipe at one size, ready to run."""

    name: str
    model: nn.Module
    config: configs.Config
    jpeg: bytes
    images: Tensor
    sizes: Tensor


def prepare(text: str, device: str) -> Case:
    """``recipe@HEIGHTxWIDTH`` with random weights and a noise image."""
    recipe, _, size = text.partition("@")
    height, width = (int(side) for side in size.split("x"))
    config = configs.resolve([configs.read_toml(configs.recipe_path(recipe))])
    torch.manual_seed(0)
    model = fold(build_detector(config, CLASSES)).to(device).eval()
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    pad = config.data.pad_multiple
    padded = -(-height // pad) * pad, -(-width // pad) * pad
    images = torch.zeros(1, 3, *padded, device=device)
    images[:, :, :height, :width] = to_input(pixels, config, device)
    return Case(text, model, config, buffer.getvalue(), images, torch.tensor([[height, width]]))


def to_input(pixels: Any, config: configs.Config, device: str) -> Tensor:
    """(1, 3, H, W) normalised on the device, from uint8 (H, W, 3)."""
    x = torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None].float() / 255
    mean, std = (
        torch.tensor(v, device=device)[:, None, None] for v in (config.data.mean, config.data.std)
    )
    return (x - mean) / std


def network(case: Case) -> None:
    """Everything up to the head's numbers: backbone, proposals with their NMS, head."""
    model: Any = case.model
    features = model.features(case.images)
    rpn = model.rpn.config
    output = model.rpn(features)
    boxes = model.rpn.proposals(output, case.sizes, rpn.pre_nms_test, rpn.post_nms_test)
    model.head(features, boxes)


def detect(case: Case) -> None:
    """Final detections of the prepared image."""
    case.model.detect(case.images, case.sizes)  # type: ignore[operator]


def end_to_end(case: Case) -> None:
    """Decode the JPEG, normalise, upload, detect, and read the boxes back."""
    with Image.open(io.BytesIO(case.jpeg)) as image:
        pixels = np.array(image.convert("RGB"))
    images = torch.zeros_like(case.images)
    height, width = pixels.shape[:2]
    images[:, :, :height, :width] = to_input(pixels, case.config, str(case.images.device))
    for found in case.model.detect(images, case.sizes):  # type: ignore[operator]
        found["boxes"].cpu()


def milliseconds(call: Callable[[Case], None], case: Case) -> float:
    """Wall time of one call, the device synchronised before and after."""
    cuda = case.images.is_cuda
    if cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    call(case)
    if cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--amp", action="store_true", help="bf16 autocast, and not fp32")
    parser.add_argument("--case", action="append", help="RECIPE@HEIGHTxWIDTH; repeatable")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = [prepare(text, options.device) for text in options.case or CASES]
    scopes = {"network": network, "detect": detect, "end_to_end": end_to_end}
    times: dict[tuple[str, str], list[float]] = {(c.name, s): [] for c in cases for s in scopes}
    autocast = torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.amp)
    with torch.inference_mode(), autocast:
        for turn in range(options.warmup + options.images):
            for case in cases:
                for scope, call in scopes.items():
                    spent = milliseconds(call, case)
                    if turn >= options.warmup:
                        times[case.name, scope].append(spent)
    rows = []
    for case in cases:
        medians = {s: statistics.median(times[case.name, s]) for s in scopes}
        rows.append({"case": case.name} | {f"{s}_ms": m for s, m in medians.items()})
        shown = "  ".join(f"{s} {m:8.2f} ms {1000 / m:7.1f} FPS" for s, m in medians.items())
        print(f"{case.name:44} {shown}")
    if options.json:
        gpu = torch.cuda.get_device_name() if options.device.startswith("cuda") else None
        result = {
            "hardware": {"gpu": gpu, "machine": platform.processor(), "cores": os.cpu_count()},
            "torch": torch.__version__,
            "precision": "bf16 autocast" if options.amp else "fp32",
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "images": options.images,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
