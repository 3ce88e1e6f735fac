"""Folding changes no output: every backbone, detectors, foreign networks; and what it leaves."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from detectors import ONE_STAGE, PYRAMIDS
from torch import Tensor, nn

from detkit import ops
from detkit.config import resolve
from detkit.deploy.fast import fast
from detkit.deploy.fold import fold
from detkit.models import norm as model_norm
from detkit.models.backbones.resnet import Bottleneck
from detkit.models.necks.large_separable import LargeSeparableConv
from detkit.models.norm import FrozenBatchNorm2d, SyncBatchNorm2d, normalise_rows
from detkit.models.zoo import BACKBONES, DETECTORS, build_backbone, build_detector
from detkit.scales import GlobalScaleConv2d, SplitConv2d, insert, learners
from detkit.scales import learner as scales_learner
from detkit.scales import split as scales_split
from detkit.scales.decompose import Part
from detkit.scales.split import split

BatchNorm = nn.modules.batchnorm._BatchNorm


def randomised(model: nn.Module) -> nn.Module:
    """The model with statistics, scales and shifts as training leaves them, all different."""
    for module in model.modules():
        if isinstance(module, BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.3, 3)
            if module.affine:
                with torch.no_grad():
                    module.weight.uniform_(0.4, 1.2).mul_(
                        torch.randint_like(module.weight, 2) * 2 - 1
                    )
                    module.bias.normal_(std=0.3)
    return model.eval()


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, BatchNorm)]


def assert_folds(model: nn.Module, x: Tensor, left: int = 0) -> nn.Module:
    """Every norm but ``left`` is gone, the output is the same, the model untouched."""
    randomised(model)
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    assert len(norms_of(folded)) == left
    assert len(norms_of(model)) > left, "there was nothing to fold"
    with torch.no_grad():
        expected, got = model(x), folded(x)
    assert not folded.training
    assert_close(got, expected)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    return folded


def assert_close(got: object, expected: object) -> None:
    """Within 1e-4 of the largest value; dicts level by level."""
    if isinstance(expected, dict):
        assert isinstance(got, dict)
        assert got.keys() == expected.keys()
        for key in expected:
            assert_close(got[key], expected[key])
        return
    assert isinstance(got, Tensor)
    assert isinstance(expected, Tensor)
    scale = expected.abs().max()
    assert scale > 1e-3, "the comparison must see something"
    assert (got - expected).abs().max() < 1e-4 * scale


# --- our models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name: str) -> None:
    assert_folds(build_backbone(name, "bn"), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("norm", ["frozen_bn", "sync_bn"])
def test_every_kind_of_our_batch_norms(norm: str) -> None:
    folded = assert_folds(build_backbone("detnet59-tiny", norm), torch.randn(1, 3, 64, 64))
    assert isinstance(folded.bn1, nn.Identity)
    assert folded.conv1.bias is not None


@pytest.mark.parametrize("detector", DETECTORS)
def test_detectors_detect_the_same(detector: str) -> None:
    """With batch norm everywhere, in neck and heads too; the same boxes, labels and scores."""
    names = {"detector": detector, "backbone": "resnet50-tiny", "norm": "bn", "head_norm": "bn"}
    layers = [{"model": names, "box": {"max_detections": 20}}]
    if detector in PYRAMIDS:
        layers.append({"model": {"neck_channels": 32}})
    if detector not in ONE_STAGE:
        channels = 0 if detector in ("rfcn", "frcnn-c4") else 64
        layers.append({"box": {"channels": channels}, "rpn": {"post_nms_test": 100}})
    model = randomised(build_detector(resolve(layers), 3))
    for name, parameter in model.named_parameters():
        if "classes" in name or "objectness" in name:
            nn.init.normal_(parameter, std=0.1)  # scores far apart: no ties to fall either way
    folded = fold(model)
    separable = [m for m in model.modules() if isinstance(m, LargeSeparableConv)]
    assert len(norms_of(folded)) == len(separable), "a norm of its two branches' sum stays"
    sizes = torch.tensor([[128, 160], [100, 140]])
    images = torch.randn(2, 3, 128, 160)
    with torch.no_grad():
        found = zip(model.detect(images, sizes), folded.detect(images, sizes), strict=True)
        for expected, got in found:
            assert len(expected["boxes"]) > 10
            assert torch.equal(got["labels"], expected["labels"])
            torch.testing.assert_close(got["boxes"], expected["boxes"], rtol=0, atol=0.01)
            torch.testing.assert_close(got["scores"], expected["scores"], rtol=0, atol=1e-4)


def test_the_fast_form_stays_channels_last_and_detects_the_same() -> None:
    """No map goes back to another layout on its way to the heads."""
    names = {"detector": "frcnn-fpn", "backbone": "resnet50-tiny", "norm": "bn"}
    small = {"model": {**names, "neck_channels": 32}, "box": {"channels": 64}}
    model = randomised(build_detector(resolve([small]), 3))
    quick = fast(model)
    images, sizes = torch.randn(1, 3, 128, 160), torch.tensor([[128, 160]])
    with torch.no_grad():
        maps = quick.features(images)
        (expected,), (got,) = model.detect(images, sizes), quick.detect(images, sizes)
    for x in (maps["p2"], maps["p5"], maps["p6"]):
        assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert not norms_of(quick)
    assert len(expected["boxes"]) > 10
    assert torch.equal(got["labels"], expected["labels"])
    torch.testing.assert_close(got["boxes"], expected["boxes"], rtol=0, atol=0.01)
    torch.testing.assert_close(got["scores"], expected["scores"], rtol=0, atol=1e-4)


# --- learnt scales --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "per_group"), [(1, 8), (8, 2), (8, 1)], ids=["dense", "grouped", "depthwise"]
)
@pytest.mark.parametrize(
    "parts",
    [
        [((1, 2), 3), ((2, 3), 5)],
        [((0, 0), 5), ((1, 1), 3)],
        [((0, 1), 2), ((1, 0), 6)],
        [((1, 1), 2), ((1, 2), 2), ((2, 1), 2), ((2, 2), 2)],
    ],
    ids=["3x3", "1x1", "1x3 and 3x1", "four"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_split_convolutions(
    groups: int, per_group: int, parts: list[tuple[tuple[int, int], int]], bias: bool
) -> None:
    """Whatever the kernels of the parts: each takes its own channels of the norm."""
    channels = groups * per_group
    conv = nn.Conv2d(channels, channels, 3, 2, 1, groups=groups, bias=bias)
    layer = split(conv, [Part(reach, n * channels // 8) for reach, n in parts])
    assert isinstance(layer, SplitConv2d)
    model = nn.Sequential(nn.Identity(), layer, nn.BatchNorm2d(channels), nn.ReLU())
    folded = assert_folds(model, torch.randn(2, channels, 9, 11))
    assert type(folded[1]) is SplitConv2d
    assert not any(p.requires_grad for p in folded.parameters())


@pytest.mark.parametrize("frozen", [None, (1.4, 0.7), (0.3, 0.9)])
def test_convolutions_with_scales(frozen: tuple[float, float] | None) -> None:
    """The predictor sees what it saw before: it looks at the input of its convolution."""
    learner = GlobalScaleConv2d(nn.Conv2d(6, 9, 3, padding=1, groups=3, bias=False))
    nn.init.normal_(learner.scale.weight)
    layer = learner.freeze(frozen) if frozen else learner
    model = nn.Sequential(layer, FrozenBatchNorm2d(9))
    folded = assert_folds(model, torch.randn(3, 6, 9, 11))
    assert type(folded[0]) is type(layer)
    assert folded[0].bias is not None


@pytest.mark.parametrize("kind", ["split", "learnt", "plain"])
def test_a_folded_block_ends_its_convolution_with_the_relu(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One operator for convolution, norm and ReLU; on CUDA for a dilated plain convolution too."""
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object, **settings: object) -> Tensor:
            calls.append(name + " relu" * bool(settings.get("relu")))
            return function(*args, **settings)

        return call

    conv = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False).double()
    block = randomised(Bottleneck(8, 8, 8, 1, 2, False, nn.BatchNorm2d, True)).double()
    if kind == "split":
        block.conv2 = split(conv, [Part((1, 1), 3), Part((2, 2), 5)])
    elif kind == "learnt":
        block.conv2 = GlobalScaleConv2d(conv)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    expected, folded = block.eval()(x), fold(block)
    monkeypatch.setattr(scales_split, "split_conv2d", counted("split", ops.split_conv2d))
    monkeypatch.setattr(scales_learner, "scaled_conv2d", counted("learnt", ops.scaled_conv2d))
    monkeypatch.setattr(model_norm, "dilated_conv2d", counted("plain", ops.dilated_conv2d))
    monkeypatch.setattr(model_norm, "may_choose", lambda x: True)  # as on CUDA
    assert_close(folded(x), expected)
    assert calls == [f"{kind} relu"]
    folded.conv2.register_forward_hook(lambda *_: None)  # it is to see what it saw before
    assert_close(folded(x), expected)
    assert calls[1:] == ([] if kind == "plain" else [kind])


