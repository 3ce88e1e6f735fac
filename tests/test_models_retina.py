"""RetinaNet: every backbone, losses by hand, edge cases of truth, torchvision's size."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from test_models_detector import batch, some, target, total
from torch import Tensor, nn

from detkit.config import Config, read_toml, recipe_path, resolve
from detkit.errors import CheckpointError, ConfigError, DataError
from detkit.models import BACKBONES, build_detector, count_detector, losses
from detkit.models.anchors import AnchorGrid
from detkit.models.builders.parts import pyramid_sizes
from detkit.models.detector import OneStageDetector
from detkit.models.heads.retina import RetinaOutput
from detkit.models.necks.fpn import FPN, ConvolvedLevels
from detkit.models.weights import init_detector
from detkit.types import CategoryMap, FeatureSpec, Target

CLASSES = 3


def config(**tables: dict[str, Any]) -> Config:
    """A RetinaNet small enough for a test; ``tables`` change it."""
    small = {
        "model": {
            "detector": "retinanet",
            "backbone": "resnet50-tiny",
            "norm": "bn",
            "neck_channels": 16,
        },
        "anchors": {"sizes": [8, 16, 32, 64, 128]},
        "retina": {"convs": 1},
    }
    return resolve([small, tables])


def build(**tables: dict[str, Any]) -> OneStageDetector:
    model = build_detector(config(**tables), CLASSES)
    assert isinstance(model, OneStageDetector)
    return model


def without_gradient(model: nn.Module) -> list[str]:
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]


# --- every combination ----------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_has_five_levels_of_nine_anchors(backbone: str) -> None:
    whole = resolve([{"model": {"detector": "retinanet", "backbone": backbone}}])
    with torch.device("meta"):
        model = build_detector(whole, 80)
        levels = model.features(torch.empty(1, 3, 256, 384))
        output = model.head(levels, (256, 384))
    specs = model.neck.feature_specs
    assert list(levels) == list(specs) == ["p3", "p4", "p5", "p6", "p7"]
    for name, spec in specs.items():
        assert levels[name].shape == (1, 256, -(-256 // spec.stride), -(-384 // spec.stride))
    cells = sum(x.shape[2] * x.shape[3] for x in levels.values())
    assert model.head.grid.per_cell == [9] * 5
    assert output.logits.shape == (1, 9 * cells, 80) and output.deltas.shape == (1, 9 * cells, 4)


def test_stages_five_and_six_of_detnet_are_levels_and_only_p7_is_convolved() -> None:
    with torch.device("meta"):
        model = build_detector(
            resolve([{"model": {"detector": "retinanet", "backbone": "detnet59"}}]), 80
        )
    assert [s.stride for s in model.neck.feature_specs.values()] == [8, 16, 16, 16, 32]
    assert list(model.neck.lateral) == ["p3", "p4", "p5", "p6"]
    assert list(model.neck.extra.convs) == ["p7"]
    assert model.neck.extra.convs["p7"].conv.in_channels == 256


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"model": {"backbone": "detnet59-tiny", "head_norm": "gn"}},
        {"model": {"head_norm": "bn"}, "retina": {"convs": 2, "smooth_l1_beta": 0.0, "gamma": 0.5}},
        {"retina": {"p6_from": "p5"}, "anchors": {"measured_strides": True}},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "targets",
    [
        some(),
        [target([[5, 5, 40, 30]], [1]), target([], [])],
        [target([], []), target([], [])],
        [target([[0, 0, 119, 90]], [1], [True]), target([[0, 0, 119, 90]], [2], [True])],
    ],
    ids=["objects", "one image without boxes", "no boxes", "crowds alone"],
)
def test_one_step_reaches_every_parameter(change: dict[str, Any], targets: list[Target]) -> None:
    model = build(**change)
    data = batch(*targets)
    result = model(data)
    assert set(result) == {"retina_class", "retina_box"}
    assert all(v.ndim == 0 and v.dtype == torch.float32 and v.isfinite() for v in result.values())
    total(result).backward()
    assert not without_gradient(model)
    model.eval()
    assert len(model.detect(data.images, data.sizes)) == 2


def test_wrong_input_is_refused() -> None:
    with pytest.raises(DataError, match=r"labels: must be in 1..3, got 4..4"):
        build()(batch(target([[0, 0, 9, 9]], [4])))
    with pytest.raises(ConfigError, match=r"retina.p6_from: must be 'c5' for detnet59-tiny"):
        build(model={"backbone": "detnet59-tiny"}, retina={"p6_from": "p5"})
    with pytest.raises(ConfigError, match="retina.bg_iou: must be at most"):
        config(retina={"bg_iou": 0.6})


# --- parts ----------------------------------------------------------------------------------------


def test_focal_loss_is_the_papers_formula() -> None:
    logits = torch.randn(40, 3, dtype=torch.float64) * 4
    truth = torch.rand(40, 3) < 0.3
    for alpha, gamma in ((0.25, 2.0), (0.5, 0.0), (0.75, 0.5)):
        p = logits.sigmoid()
        plain = torch.where(
            truth,
            -alpha * (1 - p) ** gamma * p.log(),
            -(1 - alpha) * p**gamma * (1 - p).log(),
        )
        found = losses.focal(logits, truth, alpha, gamma)
        torch.testing.assert_close(found, plain.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_and_its_gradient_are_finite_for_any_logit(gamma: float) -> None:
    logits = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).repeat(2, 1).requires_grad_()
    loss = losses.focal(logits, torch.tensor([[True], [False]]).expand(2, 5), 0.25, gamma)
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize(("divisor", "count"), [("positives", 1), ("positives+images", 2)])
def test_losses_by_hand(divisor: str, count: int) -> None:
    """Three anchors: one on the truth, one between the thresholds, one away from it."""
    retina = {"smooth_l1_beta": 0.0, "divisor": divisor}
    model = build(retina=retina, box={"regression_weight": 2.0})
    anchors = torch.tensor([[10.0, 10, 30, 30], [10, 10, 30, 19], [60, 60, 80, 80]])
    logits = torch.randn(1, 3, CLASSES)
    deltas = torch.randn(1, 3, 4)
    output = RetinaOutput(logits, deltas, anchors, [3])
    found = model.head.losses(output, [target([[10, 10, 30, 30]], [2])])
    p = logits.sigmoid()[0]
    wanted = 0.25 * (1 - p[0, 1]) ** 2 * -p[0, 1].log()
    others = torch.cat([p[0, [0, 2]], p[2]])
    wanted = wanted + (0.75 * others**2 * -(1 - others).log()).sum()
    torch.testing.assert_close(found["retina_class"], wanted / count)
    torch.testing.assert_close(found["retina_box"], 2 * deltas[0, 0].abs().sum())


def test_images_without_objects_count_in_the_divisor_alone() -> None:
    model = build(retina={"divisor": "positives+images"})
    anchors = torch.tensor([[10.0, 10, 30, 30], [60, 60, 80, 80]])
    output = RetinaOutput(torch.randn(2, 2, CLASSES), torch.zeros(2, 2, 4), anchors, [2])
    found = model.head.losses(output, [target([], [])] * 2)
    p = output.logits.sigmoid()
    wanted = (0.75 * p**2 * -(1 - p).log()).sum() / 2
    torch.testing.assert_close(found["retina_class"], wanted)
    assert found["retina_box"] == 0


def test_anchors_inside_a_crowd_are_no_background() -> None:
    model = build()
    anchors = torch.tensor([[10.0, 10, 30, 30], [60, 60, 80, 80]])
    output = RetinaOutput(torch.zeros(1, 2, CLASSES), torch.zeros(1, 2, 4), anchors, [2])
    free = model.head.losses(output, [target([], [])])["retina_class"]
    crowd = model.head.losses(output, [target([[5, 5, 40, 40]], [1], [True])])["retina_class"]
    torch.testing.assert_close(crowd, free / 2)


def test_every_class_starts_at_the_prior() -> None:
    model = build(retina={"prior": 0.02})
    data = batch(*some())
    output = model.head(model.features(data.images), (96, 128))
    assert abs(output.logits.sigmoid().mean().item() - 0.02) < 1e-3


def test_octaves_and_lists_of_sides() -> None:
    levels = ["p3", "p4"]
    octaves = resolve([{"anchors": {"sizes": [32, 64], "octave_scales": 3}}])
    lists = resolve([{"anchors": {"sizes": [32, 40, 50, 64, 80, 101]}}])
    root = 2 ** (1 / 3)
    expected = [(32, 32 * root, 32 * root**2), (64, 64 * root, 64 * root**2)]
    for found, wanted in zip(pyramid_sizes(octaves, levels), expected, strict=True):
        assert found == pytest.approx(wanted)
    assert pyramid_sizes(lists, levels) == [(32, 40, 50), (64, 80, 101)]
    with pytest.raises(ConfigError, match=r"one side for each of p3, p4, or as many for each"):
        pyramid_sizes(resolve([{"anchors": {"sizes": [32, 64, 128]}}]), levels)


def test_measured_strides_divide_the_image_by_the_map() -> None:
    """A height of 800 has 13 rows at stride 64; torchvision puts them 800 // 13 = 61 apart."""
    grid = AnchorGrid([64], [[32]], [1.0], measured=True)
    (anchors,) = grid([(13, 21)], image=(800, 1344))
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres[1].tolist() == [64, 0] and centres[21].tolist() == [0, 61]
    with pytest.raises(ValueError, match="need the size of the padded image"):
        grid([(13, 21)])


