"""Supernets and their networks: wiring, costs, paths that leave the rest alone, extraction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from supernet_keys import block_of
from torch import Tensor, nn

from detkit.config import Config, resolve
from detkit.errors import CheckpointError, ConfigError
from detkit.models import (
    build_backbone,
    build_classifier,
    count_classifier,
    count_detector,
)
from detkit.models.backbones.shuffle import ShuffleBlock, shuffle_net, shuffle_split
from detkit.models.backbones.shuffle_supernet import ShuffleSupernet, extract, find_supernet
from detkit.models.classifier import Classifier
from detkit.models.count import macs_by_module
from detkit.models.norm import norm_named
from detkit.models.search_space import ARCHITECTURES, OPS, SPACES, Position
from detkit.models.weights import init_backbone
from detkit.models.zoo import build_detector
from detkit.nas.cost import cost_table
from detkit.types import Batch, ClassificationBatch, Target

TINY = SPACES["tiny"]
A, B = TINY.parse("01-23-0123-30"), TINY.parse("10-30-2301-12")


def make_norms_speak(model: nn.Module) -> None:
    """Statistics and affines that a missed copy would not match."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)


# --- wiring ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convention", "keep", "main"),
    [(1, [0, 4, 1, 5], [2, 6, 3, 7]), (2, [0, 2, 4, 6], [1, 3, 5, 7])],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_of_both_conventions(
    convention: int, keep: list[int], main: list[int], layout: torch.memory_format
) -> None:
    x = torch.arange(8.0).view(1, 8, 1, 1).expand(2, 8, 3, 5).contiguous(memory_format=layout)
    found = shuffle_split(x, convention)
    assert [[int(v) for v in half[1, :, 2, 4]] for half in found] == [keep, main]


def layers(block: nn.Sequential) -> str:
    """``pw4>8 bn relu dw8k3s2 bn`` and so on."""
    names = []
    for layer in block:
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is None and layer.padding[0] == layer.kernel_size[0] // 2
            wide = f"{layer.in_channels}>{layer.out_channels}"
            deep = f"{layer.in_channels}k{layer.kernel_size[0]}s{layer.stride[0]}"
            names.append(f"pw{wide}" if layer.groups == 1 else f"dw{deep}")
            assert layer.kernel_size[0] == 1 or layer.groups == layer.in_channels
        else:
            names.append({nn.BatchNorm2d: "bn", nn.ReLU: "relu"}[type(layer)])
    return " ".join(names)


def test_layers_of_the_blocks() -> None:
    first, then = Position(2, 0, 6, 16, 2), Position(2, 1, 16, 16, 1)
    bn = norm_named("bn")
    for name, kernel in (("shuffle3", 3), ("shuffle5", 5), ("shuffle7", 7)):
        block = ShuffleBlock(first, OPS[name], 2, bn)
        assert layers(block.project) == f"dw6k{kernel}s2 bn pw6>6 bn relu"
        assert layers(block.main) == f"pw6>8 bn relu dw8k{kernel}s2 bn pw8>10 bn relu"
        block = ShuffleBlock(then, OPS[name], 2, bn)
        assert block.project is None
        assert layers(block.main) == f"pw8>8 bn relu dw8k{kernel}s1 bn pw8>8 bn relu"
    block = ShuffleBlock(first, OPS["xception"], 2, bn)
    assert layers(block.project) == "dw6k3s2 bn pw6>6 bn relu"
    deep = "dw8k3s1 bn pw8>8 bn relu dw8k3s1 bn"
    assert layers(block.main) == f"dw6k3s2 bn pw6>8 bn relu {deep} pw8>10 bn relu"
    block = ShuffleBlock(then, OPS["xception"], 2, bn)
    assert layers(block.main) == f"dw8k3s1 bn pw8>8 bn relu {deep} pw8>8 bn relu"


@pytest.mark.parametrize("convention", [1, 2])
def test_a_block_joins_its_branches(convention: int) -> None:
    bn = norm_named("bn")
    x = torch.randn(2, 8, 5, 7)
    block = ShuffleBlock(Position(2, 1, 8, 8, 1), OPS["shuffle5"], convention, bn).eval()
    keep, half = shuffle_split(x, convention)
    assert torch.equal(block(x), torch.cat([keep, block.main(half)], 1))
    block = ShuffleBlock(Position(2, 0, 8, 12, 2), OPS["xception"], convention, bn).eval()
    out = block(x)
    assert out.shape == (2, 12, 3, 4)
    assert torch.equal(out, torch.cat([block.project(x), block.main(x)], 1))


