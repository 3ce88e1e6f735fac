"""R-FCN, thin maps, Light-Head R-CNN, xception145: published counts, closed forms, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detkit.config import Config, OptimConfig, read_toml, recipe_path, resolve
from detkit.deploy.fold import fold
from detkit.engine.optimizer import build_optimizer, set_factor
from detkit.errors import ConfigError
from detkit.models import (
    BACKBONES,
    build_backbone,
    build_detector,
    count_backbone,
    count_detector,
)
from detkit.models.anchors import AnchorGrid
from detkit.models.detector import TwoStageDetector
from detkit.models.heads.box import BoxHead
from detkit.models.heads.light import LightPredictor
from detkit.models.heads.ps_roi import PsAlign, PsCells
from detkit.models.heads.rfcn import Vote
from detkit.models.heads.roi import RoiPooler
from detkit.models.necks.large_separable import LargeSeparableConv
from detkit.models.necks.position_sensitive import ScoreMaps, ThinMaps
from detkit.models.targets import RoiSample
from detkit.models.weights import init_detector
from detkit.types import Batch, CategoryMap, FeatureSpec, Target

CLASSES = 3
DETECTORS = ["rfcn", "rfcn-thin", "light-head", "light-head-fpn"]


def config(detector: str, backbone: str = "detnet59-tiny", **tables: dict[str, Any]) -> Config:
    """A detector small enough for a test; ``tables`` change it."""
    norm = "bn" if backbone.endswith("tiny") else "frozen_bn"
    sizes = [8, 16, 32, 64, 128] if detector.endswith("fpn") else [16, 32, 64]
    small: dict[str, dict[str, Any]] = {
        "model": {
            "detector": detector,
            "backbone": backbone,
            "norm": norm,
            **({"neck_channels": 16} if detector.endswith("fpn") else {}),
        },
        "anchors": {"sizes": sizes},
        "rpn": {
            "channels": 16,
            "drop_straddling": False,
            "post_nms_train": 60,
            "post_nms_test": 60,
        },
        "box": {"channels": 0 if "rfcn" in detector else 32, "ohem": 24},
        "thin": {"mid_channels": 16},
    }
    return resolve([small, tables])


def batch(boxes: int = 2) -> Batch:
    """Two noise images, the first with ``boxes`` objects, the second with one; padded."""
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(3))
    images[:, :, 90:] = 0
    first = torch.tensor([[5.0, 5, 45, 40], [50, 20, 110, 80]])[:boxes]
    second = torch.tensor([[20.0, 20, 70, 60]])
    none = torch.zeros(2, dtype=torch.bool)
    targets = [
        Target(first, torch.tensor([1, 3])[:boxes], none[:boxes]),
        Target(second, torch.tensor([2]), none[:1]),
    ]
    return Batch(images, torch.tensor([[90, 128]] * 2), targets, ["a.jpg", "b.jpg"])


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def published(detector: str, backbone: str, **tables: dict[str, Any]) -> Config:
    """As the paper has it, but for ``tables``."""
    return resolve([{"model": {"detector": detector, "backbone": backbone}}, tables])


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- exact counts ---------------------------------------------------------------------------------


def test_xception145_counts() -> None:
    parts = count_backbone("xception145")
    assert parts["total"].params == 1_531_936
    assert parts["total"].params - parts["fc"].params == 954_936
    assert parts["total"].macs == 143_078_976
    assert parts["total"].convs == 49
    macs = {name: part.macs for name, part in parts.items()}
    assert macs == {
        "total": 143_078_976,
        "stage1": 8_128_512,
        "stage2": 0,
        "stage3": 31_497_984,
        "stage4": 68_076_288,
        "stage5": 34_800_192,
        "fc": 576_000,
    }


def test_xception145_norms_bring_the_145_million() -> None:
    model = build_backbone("xception145", "bn").eval()
    outputs: list[int] = []
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.register_forward_hook(lambda _, __, out: outputs.append(out.numel()))
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert len(outputs) == 49
    assert sum(outputs) == 1_912_176
    assert 143_078_976 + sum(outputs) == 144_991_152


def test_large_separable_convolution_counts() -> None:
    positions = 50 * 75
    large = count_detector(published("light-head", "resnet101-dilated"), 80, 800, 1200)
    assert large["neck"].params == 19_493_332
    assert large["neck"].macs == 19_491_840 * positions
    small = published("light-head", "xception145", thin={"mid_channels": 64})
    parts = count_detector(small, 80, 800, 1200)
    assert parts["neck"].params == 2_047_828
    assert parts["neck"].macs == 2_046_720 * 25 * 38
    pyramid = count_detector(published("light-head-fpn", "resnet101"), 80, 800, 1200)
    plain = count_detector(published("frcnn-fpn", "resnet101"), 80, 800, 1200)
    cells = 200 * 300 + 100 * 150 + 50 * 75 + 25 * 38  # P2 to P5, one shared convolution
    assert pyramid["neck"].macs - plain["neck"].macs == 1_432_320 * cells
    shared = LargeSeparableConv(256, 64, 490, 15)
    assert pyramid["neck"].params - plain["neck"].params == params(shared)


def test_rfcn_counts() -> None:
    parts = count_detector(published("rfcn", "resnet101-dilated"), 80, 800, 1200)
    assert parts["neck"].params == 6_367_301
    assert parts["neck"].macs == 6_362_112 * 50 * 75
    assert parts["head"].params == parts["head"].macs == 0
    assert parts["rpn"].params == 4_765_274
    assert parts["rpn"].macs == 4_764_672 * 50 * 75


def test_thin_map_counts() -> None:
    parts = count_detector(published("rfcn-thin", "resnet101-dilated"), 80, 800, 1200)
    assert parts["neck"].params == 2048 * 1024 + 1024 + 1024 * 490 + 490
    assert parts["head"].params == 490 * (81 + 4) + 81 + 4
    large = {"kernel": 15, "mid_channels": 256}  # "+ large kernel" of table 3
    parts = count_detector(published("rfcn-thin", "resnet101-dilated", thin=large), 80, 800, 1200)
    assert parts["neck"].params == 19_493_332
    assert parts["head"].params == 490 * (81 + 4) + 81 + 4


def test_light_head_counts() -> None:
    head = LightPredictor(490, 2048, 80, class_agnostic=True)
    assert head.fc is not None and params(head.fc) == 1_005_568
    assert params(head.classes) == 165_969
    assert params(head.boxes) == 8_196
    parts = count_detector(published("light-head", "resnet101-dilated"), 80, 800, 1200)
    assert parts["head"].macs == 1000 * 1_177_600


def test_class_specific_light_head_counts() -> None:
    head = LightPredictor(490, 2048, 81, class_agnostic=False)  # 324: the background counted too
    assert params(head.boxes) == 663_876
    built = published("light-head", "resnet101-dilated", box={"class_agnostic": False})
    parts = count_detector(built, 80, 800, 1200)
    assert parts["head"].macs == 1000 * (1_832_960 - 4 * 2048)


def test_rpn_counts_of_setting_s() -> None:
    built = published("light-head", "xception145", rpn={"channels": 256}, thin={"mid_channels": 64})
    parts = count_detector(built, 80, 704, 1120)
    assert parts["rpn"].params == 686_938
    assert parts["rpn"].macs == 686_592 * 44 * 70


# --- strides, anchors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "last"), [("resnet101-dilated", (50, 75)), ("xception145", (25, 38))]
)
def test_maps_of_both_settings_at_800x1200(backbone: str, last: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = build_detector(published("light-head", backbone), 80)
        maps = model.features(torch.empty(1, 3, 800, 1200))
    assert {name: tuple(x.shape[2:]) for name, x in maps.items()} == {"c4": (50, 75), "s5": last}
    assert model.head.pooler.scales == [1 / 16 if last == (50, 75) else 1 / 32]
    assert model.rpn.grid.per_cell == [15]


def test_caffe_anchors() -> None:
    grid = AnchorGrid([16], [[32, 64, 128, 256, 512]], [0.5, 1, 2], "caffe")
    (anchors,) = grid([(2, 3)])
    assert len(anchors) == 15 * 6
    size = anchors[:, 2:] - anchors[:, :2]
    base = torch.tensor([[46.0, 24], [32, 32], [22, 44]])
    expected = torch.cat([base[i] * 2.0 ** torch.arange(5)[:, None] for i in range(3)])
    assert torch.equal(size.view(6, 15, 2), expected.expand(6, 15, 2))
    centre = ((anchors[:, 2:] + anchors[:, :2]) / 2).view(2, 3, 15, 2)
    x, y = torch.meshgrid(torch.arange(3) * 16 + 8.0, torch.arange(2) * 16 + 8.0, indexing="xy")
    assert torch.equal(centre, torch.stack([x, y], -1)[:, :, None].expand(2, 3, 15, 2))
    # scales 8 and 16 as Faster R-CNN prints them, in pixels counted from 1 with the last one in
    known = [[-83, -39, 100, 56], [-175, -87, 192, 104], [-55, -55, 72, 72], [-119, -119, 136, 136],
             [-35, -79, 52, 96], [-79, -167, 96, 184]]  # fmt: skip
    first = torch.tensor(known, dtype=torch.float32) - torch.tensor([1.0, 1, 0, 0])
    assert torch.equal(anchors[[2, 3, 7, 8, 12, 13]], first)
    fewer = AnchorGrid([16], [[64, 128, 256, 512]], [0.5, 1, 2], "caffe")
    assert fewer.per_cell == [12]  # the first R-FCN


def test_caffe_anchors_of_a_pyramid_grow_with_their_cells() -> None:
    grid = AnchorGrid([8, 16], [[16], [32]], [0.5, 1, 2], "caffe")
    fine, coarse = grid([(1, 1), (1, 1)])
    assert fine.tolist() == [[-7, -2, 15, 10], [-4, -4, 12, 12], [-2, -8, 10, 16]]
    assert coarse.tolist() == [[-15, -4, 31, 20], [-8, -8, 24, 24], [-3, -14, 19, 30]]


# --- large separable convolution ------------------------------------------------------------------


def test_large_separable_convolution_is_the_sum_of_its_branches_and_keeps_the_size() -> None:
    conv = LargeSeparableConv(3, 4, 5, 15)
    x = torch.randn(2, 3, 7, 11)
    for layer in conv.children():
        nn.init.normal_(layer.get_parameter("bias"))

    def run(name: str, x: Tensor) -> Tensor:
        layer = conv.get_submodule(name)
        weight = layer.get_parameter("weight")
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        return F.conv2d(x, weight, layer.get_parameter("bias"), padding=padding)

    shapes = {n: tuple(c.get_parameter("weight").shape) for n, c in conv.named_children()}
    assert shapes == {
        "tall1": (4, 3, 15, 1),
        "wide2": (5, 4, 1, 15),
        "wide1": (4, 3, 1, 15),
        "tall2": (5, 4, 15, 1),
    }
    expected = run("wide2", run("tall1", x)) + run("tall2", run("wide1", x))
    assert expected.shape == (2, 5, 7, 11)
    torch.testing.assert_close(conv(x), expected)
    maps = ThinMaps(3, 4, 5, 15, 3.0)
    maps.conv = conv
    torch.testing.assert_close(maps(x), expected.relu())
    assert (expected < 0).any()


def test_transposed_branches_transpose_the_output() -> None:
    conv, other = LargeSeparableConv(3, 4, 5, 7), LargeSeparableConv(3, 4, 5, 7)
    for one, two in (("tall1", "wide1"), ("wide2", "tall2")):
        for a, b in ((one, two), (two, one)):
            source, target = conv.get_submodule(a), other.get_submodule(b)
            target.load_state_dict(
                {"weight": source.get_parameter("weight").mT, "bias": source.get_parameter("bias")}
            )
    x = torch.randn(1, 3, 9, 6)
    torch.testing.assert_close(other(x.mT), conv(x).mT)


def test_initial_weights_and_learning_rates() -> None:
    model = build_detector(published("light-head", "detnet59-tiny"), 80)
    for layer in model.neck.maps.conv.children():
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02) and not layer.bias.any()
    head = model.head.predictor
    for layer, std in ((head.fc, 0.01), (head.classes, 0.01), (head.boxes, 0.001)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03) and not layer.bias.any()
    for detector, faster in (("light-head", "neck.maps.conv."), ("rfcn", "neck.maps.first.")):
        model = build_detector(config(detector), CLASSES)
        optimizer = build_optimizer(model, OptimConfig(lr=0.01), 16)
        set_factor(optimizer, 0.01, 1.0)
        names = {p: n for n, p in model.named_parameters()}
        rates = {names[p]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert any(n.startswith(faster) for n in rates)
        for name, rate in rates.items():
            assert rate == pytest.approx(0.03 if name.startswith(faster) else 0.01), name


# --- pooling --------------------------------------------------------------------------------------


def _ramp(channels: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    m = torch.arange(float(channels))[:, None, None]
    return (3 * x + 2 * y + 0.5 * m).double()[None]


@pytest.mark.parametrize(("reduce", "offset"), [("max", 0.0), ("avg", 0.5), ("avg", 0.0)])
def test_ps_roi_align_through_the_pooler_has_its_closed_form(reduce: Any, offset: float) -> None:
    spec = {"s5": FeatureSpec(490, 16)}
    pooler = RoiPooler(spec, PsAlign(7, reduce, offset))
    assert pooler.out_shape == (10, 7, 7)
    x1, y1, x2, y2 = 83.0, 141.0, 403.0, 390.0
    rois = torch.tensor([[0, x1, y1, x2, y2]], dtype=torch.float64)
    c, i, j = (t.double() for t in torch.meshgrid(*map(torch.arange, (10, 7, 7)), indexing="ij"))
    at = 0.75 if reduce == "max" else 0.5
    x = x1 / 16 - offset + (x2 - x1) / 112 * (j + at)
    y = y1 / 16 - offset + (y2 - y1) / 112 * (i + at)
    expected = 3 * x + 2 * y + 0.5 * ((c * 7 + i) * 7 + j)
    found = pooler({"s5": _ramp(490)}, rois)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-9)


def test_max_is_at_least_the_mean_and_its_gradient_sums_to_one() -> None:
    x = torch.randn(1, 98, 20, 20, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 35.0, 41, 211, 247], [0, 20, 20, 300, 290]])
    most, mean = (PsAlign(7, how, 0.0)(x, rois, 1 / 16) for how in ("max", "avg"))
    assert (most >= mean).all() and (most > mean).any()
    for found in (most, mean, PsCells(7)(x, rois, 1 / 16)):
        (grad,) = torch.autograd.grad(found.sum(), x)
        assert grad.sum().item() == pytest.approx(found.numel())


@pytest.mark.parametrize("pool", [PsAlign(7, "max", 0.0), PsAlign(7, "avg", 0.5), PsCells(7)])
def test_channel_map(pool: PsAlign | PsCells) -> None:
    x = torch.arange(490.0).view(1, -1, 1, 1).expand(1, 490, 20, 20)
    found = pool(x, torch.tensor([[0, 35.0, 41, 211, 247]]), 1 / 16)
    torch.testing.assert_close(found.flatten(), torch.arange(490.0))


def test_votes_are_means_of_the_maps_of_their_class_and_box_number() -> None:
    for agnostic in (True, False):
        maps = ScoreMaps(8, 8, 3, CLASSES, agnostic, 3.0)
        numbers = CLASSES + 1 + (4 if agnostic else 4 * CLASSES)
        assert maps.channels == 9 * numbers
        x = torch.randn(1, 8, 12, 12)
        pooled = PsCells(3)(maps(x), torch.tensor([[0, 0.0, 0, 191, 191]]), 1 / 16)
        logits, deltas = Vote(CLASSES)(pooled)
        first = maps.first(x)
        classes = maps.classes(first).view(CLASSES + 1, 3, 3, 12, 12)
        boxes = maps.boxes(first).view(-1, 4, 3, 3, 12, 12)
        for i in range(CLASSES + 1):  # a third of the map is a bin
            bins = [classes[i, a, b, 4 * a : 4 * a + 4, 4 * b : 4 * b + 4] for a, b in _bins()]
            torch.testing.assert_close(logits[0, i], torch.stack(bins).mean())
        for k in range(len(boxes)):
            bins = [boxes[k, 2, a, b, 4 * a : 4 * a + 4, 4 * b : 4 * b + 4] for a, b in _bins()]
            torch.testing.assert_close(deltas[0, k, 2], torch.stack(bins).mean())


def _bins() -> list[tuple[int, int]]:
    return [(a, b) for a in range(3) for b in range(3)]


def test_pyramid_pools_each_roi_from_the_level_of_its_size() -> None:
    model = build_detector(config("light-head-fpn", "resnet50-tiny"), CLASSES)
    assert list(model.neck.thin_specs) == ["s2", "s3", "s4", "s5"]
    assert list(model.rpn.levels) == ["p2", "p3", "p4", "p5", "p6"]
    maps = {
        name: torch.full((1, spec.channels, 256 // spec.stride, 256 // spec.stride), float(name[1]))
        for name, spec in model.neck.thin_specs.items()
    }
    rois = torch.tensor([[0, 9, 9, 9 + s, 9 + s] for s in (30.0, 113, 225, 230)])
    pooled = model.head.pooler(maps, rois)
    assert pooled[:, 0, 3, 3].tolist() == [2, 3, 4, 4]


# --- hard examples --------------------------------------------------------------------------------


class _Given(nn.Module):
    """A predictor with given outputs."""

    def __init__(self, logits: Tensor, deltas: Tensor) -> None:
        super().__init__()
        self.outputs = logits, deltas

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        return self.outputs


def _mined(rois: int, images: int = 2, **box: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Losses of random outputs, logits and deltas: ``rois`` per image, a quarter positive."""
    generator = torch.Generator().manual_seed(1)
    positive = rois // 4
    samples = []
    for _ in range(images):
        labels = torch.zeros(rois, dtype=torch.int64)
        labels[:positive] = torch.randint(1, CLASSES + 1, (positive,), generator=generator)
        boxes = torch.tensor([[4.0, 4, 60, 60]]).expand(rois, 4)
        deltas = torch.randn(positive, 4, generator=generator)
        samples.append(RoiSample(boxes, labels, torch.zeros(positive, dtype=torch.int64), deltas))
    # the first image is harder, so that ranking all images together takes more of it
    spread = torch.cat([torch.full((rois, 1), 3.0 - 2 * i) for i in range(images)])
    logits = torch.randn(images * rois, CLASSES + 1, generator=generator) * spread
    deltas = torch.randn(images * rois, 1, 4, generator=generator)
    logits.requires_grad_()
    deltas.requires_grad_()
    settings = resolve([{"model": {"detector": "light-head"}, "box": box}]).box
    pooler = RoiPooler({"s5": FeatureSpec(49, 16)}, PsAlign(7, "max", 0.0))
    head = BoxHead(pooler, _Given(logits, deltas), settings)
    return head.losses({"s5": torch.zeros(images, 49, 4, 4)}, samples), logits, deltas