def test_levels_of_one_column_have_finite_bf16_gradients() -> None:
    levels = ConvolvedLevels("c5", FeatureSpec(64, 32), 64)
    single = torch.randn(2, 64, 1, 1, generator=torch.Generator().manual_seed(0))
    expected = levels.eval()({"c5": single})
    found = levels.train()({"c5": single})
    torch.testing.assert_close(found, expected)
    for _ in range(5):  # what was in memory before decides whether a wrong kernel is caught
        levels.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            sum(level.float().sum() for level in levels({"c5": single}).values()).backward()
        assert all(p.grad is not None and p.grad.abs().max() < 1e3 for p in levels.parameters())


def test_p6_is_convolved_as_it_is_and_p7_after_a_relu() -> None:
    extra = ConvolvedLevels("c5", FeatureSpec(2, 32), 2)
    for conv in extra.convs.values():
        nn.init.zeros_(conv.conv.weight)
        for i in range(2):
            conv.conv.weight.data[i, i, 1, 1] = 1  # every second cell
    neck = FPN({"c5": FeatureSpec(2, 32)}, 2, extra=extra)
    c5 = torch.randn(1, 2, 9, 9)
    levels = neck({"c5": c5})
    assert torch.equal(levels["p6"], c5[:, :, ::2, ::2])
    assert torch.equal(levels["p7"], c5[:, :, ::4, ::4].clamp(min=0))
    assert neck.feature_specs == {f"p{5 + i}": FeatureSpec(2, 32 << i) for i in range(3)}


