"""The scale learner and its insertion: what it computes at the start, learns, freezes, refuses."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from scale_nets import Block, ThirdPartyNet, in_body
from torch import Tensor, nn
from torch.nn import functional as F

from detkit.config import OptimConfig, resolve
from detkit.engine.optimizer import build_optimizer
from detkit.errors import ConfigError
from detkit.models import DETECTORS, build_backbone, build_detector
from detkit.models.count import count_classifier, macs_by_module
from detkit.models.heads.roi import Align, RoiPooler
from detkit.ops import scaled_conv2d
from detkit.scales import (
    FixedScaleConv2d,
    GlobalScaleConv2d,
    ScaleLayer,
    follow_pooler,
    images_of_rows,
    insert,
    latest_scales,
    layers_of,
    learners,
)
from detkit.scales.learner import MAPS, ScaleWarning
from detkit.types import Batch, FeatureSpec, Target


def conv(stride: int = 1, groups: int = 1, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(4, 8, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=bias)


def trained(learner: GlobalScaleConv2d, spread: float = 0.5) -> GlobalScaleConv2d:
    """``learner`` with predictor weights away from the start."""
    nn.init.normal_(learner.scale.weight, std=spread)
    nn.init.normal_(learner.scale.bias, std=spread)
    return learner


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"stride": 2},
        {"groups": 4},
        {"dilation": 2},
        {"dilation": 3, "stride": 2, "bias": False},
    ],
)
def test_a_fresh_learner_is_the_convolution(map: str, shape: dict[str, int]) -> None:
    """Scale exactly 1 times the dilation for any input; same parameters under the same names."""
    plain = conv(**shape)
    learner = GlobalScaleConv2d(plain, map=map)
    x = torch.randn(3, 4, 13, 14) * 100
    y = learner(x)
    assert torch.equal(learner.last_scales, torch.full((3, 2), float(plain.dilation[0])))
    assert torch.allclose(y, plain(x), rtol=1e-5, atol=1e-4)  # inputs are of size 100
    assert learner.weight is plain.weight and learner.bias is plain.bias
    assert learner.state_dict().keys() - {"scale.weight", "scale.bias"} == plain.state_dict().keys()


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_are_one_at_zero_and_smooth_there(map: str, dtype: torch.dtype) -> None:
    r = torch.zeros(37, 2, dtype=dtype, requires_grad=True)
    scale = MAPS[map](r)
    assert torch.equal(scale, torch.ones_like(scale))
    (slope,) = torch.autograd.grad(scale.sum(), r)
    expected = 1.0 if map != "softplus" else 1 - 1 / math.e
    assert torch.allclose(slope, torch.full_like(slope, expected), atol=1e-6)


def test_maps_reach_the_papers_range() -> None:
    """0.46 and 9.34 at the numbers of the specification; elu1 and softplus stay positive."""
    for map, low, high in (
        ("elu1", -0.777, 8.34),
        ("linear", -0.54, 8.34),
        ("softplus", -1.079, 8.80),
    ):
        found = MAPS[map](torch.tensor([low, high]))
        assert torch.allclose(found, torch.tensor([0.46, 9.34]), atol=5e-3)
    far = torch.tensor([-30.0, -5.0])
    assert bool((MAPS["elu1"](far) > 0).all()) and bool((MAPS["softplus"](far) > 0).all())


def test_the_learner_follows_its_definition() -> None:
    """Mean, linear, map, times the dilation (2, 1), h before w; gradients as by hand."""
    plain = nn.Conv2d(4, 8, 3, padding=(2, 1), dilation=(2, 1)).double()
    learner = trained(GlobalScaleConv2d(plain))
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64, requires_grad=True)
    r = x.mean((2, 3)) @ learner.scale.weight.T + learner.scale.bias
    scales = torch.where(r > 0, 1 + r, r.exp()) * torch.tensor([2.0, 1.0], dtype=torch.float64)
    expected = scaled_conv2d(x, plain.weight, scales, plain.bias)
    found = learner(x)
    assert torch.allclose(found, expected) and torch.allclose(learner.last_scales, scales)
    assert not torch.allclose(scales[0], scales[1]), "one scale per sample"
    inputs = (x, plain.weight, plain.bias, learner.scale.weight, learner.scale.bias)
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)]
    assert all(torch.allclose(a, b) for a, b in zip(*grads, strict=True))


def test_scales_stay_float32_under_autocast() -> None:
    learner = trained(GlobalScaleConv2d(conv()))
    x = torch.randn(2, 4, 9, 9)
    exact = learner.scales(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = learner(x)
        assert torch.equal(learner.scales(x), exact)
    assert found.dtype == torch.bfloat16 and learner.last_scales.dtype == torch.float32


def test_half_precision_weights() -> None:
    learner = trained(GlobalScaleConv2d(conv())).bfloat16()
    x = torch.randn(2, 4, 9, 9, dtype=torch.bfloat16)
    assert learner(x).dtype == torch.bfloat16 and learner.last_scales.dtype == torch.float32


@pytest.mark.parametrize("map", ["elu1", "softplus"])
def test_learns_a_scale(map: str) -> None:
    """Gradient descent on the predictor finds the scale that made the targets, h and w apart."""
    smooth = F.avg_pool2d(torch.randn(3, 4, 28, 28), 5, 1)
    plain = nn.Conv2d(4, 8, 3, padding=1).requires_grad_(False)
    target = scaled_conv2d(smooth, plain.weight, torch.tensor([2.3, 0.6]), plain.bias)
    learner = GlobalScaleConv2d(plain, map=map)
    learner.scale.requires_grad_(True)
    optimizer = torch.optim.Adam(learner.scale.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        (learner(smooth) - target).square().mean().backward()
        optimizer.step()
    goal = torch.tensor([2.3, 0.6]).expand(3, 2)
    assert torch.allclose(learner.last_scales, goal, atol=0.06)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_never_waits_for_the_device() -> None:
    """Reading a scale on the host would stall every layer of every step."""
    model = nn.Sequential(
        GlobalScaleConv2d(conv()), GlobalScaleConv2d(nn.Conv2d(8, 4, 3, padding=1))
    ).cuda()
    x = torch.randn(2, 4, 16, 16, device="cuda")
    for mode in (0, 2):  # once to warm up, then a wait is an error
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                y = model(x)
            y.float().square().mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode(0)
    assert model[0].last_scales.dtype == torch.float32


def test_weight_decay_pulls_to_scale_one() -> None:
    """A predictor without gradient decays to the start; its bias too, where biases are decayed."""
    model = nn.Sequential(trained(GlobalScaleConv2d(conv())))
    x = torch.randn(1, 4, 6, 6)
    before = (learners(model)["0"].scales(x).detach() - 1).abs()
    optimizer = build_optimizer(
        model, OptimConfig(weight_decay=0.2, lr=1.0, momentum=0.0, norm_decay=True), 16
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(20):
        optimizer.step()
    after = (learners(model)["0"].scales(x).detach() - 1).abs()
    assert bool((after < 0.1 * before).all())


def test_he_start_is_around_one() -> None:
    """The paper's initialisation as an option: random, but not around 0, where taps coincide."""
    wide = nn.Conv2d(512, 1, 3, padding=1)
    learner = GlobalScaleConv2d(wide, init="he")
    assert float(learner.scale.weight.detach().std()) == pytest.approx(math.sqrt(2 / 512), rel=0.1)
    scales = learner.scales(torch.randn(2000, 512, 1, 1) / 16)
    assert float(scales.detach().median()) == pytest.approx(1, abs=0.02)


