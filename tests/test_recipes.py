"""Every published row's recipe: its cost from the papers' layer tables, its header, one real step.

The expected numbers are sums over the layers that the papers state, written here layer by layer;
nothing is copied from what the code prints.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from detkit.config import Config, read_toml, recipes, resolve, to_plain
from detkit.engine import checkpoint, distributed, schedule
from detkit.engine.optimizer import base_lr, build_optimizer, set_factor
from detkit.engine.step import train_step
from detkit.models import Part, build_backbone, build_detector, count_classifier, count_detector
from detkit.models.norm import SyncBatchNorm2d
from detkit.models.zoo import BACKBONES, WEIGHTS_OF
from detkit.models.zoo import DETECTORS as DETECTOR_BUILDERS
from detkit.types import Batch, CategoryMap, Target

PUBLISHED = [name for name in recipes() if name.startswith(("detnet/", "light-head/"))]
CLASSIFIERS = [name for name in PUBLISHED if "/imagenet-" in name]
DETECTORS = [name for name in PUBLISHED if name not in CLASSIFIERS]
COCO = 80


def settings(name: str) -> Config:
    return resolve([read_toml(recipes()[name])])


# --- costs from the layer tables ------------------------------------------------------------------


class Cost(NamedTuple):
    """Parameters and multiply-adds."""

    params: int
    macs: int


def total(parts: Iterable[Cost]) -> Cost:
    """Sum over layers."""
    parts = list(parts)
    return Cost(sum(p.params for p in parts), sum(p.macs for p in parts))


def conv(cin: int, cout: int, taps: int, cells: int, *, norm: bool = False) -> Cost:
    """Convolution of ``taps`` weights per channel pair over ``cells`` outputs: bias, or a norm's
    scale and shift.
    """
    return Cost(cin * cout * taps + (2 if norm else 1) * cout, cin * cout * taps * cells)


def linear(cin: int, cout: int, rois: int, *, norm: bool = False) -> Cost:
    """Fully connected layer over ``rois`` rows, with its bias, and with a norm where asked."""
    return Cost((cin + 1) * cout + (2 * cout if norm else 0), cin * cout * rois)


# Classifiers with 1000 classes at 224x224, stride in the first 1x1 (DetNet, Tables 1, 5 and 6: 3.8,
# 7.6, 6.1, 4.8 and 4.6 G; Light-Head R-CNN: 145 M with norms, Table 7).
CLASSIFIER = {
    "resnet50-msra": Cost(25_557_032, 3_857_973_248),
    "resnet101-msra": Cost(44_549_160, 7_570_194_432),
    "resnet50-dilated": Cost(25_557_032, 6_054_477_824),
    # ResNet-101 with the stage 5 of ResNet-50-dilated in the place of ResNet-50's
    "resnet101-dilated": Cost(44_549_160, 7_570_194_432 + 6_054_477_824 - 3_857_973_248),
    "detnet59": Cost(18_372_648, 4_846_018_560),
    "detnet59-noproj": Cost(17_322_024, 4_640_497_664),
    "xception145": Cost(1_531_936, 143_078_976),
}
LAST = {"xception145": 576, "detnet59": 1024, "detnet59-noproj": 1024}  # channels; else 2048


def backbone(name: str, height: int, width: int) -> Cost:
    """Without the classifier's last layer; all maps of a size divisible by 32 scale alike."""
    whole, fc = CLASSIFIER[name], linear(LAST.get(name, 2048), 1000, 1)
    macs = Fraction((whole.macs - fc.macs) * height * width, 224 * 224)
    assert macs.denominator == 1
    return Cost(whole.params - fc.params, int(macs))


class Level(NamedTuple):
    """A backbone's map: its channels and its stride."""

    channels: int
    stride: int


def levels(name: str) -> list[Level]:
    """Maps of stages 2, 3, ... (DetNet, section 3: the last three share stride 16)."""
    first = [Level(256, 4), Level(512, 8), Level(1024, 16)]
    if name.startswith("detnet"):
        return [*first, Level(1024, 16), Level(1024, 16)]
    return [*first, Level(2048, 16 if name.endswith("dilated") else 32)]