# --- detections -----------------------------------------------------------------------------------


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_candidates_are_limited_per_level_and_suppressed_over_levels_per_class() -> None:
    model = build(retina={"pre_nms": 2}, box={"score_threshold": 0.3, "max_detections": 3})
    anchors = torch.tensor(
        [[10.0, 10, 30, 30], [60, 60, 500, 500], [70, 5, 80, 9], [11, 10, 31, 30], [0, 0, 9, 9]]
    )
    logits = torch.full((1, 5, CLASSES), -9.0)
    given = {(0, 0): 0.6, (1, 1): 0.9, (2, 0): 0.5, (3, 0): 0.7, (3, 2): 0.4, (4, 1): 0.3}
    for (row, column), p in given.items():
        logits[0, row, column] = _logit(p)
    output = RetinaOutput(logits, torch.zeros(1, 5, 4), anchors, [3, 2])
    (found,) = model.head.detect(output, torch.tensor([[90, 119]]))
    # of the first level the third is one too many; (3, 0) of the second suppresses (0, 0);
    # 0.3 does not pass the threshold
    assert found["labels"].tolist() == [2, 1, 3]
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.7, 0.4]))
    assert found["boxes"].tolist() == [[60, 60, 119, 90], [11, 10, 31, 30], [11, 10, 31, 30]]


