"""POD's recipes: the schedule of the paper, the learners it puts in, headers, and one real step."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_recipes import COST, TRAIN2017, header, one_step, padded, picture, rate, settings
from torch import nn

from detkit.config import read_toml, recipes, resolve, to_plain
from detkit.engine import checkpoint
from detkit.loading import build
from detkit.models import build_detector, count_detector
from detkit.models.norm import SyncBatchNorm2d
from detkit.scales import GlobalScaleConv2d
from detkit.types import CategoryMap

POD = [name for name in recipes() if name.startswith("pod/")]
# Layers with a learner and what these add (POD, section 3: all 3x3 of conv3 to conv5, 2C + 2 each).
LEARNERS = {"resnet50": (13, 7_194), "resnet101": (30, 15_932)}


def test_each_model_of_the_tables_has_a_recipe() -> None:
    rows = {(c.model.detector, c.model.backbone) for c in map(settings, POD)}
    detectors = ("frcnn-c4", "frcnn-fpn", "retinanet")
    assert rows == {(d, b) for d in detectors for b in LEARNERS}


@pytest.mark.parametrize("name", POD)
def test_rows_train_as_published(name: str) -> None:
    """Section 4.1: 13 epochs, a tenth after 8 and 11; the rate is 0.00125 per image."""
    config = settings(name)
    longer = 1.5 if name.endswith("multi-scale") else 1.0
    assert config.train.epochs == 13 * longer
    steps = round(config.train.epochs * TRAIN2017 / config.train.batch_size)
    epoch = steps / config.train.epochs
    after = [rate(config, int(e * longer * epoch), steps) for e in (1, 7.9, 8.1, 10.9, 11.1)]
    assert after == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002])
    assert 0.00125 * config.train.batch_size == config.optim.lr
    assert (config.optim.weight_decay, config.optim.momentum) == (1e-4, 0.9)
    assert config.data.flip == 0.5 and config.data.color_jitter == 0
    jitter = (640, 672, 704, 736, 768, 800)
    assert config.data.multi_scale == (jitter if longer > 1 else ())


@pytest.mark.parametrize("name", POD)
def test_scales_are_learnt_where_the_paper_learns_them(name: str) -> None:
    plain = settings(name)
    learning = resolve([read_toml(recipes()[name]), {"model": {"scales": "learn"}}])
    with torch.device("meta"):
        nets = [build_detector(plain, 80), build(learning, 80)]
    learners = [m for m in nets[1].modules() if isinstance(m, GlobalScaleConv2d)]
    params = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert (len(learners), params[1] - params[0]) == LEARNERS[plain.model.backbone]
    norms = [m for m in nets[0].backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(type(norm) is SyncBatchNorm2d for norm in norms)
    assert all(p.requires_grad for p in nets[0].parameters())


@pytest.mark.parametrize("name", POD)
def test_header_reckons_right(name: str) -> None:
    config, match = settings(name), COST.search(header(name))
    assert match, header(name)
    assert int(match[1].replace(",", "")) == round(config.train.epochs * TRAIN2017)
    assert (int(match[3]), int(match[4])) == padded(config)
    rois = () if match[5] is None else (int(match[5]),)
    if rois:
        assert rois == (config.box.batch_per_image,)
    cost = count_detector(config, 80, *padded(config), *rois)["total"]
    assert float(match[2]) == pytest.approx(cost.macs / 1e9, rel=0.01)
    flop = int(match[1].replace(",", "")) * float(match[2]) * 1e9 * 6
    assert float(match[6]) == pytest.approx(flop, rel=0.05)
    assert float(match[7]) == pytest.approx(flop / 1e13 / 3600, rel=0.05)


@pytest.mark.parametrize("name", POD)
def test_the_commands_of_the_header_run(
    name: str,
    tmp_path: Path,
    real_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    would_train: Callable[[list[str]], dict[str, Any]],
) -> None:
    """The first one, but for its training; the later ones take its files."""
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^detkit .*$", header(name), re.MULTILINE)
    first, decompose, last = (shlex.split(line)[1:] for line in lines)
    source = Path(first[first.index("--init-from") + 1])
    source.parent.mkdir(parents=True)
    net = resolve([{"model": {"backbone": settings(name).model.backbone}}])
    content: checkpoint.Checkpoint = {
        "format": checkpoint.FORMAT,
        "kind": "backbone",
        "config": to_plain(net),
        "categories": CategoryMap([1], ["thing"]).to_plain(),
        "model": {},
        "provenance": {},
    }
    checkpoint.save(source, content)
    model = would_train([*first, "--set", f"data.path={real_data / 'coco_mini'}"])["model"]
    assert (model["scales"], model["backbone"]) == ("learn", settings(name).model.backbone)
    out = first[first.index("--out") + 1]
    assert decompose[:2] == ["decompose", f"{out}/best.pth"]
    assert last[last.index("--init-from") + 1] == decompose[decompose.index("-o") + 1]
    assert last[last.index("--recipe") + 1] == name


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if "101" in n else ()) for n in POD],
)
def test_one_step_learns_scales(name: str) -> None:
    small = {
        "model": {"scales": "learn"},
        "rpn": {"pre_nms_train": 200, "post_nms_train": 60},
        "box": {"batch_per_image": 24},
        "train": {"batch_size": 1},
    }
    if settings(name).model.detector == "retinanet":
        del small["rpn"]
        small["box"] = {}
    torch.manual_seed(0)
    model = build(resolve([read_toml(recipes()[name]), small]), 3).train()
    learners = [m for m in model.modules() if isinstance(m, GlobalScaleConv2d)]
    before = [[p.clone() for p in m.parameters()] for m in learners]
    config = resolve([read_toml(recipes()[name]), small])
    one_step(model, config, picture())
    for learner, old in zip(learners, before, strict=True):
        for now, then in zip(learner.parameters(), old, strict=True):
            assert now.grad is not None and now.isfinite().all()
            assert not now.equal(then)
