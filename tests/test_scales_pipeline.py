"""Learners in a whole detector: collect, plan, apply, rebuild from plain types."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from detkit.config import resolve
from detkit.models import build_detector
from detkit.models.detector import Detector
from detkit.scales import (
    ScaleLayer,
    ScaleStatistics,
    insert,
    learners,
    plan,
    rebuild,
    recording,
    to_plain,
)

SIZES = torch.tensor([[96, 128]])


def detector(name: str) -> Detector:
    model = {"detector": name, "backbone": "detnet59-tiny", "norm": "bn"}
    return build_detector(resolve([{"model": model, "rpn": {"post_nms_test": 20}}]), 3).eval()


@pytest.mark.parametrize("name", ["frcnn-c4", "light-head"])
def test_from_learners_to_a_net_of_plain_types(name: str) -> None:
    model = detector(name)
    params = sum(p.numel() for p in model.parameters())
    layers = insert(model)
    for learner in learners(model).values():
        nn.init.normal_(learner.scale.bias, std=0.5)
        nn.init.normal_(learner.scale.weight, std=0.1)
    halves = [ScaleStatistics([layer.path for layer in layers]) for _ in range(2)]
    images = torch.randn(4, 3, 96, 128)
    with recording(model) as recorder:
        for number, image in enumerate(images):
            model.detect(image[None], SIZES)
            halves[number % 2].add(recorder.take())
    halves[0].merge(halves[1])
    stats = halves[0].to_plain()
    assert {s["count"] for s in stats.values()} == {4}
    stored = json.dumps({"layers": [layer.to_plain() for layer in layers], "stats": stats})

    def planned() -> str:
        known = json.loads(stored)
        found = plan(
            [ScaleLayer.from_plain(layer) for layer in known["layers"]],
            {path: s["mean"] for path, s in known["stats"].items()},
            stds={path: s["std"] for path, s in known["stats"].items()},
        )
        return json.dumps(found.to_plain())

    assert planned() == planned()
    rows = json.loads(planned())["layers"]
    fast = rebuild(model, rows)
    assert sum(p.numel() for p in fast.parameters()) <= params
    again = rebuild(detector(name), rows)
    again.load_state_dict(fast.state_dict(), strict=True)
    plain = to_plain(again)
    for image in images[:2]:
        expected = fast.detect(image[None], SIZES)[0]
        assert len(expected["boxes"])
        for other in (again, plain):
            found = other.detect(image[None], SIZES)[0]
            assert found["labels"].equal(expected["labels"])
            assert torch.allclose(found["boxes"], expected["boxes"], atol=1e-3)