def test_empty_boxes_stay_only_when_asked_for() -> None:
    anchors = torch.tensor([[130.0, 5, 150, 20], [5, 5, 20, 20]])
    output = RetinaOutput(torch.ones(1, 2, CLASSES), torch.zeros(1, 2, 4), anchors, [2])
    counts = {
        keep: len(
            build(box={"keep_empty": keep}).head.detect(output, torch.tensor([[90, 119]]))[0][
                "boxes"
            ]
        )
        for keep in (False, True)
    }
    assert counts == {False: CLASSES, True: 2 * CLASSES}


def test_boxes_come_in_pixels_of_the_file() -> None:
    model = build(box={"score_threshold": 0.0, "max_detections": 5}).eval()
    data = batch(*some())
    small = model.detect(data.images, data.sizes)
    large = model.detect(data.images, data.sizes, data.sizes * 3)
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a["boxes"] * 3, b["boxes"])


def test_overfits_two_images() -> None:
    torch.manual_seed(11)
    model = build(model={"head_norm": "gn"}).train()
    data = batch(*some())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(50):
        optimizer.zero_grad()
        total(model(data)).backward()
        optimizer.step()
    model.eval()
    for found, truth in zip(model.detect(data.images, data.sizes), data.targets, strict=True):
        for box, label in zip(truth.boxes, truth.labels, strict=True):
            near = (found["boxes"] - box).abs().amax(1) < 0.2 * (box[2:] - box[:2]).max() + 2
            assert (near & (found["labels"] == label) & (found["scores"] > 0.3)).any()


# --- weights and cost -----------------------------------------------------------------------------


def test_class_rows_are_kept_by_name_in_every_anchor() -> None:
    theirs, ours = CategoryMap(["cat", "dog", "cow"]), CategoryMap(["cow", "fox", "cat"])
    source, model = build(), build()
    state = source.state_dict()
    before = model.head.classes.out.bias.clone()
    nn.init.normal_(source.head.classes.out.bias)
    report = init_detector(model, state, "x", theirs=theirs, ours=ours)
    assert report.kept == ("cow", "cat") and report.fresh == ("fox",)

    def rows(values: Tensor) -> Tensor:
        return values.detach().unflatten(0, (9, 3))

    for part in ("weight", "bias"):
        found, given = (rows(m.head.classes.out.get_parameter(part)) for m in (model, source))
        assert torch.equal(found[:, 0], given[:, 2]) and torch.equal(found[:, 2], given[:, 0])
    assert torch.equal(rows(model.head.classes.out.bias)[:, 1], rows(before)[:, 1])
    two = CategoryMap(["cat", "dog"])
    with pytest.raises(CheckpointError, match="must have just the weights of the model"):
        init_detector(model, {}, "x", theirs=two, ours=ours)


def test_size_equals_torchvisions(tv: ModuleType) -> None:
    with torch.device("meta"):
        peer = tv.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    tables = {"model": {"detector": "retinanet"}, "retina": {"p6_from": "p5"}}
    parts = count_detector(resolve([tables]), 91, 800, 1344)
    assert set(parts) == {"total", "backbone", "neck", "head"}
    assert parts["total"].params == sum(p.numel() for p in peer.parameters()) == 34_068_119
    assert parts["neck"].macs + parts["head"].macs + parts["backbone"].macs == parts["total"].macs


def test_the_tiny_recipe_has_anchors_for_its_objects() -> None:
    tiny = resolve([read_toml(recipe_path("tiny/retinanet"))])
    with torch.device("meta"):
        model = build_detector(tiny, CLASSES)
    assert model.head.grid.per_cell == [9] * 5
    sides = [
        side for level in pyramid_sizes(tiny, list(model.neck.feature_specs)) for side in level
    ]
    assert min(sides) <= 20 and max(sides) >= 300