def test_of_2000_rois_the_256_hardest_of_each_image_learn() -> None:
    losses, logits, _ = _mined(2000)
    (grad,) = torch.autograd.grad(losses["box_class"], logits)
    learns = grad.abs().sum(1) > 0
    assert [int(part.sum()) for part in learns.split(2000)] == [256, 256]
    losses, logits, _ = _mined(2000, ohem_scope="batch")
    (grad,) = torch.autograd.grad(losses["box_class"], logits)
    counts = [int(part.sum()) for part in (grad.abs().sum(1) > 0).split(2000)]
    assert sum(counts) == 512 and counts[0] > counts[1] > 0


def test_the_box_loss_is_doubled_after_ranking_and_alone() -> None:
    single, *outputs = _mined(200, ohem=20, regression_weight=1.0)
    grads = torch.autograd.grad(total(single), outputs)
    double, *outputs = _mined(200, ohem=20, regression_weight=2.0)
    more = torch.autograd.grad(total(double), outputs)
    torch.testing.assert_close(double["box_class"], single["box_class"])
    torch.testing.assert_close(double["box_regression"], 2 * single["box_regression"])
    torch.testing.assert_close(more[0], grads[0])  # the same RoIs were chosen
    torch.testing.assert_close(more[1], 2 * grads[1])
    # divided by all that were chosen, not by the positive ones
    chosen = grads[0].abs().sum(1) > 0
    assert int(chosen.sum()) == 40
    plain, *_ = _mined(200, ohem=0, regression_weight=1.0)
    hand_class, hand_box = _hand_mined(200, 20)
    torch.testing.assert_close(single["box_class"], hand_class)
    torch.testing.assert_close(single["box_regression"], hand_box)
    assert single["box_class"] > plain["box_class"]