def test_the_two_conventions_are_different_networks_and_do_not_mix() -> None:
    one = shuffle_net(replace(TINY, shuffle=1), A).eval()
    two = shuffle_net(TINY, A).eval()
    state = one.state_dict()
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*shuffle2.*Unexpected key.*shuffle1"):
        two.load_state_dict(state)
    model, source = Classifier(two, 3), Classifier(one, 3).state_dict()
    with pytest.raises(CheckpointError, match=r"1 missing \(backbone.shuffle2\) and 1 left over"):
        init_backbone(model, source, "supernet.pth")
    state["shuffle2"] = state.pop("shuffle1")
    two.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(one(x)["c5"], two(x)["c5"])


@pytest.mark.parametrize("name", ["detnas-300m", "detnas-supernet20"])
def test_maps_of_a_whole_image(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name, "bn")
        if isinstance(backbone, ShuffleSupernet):
            backbone.set_path([3] * 20)
        maps = backbone(torch.empty(1, 3, 800, 1344))
    shapes = {"c2": (64, 200, 336), "c3": (160, 100, 168), "c4": (320, 50, 84), "c5": (640, 25, 42)}
    assert {name: tuple(x.shape[1:]) for name, x in maps.items()} == shapes
    assert [spec.stride for spec in backbone.feature_specs.values()] == [4, 8, 16, 32]


@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "sync_bn", "gn"])
def test_starting_weights(norm: str) -> None:
    space = SPACES["small"]
    model = Classifier(shuffle_net(space, [0, 3] * 10, norm), 50)
    stem, *convs = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert 0.009 < float(stem.weight.detach().std()) < 0.011 and not stem.bias.any()
    for conv in convs:
        expected = 1.0 if conv.groups > 1 else 1 / conv.in_channels
        assert abs(float(conv.weight.detach().std()) / expected - 1) < 0.25
    biased = [conv for conv in convs if conv.bias is not None]
    assert len(biased) == 1 and biased[0].out_channels == 1024 and not biased[0].bias.any()
    assert 0.009 < float(model.fc.weight.detach().std()) < 0.011 and not model.fc.bias.any()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    assert len(norms) == len(convs) + 1
    for layer in norms:
        assert (layer.weight == 1).all() and (layer.bias == 1e-4).all() and layer.eps == 1e-5
    assert model.tail[3].p == 0.2 and type(model.tail[3]) is nn.Dropout2d


def test_a_classifier_without_last_layers_keeps_its_keys() -> None:
    keys = set(build_classifier(Config(), 5).state_dict())
    assert {"fc.weight", "fc.bias"} <= keys and not any(key.startswith("tail") for key in keys)


# --- costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_networks_cost_what_the_table_says(name: str) -> None:
    found = ARCHITECTURES[name]
    space = SPACES[found.space]
    table, genes = cost_table(space), space.parse(found.genes)
    with torch.device("meta"):
        backbone = build_backbone(name, "bn")
    parts = count_classifier(backbone)
    stages = [parts[f"stage{i}"] for i in range(1, 6)]
    assert parts["total"].macs == table.full(genes).macs
    assert parts["total"].params == table.full(genes).params
    assert sum(stage.macs for stage in stages) == table.body(genes).macs
    assert sum(stage.params for stage in stages) == table.body(genes).params


@pytest.mark.parametrize("gene", range(4))
def test_cost_of_an_odd_image(gene: int) -> None:
    """Maps of odd sides, where halving rounds up."""
    table = cost_table(TINY, 75, 50)
    with torch.device("meta"):
        net = shuffle_net(TINY, [gene] * 10)
        macs = sum(macs_by_module(net, lambda: net(torch.empty(1, 3, 75, 50))).values())
    assert macs == table.body([gene] * 10).macs