def test_scales_are_held_at_the_limit_with_one_warning() -> None:
    learner = GlobalScaleConv2d(conv(), max_scale=4.0)
    nn.init.constant_(learner.scale.bias, 10.0)
    x = torch.randn(1, 4, 9, 9)
    with pytest.warns(ScaleWarning, match="11 pixels"):
        learner(x)
    assert learner.last_scales.tolist() == [[4.0, 4.0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(x)
        free = GlobalScaleConv2d(conv(), max_scale=None)
        nn.init.constant_(free.scale.bias, 40.0)
        free(x)
    assert free.last_scales.tolist() == [[41.0, 41.0]]
    with pytest.raises(ValueError, match="max_scale"):
        GlobalScaleConv2d(conv(dilation=3), max_scale=2.0)


def test_one_scale_per_image_over_its_rows() -> None:
    """RoIs of an image share the scale of their mean; a NaN RoI stays in its image; no RoIs."""
    learner = trained(GlobalScaleConv2d(conv(), scale_group="image"))
    rows = torch.tensor([0, 2, 0, 2, 2])
    x = torch.randn(5, 4, 7, 7)
    with pytest.raises(ValueError, match="images_of_rows"):
        learner(x)
    with images_of_rows(learner, rows, 4):
        y = learner(x)
        scales = learner.last_scales
    alone = trained(GlobalScaleConv2d(conv()))
    alone.load_state_dict(learner.state_dict())
    means = torch.stack([x[rows == i].mean(0) for i in (0, 2)])
    expected = alone.scales(means)
    assert torch.allclose(scales, expected[[0, 1, 0, 1, 1]], atol=1e-6)
    assert torch.allclose(y, scaled_conv2d(x, learner.weight, scales, learner.bias), atol=1e-6)
    with images_of_rows(learner, rows, 3):
        bad = x.clone()
        bad[0] = math.nan
        assert learner.scales(bad)[rows == 2].isfinite().all()
        with pytest.raises(ValueError, match="name 3 rows"):
            learner(x[:3])
    with images_of_rows(learner, rows[:0], 2):
        assert learner(x[:0]).shape == (0, 8, 7, 7)
    with pytest.raises(ValueError, match="images_of_rows"):
        learner(x)


def test_a_pooler_names_the_images() -> None:
    """Also in a deep copy, whose pooler must serve the copied learner."""
    head = nn.ModuleDict({"conv": Block(4, 8)})
    pooler = RoiPooler({"p4": FeatureSpec(4, 16)}, Align(7, 2, True))
    model = nn.ModuleDict({"head": head, "pooler": pooler})
    with pytest.raises(ValueError, match="scale_group"):
        follow_pooler(model, pooler)
    insert(model, in_any, scale_group="image")
    follow_pooler(model, pooler)
    clone = copy.deepcopy(model)
    features = {"p4": torch.randn(2, 4, 10, 10)}
    rois = torch.tensor([[0, 0, 0, 50, 50], [1, 10, 10, 90, 90], [1, 0, 0, 40, 80]]).float()
    for one in (clone, model):
        trained(one["head"]["conv"].conv)
        one["head"]["conv"](one["pooler"](features, rois))
        scales = one["head"]["conv"].conv.last_scales
        assert torch.equal(scales[1], scales[2]) and not torch.equal(scales[0], scales[1])


def in_any(path: str, _: nn.Conv2d) -> bool:
    return True


@pytest.mark.parametrize(
    ("scale", "plain"),
    [
        ((2.0, 3.0), True),
        ((0.46, 0.89), True),
        ((1.0, 0.3), True),
        ((2.0, 0.7), True),
        ((1.3, 0.7), False),
        ((8.49, 9.34), False),
    ],
)
@pytest.mark.parametrize("groups", [1, 4])
def test_frozen_scales(scale: tuple[float, float], plain: bool, groups: int) -> None:
    """Whole numbers and folds below 1 are plain convolutions, all are the sampled convolution."""
    learner = GlobalScaleConv2d(conv(2, groups)).double()
    x = torch.randn(2, 4, 21, 22, dtype=torch.float64)
    fixed = torch.tensor(scale, dtype=torch.float64)
    expected = scaled_conv2d(x, learner.weight, fixed, learner.bias, 2, groups)
    frozen = learner.freeze(scale)
    assert isinstance(frozen, nn.Conv2d if plain else FixedScaleConv2d)
    assert torch.allclose(frozen(x), expected, atol=1e-12)
    assert frozen.weight.data_ptr() != learner.weight.data_ptr()
    with pytest.raises(ValueError, match="two finite numbers"):
        learner.freeze((math.nan, 1.0))


# --- inserting ----------------------------------------------------------------------------------


def test_insert_into_a_foreign_network() -> None:
    """Strided, grouped, dilated and depthwise convolutions: chosen ones are replaced, the network
    computes what it did, gradients reach the predictors, state-dict keys stay."""
    model = ThirdPartyNet().eval()
    x = torch.randn(2, 3, 33, 40)
    before, keys = model(x), set(model.state_dict())
    layers = insert(model, in_body)
    assert [layer.path for layer in layers] == [f"body.{i}.conv" for i in range(5)]
    assert [layer.label for layer in layers] == [layer.path for layer in layers]
    assert [layer.groups for layer in layers] == [1, 1, 4, 1, 12]
    assert layers[1].stride == (2, 2) and layers[3].dilation == (2, 2)
    assert layers == layers_of(model)
    assert [ScaleLayer.from_plain(json.loads(json.dumps(e.to_plain()))) for e in layers] == layers
    assert type(model.last) is nn.Conv2d and type(model.stem[0]) is nn.Conv2d
    assert (model(x) - before).abs().max() <= 1e-5
    assert keys < set(model.state_dict())
    model(x).square().mean().backward()
    for learner in learners(model).values():
        assert learner.scale.weight.grad.abs().sum() > 0
    scales = latest_scales(model)
    assert scales["body.0.conv"] == (1.0, 1.0) and scales["body.3.conv"] == (2.0, 2.0)


@pytest.mark.parametrize(
    ("name", "count", "labels"),
    [
        ("resnet50", 13, "R31 R32 R33 R34 R41 R42 R43 R44 R45 R46 R51 R52 R53"),
        ("resnet101", 30, "R31 R32 R33 R34 R41"),
        ("detnet59", 16, "R31 R32 R33 R34 R41 R42 R43 R44 R45 R46 R51 R52 R53 R61 R62 R63"),
        ("resnet50-tiny", 12, "R31a R31b R32a R32b R41a R41b R42a R42b R51a R51b R52a R52b"),
    ],
)
def test_default_selection(name: str, count: int, labels: str) -> None:
    """The 3x3 convolutions of conv3 to conv5 (POD section 4.1), those of stride 2 included."""
    with torch.device("meta"):
        backbone = build_backbone(name)
        before = sum(p.numel() for p in backbone.parameters())
        layers = insert(backbone)
    assert len(layers) == count
    assert [layer.label for layer in layers][: len(labels.split())] == labels.split()
    assert all(layer.part == "backbone" for layer in layers)
    added = sum(p.numel() for p in backbone.parameters()) - before
    assert added == sum(2 * layer.channels[0] + 2 for layer in layers)
    if name.startswith("resnet") and "tiny" not in name:
        assert added == {"resnet50": 7194, "resnet101": 15932}[name]
        assert [layer.label for layer in layers if layer.stride == (2, 2)] == ["R31", "R41", "R51"]
    if name == "detnet59":
        assert {layer.dilation for layer in layers if layer.label >= "R5"} == {(2, 2)}


@pytest.mark.parametrize("name", ["detnet59-tiny", "resnet50-tiny"])
def test_a_backbone_computes_the_same_with_fresh_learners(name: str) -> None:
    backbone = build_backbone(name, norm="bn").eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):  # a fresh block is its shortcut, whatever is inside
            nn.init.uniform_(module.weight, 0.7, 1.0)
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        before = backbone(x)
        insert(backbone)
        for level, found in backbone(x).items():
            assert (found - before[level]).abs().max() <= 1e-5 * before[level].max()


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_takes_learners(name: str) -> None:
    """All stages from conv3 on, wherever they are: Faster R-CNN on C4 has conv5 in its head."""
    config = resolve([{"model": {"detector": name, "backbone": "detnet59"}}])
    with torch.device("meta"):
        layers = insert(build_detector(config, 3))
    assert [f"{layer.label}" for layer in layers] == [
        f"R{stage}{block}"
        for stage, count in zip("3456", (4, 6, 3, 3), strict=True)
        for block in range(1, count + 1)
    ]
    heads = {layer.label[:2] for layer in layers if layer.part == "head"}
    assert heads == ({"R5", "R6"} if name == "frcnn-c4" else set())


def test_a_scale_per_image_in_the_head_on_c4() -> None:
    """Losses and detections run, RoIs of one image share a scale, those of two do not."""
    changes = {
        "model": {"detector": "frcnn-c4", "backbone": "resnet50-tiny", "norm": "gn"},
        "rpn": {"post_nms_train": 20, "post_nms_test": 8},
    }
    model = build_detector(resolve([changes]), 3)
    layers = insert(model, scale_group="image")
    assert {e.part: e.scale_group for e in layers} == {"backbone": "sample", "head": "image"}
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):  # blocks start as their shortcut, without gradients
            nn.init.ones_(module.weight)
        if isinstance(module, GlobalScaleConv2d):
            trained(module, 0.2)
    truth = Target(torch.tensor([[8.0, 8, 60, 60]]), torch.tensor([1]), torch.tensor([False]))
    images = torch.randn(2, 3, 96, 128)
    sizes = torch.tensor([[96, 128], [96, 128]])
    sum(model(Batch(images, sizes, [truth, truth])).values()).backward()
    head = [m for p, m in learners(model).items() if p.startswith("head.")]
    assert all(m.scale.weight.grad.abs().sum() > 0 for m in head)
    model.eval().detect(images, sizes)
    for learner in head:
        assert len(learner.last_scales) == 16
        assert len(learner.last_scales.unique(dim=0)) == 2
    meta, image = model.to("meta"), torch.empty(1, 3, 96, 128, device="meta")
    assert set(head) < macs_by_module(meta, lambda: meta.run_layers(image, 10)).keys()