def cells(height: int, width: int, stride: int) -> int:
    return -(-height // stride) * -(-width // stride)


def pyramid_cells(name: str, height: int, width: int) -> list[int]:
    """Cells of P2 to P6; where there is no stage 6, P6 is every second cell of P5."""
    strides = [level.stride for level in levels(name)]
    if len(strides) < 5:
        strides.append(2 * strides[-1])
    return [cells(height, width, stride) for stride in strides]


def pyramid(name: str, height: int, width: int, *, norm: bool) -> Cost:
    """FPN: a 1x1 lateral and a 3x3 output convolution per level of the backbone, 256 channels."""
    counts = pyramid_cells(name, height, width)
    layers = []
    for level, count in zip(levels(name), counts, strict=False):
        layers += [conv(level.channels, 256, 1, count, norm=norm)]
        layers += [conv(256, 256, 9, count, norm=norm)]
    return total(layers)


def region_proposals(cin: int, channels: int, per_cell: int, logits: int, count: int) -> Cost:
    """3x3 convolution, ``logits`` per anchor and four deltas, over ``count`` cells."""
    return total(
        [
            conv(cin, channels, 9, count),
            conv(channels, logits * per_cell, 1, count),
            conv(channels, 4 * per_cell, 1, count),
        ]
    )


def two_fc(rois: int, *, norm: bool) -> Cost:
    """7x7x256 features, two layers of 1024, 81 classes and 80 boxes."""
    return total(
        [
            linear(256 * 49, 1024, rois, norm=norm),
            linear(1024, 1024, rois, norm=norm),
            linear(1024, COCO + 1, rois),
            linear(1024, 4 * COCO, rois),
        ]
    )


def large_separable(cin: int, middle: int, count: int) -> Cost:
    """Two branches, 15x1 then 1x15 and the other way round, to 10 * 7 * 7 channels."""
    return total([conv(cin, middle, 15, count), conv(middle, 490, 15, count)] * 2)


def light_head(rois: int) -> Cost:
    """One layer of 2048 on the 490 numbers of a RoI, 81 classes and one box."""
    return total([linear(490, 2048, rois), linear(2048, 81, rois), linear(2048, 4, rois)])


def stage5(rois: int) -> Cost:
    """ResNet's last stage on 14x14 features with the stride in its first 1x1: 7x7 all along."""
    out = 49 * rois
    first = [conv(1024, 512, 1, out, norm=True), conv(1024, 2048, 1, out, norm=True)]
    later = [conv(2048, 512, 1, out, norm=True)] * 2
    each = [conv(512, 512, 9, out, norm=True), conv(512, 2048, 1, out, norm=True)] * 3
    return total([*first, *later, *each])


# --- detectors ------------------------------------------------------------------------------------


def faster_rcnn_fpn(config: Config, height: int, width: int, rois: int) -> Cost:
    name, norm = config.model.backbone, config.model.head_norm != "none"
    return total(
        [
            backbone(name, height, width),
            pyramid(name, height, width, norm=norm),
            region_proposals(256, 256, 3, 1, sum(pyramid_cells(name, height, width))),
            two_fc(rois, norm=norm),
        ]
    )


def mask_rcnn_fpn(config: Config, height: int, width: int, rois: int) -> Cost:
    """On 100 detections: four 3x3 convolutions on 14x14, 2x2 deconvolution, 80 masks of 28x28."""
    inside, outside = 100 * 14 * 14, 100 * 28 * 28
    deconvolution = Cost(256 * 256 * 4 + 256, 256 * 256 * 4 * inside)
    head = [*[conv(256, 256, 9, inside)] * 4, deconvolution, conv(256, COCO, 1, outside)]
    return total([faster_rcnn_fpn(config, height, width, rois), *head])


def faster_rcnn_c4(config: Config, height: int, width: int, rois: int) -> Cost:
    name, c4 = config.model.backbone, cells(height, width, 16)
    on_image = stage5(1)  # what the backbone's own count has in it
    own = Cost(on_image.params, on_image.macs // 49 * cells(height, width, 32))
    whole = backbone(name, height, width)
    return total(
        [
            Cost(whole.params - own.params, whole.macs - own.macs),
            region_proposals(1024, 512, 15, 1, c4),
            stage5(rois),
            linear(2048, 81, rois),
            linear(2048, 4 * COCO, rois),
        ]
    )


def dense_c4(config: Config, height: int, width: int) -> list[Cost]:
    """Dilated ResNet-101 and a softmax RPN of 512 channels on its C4."""
    anchors = 3 * len(config.anchors.sizes)
    return [
        backbone(config.model.backbone, height, width),
        region_proposals(1024, 512, anchors, 2, cells(height, width, 16)),
    ]


def rfcn(config: Config, height: int, width: int, rois: int) -> Cost:
    """1x1 to 1024 channels, then 7x7 score maps of 81 classes and of one box; they are averaged."""
    c5 = cells(height, width, 16)
    head = [conv(2048, 1024, 1, c5), conv(1024, 81 * 49, 1, c5), conv(1024, 4 * 49, 1, c5)]
    return total([*dense_c4(config, height, width), *head])


def thin_rfcn(config: Config, height: int, width: int, rois: int) -> Cost:
    """490 thin maps, classes and box straight from the 490 numbers of a RoI.

    The maps come from R-FCN's two 1x1 convolutions, the second with fewer channels, or from the
    large kernel.
    """
    c5 = cells(height, width, 16)
    thin = [conv(2048, 1024, 1, c5), conv(1024, 490, 1, c5)]
    if config.thin.kernel > 1:
        thin = [large_separable(2048, 256, c5)]
    head = [linear(490, 81, rois), linear(490, 4, rois)]
    return total([*dense_c4(config, height, width), *thin, *head])


def light_head_rcnn(config: Config, height: int, width: int, rois: int) -> Cost:
    if config.model.backbone == "xception145":  # setting S: RPN on 288 channels, C5 at stride 32
        base = [
            backbone("xception145", height, width),
            region_proposals(288, 256, 15, 2, cells(height, width, 16)),
        ]
        thin = large_separable(576, 64, cells(height, width, 32))
    else:
        base = dense_c4(config, height, width)
        thin = large_separable(2048, 256, cells(height, width, 16))
    return total([*base, thin, light_head(rois)])


def light_head_fpn(config: Config, height: int, width: int, rois: int) -> Cost:
    """FPN with its RPN, one large kernel of 64 over P2 to P5, the head of Light-Head R-CNN."""
    name = config.model.backbone
    counts = pyramid_cells(name, height, width)
    return total(
        [
            backbone(name, height, width),
            pyramid(name, height, width, norm=False),
            region_proposals(256, 256, 3, 1, sum(counts)),
            large_separable(256, 64, sum(counts[:4])),
            light_head(rois),
        ]
    )


EXPECTED: dict[str, Callable[[Config, int, int, int], Cost]] = {
    "frcnn-fpn": faster_rcnn_fpn,
    "maskrcnn-fpn": mask_rcnn_fpn,
    "frcnn-c4": faster_rcnn_c4,
    "rfcn": rfcn,
    "rfcn-thin": thin_rfcn,
    "light-head": light_head_rcnn,
    "light-head-fpn": light_head_fpn,
}


def padded(config: Config) -> tuple[int, int]:
    """Height and width of a wide test image as the network sees it."""
    multiple = config.data.pad_multiple
    short, long = (-(-side // multiple) * multiple for side in image_size(config))
    return short, long


def image_size(config: Config) -> tuple[int, int]:
    return config.data.short_side, config.data.long_side


@pytest.mark.parametrize("name", DETECTORS)
def test_detector_costs_what_its_layers_sum_up_to(name: str) -> None:
    config = settings(name)
    height, width = padded(config)
    rois = config.rpn.post_nms_test
    found = count_detector(config, COCO, height, width, rois)["total"]
    expected = EXPECTED[config.model.detector](config, height, width, rois)
    assert (found.params, found.macs) == expected


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_costs_what_was_published(name: str) -> None:
    config = settings(name)
    with torch.device("meta"):
        found = count_classifier(
            build_backbone(config.model.backbone), 1000, config.data.short_side
        )
    assert (found["total"].params, found["total"].macs) == CLASSIFIER[config.model.backbone]


def giga(cost: Cost, digits: int = 1) -> float:
    return round(cost.macs / 1e9, digits)


def test_the_sums_give_the_published_parts() -> None:
    """Whole parts whose sizes are known from elsewhere: the sums above are not of our making."""
    assert pyramid("resnet50-msra", 800, 1344, norm=False).params == 3_344_384
    assert pyramid("detnet59", 800, 1344, norm=False).params == 3_934_720
    assert region_proposals(256, 256, 3, 1, 1).params == 593_935
    assert region_proposals(1024, 512, 15, 2, 1) == (4_765_274, 4_764_672)
    assert region_proposals(288, 256, 15, 2, 1) == (686_938, 686_592)
    assert large_separable(2048, 256, 1) == (19_493_332, 19_491_840)
    assert large_separable(576, 64, 1) == (2_047_828, 2_046_720)
    assert light_head(1) == (1_005_568 + 165_969 + 8_196, 1_177_600)
    with_maps = settings("light-head/rfcn-b2")
    parts = rfcn(with_maps, 16, 16, 1), total(dense_c4(with_maps, 16, 16))
    assert parts[0].params - parts[1].params == 6_367_301
    assert parts[0].macs - parts[1].macs == 6_362_112


def test_the_sums_give_the_published_costs_of_whole_images() -> None:
    backbones = {
        "resnet50-msra": 82.6,
        "resnet50-dilated": 129.7,
        "detnet59": 103.8,
        "detnet59-noproj": 99.4,
        "resnet101-msra": 162.2,
    }
    for name, cost in backbones.items():
        assert giga(backbone(name, 800, 1344)) == cost
    assert giga(pyramid("resnet50-msra", 800, 1344, norm=False)) == 60.9
    assert giga(pyramid("detnet59", 800, 1344, norm=False)) == 66.9
    # Setting L at 800x1200: 279 GMACs; setting S at 700x1100: 7.05. Both unpadded.
    assert giga(backbone("resnet101-dilated", 800, 1200)) == 186.8


@pytest.mark.parametrize(
    ("name", "size", "parts", "whole"),
    [
        ("light-head/setting-l", (800, 1200), {"backbone": 186.8, "rpn": 17.9}, 279),
        ("light-head/setting-s-700", (700, 1100), {"backbone": 2.21, "rpn": 2.08}, 7.05),
    ],
)
def test_light_head_costs_the_published_giga(
    name: str, size: tuple[int, int], parts: dict[str, float], whole: float
) -> None:
    found = count_detector(settings(name), COCO, *size)
    digits = 1 if whole > 100 else 2
    for part, cost in parts.items():
        assert round(found[part].macs / 1e9, digits) == cost
    assert found["total"].macs / 1e9 == pytest.approx(whole, abs=0.5 if whole > 100 else 0.005)


# --- headers --------------------------------------------------------------------------------------


def header(name: str) -> str:
    """Comment block at the top of a recipe, lines kept."""
    lines = recipes()[name].read_text(encoding="utf-8").splitlines()
    return "\n".join(line[1:].strip() for line in lines[: lines.index("")])


def command_of(name: str) -> list[str]:
    (line,) = re.findall(r"^detkit .*$", header(name), re.MULTILINE)
    return shlex.split(line)[1:]


COST = re.compile(
    r"^Estimate, not measured: ([\d,]+) images x ([\d.]+) GMACs \((\d+)x(\d+)(?:, (\d+) RoIs)?\)$"
    r"\n^x 6 FLOP \(forward 2, backward 4\) = ([\d.e]+) FLOP, ([\d.]+) GPU hours at 10 TFLOP/s\.$",
    re.MULTILINE,
)
IMAGENET, TRAIN2017 = 1_281_167, 118_287


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_has_command_score_and_cost(name: str) -> None:
    text = header(name)
    first = text.splitlines()[0]
    paper = {"detnet": "DetNet, Table", "light-head": "Light-Head R-CNN, Table"}
    assert first.startswith(paper[name.split("/")[0]])
    assert re.search(r"Published: ((mask )?AP \d\d\.\d|top-1 error \d\d\.\d)", first)
    arguments = command_of(name)
    assert arguments[0] == ("pretrain" if name in CLASSIFIERS else "finetune")
    assert arguments[arguments.index("--recipe") + 1] == name
    assert re.search(r"^Cost: 8 GPUs x (1 image|2 images|32 images), ", text, re.MULTILINE)


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_reckons_right(name: str) -> None:
    config = settings(name)
    match = COST.search(header(name))
    assert match, header(name)
    images = int(match[1].replace(",", ""))
    each = IMAGENET if name in CLASSIFIERS else TRAIN2017
    length = config.train.steps * config.train.batch_size or config.train.epochs * each
    assert images == length
    if name in CLASSIFIERS:
        cost = CLASSIFIER[config.model.backbone]
    else:
        height, width, rois = (int(match[i]) for i in (3, 4, 5))
        assert (height, width) == padded(config)
        assert rois == (
            config.rpn.post_nms_train if config.box.ohem else config.box.batch_per_image
        )
        cost = EXPECTED[config.model.detector](config, height, width, rois)
    assert float(match[2]) == pytest.approx(cost.macs / 1e9, rel=0.01)
    flop = images * float(match[2]) * 1e9 * 6
    assert float(match[6]) == pytest.approx(flop, rel=0.05)
    assert float(match[7]) == pytest.approx(flop / 1e13 / 3600, rel=0.05)


# --- what the papers fix --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in DETECTORS if n.startswith("detnet/")])
def test_detnet_rows_train_as_published(name: str) -> None:
    config = settings(name)
    assert (config.rpn.joint, config.rpn.nms_iou) == (True, 0.7)
    assert (config.rpn.pre_nms_train, config.rpn.post_nms_train) == (12000, 2000)
    assert (config.rpn.pre_nms_test, config.rpn.post_nms_test) == (6000, 1000)
    assert (config.train.steps, config.train.batch_size) == (180_000, 16)
    assert drops(config) == {120_000: 0.1, 160_000: 0.01}
    assert rate(config, 0) == pytest.approx(0.02 * 0.3) and rate(config, 500) == 0.02
    assert (config.optim.momentum, config.optim.weight_decay) == (0.9, 1e-4)
    assert (config.optim.bias_lr_factor, config.optim.norm_decay) == (2.0, False)
    assert (config.rpn.batch_per_image, config.rpn.positive_fraction) == (256, 0.5)
    assert (config.box.batch_per_image, config.box.positive_fraction) == (512, 0.25)
    assert (config.box.score_threshold, config.box.nms_iou) == (0.05, 0.5)
    assert image_size(config) == (800, 1333)
    scratch = name.endswith("scratch")
    norms = (config.model.norm, config.model.head_norm, config.model.frozen_stages)
    assert norms == (("sync_bn", "sync_bn", 0) if scratch else ("frozen_bn", "none", 1))


@pytest.mark.parametrize("name", [n for n in DETECTORS if n.startswith("light-head/")])
def test_light_head_rows_train_as_published(name: str) -> None:
    config = settings(name)
    assert (config.model.norm, config.model.frozen_stages) == ("frozen_bn", 2)
    assert (config.optim.bias_lr_factor, config.optim.norm_decay) == (1.0, False)
    assert config.thin.lr_factor == 3
    if config.model.backbone != "xception145":  # raw pixels minus a mean: nothing is divided
        pixels = (123.15, 115.9, 103.06) if "-b1" in name else (122.7717, 115.9465, 102.9801)
        assert [255 * m for m in config.data.mean] == pytest.approx(pixels, abs=1e-4)
        assert [255 * s for s in config.data.std] == pytest.approx([1, 1, 1], abs=1e-5)
    if "-b1" in name:
        # 8 gradients summed at 5e-4 are their mean at 0.004; its decay 5e-4 x 5e-4 is not summed
        assert rate(config, 1000) == pytest.approx(8 * 5e-4)
        assert rate(config, 1000) * config.optim.weight_decay == pytest.approx(5e-4 * 5e-4)
        assert rate(config, 0) == pytest.approx(8 * 5e-5)
        assert image_size(config) == (600, 1000)
        assert len(config.anchors.sizes) * len(config.anchors.ratios) == 12
        assert (config.rpn.post_nms_train, config.rpn.post_nms_test) == (300, 300)
        assert (config.box.ohem, config.box.regression_weight) == (128, 1.0)
        assert config.train.epochs == 2 * 8 and config.optim.milestones[0] == pytest.approx(
            5.333 / 8, abs=1e-4
        )
        return
    assert drops(config) == {93_750: 0.1} and config.train.steps == 93_750 + 31_250
    assert (rate(config, 500), config.optim.weight_decay) == (0.01, 1e-4)
    assert image_size(config) == ((700, 1100) if name.endswith("s-700") else (800, 1200))
    if config.model.detector != "frcnn-c4":
        assert (config.box.ohem, config.box.regression_weight) == (256, 2.0)
    if config.model.detector != "light-head-fpn":
        assert len(config.anchors.sizes) * len(config.anchors.ratios) == 15
        assert (config.rpn.pre_nms_train, config.rpn.post_nms_train) == (12000, 2000)
        assert (config.rpn.pre_nms_test, config.rpn.post_nms_test) == (6000, 1000)


@pytest.mark.parametrize(
    ("name", "pool", "nms_iou", "scales"),
    [
        ("rfcn-b2", "cells", 0.3, 0),
        ("rfcn-b2-large-kernel", "cells", 0.3, 0),
        ("setting-l-pool", "cells", 0.3, 0),
        ("setting-l-align", "max", 0.3, 0),
        ("setting-l", "max", 0.5, 0),
        ("setting-l-multi-scale", "max", 0.5, 5),
    ],
)
def test_each_row_of_the_light_head_tables_adds_its_part(
    name: str, pool: str, nms_iou: float, scales: int
) -> None:
    config = settings(f"light-head/{name}")
    assert (config.box.ps_pool, config.box.ps_offset, config.box.nms_iou) == (pool, 0.0, nms_iou)
    assert config.data.multi_scale == (600, 700, 800, 900, 1000)[:scales]
    assert config.data.train_long_side == (1400 if scales else 0)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_train_as_resnext(name: str) -> None:
    config = settings(name)
    steps = 100 * IMAGENET / 256
    rates = [rate(config, int(steps * (epoch + 0.5) / 100), steps) for epoch in (0, 29, 30, 60, 90)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 1e-3, 1e-4])
    assert (config.train.epochs, config.train.batch_size) == (100, 256)
    assert config.optim.nesterov and config.optim.norm_decay
    assert config.optim.weight_decay == (4e-5 if name.endswith("xception145") else 1e-4)
    data = config.data
    assert (data.short_side, data.min_crop, data.color_jitter, data.lighting) == (
        224,
        0.08,
        0.4,
        0.1,
    )
    assert round(data.short_side / data.eval_crop) == 256


def rate(config: Config, step: int, steps: float = 0) -> float:
    """Learning rate of the step after ``step`` steps."""
    length = steps or config.train.steps or 16 * TRAIN2017 / config.train.batch_size
    share = schedule.factor(config.optim, step / length, step)
    return base_lr(config.optim, config.train.batch_size) * share


def drops(config: Config) -> dict[int, float]:
    """Steps before which the rate changes, to its share of the first one from then on."""
    found, last = {}, 1.0
    for step in range(0, config.train.steps, 1250):
        share = round(rate(config, max(step, 1000)) / rate(config, 1000), 6)
        if share != last:
            found[step] = last = share
    return {step: share for step, share in found.items()}


# --- one step of each -----------------------------------------------------------------------------


# The others differ from one of these in the backbone, or in what one step does not show.
DISTINCT = {
    *("detnet/detnet59-fpn", "detnet/detnet59-fpn-scratch", "detnet/detnet59-maskrcnn"),
    *("light-head/rfcn-b1", "light-head/rfcn-b2-thin", "light-head/setting-l"),
    *("light-head/setting-s-700", "light-head/fpn", "light-head/faster-rcnn"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in DISTINCT else pytest.mark.slow) for n in DETECTORS],
)
def test_one_step_trains_what_is_not_frozen(name: str) -> None:
    small = {
        "rpn": {"pre_nms_train": 200, "post_nms_train": 60},
        "box": {"batch_per_image": 24},
        "train": {"batch_size": 1},
    }
    config = resolve([read_toml(recipes()[name]), small])
    model = build_detector(config, 3)
    stages = 0 if name.endswith("scratch") else 1 if name.startswith("detnet/") else 2
    assert model.backbone.frozen_stages == stages
    norms = {path: m for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for norm in norms.values():
        # random weights under the statistics of frozen norms would explode
        nn.init.constant_(norm.weight, 0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    one_step(model.train(), config, picture(masks=config.model.detector.startswith("mask")))
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    changed = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    for number in range(1, model.backbone.num_stages + 1):
        keys = stage_keys(model.backbone, number)
        convs = {k for k in keys if before[k].ndim == 4}
        if number <= stages:
            assert not keys & changed
        else:
            assert convs <= changed
    kept = config.model.norm == "frozen_bn"
    state = {p: n.state_dict() if kept else dict(n.named_buffers()) for p, n in norms.items()}
    keys = {f"{path}.{key}" for path, own in state.items() for key in own}
    assert not keys & changed if kept else keys <= changed


def stage_keys(backbone: nn.Module, number: int) -> set[str]:
    """Keys of a stage's weights and buffers in the detector's state dict."""
    names = {module: name for name, module in backbone.named_modules()}
    return {
        f"backbone.{names[module]}.{key}"
        for module in backbone.stage(number)
        for key in module.state_dict()
    }


def picture(count: int = 1, *, masks: bool = False) -> Batch:
    """Noise images of 128x128 with two objects each."""
    images = torch.randn(count, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[10.0, 12, 60, 70], [40, 50, 120, 118]])
    marks = torch.zeros(2, 128, 128, dtype=torch.bool)
    for mark, (x0, y0, x1, y1) in zip(marks, boxes.int().tolist(), strict=True):
        mark[y0:y1, x0:x1] = True
    truth = Target(boxes, torch.tensor([1, 3]), torch.tensor([False, False]), marks)
    if not masks:
        truth.masks = None
    return Batch(images, torch.full((count, 2), 128), [truth] * count)


def one_step(model: nn.Module, config: Config, batch: Batch, *, images: int = 1) -> None:
    optimizer = build_optimizer(model, config.optim, config.train.batch_size)
    set_factor(optimizer, base_lr(config.optim, config.train.batch_size), 1.0)
    result = train_step(
        model,
        [batch],
        optimizer,
        GradScaler("cpu", enabled=False),
        images=images,
        device=torch.device("cpu"),
    )
    assert result.finite


@pytest.mark.parametrize("name", [n for n in DETECTORS if n.endswith("scratch")])
def test_from_scratch_every_norm_is_synchronised(name: str) -> None:
    with torch.device("meta"):
        model = build_detector(settings(name), COCO)
    norms = {path: m for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(type(norm) is SyncBatchNorm2d for norm in norms.values())
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and path.startswith(("backbone.", "neck.")):
            assert module.bias is None, f"{path} has a bias and no norm"
    assert {path.split(".")[0] for path in norms} == {"backbone", "neck", "head"}
    assert sum(path.startswith("head.") for path in norms) == 2
    assert all(p.requires_grad for p in model.parameters())


def scratch() -> Config:
    """The from-scratch recipe on the small backbone, without a choice of RoIs and anchors by lot:
    every process must count the same ones.
    """
    small = {
        "model": {"backbone": "detnet59-tiny", "neck_channels": 16},
        "rpn": {"batch_per_image": 100_000, "post_nms_train": 8},
        "box": {"channels": 32, "batch_per_image": 10, "positive_fraction": 1.0},
        "train": {"batch_size": 2},
        "optim": {"lr": 1.6},
    }
    return resolve([read_toml(recipes()["detnet/detnet59-fpn-scratch"]), small])


def small_scratch() -> nn.Module:
    torch.manual_seed(0)
    model = build_detector(scratch(), 3).train()
    for norm in (m for m in model.modules() if isinstance(m, SyncBatchNorm2d)):
        nn.init.constant_(norm.weight, 0.5)  # blocks that start as their shortcut would not move
    return model


def stepped(wrap: Callable[[nn.Module], nn.Module], batch: Batch) -> dict[str, Tensor]:
    """Weights of the small detector after one step."""
    model = small_scratch()
    one_step(wrap(model), scratch(), batch, images=2)
    return model.state_dict()


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    whole = picture(2)
    own = Batch(whole.images[rank : rank + 1], whole.sizes[:1], whole.targets[:1])
    weights = stepped(lambda model: distributed.wrap(model, torch.device("cpu")), own)
    torch.save(weights, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_from_scratch_two_processes_step_as_one(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    alone = stepped(lambda model: model, picture(2))
    start = small_scratch().state_dict()
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for key, value in alone.items():
        torch.testing.assert_close(parts[0][key], value, rtol=1e-5, atol=1e-5)
        assert parts[0][key].equal(parts[1][key]), key
    backbone = [key for key in alone if key.startswith("backbone.") and alone[key].ndim == 4]
    moved = [(alone[key] - start[key]).abs().max() for key in backbone]
    assert min(moved) > 1e-4  # the step is far larger than what may differ


# --- the commands of the headers ------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints that the pre-training recipes would leave, but for weights."""
    folder = tmp_path_factory.mktemp("pretrained")
    for name in CLASSIFIERS:
        arguments = command_of(name)
        target = folder / arguments[arguments.index("--out") + 1] / "best.pth"
        target.parent.mkdir(parents=True)
        content: checkpoint.Checkpoint = {
            "format": checkpoint.FORMAT,
            "kind": "backbone",
            "config": to_plain(settings(name)),
            "categories": CategoryMap([1], ["thing"]).to_plain(),
            "model": {},
            "provenance": {},
        }
        checkpoint.save(target, content)
    return folder


@pytest.mark.parametrize(("name", "source"), WEIGHTS_OF.items())
def test_dilated_backbones_fit_the_weights_they_start_from(name: str, source: str) -> None:
    with torch.device("meta"):
        ours, theirs = (build_backbone(n).state_dict() for n in (name, source))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert CLASSIFIER[name].macs != CLASSIFIER[source].macs


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_command_of_the_header_runs(
    name: str,
    pretrained: Path,
    real_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    would_train: Callable[[list[str]], dict[str, Any]],
) -> None:
    monkeypatch.chdir(pretrained)
    data = real_data / ("sign_digits_imagefolder" if name in CLASSIFIERS else "coco_mini")
    asked = to_plain(settings(name))
    got = would_train([*command_of(name), "--set", f"data.path={data}"])
    asked["data"]["path"] = str(data)
    if name in DETECTORS and "--init-from" in command_of(name):
        # what the images of the backbone's pre-training were normalised by wins
        asked["data"]["mean"], asked["data"]["std"] = got["data"]["mean"], got["data"]["std"]
        assert got["data"]["mean"] == to_plain(Config())["data"]["mean"]
    assert got == asked


# --- docs/detectors.md ----------------------------------------------------------------------------

DOC = Path(__file__).parents[1] / "docs" / "detectors.md"


def documented(marker: str) -> list[dict[str, str]]:
    """Rows of the table below a marker, by column; a later column of the same name ends in '."""
    text = DOC.read_text(encoding="utf-8")
    (table,) = re.findall(rf"<!-- {marker} -->\n((?:\|.*\n)+)", text)
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    )
    names = [name + "'" * head[:i].count(name) for i, name in enumerate(head)]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_documented_parts_are_what_the_code_gives() -> None:
    rows = documented("parts")
    counted: dict[tuple[str, str], dict[str, Part]] = {}
    for row in rows:
        config, key = settings(row["recipe"]), (row["recipe"], row["image"])
        height, width = map(int, row["image"].split("x"))
        if row["part"] == "classifier":
            with torch.device("meta"):
                net = build_backbone(config.model.backbone)
            counted[key] = {"classifier": count_classifier(net, 1000, height)["total"]}
        elif key not in counted:
            counted[key] = count_detector(config, COCO, height, width)
        found = counted[key][row["part"]]
        digits = len(row["GMACs"].partition(".")[2])
        assert row["parameters"] == row["by hand"] == f"{found.params:,}", row
        assert row["GMACs"] == row["by hand'"] == f"{found.macs / 1e9:.{digits}f}", row
    papers = {row["recipe"].split("/")[0] for row in rows}
    assert papers == {"detnet", "light-head", "detnas"}


def check_documented(cells: list[tuple[str, str, str]]) -> None:
    for name, net, cell in cells:
        config = resolve([{"model": {"detector": name, "backbone": net}}])
        found = count_detector(config, COCO, 800, 1344)["total"]
        assert cell == f"{found.params / 1e6:.2f} / {found.macs / 1e9:.1f}", (name, net)


def documented_cells() -> list[tuple[str, str, str]]:
    rows = documented("whole")
    return [
        (name, row["backbone"], cell)
        for row in rows
        for name, cell in row.items()
        if name != "backbone"
    ]


def test_every_detector_and_backbone_is_documented() -> None:
    cells = documented_cells()
    assert {name for name, _, _ in cells} == set(DETECTOR_BUILDERS)
    assert {net for _, net, _ in cells} == set(BACKBONES), "run tools/detector_tables.py"
    # one backbone per detector here, all of them in the slow test
    check_documented(
        [cells[i * (len(DETECTOR_BUILDERS) + 1)] for i in range(len(DETECTOR_BUILDERS))]
    )


@pytest.mark.slow
def test_documented_costs_are_what_the_code_gives() -> None:
    check_documented(documented_cells())