def _hand_mined(rois: int, keep: int) -> tuple[Tensor, Tensor]:
    """Both losses by the definition, from the outputs of :func:`_mined`."""
    classes, boxes = torch.tensor(0.0), torch.tensor(0.0)
    generator = torch.Generator().manual_seed(1)
    truth = []
    for _ in range(2):
        labels = torch.zeros(rois, dtype=torch.int64)
        labels[: rois // 4] = torch.randint(1, CLASSES + 1, (rois // 4,), generator=generator)
        truth.append((labels, torch.randn(rois // 4, 4, generator=generator)))
    _, *outputs = _mined(rois)
    logits, deltas = (t.detach() for t in outputs)
    for i, (labels, goal) in enumerate(truth):
        rows = []
        for r in range(rois):
            at = i * rois + r
            entropy = -logits[at].log_softmax(0)[labels[r]]
            box = torch.tensor(0.0)
            if labels[r] > 0:
                d = (deltas[at, 0] - goal[r]).abs()
                box = torch.where(d < 1, d * d / 2, d - 0.5).sum()
            rows.append((entropy, box))
        rows.sort(key=lambda row: -float(row[0] + row[1]))
        classes = classes + sum(row[0] for row in rows[:keep])
        boxes = boxes + sum(row[1] for row in rows[:keep])
    return classes / (2 * keep), boxes / (2 * keep)


def test_all_proposals_and_truth_boxes_are_candidates() -> None:
    model = build_detector(config("light-head"), CLASSES)
    proposals = torch.rand(500, 4) * 40
    proposals[:, 2:] += proposals[:, :2] + 5
    sample = model.head.sample(proposals, batch().targets[0])
    assert len(sample.boxes) == len(sample.labels) == 502


# --- whole detectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("detector", ["light-head", "light-head-fpn"])  # a neck of each kind
def test_every_combination_builds_and_runs(detector: str, backbone: str) -> None:
    with torch.device("meta"):
        model = build_detector(published(detector, backbone), 80).eval()
        model.run_layers(torch.empty(1, 3, 256, 320), 10)
    assert isinstance(model, TwoStageDetector)


@pytest.mark.parametrize("backbone", ["detnet59-tiny", "resnet50-tiny", "xception145"])
@pytest.mark.parametrize("detector", DETECTORS)
def test_one_step_reaches_every_parameter_and_detections_come_out(
    detector: str, backbone: str
) -> None:
    model = build_detector(config(detector, backbone), CLASSES)
    losses = model(batch())
    assert set(losses) == {"rpn_objectness", "rpn_box", "box_class", "box_regression"}
    assert all(v.ndim == 0 and v.isfinite() for v in losses.values())
    total(losses).backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    for part in (model.neck, model.rpn, model.head):
        assert all(p.grad is not None and p.grad.any() for p in part.parameters())
    model.eval()
    for found in model.detect(batch().images, batch().sizes):
        assert 0 < len(found["boxes"]) <= 100 and found["boxes"].isfinite().all()
        assert found["boxes"][:, [1, 3]].max() <= 90


@pytest.mark.parametrize(
    ("detector", "change"),
    [
        ("rfcn", {"box": {"class_agnostic": False, "ps_pool": "avg", "ps_offset": 0.5}}),
        ("rfcn", {"model": {"head_norm": "gn"}, "box": {"ohem": 0}}),
        ("rfcn-thin", {"model": {"head_norm": "bn"}, "box": {"ps_pool": "max"}}),
        ("rfcn-thin", {"box": {"channels": 16}, "thin": {"kernel": 5}}),
        ("light-head", {"box": {"class_agnostic": False, "ohem_scope": "batch"}}),
        ("light-head", {"model": {"head_norm": "bn"}, "anchors": {"style": "torchvision"}}),
        ("light-head", {"box": {"ps_pool": "avg", "ps_offset": 0.5, "sampling_ratio": 0}}),
        ("light-head-fpn", {"model": {"head_norm": "gn"}, "anchors": {"style": "caffe"}}),
        ("light-head-fpn", {"box": {"roi_max_level": 6, "resolution": 3}}),
        ("light-head-fpn", {"thin": {"kernel": 1}, "box": {"channels": 0}}),
    ],
    ids=str,
)
def test_options_train_and_detect(detector: str, change: dict[str, Any]) -> None:
    model = build_detector(config(detector, **change), CLASSES)
    total(model(batch())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert len(model.detect(batch().images, batch().sizes)) == 2


@pytest.mark.parametrize("detector", DETECTORS)
def test_images_without_objects(detector: str) -> None:
    model = build_detector(config(detector), CLASSES)
    data = batch(boxes=0)
    data.targets[1] = data.targets[0]
    losses = model(data)
    total(losses).backward()
    assert losses["box_regression"] == 0 and losses["box_class"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        logits, deltas = model.head(model.features(data.images), [torch.zeros(0, 4)] * 2)
    assert logits.shape == (0, CLASSES + 1) and deltas.shape == (0, 1, 4)


@pytest.mark.parametrize(
    ("detector", "change", "message"),
    [
        ("rfcn", {"box": {"channels": 1024}}, "box.channels: must be 0 for rfcn"),
        ("rfcn", {"thin": {"kernel": 15}}, "thin.kernel: must be 1 for rfcn"),
        ("rfcn", {"box": {"ps_offset": 0.5}}, "box.ps_offset: must be 0 with box.ps_pool cells"),
        ("light-head", {"box": {"sampling_ratio": 0}}, "box.sampling_ratio: must be positive"),
        (
            "light-head-fpn",
            {"anchors": {"sizes": [32]}},
            "anchors.sizes: must be one side for each",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(
    detector: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_detector(config(detector, **change), CLASSES)


@pytest.mark.parametrize("detector", ["rfcn", "light-head"])
@pytest.mark.parametrize("agnostic", [True, False])
def test_other_categories_keep_the_rows_of_shared_names(detector: str, agnostic: bool) -> None:
    settings = config(detector, box={"class_agnostic": agnostic})
    old, new = build_detector(settings, 2), build_detector(settings, 3)
    for layer in (m for m in old.modules() if isinstance(m, nn.Conv2d | nn.Linear)):
        nn.init.normal_(layer.weight, std=0.05)
    old.eval(), new.eval()
    theirs, ours = CategoryMap(["cat", "dog"]), CategoryMap(["bird", "dog", "cow"])
    report = init_detector(new, old.state_dict(), "old.pth", theirs=theirs, ours=ours)
    assert report.kept == ("dog",) and report.fresh == ("bird", "cow")
    data = batch()
    boxes = [torch.tensor([[5.0, 5, 45, 40], [50, 20, 110, 80]])] * 2
    with torch.no_grad():
        was, now = (model.head(model.features(data.images), boxes) for model in (old, new))
    torch.testing.assert_close(now[0][:, [0, 2]], was[0][:, [0, 2]])
    column = (0, 0) if agnostic else (1, 1)
    torch.testing.assert_close(now[1][:, column[0]], was[1][:, column[1]])


def _lively_norms(model: nn.Module) -> int:
    """Gives every batch norm statistics and a scale of its own; how many there are."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        nn.init.normal_(norm.bias, std=0.1)
    return len(norms)


def test_all_norms_of_setting_s_fold_into_their_convolutions() -> None:
    model = build_detector(config("light-head", "xception145"), CLASSES).eval()
    assert _lively_norms(model) == 49
    folded = fold(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    data = batch()
    with torch.no_grad():
        maps, expected = folded.features(data.images), model.features(data.images)
    for name, x in expected.items():
        torch.testing.assert_close(maps[name], x, rtol=0, atol=1e-4)
    found = folded.detect(data.images, data.sizes)
    for ours, theirs in zip(found, model.detect(data.images, data.sizes), strict=True):
        assert len(theirs["boxes"]) > 0 and torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("detector", ["rfcn", "rfcn-thin"])
def test_norms_of_the_head_fold_too(detector: str) -> None:
    model = build_detector(config(detector, model={"head_norm": "bn"}), CLASSES).eval()
    _lively_norms(model)
    folded = fold(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        maps, expected = (m.features(batch().images) for m in (folded, model))
    for name, x in expected.items():
        torch.testing.assert_close(maps[name], x, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_light_head_overfits_two_images() -> None:
    torch.manual_seed(0)
    model = build_detector(config("light-head", box={"score_threshold": 0.05}), CLASSES)
    data = batch()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(100):
        optimizer.zero_grad()
        total(model(data)).backward()
        optimizer.step()
    model.eval()
    for found, truth in zip(model.detect(data.images, data.sizes), data.targets, strict=True):
        for box, label in zip(truth.boxes, truth.labels, strict=True):
            near = (found["boxes"] - box).abs().amax(1) < 0.2 * (box[2:] - box[:2]).max() + 2
            assert (near & (found["labels"] == label) & (found["scores"] > 0.5)).any()


@pytest.mark.parametrize("detector", DETECTORS)
def test_tiny_recipes_cost_about_as_much_as_the_first_one(detector: str) -> None:
    macs = {}
    for name in ("frcnn-fpn", detector):
        recipe = resolve([read_toml(recipe_path(f"tiny/{name}"))])
        assert recipe.model.detector == name
        macs[name] = count_detector(recipe, CLASSES, 352, 544, 300)["total"].macs
    assert 0.4 < macs[detector] / macs["frcnn-fpn"] < 1.5
