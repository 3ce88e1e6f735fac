"""Recipes of DetNAS: costs from its tables of integers, headers, what is fixed, one real step.

The numbers of whole networks and of single blocks are those that tests/test_nas_space.py holds
the code to.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from test_nas_space import BLOCKS, NETS, STEMS, UNIFORM
from test_recipes import (
    COST,
    IMAGENET,
    Cost,
    cells,
    command_of,
    conv,
    drops,
    header,
    image_size,
    large_separable,
    light_head,
    linear,
    one_step,
    padded,
    picture,
    rate,
    region_proposals,
    settings,
    total,
)
from test_recipes import backbone as resnet
from torch import nn

from detkit.cli.main import cli
from detkit.config import Config, read_toml, recipes, resolve, to_plain
from detkit.engine import checkpoint
from detkit.engine.optimizer import build_optimizer
from detkit.models import build_backbone, build_detector, count_classifier, count_detector
from detkit.models.backbones.shuffle_supernet import ChoiceBlock, find_supernet
from detkit.models.classifier import Classifier
from detkit.models.count import macs_by_module
from detkit.models.norm import SyncBatchNorm2d
from detkit.types import CategoryMap

PUBLISHED = [name for name in recipes() if name.startswith("detnas/")]
CLASSIFIERS = [name for name in PUBLISHED if "/imagenet-" in name]
DETECTORS = [name for name in PUBLISHED if name not in CLASSIFIERS]
SUPERNETS = [name for name in PUBLISHED if "supernet" in name]
VOC = [name for name in DETECTORS if "-voc" in name]
DOC = Path(__file__).parents[1] / "docs" / "detnas.md"

SHUFFLENETV2_20 = "detnas:small:0000-0000-00000000-0000"
CHANNELS = {
    "small": (64, 160, 320, 640),
    "large": (96, 240, 480, 960),
    "wide": (172, 432, 864, 1728),
}
SUPERNET = {"detnas-supernet20": "small", "detnas-supernet40": "large"}
SUPERNET_PARAMS = {"small": (6_808_256, 8_491_688), "large": (28_642_008, 30_653_120)}
TAIL_MACS = {"small": 33_136_640, "large": 49_192_960}
RESNET = {
    "resnet50-msra": Cost(25_557_032, 3_857_973_248),
    "resnet101-msra": Cost(44_549_160, 7_570_194_432),
}


def space_of(name: str) -> str:
    if name in SUPERNET:
        return SUPERNET[name]
    return {"detnas-1.3g": "large", "detnas-3.8g": "wide"}.get(name, "small")


def mean_path(space: str) -> Fraction:
    """Multiply-adds at 224x224 of stem and blocks, on average over all paths."""
    found = Fraction(STEMS[space][0])
    for stage, count in enumerate({"small": (4, 4, 8, 4), "large": (8, 8, 16, 8)}[space]):
        (first, _), (then, _) = BLOCKS[space][2 * stage : 2 * stage + 2]
        found += Fraction(sum(first), 4) + (count - 1) * Fraction(sum(then), 4)
    return found


def classifier(name: str) -> Cost:
    """With 1000 classes at 224x224; of a supernet all parameters and the mean path."""
    if name in RESNET:
        return RESNET[name]
    if name in SUPERNET:
        space = SUPERNET[name]
        return Cost(SUPERNET_PARAMS[space][1], round(mean_path(space) + TAIL_MACS[space]))
    _, macs, _, params = UNIFORM["small", 0] if name == SHUFFLENETV2_20 else NETS[name]
    return Cost(params, macs)


def body(name: str, height: int, width: int, path_macs: int | None = None) -> Cost:
    """Stem and blocks on an image of sides divisible by 32; of a supernet the path given."""
    if name in RESNET:
        return resnet(name, height, width)
    if name in SUPERNET:
        space = SUPERNET[name]
        macs, params = path_macs or mean_path(space), SUPERNET_PARAMS[space][0]
    else:
        macs, _, params, _ = UNIFORM["small", 0] if name == SHUFFLENETV2_20 else NETS[name]
    return Cost(params, round(Fraction(macs) * height * width / 224**2))


def stage_channels(name: str) -> tuple[int, ...]:
    return (256, 512, 1024, 2048) if name in RESNET else CHANNELS[space_of(name)]


# --- detectors ------------------------------------------------------------------------------------


def classes(config: Config) -> int:
    return 20 if config.data.split == "trainval0712" else 80


def four_conv(rois: int, num_classes: int) -> Cost:
    """Four convolutions with norms on 7x7 features, one layer of 1024, classes and boxes."""
    return total(
        [
            *[conv(256, 256, 9, 49 * rois, norm=True)] * 4,
            linear(256 * 49, 1024, rois),
            linear(1024, num_classes + 1, rois),
            linear(1024, 4 * num_classes, rois),
        ]
    )


def faster_rcnn(config: Config, height: int, width: int, rois: int) -> list[Cost]:
    """FPN with norms on C2 to C5, every second cell of P5 as P6."""
    counts = [cells(height, width, 4 << i) for i in range(5)]
    pyramid = []
    for cin, count in zip(stage_channels(config.model.backbone), counts, strict=False):
        pyramid += [conv(cin, 256, 1, count, norm=True), conv(256, 256, 9, count, norm=True)]
    rpn = region_proposals(256, 256, 3, 1, sum(counts))
    return [*pyramid, rpn, four_conv(rois, classes(config))]


def mask_rcnn(config: Config, height: int, width: int, rois: int) -> list[Cost]:
    """With norms in the mask head's convolutions."""
    inside = 100 * 14 * 14
    mask = [conv(256, 256, 9, inside, norm=True)] * 4
    mask += [Cost(256 * 256 * 4 + 256, 256 * 256 * 4 * inside), conv(256, 80, 1, 4 * inside)]
    return [*faster_rcnn(config, height, width, rois), *mask]