def test_learners_in_a_detector_keep_their_images() -> None:
    """The head's learners are told by the pooler which image a row is of; folding must not cut
    that.
    """
    config = {"detector": "frcnn-c4", "backbone": "resnet50-tiny", "norm": "bn"}
    model = build_detector(resolve([{"model": config, "rpn": {"post_nms_test": 20}}]), 3)
    insert(model, scale_group="image")
    for name, parameter in randomised(model).named_parameters():
        if ".scale." in name or "classes" in name or "objectness" in name:
            nn.init.normal_(parameter, std=0.1)
    folded = fold(model)
    assert norms_of(folded) == []
    sizes, images = torch.tensor([[96, 128], [90, 100]]), torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        found = zip(model.detect(images, sizes), folded.detect(images, sizes), strict=True)
        for expected, got in found:
            assert len(expected["boxes"]) > 10
            assert torch.equal(got["labels"], expected["labels"])
            torch.testing.assert_close(got["boxes"], expected["boxes"], rtol=0, atol=0.01)
    scales = [[m.last_scales for m in learners(net).values()] for net in (model, folded)]
    for before, after in zip(*scales, strict=True):
        assert before.std() > 1e-3, "the scales must differ"
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


# --- others' models -------------------------------------------------------------------------------


class Block(nn.Module):
    """As most of the field writes it: names in pairs, an optional shortcut."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample = None
        if stride > 1 or cin != cout:
            conv = nn.Conv2d(cin, cout, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return torch.relu(out)


def test_a_foreign_residual_network() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    stages = [nn.Sequential(Block(8, 8, 1), Block(8, 8, 1)), Block(8, 16, 2), Block(16, 32, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10), nn.BatchNorm1d(10)]
    model = nn.Sequential(stem, *stages, *head)
    folded = assert_folds(model, torch.randn(4, 3, 64, 64))
    assert not [p for p in folded.get_submodule("0").parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 12, 3, groups=4, padding=1, bias=False),
        nn.Conv2d(8, 8, 3, groups=8, padding=2, dilation=2),
        nn.Conv2d(8, 6, (3, 5), stride=2, padding="valid", bias=True),
        nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 6, 3, padding="same", padding_mode="circular", dilation=3),
    ],
    ids=["grouped", "depthwise dilated", "bias", "reflect", "circular"],
)
@pytest.mark.parametrize("affine", [True, False])
def test_any_convolution(conv: nn.Conv2d, affine: bool) -> None:
    norm = nn.BatchNorm2d(conv.out_channels, eps=0.01, affine=affine)
    model = nn.Sequential(copy.deepcopy(conv), norm).double()
    folded = assert_folds(model, torch.randn(2, 8, 16, 16, dtype=torch.float64))
    x = torch.randn(1, 8, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert folded[0].weight.dtype == torch.float64


def test_the_rule_by_hand() -> None:
    """W' = 2 * 3 / sqrt(3 + 1) = 3; b' = 0.5 + (4 - 1) * 3 / 2 = 5."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=1)).eval()
    values = {"0.weight": 2.0, "0.bias": 4.0, "1.weight": 3.0, "1.bias": 0.5}
    values |= {"1.running_mean": 1.0, "1.running_var": 3.0}
    for name, value in values.items():
        model.state_dict()[name].fill_(value)
    folded = fold(model)
    assert (folded[0].weight.item(), folded[0].bias.item()) == (3.0, 5.0)