def test_frozen_stages_stay_frozen() -> None:
    backbone = build_backbone("resnet50-tiny", norm="bn", frozen_stages=3)
    insert(backbone)
    frozen = {p for p, m in learners(backbone).items() if not m.scale.weight.requires_grad}
    assert frozen == {p for p in learners(backbone) if p.startswith("layer2")}


def test_a_shared_convolution_is_replaced_everywhere() -> None:
    shared = conv(bias=False)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    assert [layer.path for layer in insert(model, ["a.0"])] == ["a.0"]
    assert model["a"][0] is model["b"][0] and isinstance(model["b"][0], GlobalScaleConv2d)


class _Fancy(nn.Conv2d):
    pass


def test_refusals_name_the_layer_and_replace_nothing() -> None:
    cases = {
        "padding": nn.Conv2d(4, 4, 3, padding=0),
        "same needs dilation": nn.Conv2d(4, 4, 3, padding=1, dilation=2),
        "circular": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        "subclass": _Fancy(4, 4, 3, padding=1),
        "parametrized": torch.nn.utils.parametrizations.weight_norm(conv()),
    }
    for name, wrong in cases.items():
        model = nn.ModuleDict({"good": conv(), "bad": wrong})
        with pytest.raises(ValueError, match="bad: "):
            insert(model, in_any)
        assert type(model["good"]) is nn.Conv2d, name
    hooked = nn.ModuleDict({"bad": conv()})
    hooked["bad"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="bad: must have no hooks"):
        insert(hooked, in_any)
    with pytest.raises(ConfigError, match="last.conv"):
        insert(ThirdPartyNet(), ["body.0.conv", "last.conv"])
    with pytest.raises(ConfigError, match="got none; give select"):
        insert(ThirdPartyNet())
    with pytest.raises(ConfigError, match="convolution itself"):
        insert(conv(), in_any)
    for option, value in (("map", "elu"), ("init", "He"), ("scale_group", "images")):
        with pytest.raises(ConfigError, match=f"{option}: .*did you mean"):
            insert(ThirdPartyNet(), in_body, **{option: value})


