"""What the benchmarks of whole detectors share: models with random weights, and timing in turn."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detkit.bench.machine import machine
from detkit.bench.peers import load_torchvision
from detkit.bench.timing import Call, compare
from detkit.config import Config, read_toml, recipe_path, resolve
from detkit.models import build_detector

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
    out = images.new_zeros(len(images), 3, height, width)
    out[:, :, : images.shape[2], : images.shape[3]] = (images - 0.45) / 0.225
    return out


def rows(
    title: str, calls: dict[str, Call], seconds: float, device: torch.device = CPU
) -> list[dict[str, Any]]:
    timings, failures = compare(calls, device, seconds)
    if failures:
        raise RuntimeError(f"{title}: {failures}")
    found = []
    for name, timing in timings.items():
        peer = timings[PEER].ratio / timing.ratio
        found.append({"what": title, "contestant": name, **vars(timing), "over_peer": peer})
        print(f"{title:9} {name:26} {timing.ms:9.1f} ms   {peer:6.2f} times torchvision's speed")
    return found


def options(description: str, seconds: float | None = None) -> argparse.ArgumentParser:
    """The flags that every one of them takes; ``--seconds`` where its default is given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=1)
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds, help="of a comparison")
    parser.add_argument("--json", type=Path)
    return parser


def peer() -> Any:
    """torchvision, or an end."""
    tv = load_torchvision()
    if tv is None:
        raise SystemExit("torchvision is not there; `make peer` makes the folder of DETKIT_PEER")
    return tv


def facts(tv: Any, device: torch.device = CPU) -> dict[str, Any]:
    """Hardware and versions; ask before measuring, for the load then."""
    return machine(str(device)) | {"torchvision": tv.__version__}


def write(path: Path | None, hardware: dict[str, Any], result: dict[str, Any]) -> None:
    """The JSON file, if one is wanted."""
    if path is None:
        return
    hardware["load_after"] = os.getloadavg()[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"hardware": hardware} | result, indent=1) + "\n", encoding="utf-8")