@pytest.mark.parametrize(("name", "space"), [("20", "small"), ("40", "large"), ("-tiny", "tiny")])
def test_supernets_hold_every_block(name: str, space: str) -> None:
    with torch.device("meta"):
        supernet = build_backbone(f"detnas-supernet{name}", "sync_bn")
        model = Classifier(supernet, 1000)
    table = cost_table(SPACES[space])
    assert sum(p.numel() for p in supernet.parameters()) == table.supernet_params()
    whole = sum(p.numel() for p in model.parameters())
    assert whole == table.supernet_params() + table.tail.params


def test_a_path_costs_what_the_table_says() -> None:
    with torch.device("meta"):
        supernet = ShuffleSupernet(TINY)
        supernet.set_path(B)
        images = torch.empty(1, 3, 224, 224)
        macs = sum(macs_by_module(supernet, lambda: supernet(images)).values())
    assert macs == cost_table(TINY).body(B).macs


# --- paths ----------------------------------------------------------------------------------------


def test_a_path_must_be_set_and_is_of_the_space() -> None:
    supernet = ShuffleSupernet(TINY)
    assert supernet.path is None
    with pytest.raises(ValueError, match="a path must be set before a forward pass"):
        supernet(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match=r"must be 10 numbers in 0..3 for the tiny space, got 9"):
        supernet.set_path(A[:-1])
    with pytest.raises(ConfigError, match=r"in 0..3"):
        supernet.set_path([*A[:-1], -1])
    assert supernet.path is None
    supernet.set_path(A)
    assert supernet.path == A
    model = nn.Sequential(Classifier(supernet, 3))
    assert find_supernet(model) is supernet
    with pytest.raises(ValueError, match="must hold one supernet, got 0"):
        find_supernet(shuffle_net(TINY, A))