def test_same_padding_is_taken() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding="same", dilation=2))
    x = torch.randn(1, 3, 9, 9)
    before = model(x)
    insert(model, ["0"])
    assert torch.allclose(model(x), before, atol=1e-6)


def test_costs_are_counted() -> None:
    """The sampled convolution costs what it replaced, the predictor 2 C per image."""
    with torch.device("meta"):
        plain, learning = build_backbone("resnet50"), build_backbone("resnet50")
        layers = insert(learning)
    before, after = count_classifier(plain)["total"], count_classifier(learning)["total"]
    added = sum(2 * layer.channels[0] for layer in layers)
    assert after.macs == before.macs + added and after.convs == before.convs
    assert after.params == before.params + 7194

    frozen = GlobalScaleConv2d(conv()).freeze((1.5, 1.5))
    counted = macs_by_module(frozen, lambda: frozen(torch.randn(1, 4, 5, 5)))
    assert counted == {frozen: 25 * 8 * 4 * 9}


def test_compiles_and_exports() -> None:
    learner = trained(GlobalScaleConv2d(conv())).eval()
    x = torch.randn(2, 4, 9, 9)
    expected = learner(x)
    compiled = torch.compile(learner, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), expected)
    exported = torch.export.export(learner, (x,)).module()
    assert torch.allclose(exported(x), expected)


def test_latest_scales_average_the_rows() -> None:
    model = nn.Sequential(trained(GlobalScaleConv2d(conv())))
    assert latest_scales(model) == {}
    model(torch.randn(3, 4, 8, 8))
    mean: Tensor = model[0].last_scales.double().mean(0)
    assert latest_scales(model)["0"] == pytest.approx(tuple(mean.tolist()))
    assert F.relu(mean).min() > 0 and "last_scales" not in model.state_dict()