def retina(config: Config, height: int, width: int, rois: int) -> list[Cost]:
    """No norms: C3 to C5, P6 from P5 and P7 from P6; two branches of four convolutions."""
    counts = [cells(height, width, 8 << i) for i in range(5)]
    layers = []
    for cin, count in zip(stage_channels(config.model.backbone)[1:], counts, strict=False):
        layers += [conv(cin, 256, 1, count), conv(256, 256, 9, count)]
    layers += [conv(256, 256, 9, counts[3]), conv(256, 256, 9, counts[4])]
    everywhere = sum(counts)
    layers += [conv(256, 256, 9, everywhere)] * 8
    return [*layers, conv(256, 9 * classes(config), 9, everywhere), conv(256, 36, 9, everywhere)]


def light_head_rcnn(config: Config, height: int, width: int, rois: int) -> list[Cost]:
    """Proposals from C4, a large kernel of 64 on C5 at stride 32; a norm after each of two."""
    c4, c5 = (cells(height, width, stride) for stride in (16, 32))
    cin = stage_channels(config.model.backbone)
    norms = Cost(2 * 490 + 2 * 2048, 0)
    kernel, head = large_separable(cin[3], 64, c5), light_head(rois)
    return [region_proposals(cin[2], 256, 15, 2, c4), kernel, head, norms]


PARTS = {
    "frcnn-fpn": faster_rcnn,
    "maskrcnn-fpn": mask_rcnn,
    "retinanet": retina,
    "light-head": light_head_rcnn,
}


def whole(config: Config, height: int, width: int, rois: int, path_macs: int | None = None) -> Cost:
    parts = PARTS[config.model.detector](config, height, width, rois)
    return total([body(config.model.backbone, height, width, path_macs), *parts])


@pytest.mark.parametrize("name", [n for n in DETECTORS if n not in SUPERNETS])
def test_detector_costs_what_its_layers_sum_up_to(name: str) -> None:
    config = settings(name)
    found = count_detector(config, classes(config), 800, 1344, 1000)["total"]
    assert (found.params, found.macs) == whole(config, 800, 1344, 1000)


@pytest.mark.parametrize("name", [n for n in DETECTORS if n in SUPERNETS])
def test_supernet_detector_costs_what_its_layers_sum_up_to(name: str) -> None:
    """All blocks' parameters, the multiply-adds of the path that a step takes."""
    config = settings(name)
    with torch.device("meta"):
        model = build_detector(config, classes(config)).eval()
        supernet = find_supernet(model)
        supernet.set_path([0] * len(supernet.space))
        images = torch.empty(1, 3, 800, 1344)
    macs = sum(macs_by_module(model, lambda: model.run_layers(images, 1000)).values())
    path = UNIFORM[supernet.space.name, 0][0]
    params = sum(p.numel() for p in model.parameters())
    assert (params, macs) == whole(config, 800, 1344, 1000, path)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_costs_what_was_published(name: str) -> None:
    net = settings(name).model.backbone
    with torch.device("meta"):
        backbone = build_backbone(net)
        if net in SUPERNET:
            params = sum(p.numel() for p in Classifier(backbone, 1000).parameters())
            assert params == classifier(net).params
            return
    found = count_classifier(backbone, 1000, 224)["total"]
    assert (found.params, found.macs) == classifier(net)