@pytest.mark.parametrize("norm", ["bn", "sync_bn"])
def test_idle_blocks_never_move(norm: str) -> None:
    """Not by gradients, momentum, decay, norm statistics or counters; twice in a row."""
    model = Classifier(ShuffleSupernet(TINY, norm), 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    images = torch.randn(4, 3, 64, 64)
    for genes in (A, B, B):  # blocks of A carry momentum when B is trained
        find_supernet(model).set_path(genes)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer.zero_grad(set_to_none=True)
        model(ClassificationBatch(images, torch.tensor([0, 1, 2, 3])))["loss"].backward()
        optimizer.step()
        places = [(p.stage, p.index) for p in TINY.positions()]
        active = {(*place, gene) for place, gene in zip(places, genes, strict=True)}
        for key, value in model.state_dict().items():
            place = block_of(key)
            moves = place in active or (place is None and not key.endswith("shuffle2"))
            assert moves != torch.equal(value, before[key]), key


def test_a_path_equals_its_network_and_extraction_renames() -> None:
    model = Classifier(ShuffleSupernet(TINY), 5)
    make_norms_speak(model)
    model.eval()
    images = torch.randn(2, 3, 64, 96)
    state = model.state_dict()
    for genes in (A, B):
        model.backbone.set_path(genes)
        single = Classifier(shuffle_net(TINY, genes), 5)
        taken = extract(state, TINY, genes)
        single.load_state_dict(taken, strict=True)
        pointers = {value.data_ptr() for value in state.values()}
        assert {value.data_ptr() for value in taken.values()} <= pointers
        with torch.no_grad():
            expected = model.backbone(images)
            found = single.eval().backbone(images)
            for name, x in expected.items():
                torch.testing.assert_close(found[name], x, rtol=0, atol=1e-5)
            logits = model.classify(images)
            torch.testing.assert_close(single.classify(images), logits, rtol=0, atol=1e-5)
    key = "backbone.stage2.0.3.main.0.weight"
    genes = (3, *A[1:])
    assert torch.equal(extract(state, TINY, genes)[key.replace(".3.", ".")], state[key])


def test_extraction_from_something_else_is_refused() -> None:
    state = shuffle_net(TINY, A).state_dict()
    with pytest.raises(ValueError, match=r"must hold the blocks of a tiny supernet, got none for"):
        extract(state, TINY, A)


def test_frozen_stages_of_a_supernet_stay() -> None:
    supernet = build_backbone("detnas-supernet-tiny", "bn", frozen_stages=2)
    supernet.train()
    assert not supernet.stem.training and not supernet.stage2.training and supernet.stage3.training
    assert not any(p.requires_grad for p in supernet.stage2.parameters())


# --- detectors ------------------------------------------------------------------------------------


def small_batch() -> Batch:
    boxes = torch.tensor([[5.0, 5.0, 40.0, 30.0]])
    target = Target(boxes, torch.tensor([1]), torch.tensor([False]))
    return Batch(torch.randn(1, 3, 64, 96), torch.tensor([[64, 96]]), [target], ["a.jpg"])


def test_a_detector_on_a_supernet_finds_what_its_network_finds() -> None:
    settings = {"backbone": "detnas-supernet-tiny", "norm": "bn", "neck_channels": 16}
    box = {"channels": 32, "score_threshold": 0.0}
    model = build_detector(resolve([{"model": settings, "box": box}]), 3)
    supernet = find_supernet(model)
    supernet.set_path(A)
    losses: list[Tensor] = list(model(small_batch()).values())
    torch.stack(losses).sum().backward()
    idle = {block_of(k) for k, p in model.named_parameters() if p.grad is None}
    assert len(idle) == 3 * len(TINY) and None not in idle
    make_norms_speak(model)
    model.eval()
    name = f"detnas:tiny:{TINY.text(A)}"
    single = build_detector(resolve([{"model": settings | {"backbone": name}, "box": box}]), 3)
    single.load_state_dict(extract(model.state_dict(), TINY, A), strict=True)
    single.eval()
    batch = small_batch()
    (expected,) = model.detect(batch.images, batch.sizes)
    (found,) = single.detect(batch.images, batch.sizes)
    assert len(expected["scores"])
    torch.testing.assert_close(found["boxes"], expected["boxes"])
    torch.testing.assert_close(found["scores"], expected["scores"])


def test_a_classifier_starts_a_detector_without_its_last_layers() -> None:
    settings = {"backbone": "detnas-supernet-tiny", "norm": "bn"}
    model = build_detector(resolve([{"model": settings}]), 3)
    source = Classifier(ShuffleSupernet(TINY), 5)
    make_norms_speak(source)
    report = init_backbone(model, source.state_dict(), "supernet.pth")
    assert not report.missing
    assert {name.split(".")[0] for name in report.unused} == {"tail", "fc"}
    found = model.backbone.state_dict()
    same = [torch.equal(found[k], v) for k, v in source.backbone.state_dict().items()]
    assert len(same) == len(found) and all(same)


def test_parameters_of_published_detectors() -> None:
    """DetNAS's COCO networks: norms after every layer of the pyramid, none in RetinaNet's.

    Ours differ from the release's Faster R-CNN in two ways: a layer before a norm has no bias,
    which the norm would take out again, and background has no box.
    """
    settings = {"backbone": "detnas-300m", "norm": "sync_bn", "head_norm": "sync_bn"}
    layers = {"model": settings, "box": {"head": "4conv1fc"}}
    parts = count_detector(resolve([layers]), 80, 224, 224)
    neck_biases, head_biases, background = 8 * 256, 4 * 256, 4 * (1024 + 1)
    ours = {name: part.params for name, part in parts.items()}
    assert ours == {
        "backbone": 1_849_680,
        "neck": 2_668_544 - neck_biases,
        "rpn": 593_935,
        "head": 15_623_573 - head_biases - background,
        "total": 20_735_732 - neck_biases - head_biases - background,
    }
    settings = {"backbone": "detnas-300m-retinanet", "norm": "bn", "detector": "retinanet"}
    layers = {"model": settings, "retina": {"p6_from": "p5"}}
    parts = count_detector(resolve([layers]), 80, 224, 224)
    found = [parts[name].params for name in ("backbone", "neck", "head", "total")]
    assert found == [2_041_888, 3_237_888, 6_463_220, 11_742_996]


def test_names_of_backbones() -> None:
    with torch.device("meta"):
        assert build_backbone("detnas:tiny:0123012301:shuffle1").space.shuffle == 1
        assert build_backbone("detnas-supernet20:shuffle1").space.shuffle == 1
        assert build_backbone("detnas-supernet20").space.shuffle == 2
    with pytest.raises(ConfigError, match="did you mean 'detnas-supernet20'"):
        build_backbone("detnas-supernet21")
    with pytest.raises(ConfigError, match="must be 10 numbers in 0..3 for the tiny space"):
        build_backbone("detnas:tiny:012")
