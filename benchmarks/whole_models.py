"""Whole detectors beside torchvision's Faster R-CNN ResNet-50-FPN: detection, and a training step.

Detection is `detect` on one image of 700x1100: Light-Head R-CNN's setting S as it is and as
`detkit.deploy.fast` makes it, our Faster R-CNN, and torchvision's. Training is one optimiser step
of Faster R-CNN with frozen batch norms and two frozen stages at short side 320: ours in fp32 and in
bf16 (what `train.amp = "auto"` takes on processors with bf16 instructions), and torchvision's.
Weights are random, images noise with 15 boxes each. Contestants run in turn in one process;
processor time with one thread, time on the wall with more.

    python benchmarks/whole_models.py [--threads 1] [--seconds 60] [--batch 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from detkit.bench.machine import machine
from detkit.bench.peers import load_torchvision
from detkit.bench.timing import Call, compare
from detkit.config import Config, read_toml, recipe_path, resolve
from detkit.deploy import fast
from detkit.engine.optimizer import build_optimizer, set_factor
from detkit.engine.step import train_step
from detkit.models import build_detector
from detkit.types import Batch, Target

CPU = torch.device("cpu")
SMALL, LARGE = "light-head/setting-s-700", "torchvision/frcnn-fpn"
PEER = "torchvision"


def settings(recipe: str) -> Config:
    return resolve([read_toml(recipe_path(recipe))])


def detector(recipe: str, classes: int) -> Any:
    torch.manual_seed(0)
    return build_detector(settings(recipe), classes)


def peer_model(tv: Any, classes: int, short: int, long: int) -> Any:
    """The peer with frozen norms and two frozen stages, as its pretrained one has."""
    detection = tv.models.detection
    torch.manual_seed(0)
    norm = tv.ops.FrozenBatchNorm2d
    body = tv.models.resnet50(weights=None, norm_layer=norm)
    backbone = detection.backbone_utils._resnet_fpn_extractor(body, 3)
    return detection.FasterRCNN(backbone, classes + 1, min_size=short, max_size=long)


def padded(images: Tensor) -> Tensor:
    """Sides as multiples of 32, zeros at right and bottom; normalised roughly as photos are."""
    height, width = (-(-side // 32) * 32 for side in images.shape[2:])
    out = torch.zeros(len(images), 3, height, width)
    out[:, :, : images.shape[2], : images.shape[3]] = (images - 0.45) / 0.225
    return out


def detection_calls(tv: Any) -> dict[str, Call]:
    """The first is what the others are compared with."""
    pixels = torch.rand(1, 3, 700, 1100, generator=torch.Generator().manual_seed(0))
    images, sizes = padded(pixels), torch.tensor([[700, 1100]])
    plain, large = detector(SMALL, 80).eval(), detector(LARGE, 80).eval()
    peer = peer_model(tv, 80, 700, 1100).eval()
    quick, large_quick = fast(plain), fast(large)

    def bf16(_: int) -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return quick.detect(images, sizes)  # type: ignore[operator]

    return {
        "Light-Head S, fast": lambda _: quick.detect(images, sizes),  # type: ignore[operator]
        "Light-Head S": lambda _: plain.detect(images, sizes),
        "Light-Head S, fast, bf16": bf16,
        "Faster R-CNN, fast": lambda _: large_quick.detect(images, sizes),  # type: ignore[operator]
        "Faster R-CNN": lambda _: large.detect(images, sizes),
        PEER: lambda _: peer([pixels[0]]),
    }


def truth(generator: torch.Generator, count: int = 15) -> Target:
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([367.0, 260.0])
    sides = 15 + torch.rand(count, 2, generator=generator) * 45
    labels = torch.randint(1, 4, (count,), generator=generator)
    boxes = torch.cat([corner, corner + sides], 1)
    return Target(boxes, labels, torch.zeros(count, dtype=torch.bool))


def step(batch: Batch, amp: str, layout: torch.memory_format) -> Call:
    """One of our training steps, the rate too small to move the weights far."""
    config, model = settings(LARGE), detector(LARGE, 3).train().to(memory_format=layout)
    optimizer = build_optimizer(model, config.optim, len(batch.images))
    set_factor(optimizer, 1e-4, 1.0)
    scaler, images = GradScaler("cpu", enabled=False), len(batch.images)
    return lambda _: train_step(
        model, [batch], optimizer, scaler, images=images, device=CPU, amp=amp, layout=layout
    )


def training_calls(tv: Any, count: int) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(count, 3, 320, 427, generator=generator)
    targets = [truth(generator) for _ in range(count)]
    batch = Batch(padded(pixels), torch.tensor([[320, 427]] * count), targets)
    peer = peer_model(tv, 3, 320, 1333).train()
    wanted = [p for p in peer.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(wanted, lr=1e-4, momentum=0.9, weight_decay=1e-4)
    theirs = [{"boxes": t.boxes, "labels": t.labels} for t in targets]

    def peer_step(_: int) -> None:
        sgd.zero_grad(set_to_none=True)
        sum(peer(list(pixels), theirs).values()).backward()
        sgd.step()

    return {
        "Faster R-CNN, fp32": step(batch, "off", torch.contiguous_format),
        "Faster R-CNN, bf16": step(batch, "bf16", torch.channels_last),
        PEER: peer_step,
    }


def rows(title: str, calls: dict[str, Call], seconds: float) -> list[dict[str, Any]]:
    timings, failures = compare(calls, CPU, seconds)
    if failures:
        raise RuntimeError(f"{title}: {failures}")
    found = []
    for name, timing in timings.items():
        peer = timings[PEER].ratio / timing.ratio
        found.append({"what": title, "contestant": name, **vars(timing), "over_peer": peer})
        print(f"{title:9} {name:26} {timing.ms:9.1f} ms   {peer:6.2f} times torchvision's speed")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each of the two")
    parser.add_argument("--batch", type=int, default=4, help="images of a training step")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tv = load_torchvision()
    if tv is None:
        raise SystemExit("torchvision is not there; `make peer` makes the folder of DETKIT_PEER")
    facts = machine() | {"torchvision": tv.__version__}
    with torch.inference_mode():
        found = rows("detection", detection_calls(tv), options.seconds)
    found += rows("training", training_calls(tv, options.batch), options.seconds)
    if options.json:
        facts["load_after"] = os.getloadavg()[0]
        result = {"hardware": facts, "batch": options.batch, "rows": found}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
