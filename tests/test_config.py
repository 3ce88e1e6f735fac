"""Every setting of a detector is read by it or refused: none is ignored."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectors import ONE_STAGE, PYRAMIDS

from detkit.config import UNUSED, Config, resolve, to_plain
from detkit.errors import ConfigError
from detkit.models.zoo import DETECTORS, build_detector
from detkit.types import Batch, Target

TABLES = ("model", "anchors", "rpn", "box", "thin", "retina", "mask")


def small(detector: str, **box: Any) -> Config:
    """Little work: few channels, proposals and detections."""
    sizes = [8, 16, 32, 64, 128] if detector in PYRAMIDS else [16, 32, 64]
    layers = [
        {
            "model": {"detector": detector, "backbone": "resnet50-tiny", "norm": "bn"},
            "anchors": {"sizes": sizes},
        },
        {"box": {"score_threshold": 0.0, "max_detections": 3} | box},
    ]
    if detector not in ONE_STAGE:
        layers.append({"rpn": {"post_nms_train": 20, "post_nms_test": 20}})
    return resolve(layers)


class Recorder:
    """A table of settings that remembers which were asked for."""

    def __init__(self, table: str, settings: object, seen: set[str]) -> None:
        self.table, self.settings, self.seen = table, settings, seen

    def __getattr__(self, key: str) -> Any:
        self.seen.add(f"{self.table}.{key}")
        return getattr(self.settings, key)


def read_by(config: Config) -> set[str]:
    """What building, training and detecting ask for."""
    seen: set[str] = set()
    tables = {name: Recorder(name, getattr(config, name), seen) for name in TABLES}
    torch.manual_seed(0)
    own = SimpleNamespace(**tables, space=Config().space)
    model = build_detector(own, 2)  # type: ignore[arg-type]
    masks = torch.zeros(1, 64, 96, dtype=torch.bool)
    box = torch.tensor([[8.0, 8, 60, 50]])
    target = Target(box, torch.tensor([1]), torch.tensor([False]), masks)
    batch = Batch(torch.randn(2, 3, 64, 96), torch.tensor([[64, 96]] * 2), [target] * 2)
    model(batch)
    model.eval().detect(batch.images, batch.sizes)
    return seen


@pytest.mark.parametrize("detector", DETECTORS)
def test_what_a_detector_does_not_read_is_refused(detector: str) -> None:
    variants = [small(detector)]
    if detector not in ONE_STAGE:  # what random sampling and mining read, and PS-RoIAlign
        other = {"ps_pool": "max"} if detector.startswith("rfcn") else {}
        variants = [small(detector, ohem=0), small(detector, ohem=8, **other)]
    read = set[str]().union(*(read_by(config) for config in variants))
    every = {f"{t}.{f.name}" for t in TABLES for f in fields(getattr(Config(), t))}
    unused = UNUSED[detector]
    refused = {key for key in every if key in unused or key.split(".")[0] in unused}
    assert set(unused) <= every | set(TABLES)
    # scales are put into whatever was built
    assert every - read - {"model.scales"} == refused


@pytest.mark.parametrize(
    ("detector", "change", "message"),
    [
        (
            "retinanet",
            {"rpn": {"joint": True, "softmax": True}},
            "rpn.softmax: must stay False for retinanet, which does not use it, got True; "
            "neither does it use rpn.joint",
        ),
        ("light-head", {"box": {"aligned": False}}, "box.aligned: must stay True for light-head"),
        ("frcnn-fpn", {"thin": {"kernel": 7}}, "thin.kernel: must stay 15 for frcnn-fpn"),
    ],
)
def test_settings_without_a_reader_are_refused_by_name(
    detector: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        resolve([{"model": {"detector": detector}}, change])
    stored = resolve([{"model": {"detector": detector}}])
    with pytest.raises(ConfigError, match=f"^{message}"):  # on top of a checkpoint's too
        resolve([change], stored)
    assert resolve([to_plain(stored)]) == stored  # saying what holds anyway is no change