# --- headers and docs -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_has_command_and_score(name: str) -> None:
    text = header(name)
    first = text.splitlines()[0]
    assert first.startswith(("DetNAS, ", "Beyond DetNAS, "))
    found = re.search(r"Published: (AP |AP50 |top-1 error )\d\d\.\d|Published: none", first)
    assert found, first
    assert ("none" in found[0]) >= (name in SUPERNETS)
    arguments = command_of(name)
    assert arguments[0] == ("pretrain" if name in CLASSIFIERS else "finetune")
    assert arguments[arguments.index("--recipe") + 1] == name
    assert re.search(r"^Cost: 8 GPUs x (2|128) images, ", text, re.MULTILINE)
    assert re.search(r"Inferred: |Stated by |Not published", " ".join(text.split()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_reckons_right(name: str) -> None:
    config = settings(name)
    match = COST.search(header(name))
    assert match, header(name)
    images = int(match[1].replace(",", ""))
    assert images == config.train.steps * config.train.batch_size
    if name in CLASSIFIERS:
        cost = classifier(config.model.backbone)
    else:
        height, width = int(match[3]), int(match[4])
        assert (height, width) == padded(config)
        rois = config.rpn.post_nms_train if config.box.ohem else config.box.batch_per_image
        assert int(match[5] or rois) == rois
        assert (match[5] is None) == (config.model.detector == "retinanet")
        cost = whole(config, height, width, rois)
    assert float(match[2]) == pytest.approx(cost.macs / 1e9, rel=0.01)
    flop = images * float(match[2]) * 1e9 * 6
    assert float(match[6]) == pytest.approx(flop, rel=0.05)
    assert float(match[7]) == pytest.approx(flop / 1e13 / 3600, rel=0.05)


# --- what the released code fixes -----------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_train_as_published(name: str) -> None:
    config = settings(name)
    assert (config.train.steps, config.train.batch_size) == (300_000, 1024)
    assert 239 < config.train.steps * config.train.batch_size / IMAGENET < 240
    assert [rate(config, step) for step in (0, 150_000, 299_999)] == pytest.approx(
        [0.5, 0.25, 0.5 / 300_000]
    )
    optim = config.optim
    assert (optim.name, optim.momentum, optim.nesterov) == ("sgd", 0.9, False)
    assert (config.train.label_smoothing, config.train.clip) == (0.1, 0)
    assert (config.model.norm, config.model.norm_momentum) == ("bn", 0.1)
    data = config.data
    assert (data.short_side, data.color_jitter, data.flip, data.min_crop) == (224, 0.4, 0.5, 0.08)
    assert round(data.short_side / data.eval_crop) == 256


def test_decay_of_classifiers_is_of_weights_of_two_dimensions_and_more() -> None:
    config = settings("detnas/imagenet-300m")
    with torch.device("meta"):
        model = Classifier(build_backbone(config.model.backbone, "bn"), 1000)
    for group in build_optimizer(model, config.optim, 1024).param_groups:
        expected = {4e-5} if any(p.ndim > 1 for p in group["params"]) else {0.0}
        assert {group["weight_decay"]} == expected
        assert len({p.ndim > 1 for p in group["params"]}) == 1


def test_decay_of_detectors_leaves_biases_out_which_learn_twice_as_fast() -> None:
    config = settings("detnas/300m-fpn")
    with torch.device("meta"):
        model = build_detector(config, 80)
    of = {}
    for group in build_optimizer(model, config.optim, 16).param_groups:
        of |= {id(p): (group["weight_decay"], group["lr_factor"]) for p in group["params"]}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {of[id(m.weight)] for m in norms} == {(1e-4, 1.0)}
    assert {of[id(m.bias)] for m in norms} == {(0.0, 1.0)}
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {of[id(m.weight)] for m in layers} == {(1e-4, 1.0)}
    assert {of[id(m.bias)] for m in layers if m.bias is not None} == {(0.0, 2.0)}


def rgb(name: str) -> bool:
    """Whether the images are those of MMRazor."""
    return "mmrazor" in name or name.endswith("rgb")


@pytest.mark.parametrize("name", PUBLISHED)
def test_pixels_are_the_same_in_every_stage(name: str) -> None:
    data = settings(name).data
    plain = to_plain(Config())["data"]
    if rgb(name):
        assert (data.channels, list(data.mean), list(data.std)) == (
            "rgb",
            plain["mean"],
            plain["std"],
        )
    else:
        assert (data.channels, data.mean) == ("bgr", (0, 0, 0))
        assert [255 * s for s in data.std] == [1, 1, 1]


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_train_as_published(name: str) -> None:
    config = settings(name)
    voc, one_stage = name in VOC, config.model.detector == "retinanet"
    supernet = name in SUPERNETS
    steps = 22_500 if voc else 90_000
    assert (config.train.steps, config.train.batch_size) == (steps, 16)
    assert drops(config) == {steps * 2 // 3: 0.1, steps * 8 // 9: 0.01}
    peak = 0.01 if one_stage else 0.02
    assert rate(config, 0) == pytest.approx(peak / 3) and rate(config, 500) == peak
    assert (config.optim.momentum, config.optim.weight_decay) == (0.9, 1e-4)
    assert image_size(config) == (800, 1333)
    model = config.model
    assert (model.norm, model.frozen_stages) == ("sync_bn", 0)
    assert model.head_norm == ("none" if one_stage else "sync_bn")
    assert model.norm_momentum == (0.1 if supernet else 0.01)
    assert (config.box.score_threshold, config.box.max_detections) == (0.05, 100)
    splits = (config.data.split, config.data.val_split, config.eval.metric)
    assert splits == (("trainval0712", "test", "voc07") if voc else ("train", "val", "AP"))
    if supernet:
        assert config.nas.sampling == "uniform"
        assert config.nas.search_images == (16_551 // 5 if voc else 5000)
    if one_stage:
        box, own = config.box, config.retina
        assert (box.weights, box.nms_iou, box.regression_weight) == ((10, 10, 5, 5), 0.4, 1 / 4)
        assert (own.fg_iou, own.bg_iou, own.prior, own.pre_nms) == (0.5, 0.4, 0.01, 1000)
        assert (own.alpha, own.gamma, own.smooth_l1_beta) == (0.25, 2.0, 0.11)
        assert (own.p6_from, own.divisor, own.convs) == ("p5", "positives+images", 4)
        assert (config.anchors.sizes, config.anchors.octave_scales) == ((32, 64, 128, 256, 512), 3)
    elif config.model.detector != "light-head":
        rpn, box = config.rpn, config.box
        assert (rpn.fg_iou, rpn.bg_iou, rpn.nms_iou, rpn.post_nms_scope) == (0.7, 0.3, 0.7, "batch")
        assert (rpn.batch_per_image, rpn.positive_fraction) == (256, 0.5)
        assert (rpn.pre_nms_train, rpn.post_nms_train) == (2000, 2000)
        assert (rpn.pre_nms_test, rpn.post_nms_test) == (1000, 1000)
        assert (rpn.smooth_l1_beta, box.smooth_l1_beta) == (pytest.approx(1 / 9), 1)
        assert (box.head, box.resolution, box.sampling_ratio) == ("4conv1fc", 7, 2)
        assert (box.batch_per_image, box.positive_fraction, box.fg_iou) == (512, 0.25, 0.5)
        assert (box.nms_iou, box.weights, box.class_agnostic) == (0.5, (10, 10, 5, 5), False)


# --- one step of each -----------------------------------------------------------------------------

# The others differ from one of these in the backbone, or in what one step does not show.
DISTINCT = {
    *("detnas/300m-fpn", "detnas/300m-retinanet", "detnas/supernet20-fpn"),
    *("detnas/supernet20-maskrcnn", "detnas/supernet20-light-head"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in DISTINCT else pytest.mark.slow) for n in DETECTORS],
)
def test_one_step_trains_everything_but_idle_blocks(name: str) -> None:
    small = {
        "rpn": {"pre_nms_train": 200, "post_nms_train": 60},
        "box": {"batch_per_image": 24},
        "train": {"batch_size": 1},
    }
    if settings(name).model.detector == "retinanet":
        small = {"train": {"batch_size": 1}}
    config = resolve([read_toml(recipes()[name]), small])
    torch.manual_seed(0)
    model = build_detector(config, 3).train()
    idle: set[str] = set()
    if name in SUPERNETS:
        supernet = find_supernet(model)
        supernet.set_path([i % 4 for i in range(len(supernet.space))])
        for path, module in model.named_modules():
            if isinstance(module, ChoiceBlock):
                others = (block for gene, block in enumerate(module) if gene != module.gene)
                gone = {id(v) for b in others for v in (*b.parameters(), *b.buffers())}
                state = module.state_dict(keep_vars=True)
                idle |= {f"{path}.{key}" for key, value in state.items() if id(value) in gone}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(type(norm) is SyncBatchNorm2d for norm in norms)
    assert {norm.momentum for norm in norms} == {config.model.norm_momentum}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    one_step(model, config, picture(masks=config.model.detector.startswith("mask")))
    for key, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is None if key in idle else grad is not None and grad.isfinite().all(), key
    still = {key for key, value in model.state_dict().items() if value.equal(before[key])}
    assert idle <= still
    # a shift that the next norm takes out again has no gradient, and no decay moves it
    moved = {key for key in before if not key.endswith(("bias", "backbone.shuffle2"))}
    assert not still & moved - idle


# --- the commands of the headers ------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints that the pre-training recipes would leave, but for weights."""
    folder = tmp_path_factory.mktemp("pretrained")
    for name in CLASSIFIERS:
        arguments, config = command_of(name), settings(name)
        target = folder / arguments[arguments.index("--out") + 1] / "best.pth"
        target.parent.mkdir(parents=True)
        content: checkpoint.Checkpoint = {
            "format": checkpoint.FORMAT,
            "kind": "backbone",
            "config": to_plain(config),
            "categories": CategoryMap([1], ["thing"]).to_plain(),
            "model": {},
            "provenance": {},
        }
        if name in SUPERNETS:
            with torch.device("meta"):
                space = build_backbone(config.model.backbone).space
            content |= {"kind": "supernet", "space": space.to_plain(), "stage": "pretrain"}
        checkpoint.save(target, content)
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_command_of_the_header_runs(
    name: str,
    pretrained: Path,
    real_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    would_train: Callable[[list[str]], dict[str, Any]],
) -> None:
    monkeypatch.chdir(pretrained)
    asked = to_plain(settings(name))
    folder = "sign_digits_imagefolder" if name in CLASSIFIERS else "coco_mini"
    asked["data"]["path"] = str(real_data / ("raccoon_voc" if name in VOC else folder))
    extra = ["--set", f"data.path={asked['data']['path']}"]
    if asked["data"]["split"] == "trainval0712":
        asked["data"] |= {"split": "train", "val_split": "val"}
        extra += ["--set", "data.split=train", "--set", "data.val_split=val"]
    assert would_train([*command_of(name), *extra]) == asked


# --- docs/detnas.md -------------------------------------------------------------------------------


def test_the_document_has_every_recipe_with_its_score() -> None:
    """Numbers of a row, in its order, are those of the two recipes' first lines."""
    text = DOC.read_text(encoding="utf-8")
    told: set[str] = set()
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| ") or len(cells) != 7 or "`" not in cells[6]:
            continue
        names = re.findall(r"`(detnas/[^`]+)`", cells[6])
        for name in names:
            column = 3 if name in CLASSIFIERS else 5
            first = header(name).splitlines()[0].partition("Published: ")[2]
            scores = [s for s in re.findall(r"\d\d\.\d", first)][: 1 if column == 3 else None]
            assert re.findall(r"\d\d\.\d", cells[column]) == scores, name
            params = classifier(settings(name).model.backbone).params / 1e6
            assert cells[2] == f"{params:.2f} M"
        told |= set(names)
    assert told == {name for name in PUBLISHED if name not in SUPERNETS}
    endings = set(re.findall(r"`(?:detnas/supernet20)?(-[a-z0-9-]+|detnas/[^`]+)`", text))
    for name in SUPERNETS:
        assert name in endings or name.removeprefix("detnas/supernet20") in endings, name


def test_commands_of_the_document_are_those_of_the_program() -> None:
    """Every option is one of its command, and every recipe exists."""
    lines = re.findall(r"^detkit (.*)$", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 10
    root = click.Context(cli)
    for line in lines:
        name, *arguments = shlex.split(line)
        command = cli.get_command(root, name)
        assert command is not None
        command.make_context(name, arguments, parent=root)  # refuses unknown options
        if "--recipe" in arguments:
            recipe = arguments[arguments.index("--recipe") + 1]
            assert recipe in recipes() or recipe in ("best.toml", "best-finetune.toml")