class Wired(nn.Module):
    """A convolution and a norm of equal widths under the usual names, wired by a function."""

    def __init__(self, wire: Callable[[Wired, Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        for name, module in more.items():
            self.add_module(name, module)
        self.wire = wire

    def forward(self, x: Tensor) -> Tensor:
        return self.wire(self, x)


def in_order(m: Wired, x: Tensor) -> Tensor:
    return m.bn1(m.conv1(x))


def norm_first(m: Wired, x: Tensor) -> Tensor:
    return m.conv1(torch.relu(m.bn1(x)))


def output_seen_twice(m: Wired, x: Tensor) -> Tensor:
    y = m.conv1(x)
    return m.bn1(y) + y


def norm_used_twice(m: Wired, x: Tensor) -> Tensor:
    return m.bn1(torch.relu(m.bn1(m.conv1(x))))


def convolution_used_without_norm(m: Wired, x: Tensor) -> Tensor:
    return m.bn1(m.conv1(x)) + m.conv1(-x)


def together_twice(m: Wired, x: Tensor) -> Tensor:
    return m.bn1(m.conv1(torch.relu(m.bn1(m.conv1(x)))))


def value_dependent(m: Wired, x: Tensor) -> Tensor:
    return m.bn1(m.conv1(x)) if x.sum() > 0 else x


def through_a_list(m: Wired, x: Tensor) -> Tensor:
    for conv, norm in zip(m.convs, m.norms, strict=True):
        x = norm(conv(x))
    return m.bn1(m.conv1(x))


@pytest.mark.parametrize(
    ("wire", "left", "reason"),
    [
        (in_order, 0, ""),
        (together_twice, 0, ""),
        (norm_first, 1, "it does not follow a single convolution or linear layer: bn1"),
        (output_seen_twice, 1, "it does not follow a single convolution or linear layer: bn1"),
        (norm_used_twice, 1, "it does not follow a single convolution or linear layer: bn1"),
        (convolution_used_without_norm, 1, "it does not follow a single convolution"),
        (value_dependent, 1, "the forward of Wired cannot be followed"),
    ],
)
def test_pairs_are_what_the_data_says_and_not_the_names(
    wire: Callable[[Wired, Tensor], Tensor],
    left: int,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A pre-activation block has the same names as a plain one: folding it would be wrong."""
    with caplog.at_level(logging.WARNING, logger="detkit"):
        model = randomised(Wired(wire))
        x = torch.randn(2, 4, 8, 8)
        folded = fold(model)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
        assert len(norms_of(folded)) == left
    assert [reason in message for message in caplog.messages] == [True] * left


def test_lists_of_modules() -> None:
    convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
    norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
    assert_folds(Wired(through_a_list, convs=convs, norms=norms), torch.randn(1, 4, 8, 8))


def test_rows_of_a_linear_layer() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(6, 5), SyncBatchNorm2d(5)

        def forward(self, x: Tensor) -> Tensor:
            return normalise_rows(self.norm, self.fc(x))

    assert_folds(Rows(), torch.randn(7, 6))


# --- what stays -----------------------------------------------------------------------------------


def test_what_stays_is_named(caplog: pytest.LogCaptureFixture) -> None:
    shared = nn.Conv2d(4, 4, 1)
    model = nn.Sequential()
    model.add_module("grouped", nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)))
    model.add_module("one", nn.Sequential(shared, nn.BatchNorm2d(4)))
    model.add_module("other", nn.Sequential(shared, nn.BatchNorm2d(4)))
    stateless = nn.BatchNorm2d(4, track_running_stats=False)
    model.add_module("stateless", nn.Sequential(nn.Conv2d(4, 4, 1), stateless))
    up = nn.ConvTranspose2d(4, 4, 2, 2)
    model.add_module("up", nn.Sequential(up, nn.BatchNorm2d(4)))
    model.add_module("plain", nn.Sequential(nn.Conv2d(4, 4, 1), FrozenBatchNorm2d(4)))
    with caplog.at_level(logging.INFO, logger="detkit"):
        folded = assert_folds(model, torch.randn(2, 3, 8, 8), left=4)
    assert isinstance(folded.grouped[1], nn.GroupNorm)
    assert folded.one[0] is folded.other[0]
    before = "norms left as they are, "
    assert caplog.messages == [
        "batch norms folded: 1",
        f"{before}no batch norm: grouped.1",
        f"{before}it or its layer is registered in several places: one.1, other.1",
        f"{before}it keeps no statistics: stateless.1",
        f"{before}it does not follow a single convolution or linear layer: up.1",
    ]


def test_a_convolution_that_computes_something_else_stays() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, weight, self.bias)

    model = nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4))
    model.append(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    assert_folds(model, torch.randn(1, 3, 8, 8), left=1)


def test_folding_draws_no_random_numbers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    state = torch.get_rng_state()
    fold(model)
    assert torch.equal(state, torch.get_rng_state())
