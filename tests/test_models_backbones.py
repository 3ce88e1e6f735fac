"""Backbones: published counts and shapes, blocks, freezing, torchvision's names and numbers."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from detkit.config import Config
from detkit.errors import ConfigError
from detkit.models import (
    BACKBONES,
    build_backbone,
    build_classifier,
    count_backbone,
    count_classifier,
)
from detkit.models.backbones.detnet import detnet
from detkit.models.backbones.resnet import BasicBlock, Bottleneck, ResNet, resnet
from detkit.models.count import macs_by_module
from detkit.models.norm import norm_named
from detkit.models.torchvision_keys import convert

R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)

BUILD: dict[str, Callable[[bool], ResNet]] = {
    "resnet50": lambda s: resnet(R50, stride_in_1x1=s),
    "resnet101": lambda s: resnet(R101, stride_in_1x1=s),
    "resnet50-dilated": lambda s: resnet(R50, stride_in_1x1=s, dilated=True),
    "detnet59": lambda s: detnet(stride_in_1x1=s),
    "detnet59-noproj": lambda s: detnet(project_last=False, stride_in_1x1=s),
    "detnet110": lambda s: detnet((3, 4, 23, 3, 3), stride_in_1x1=s),
    "detnet 3-4-20-3-3": lambda s: detnet((3, 4, 20, 3, 3), stride_in_1x1=s),
}

# DetNet (arXiv 1804.06215) table 1 and what its layer tables imply at 224x224 with 1000 classes:
# parameters, the same without FC, convolutions, MACs with the stride in the 1x1 and in the 3x3.
COUNTS = {
    "resnet50": (25_557_032, 23_508_032, 53, 3_857_973_248, 4_089_184_256),
    "resnet101": (44_549_160, 42_500_160, 104, 7_570_194_432, 7_801_405_440),
    "resnet50-dilated": (25_557_032, 23_508_032, 53, 6_054_477_824, 6_208_618_496),
    "detnet59": (18_372_648, 17_347_648, 63, 4_846_018_560, 5_000_159_232),
    "detnet59-noproj": (17_322_024, 16_297_024, 62, 4_640_497_664, 4_794_638_336),
    "detnet110": (37_364_776, 36_339_776, 114, 8_558_239_744, 8_712_380_416),
    "detnet 3-4-20-3-3": (34_013_224, 32_988_224, 105, 7_903_141_888, 8_057_282_560),
}


@pytest.mark.parametrize("stride_in_1x1", [True, False])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_equal_the_published_ones(name: str, stride_in_1x1: bool) -> None:
    params, without_fc, convs, macs_1x1, macs_3x3 = COUNTS[name]
    with torch.device("meta"):
        backbone = BUILD[name](stride_in_1x1)
    parts = count_classifier(backbone)
    assert parts["total"].params == params
    assert parts["total"].params - parts["fc"].params == without_fc
    assert parts["total"].convs == convs
    assert parts["total"].macs == (macs_1x1 if stride_in_1x1 else macs_3x3)


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("resnet50", 4_089_184_256),
        ("resnet101", 7_801_405_440),
        ("resnet50-msra", 3_857_973_248),
        ("resnet101-msra", 7_570_194_432),
        ("resnet50-dilated", 6_054_477_824),
        ("detnet59", 4_846_018_560),
        ("detnet59-noproj", 4_640_497_664),
        ("detnet110", 8_558_239_744),
    ],
)
def test_named_backbones_stride_where_their_papers_do(name: str, macs: int) -> None:
    assert count_backbone(name)["total"].macs == macs


def test_macs_of_each_stage_of_detnet59() -> None:
    parts = count_backbone("detnet59")
    stages = [118_013_952, 667_942_912, 950_534_144, 1_387_266_048, 860_618_752, 860_618_752]
    assert [parts[f"stage{i}"].macs for i in range(1, 7)] == stages
    assert parts["fc"].macs == 1_024_000
    assert sum(stages) + 1_024_000 == parts["total"].macs
    noproj = count_backbone("detnet59-noproj")
    assert noproj["stage6"].macs == 655_097_856
    assert parts["total"].params - noproj["total"].params == 1024 * 1024 + 2 * 1024
    assert parts["total"].macs - noproj["total"].macs == 205_520_896


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("resnet50-msra", 82.6),
        ("resnet50-dilated", 129.7),
        ("detnet59", 103.8),
        ("detnet59-noproj", 99.4),
        ("resnet101-msra", 162.2),
        ("detnet110", 183.4),
    ],
)
def test_cost_on_a_whole_image(name: str, gmacs: float) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name)
        images = torch.empty(1, 3, 800, 1344)
    macs = sum(macs_by_module(backbone, lambda: backbone(images)).values())
    assert round(macs / 1e9, 1) == gmacs


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [(224, 224), (800, 1344), (75, 50)])
def test_maps_have_the_declared_shapes(name: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name)
        maps = backbone(torch.empty(2, 3, *size))
    assert list(maps) == list(backbone.feature_specs)
    for key, spec in backbone.feature_specs.items():
        expected = [-(-s // spec.stride) for s in size]  # every stride-2 layer rounds up
        assert maps[key].shape == (2, spec.channels, *expected)


def test_detnet_holds_stride_16() -> None:
    specs = build_backbone("detnet59").feature_specs
    assert [s.stride for s in specs.values()] == [4, 8, 16, 16, 16]
    assert [s.channels for s in specs.values()] == [256, 512, 1024, 1024, 1024]
    assert [s.stride for s in build_backbone("resnet50-dilated").feature_specs.values()] == [
        4,
        8,
        16,
        16,
    ]


def _zero_main_path(block: nn.Module) -> None:
    for name in ("conv1", "conv2", "conv3"):
        nn.init.zeros_(block.get_submodule(name).weight)


def test_block_b_convolves_the_shortcut_and_block_a_passes_it() -> None:
    net = detnet((1, 1, 1, 2, 2), "bn").eval()
    x = torch.randn(1, 1024, 5, 6)
    for stage in ("layer4", "layer5"):
        b, a = net.get_submodule(stage)
        assert b.downsample is not None and a.downsample is None
        for block in (a, b):
            _zero_main_path(block)
        b.downsample[1].running_mean.normal_()
        b.downsample[1].running_var.uniform_(0.5, 2)
        torch.testing.assert_close(b(x), torch.relu(b.downsample(x)))
        assert torch.equal(a(x), torch.relu(x))


def test_noproj_drops_the_last_projection_only() -> None:
    with torch.device("meta"):
        net = detnet(project_last=False)
    assert net.layer4[0].downsample is not None
    assert net.layer5[0].downsample is None


def test_dilated_stages_spread_an_impulse_by_two() -> None:
    with torch.device("meta"):
        nets = {"layer4 layer5": detnet(), "layer4": resnet(R50, dilated=True)}
    for stages, net in nets.items():
        for stage in stages.split():
            for block in net.get_submodule(stage):
                conv = block.conv2
                probe = nn.Conv2d(1, 1, 3, conv.stride, conv.padding, conv.dilation, bias=False)
                nn.init.ones_(probe.weight)
                x = torch.zeros(1, 1, 11, 11)
                x[0, 0, 5, 5] = 1
                hit = probe(x)[0, 0].nonzero() - 5
                assert sorted(map(tuple, hit.tolist())) == [
                    (i, j) for i in (-2, 0, 2) for j in (-2, 0, 2)
                ]
        assert all(block.conv2.dilation == (1, 1) for block in net.layer3)


def test_basic_block_refuses_a_bottleneck() -> None:
    with pytest.raises(ValueError, match="width must equal cout=64, got 32"):
        BasicBlock(64, 32, 64, 1, 1, False, norm_named("bn"), False)


@pytest.mark.parametrize("block", [Bottleneck, BasicBlock])
def test_zero_init_starts_blocks_as_their_shortcut(block: type) -> None:
    net = block(32, 32, 32, 1, 1, False, norm_named("bn"), False)
    last = net.bn3 if block is Bottleneck else net.bn2
    nn.init.zeros_(last.weight)
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(net(x), torch.relu(x))
    tiny = build_backbone("resnet50-tiny", "bn")
    ends = [m.bn2 for m in tiny.modules() if isinstance(m, BasicBlock)]
    assert ends and all(not norm.weight.any() for norm in ends)
    # frozen norms could never leave zero
    frozen = build_backbone("resnet50-tiny", "frozen_bn")
    assert all(m.bn2.weight.all() for m in frozen.modules() if isinstance(m, BasicBlock))


# --- freezing -------------------------------------------------------------------------------------


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def _changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}


def _one_step(backbone: ResNet) -> set[str]:
    """Names that one step of SGD in training mode changes."""
    backbone.eval()
    backbone.train()
    before = _snapshot(backbone)
    trainable = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, 0.1, weight_decay=0.1)
    sum(x.square().mean() for x in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    optimizer.step()
    return _changed(backbone, before)


def test_detnet_recipe_freezes_the_stem_and_every_norm() -> None:
    changed = _one_step(build_backbone("detnet59-tiny", "frozen_bn", frozen_stages=1))
    assert "conv1.weight" not in changed
    assert not any("bn" in key or "downsample.1" in key for key in changed)
    assert {
        "layer1.0.conv1.weight",
        "layer1.1.conv2.weight",
        "layer5.0.downsample.0.weight",
    } <= changed


@pytest.mark.parametrize("norm", ["bn", "sync_bn", "gn"])
def test_frozen_stages_keep_their_statistics_and_others_move(norm: str) -> None:
    backbone = build_backbone("detnet59-tiny", norm, frozen_stages=2)
    changed = _one_step(backbone)
    assert not any(key.startswith(("conv1", "bn1", "layer1.")) for key in changed)
    moving = {"layer2.0.conv1.weight", "layer2.0.bn1.weight"}
    assert moving | ({"layer2.0.bn1.running_mean"} if norm != "gn" else set()) <= changed


def test_frozen_stages_out_of_range() -> None:
    with pytest.raises(
        ConfigError, match=r"model.frozen_stages: must be in 0..5 for resnet50-tiny, got 6"
    ):
        build_backbone("resnet50-tiny", "bn", 6)


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'detnet59'"):
        build_backbone("detnet-59")


# --- torchvision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "sync_bn"])
@pytest.mark.parametrize("depth", [50, 101])
def test_state_dict_keys_are_torchvisions(tv: ModuleType, depth: int, norm: str) -> None:
    with torch.device("meta"):
        peer = getattr(tv.models, f"resnet{depth}")().state_dict()
        ours = build_backbone(f"resnet{depth}", norm).state_dict()
    peer = {k: v.shape for k, v in peer.items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in ours.items()} == peer


def test_logits_equal_torchvisions(tv: ModuleType) -> None:
    peer = tv.models.resnet50(num_classes=10)
    for module in peer.modules():  # statistics and affines that a missed copy would not match
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.normal_(module.bias, 0, 0.1)
    ours = build_classifier(Config(), 10)
    ours.load_state_dict(convert(peer.state_dict()), strict=True)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval().classify(images), peer.eval()(images))
