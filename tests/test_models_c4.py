"""Faster R-CNN on C4: the last stages of any backbone leave it for the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detkit.config import Config, resolve
from detkit.errors import CheckpointError, ConfigError
from detkit.models import (
    build_backbone,
    build_classifier,
    build_detector,
    count_detector,
)
from detkit.models.weights import init_backbone
from detkit.types import Batch, Target

CLASSES = 3


def config(**tables: dict[str, Any]) -> Config:
    """A detector small enough for a test; ``tables`` change it."""
    small = {
        "model": {"detector": "frcnn-c4", "backbone": "resnet50-tiny", "norm": "bn"},
        "anchors": {"sizes": [16, 64]},
        "rpn": {"drop_straddling": False, "channels": 8, "post_nms_train": 6, "post_nms_test": 6},
        "box": {"batch_per_image": 6, "resolution": 6},
    }
    return resolve([small, tables])


def batch(*boxes: list[list[float]]) -> Batch:
    targets = [
        Target(
            torch.tensor(b, dtype=torch.float32).reshape(-1, 4),
            torch.ones(len(b), dtype=torch.int64),
            torch.zeros(len(b), dtype=torch.bool),
        )
        for b in boxes
    ]
    images = torch.randn(len(boxes), 3, 64, 96, generator=torch.Generator().manual_seed(3))
    return Batch(images, torch.tensor([[64, 96]] * len(boxes)), targets)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


KINDS = ("resnet50", "resnet50-dilated", "detnet59", "xception145", "detnas-300m", "detnet59-tiny")


@pytest.mark.parametrize("backbone", KINDS)
def test_every_kind_of_backbone_trains_and_detects(backbone: str) -> None:
    model = build_detector(config(model={"backbone": backbone}), CLASSES)
    assert list(model.backbone.feature_specs)[-1] == "c4"
    data = batch([[5, 5, 40, 30]])
    total(model(data)).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing
    model.eval()
    (found,) = model.detect(data.images, data.sizes)
    assert found["boxes"].shape == (len(found["scores"]), 4)


def test_truth_may_be_missing() -> None:
    model = build_detector(config(), CLASSES)
    losses = model(batch([], [[5, 5, 40, 30]]))
    total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        empty = model.head(model.features(batch([]).images), [torch.zeros(0, 4)])
    assert empty[0].shape == (0, CLASSES + 1)


def test_cost_of_conv5_on_each_roi() -> None:
    """ResNet-50: conv5 works on 14x14, then 7x7; its weights are no more in the backbone."""
    model = {"detector": "frcnn-c4", "backbone": "resnet50"}
    parts = count_detector(resolve([{"model": model}]), 80, 800, 1344, proposals=300)
    first = 196 * 1024 * 512 + 49 * (9 * 512 * 512 + 512 * 2048 + 1024 * 2048)
    later = 49 * (2048 * 512 + 9 * 512 * 512 + 512 * 2048)
    assert parts["head"].macs == 300 * (first + 2 * later + 2048 * (81 + 320))
    norms = 2 * (3 * (512 + 512 + 2048) + 2048)
    conv5 = 512 * (1024 + 2 * 2048) + 3 * (9 * 512 * 512 + 512 * 2048) + 1024 * 2048 + norms
    assert parts["head"].params == conv5 + 2049 * (81 + 320)
    assert parts["backbone"].params == 23_508_032 - conv5
    anchors = 5 * 3
    assert parts["rpn"].params == 512 * (9 * 1024 + 1) + 5 * anchors * 513
    assert parts["neck"].params == 0


def test_detnet_keeps_the_resolution_of_its_rois() -> None:
    with torch.device("meta"):
        model = build_detector(
            resolve([{"model": {"detector": "frcnn-c4", "backbone": "detnet59"}}]), 80
        )
        x = torch.empty(2, 1024, 14, 14)
        assert model.head.predictor.backbone_layers == ("layer4", "layer5")
        for name in model.head.predictor.backbone_layers:
            x = model.head.predictor.get_submodule(name)(x)
    assert x.shape == (2, 1024, 14, 14)


@pytest.mark.parametrize("backbone", ["resnet50-tiny", "detnet59-tiny"])
def test_a_pretrained_backbone_fills_the_head_too(backbone: str) -> None:
    settings = config(model={"backbone": backbone})
    state = build_classifier(settings, 5).state_dict()
    model = build_detector(settings, CLASSES)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    report = init_backbone(model, state, "classifier.pth")
    for key, value in model.state_dict().items():
        twin = key.replace("head.predictor.layer", "backbone.layer")
        if twin in state:
            assert torch.equal(value, state[twin])
        else:
            assert torch.equal(value, own[key]) and not key.startswith("backbone.")
    weights = [k for k in state if k.startswith("backbone.") and "num_batches" not in k]
    assert report.loaded == len(weights)
    del state["backbone.layer4.0.conv1.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing \(backbone.layer4.0.conv1.weight\)"):
        init_backbone(model, state, "classifier.pth")


def test_the_same_maps_up_to_c4_as_the_whole_backbone() -> None:
    whole = build_backbone("detnet59-tiny", "bn").eval()
    cut = build_backbone("detnet59-tiny", "bn").eval()
    cut.load_state_dict(whole.state_dict())
    tail = cut.take_stages_after("c4")
    images = torch.randn(1, 3, 64, 64)
    maps, all_maps = cut(images), whole(images)
    assert list(maps) == ["c2", "c3", "c4"] == list(cut.feature_specs)
    x = maps["c4"]
    assert torch.equal(x, all_maps["c4"])
    for stage in tail.values():
        x = stage(x)
    assert torch.equal(x, all_maps["c6"])


def test_frozen_stages_stay_fixed_and_the_head_learns() -> None:
    model = build_detector(config(model={"frozen_stages": 4}), CLASSES).train()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    total(model(batch([[5, 5, 40, 30]], [[9, 9, 60, 60]]))).backward()
    tail = model.head.predictor.layer4[0].bn2.weight
    assert tail.grad is not None and tail.grad.any()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert any(isinstance(m, nn.BatchNorm2d) and m.training for m in model.head.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"frozen_stages": 5}}, r"model.frozen_stages: must be in 0..4 .* got 5"),
        ({"model": {"head_norm": "gn"}}, "model.head_norm: must be none or model.norm = 'bn'"),
        ({"box": {"channels": 64}}, "box.channels: must be 0 for frcnn-c4"),
        ({"model": {"backbone": "detnas-supernet20"}}, "must be one network .* got a supernet"),
    ],
)
def test_what_it_cannot_do_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_detector(config(**change), CLASSES)
    with pytest.raises(ConfigError, match="must have stages after c6, got one with c2, c3, c4"):
        build_backbone("detnet59-tiny", "bn").take_stages_after("c6")
