"""Every setting of a run as frozen dataclasses, read from TOML; unknown keys name the nearest.

Order of precedence, last wins: defaults (the detector's own above the general ones), recipe,
checkpoint to start from, config file, command-line flags (``--seed`` is one), ``--set key=value``.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from detkit.errors import ConfigError

NORMS = ("frozen_bn", "bn", "sync_bn", "gn")
SCALES = ("off", "learn", "split")

_C4_RPN = {
    "softmax": True,
    "channels": 512,
    "pre_nms_train": 12000,
    "post_nms_train": 2000,
    "pre_nms_test": 6000,
    "post_nms_test": 1000,
}
_PS_BOX = {"class_agnostic": True, "ohem": 256, "regression_weight": 2.0, "score_threshold": 0.0}
DETECTOR_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "frcnn-c4": {
        "rpn": {"channels": 512, "pre_nms_train": 12000, "pre_nms_test": 6000},
        "box": {"resolution": 14, "channels": 0},
    },
    "retinanet": {
        "anchors": {"octave_scales": 3},
        "box": {"weights": [1.0, 1.0, 1.0, 1.0]},
    },
    "rfcn": {
        "anchors": {"style": "caffe"},
        "rpn": _C4_RPN,
        "box": {**_PS_BOX, "ps_pool": "cells", "nms_iou": 0.3, "channels": 0},
        "thin": {"kernel": 1, "mid_channels": 1024},
    },
    "rfcn-thin": {
        "anchors": {"style": "caffe"},
        "rpn": _C4_RPN,
        "box": {**_PS_BOX, "ps_pool": "cells", "nms_iou": 0.3, "channels": 0},
        "thin": {"kernel": 1, "mid_channels": 1024},
    },
    "light-head": {
        "anchors": {"style": "caffe"},
        "rpn": _C4_RPN,
        "box": {**_PS_BOX, "channels": 2048},
    },
    "light-head-fpn": {
        "box": {**_PS_BOX, "channels": 2048},
        "thin": {"mid_channels": 64},
    },
}
"""What a detector's paper fixes where that differs from the defaults below; every recipe and
setting comes on top."""

_ONE_LEVEL = ("model.neck_channels", "box.roi_max_level", "box.canonical_size", "box.head")
_PS_POOL = ("box.ps_pool", "box.ps_offset")
_ROIS = (
    *("box.head", "box.resolution", "box.sampling_ratio", "box.aligned", "box.roi_max_level"),
    *("box.canonical_size", "box.channels", "box.batch_per_image", "box.ohem", "box.ohem_scope"),
    *("box.positive_fraction", "box.fg_iou", "box.smooth_l1_beta", "box.class_agnostic"),
)
UNUSED: dict[str, tuple[str, ...]] = {
    "frcnn-c4": (*_ONE_LEVEL, *_PS_POOL, "thin", "retina", "mask"),
    "frcnn-fpn": (*_PS_POOL, "thin", "retina", "mask"),
    "maskrcnn-fpn": (*_PS_POOL, "thin", "retina"),
    "retinanet": ("rpn", *_ROIS, *_PS_POOL, "thin", "mask"),
    "rfcn": (*_ONE_LEVEL, "box.aligned", "thin.channels", "retina", "mask"),
    "rfcn-thin": (*_ONE_LEVEL, "box.aligned", "retina", "mask"),
    "light-head": (*_ONE_LEVEL, "box.aligned", "retina", "mask"),
    "light-head-fpn": ("box.aligned", "box.head", "retina", "mask"),
}
"""Tables and settings that a detector has no part for; changing them is refused."""

_LENGTHS = ("steps", "epochs", "minutes")  # of the table train

SUPERNET = "detnas-supernet"
"""How the names of supernets begin; alone it is the supernet of the table ``space``."""


def is_supernet(backbone: str) -> bool:
    """Whether ``backbone`` names a supernet of DetNAS."""
    return backbone.startswith(SUPERNET)


def _require(condition: bool, key: str, must: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{key}: must be {must}, got {value!r}")


def _one_of(key: str, value: str, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(
            f"{key}: must be one of {', '.join(choices)}, got {value!r}{suggest(value, choices)}"
        )


def suggest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known word nearest to ``word``, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def suggest_path(path: str | Path) -> str:
    """As :func:`suggest`, of what lies where ``path`` does not, without its hidden files."""
    path = Path(path)
    if path.exists():
        return ""
    try:
        near = [str(path.with_name(p.name)) for p in path.parent.iterdir() if p.name[0] != "."]
    except OSError:
        return ""
    return suggest(str(path), sorted(near)) if path.name else ""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network."""

    detector: str = "frcnn-fpn"
    """Name of a detector, as `detkit models` lists them."""
    backbone: str = "resnet50"
    """Name of a backbone, as `detkit models` lists them."""
    norm: str = "frozen_bn"
    """Normalisation of the backbone: frozen_bn, bn, sync_bn or gn."""
    head_norm: str = "none"
    """Normalisation of neck and heads: none, bn, sync_bn or gn."""
    norm_eps: float = 1e-5
    """Added to the variances of the backbone's batch norms (0 in torchvision's published
    detectors)."""
    norm_momentum: float = 0.1
    """Share of a batch in the running statistics of all batch norms (DetNAS: 0.1 for supernets,
    0.01 for single networks)."""
    frozen_stages: int = 0
    """Stages of the backbone that stay fixed: 0 none, 1 the stem (DetNet), 2 stem and conv2."""
    neck_channels: int = 256
    """Channels of every FPN level."""
    scales: str = "off"
    """Global scales (POD): off, learn (3x3 convolutions of conv3 to conv5 predict theirs), or
    split, which is what `detkit decompose` makes of these and nobody sets."""

    def __post_init__(self) -> None:
        _one_of("model.norm", self.norm, NORMS)
        _one_of("model.scales", self.scales, SCALES)
        _one_of("model.head_norm", self.head_norm, ("none", "bn", "sync_bn", "gn"))
        _require(self.norm_eps >= 0, "model.norm_eps", "zero or more", self.norm_eps)
        _require(
            0 < self.norm_momentum <= 1, "model.norm_momentum", "in (0, 1]", self.norm_momentum
        )
        _require(0 <= self.frozen_stages <= 6, "model.frozen_stages", "in 0..6", self.frozen_stages)
        _require(self.neck_channels > 0, "model.neck_channels", "positive", self.neck_channels)


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """Anchors of the region proposal network; strides come from the feature maps."""

    sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """Sides in input pixels of square anchors: one per level of a pyramid, finest first (or as many
    on each, level by level); all of them in each cell of a detector with one level."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height divided by width."""
    octave_scales: int = 1
    """Sizes per octave and level: size * 2^(i / octave_scales) (RetinaNet: 3)."""
    style: str = "torchvision"
    """torchvision (whole pixels around the cell's corner) or caffe (around the cell's centre, whole
    pixels at the cell's own size, then scaled, as R-FCN and Light-Head R-CNN)."""
    measured_strides: bool = False
    """Strides are padded image size // map size, as torchvision computes them, and not the declared
    ones; they differ where a map's size was rounded up."""

    def __post_init__(self) -> None:
        _one_of("anchors.style", self.style, ("torchvision", "caffe"))
        _require(self.octave_scales > 0, "anchors.octave_scales", "positive", self.octave_scales)
        _require(
            min(self.sizes, default=0) > 0,
            "anchors.sizes",
            "positive numbers",
            self.sizes,
        )
        _require(
            min(self.ratios, default=0) > 0,
            "anchors.ratios",
            "positive numbers",
            self.ratios,
        )


@dataclass(frozen=True, kw_only=True)
class RpnConfig:
    """Region proposal network: sampling, loss and proposals."""

    channels: int = 0
    """Channels of the 3x3 convolution; 0 takes those of its input."""
    softmax: bool = False
    """Two logits per anchor under a softmax (background, object) and not one under a sigmoid."""
    batch_per_image: int = 256
    """Anchors sampled for the loss."""
    positive_fraction: float = 0.5
    """Largest share of positives among them."""
    fg_iou: float = 0.7
    """An anchor at or above this IoU with a truth box is positive."""
    bg_iou: float = 0.3
    """An anchor below this IoU with every truth box is negative."""
    smooth_l1_beta: float = 1 / 9
    """Where the box loss turns from square to linear."""
    drop_straddling: bool = True
    """Leave anchors that cross the image border out of the loss."""
    pre_nms_train: int = 2000
    """Best-scoring anchors kept before NMS when training, per level (or in all, if joint)."""
    post_nms_train: int = 2000
    """Proposals kept after NMS when training."""
    pre_nms_test: int = 1000
    """As pre_nms_train, when detecting."""
    post_nms_test: int = 1000
    """As post_nms_train, when detecting."""
    nms_iou: float = 0.7
    """NMS threshold of the proposals."""
    post_nms_scope: str = "image"
    """When training, post_nms_train counts the proposals of each image, or those of all images of
    one process together (batch)."""
    joint: bool = False
    """Rank and suppress all levels as one pool (DetNet) and not per level."""
    min_size: float = 0.0
    """Smallest side in input pixels of a proposal."""

    def __post_init__(self) -> None:
        _one_of("rpn.post_nms_scope", self.post_nms_scope, ("image", "batch"))
        for name in ("positive_fraction", "fg_iou", "bg_iou", "nms_iou"):
            _require(0 <= getattr(self, name) <= 1, f"rpn.{name}", "in 0..1", getattr(self, name))
        for name in ("channels", "smooth_l1_beta", "min_size"):
            _require(getattr(self, name) >= 0, f"rpn.{name}", "zero or more", getattr(self, name))
        _require(
            self.bg_iou <= self.fg_iou,
            "rpn.bg_iou",
            f"at most rpn.fg_iou={self.fg_iou}",
            self.bg_iou,
        )
        for name in (
            "batch_per_image",
            "pre_nms_train",
            "post_nms_train",
            "pre_nms_test",
            "post_nms_test",
        ):
            _require(getattr(self, name) > 0, f"rpn.{name}", "positive", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class BoxConfig:
    """Box head on RoIs: features, sampling, loss and final detections."""

    head: str = "2fc"
    """Layers on RoIs of frcnn-fpn and maskrcnn-fpn: 2fc (two fully connected ones) or 4conv1fc
    (four 3x3 convolutions, then a fully connected one)."""
    resolution: int = 7
    """Bins of RoI pooling per side."""
    sampling_ratio: int = 2
    """Samples per bin and axis; 0 adapts to the RoI's size. Not used by ps_pool cells."""
    aligned: bool = True
    """Half-pixel shift of RoIAlign; position-sensitive heads have ps_offset."""
    ps_pool: str = "max"
    """Position-sensitive heads: max or avg of the sampled points (PS-RoIAlign), or cells, the mean
    over whole cells of R-FCN's PS-RoI pooling."""
    ps_offset: float = 0.0
    """Shift in cells of PS-RoIAlign: 0 (the paper's code) or 0.5 (torchvision)."""
    roi_max_level: int = 5
    """Coarsest level RoIs are sent to (5 or 6)."""
    canonical_size: float = 224.0
    """Box side in pixels that goes to level 4; level k = floor(4 + log2(side / canonical_size))."""
    channels: int = 1024
    """Width of the fully connected layers; 0 leaves them out (thin feature maps, R-FCN)."""
    batch_per_image: int = 512
    """RoIs sampled for the loss; not used with ohem."""
    ohem: int = 0
    """Online hard example mining: RoIs per image with the largest losses that learn, out of all
    proposals; 0 samples at random instead."""
    ohem_scope: str = "image"
    """Rank the losses within each image, or over the images of one process together (batch)."""
    positive_fraction: float = 0.25
    """Largest share of positives among them."""
    fg_iou: float = 0.5
    """A RoI at or above this IoU with a truth box takes its class."""
    smooth_l1_beta: float = 1.0
    """Where the box loss turns from square to linear."""
    weights: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    """Scale of the regression targets dx, dy, dw, dh."""
    regression_weight: float = 1.0
    """Weight of the box loss in the sum; hard examples are ranked without it."""
    class_agnostic: bool = False
    """One box per RoI and not one per class."""
    score_threshold: float = 0.05
    """Detections at or below this score are dropped."""
    nms_iou: float = 0.5
    """Per-class NMS threshold of the detections."""
    max_detections: int = 100
    """Detections kept per image."""
    min_size: float = 0.0
    """Smallest side in input pixels of a detection."""
    keep_empty: bool = False
    """Keep detections that are empty after clipping (torchvision's RetinaNet does)."""

    def __post_init__(self) -> None:
        _one_of("box.head", self.head, ("2fc", "4conv1fc"))
        _one_of("box.ps_pool", self.ps_pool, ("max", "avg", "cells"))
        _one_of("box.ohem_scope", self.ohem_scope, ("image", "batch"))
        _require(self.ps_offset in (0, 0.5), "box.ps_offset", "0 or 0.5", self.ps_offset)
        for name in (
            "sampling_ratio",
            "channels",
            "ohem",
            "smooth_l1_beta",
            "regression_weight",
            "min_size",
        ):
            _require(getattr(self, name) >= 0, f"box.{name}", "zero or more", getattr(self, name))
        _require(self.canonical_size > 0, "box.canonical_size", "positive", self.canonical_size)
        _require(self.roi_max_level in (5, 6), "box.roi_max_level", "5 or 6", self.roi_max_level)
        _require(
            len(self.weights) == 4 and min(self.weights) > 0,
            "box.weights",
            "four positive numbers",
            self.weights,
        )
        for name in ("positive_fraction", "fg_iou", "score_threshold", "nms_iou"):
            _require(0 <= getattr(self, name) <= 1, f"box.{name}", "in 0..1", getattr(self, name))
        for name in ("resolution", "batch_per_image", "max_detections"):
            _require(getattr(self, name) > 0, f"box.{name}", "positive", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ThinConfig:
    """Position-sensitive maps: R-FCN's and the thin ones of Light-Head R-CNN (section 3.2)."""

    channels: int = 10
    """Channels per bin; box.resolution^2 times as many come out of the convolution. R-FCN has one
    per class and box number instead."""
    kernel: int = 15
    """Length of the large separable convolution; 1 puts R-FCN's two 1x1 convolutions in its place.
    """
    mid_channels: int = 256
    """Channels between the two: of the separable one (setting L 256, setting S 64), or of R-FCN's
    1x1 (1024)."""
    lr_factor: float = 3.0
    """Learning-rate factor of the large separable convolution, or of the first of R-FCN's two."""

    def __post_init__(self) -> None:
        _require(self.kernel % 2 == 1, "thin.kernel", "odd", self.kernel)
        for name in ("channels", "kernel", "mid_channels", "lr_factor"):
            _require(getattr(self, name) > 0, f"thin.{name}", "positive", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class RetinaConfig:
    """One-stage head of RetinaNet; final detections and box targets as the box table says."""

    convs: int = 4
    """3x3 convolutions of each branch."""
    p6_from: str = "c5"
    """Map that the first extra level is convolved from: c5 (the paper) or p5 (torchvision)."""
    fg_iou: float = 0.5
    """An anchor at or above this IoU with a truth box is positive."""
    bg_iou: float = 0.4
    """An anchor below this IoU with every truth box is negative."""
    alpha: float = 0.25
    """Focal loss: weight of positives."""
    gamma: float = 2.0
    """Focal loss: how fast easy examples fade."""
    divisor: str = "positives"
    """Focal loss: divided by the positive anchors (positives), or by these and the images together
    (positives+images, DetNAS)."""
    prior: float = 0.01
    """Score of every class before training."""
    smooth_l1_beta: float = 0.11
    """Where the box loss turns from square to linear."""
    pre_nms: int = 1000
    """Best-scoring detections kept before NMS, per level."""

    def __post_init__(self) -> None:
        _one_of("retina.p6_from", self.p6_from, ("c5", "p5"))
        _one_of("retina.divisor", self.divisor, ("positives", "positives+images"))
        for name in ("fg_iou", "bg_iou", "alpha"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"retina.{name}", "in 0..1", value)
        _require(
            self.bg_iou <= self.fg_iou,
            "retina.bg_iou",
            f"at most retina.fg_iou={self.fg_iou}",
            self.bg_iou,
        )
        _require(0 < self.prior < 1, "retina.prior", "between 0 and 1", self.prior)
        for name in ("gamma", "smooth_l1_beta"):
            value = getattr(self, name)
            _require(value >= 0, f"retina.{name}", "zero or more", value)
        for name in ("convs", "pre_nms"):
            _require(getattr(self, name) > 0, f"retina.{name}", "positive", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Mask head on the RoIs of the box head (Mask R-CNN)."""

    resolution: int = 14
    """Bins of RoIAlign per side; masks are twice as fine."""
    sampling_ratio: int = 2
    """Samples per bin and axis; 0 adapts to the RoI's size."""
    convs: int = 4
    """3x3 convolutions before the upsampling."""
    channels: int = 256
    """Their channels."""
    threshold: float = 0.5
    """A pixel at or above this probability belongs to the object."""

    def __post_init__(self) -> None:
        for name in ("resolution", "convs", "channels"):
            _require(getattr(self, name) > 0, f"mask.{name}", "positive", getattr(self, name))
        _require(
            self.sampling_ratio >= 0, "mask.sampling_ratio", "zero or more", self.sampling_ratio
        )
        _require(0 < self.threshold < 1, "mask.threshold", "between 0 and 1", self.threshold)


@dataclass(frozen=True, kw_only=True)
class ScalesConfig:
    """Learnt scales (model.scales = learn) and what is measured of them."""

    map: str = "elu1"
    """From the predictor's number to the scale: elu1, linear (may reach 0) or softplus."""
    init: str = "zero"
    """Start of the predictors: zero (every scale is 1) or he (the paper's)."""
    group: str = "sample"
    """Whom a scale of a RoI head is for: each RoI (sample) or all of an image."""
    max: float = 32.0
    """Largest scale in pixels; 0 for no limit."""
    images: int = 500
    """Training images that the scales are averaged over at the end of training."""
    log_every: int = 50
    """Steps between lines with the scales in metrics.jsonl."""

    def __post_init__(self) -> None:
        _one_of("scales.map", self.map, ("elu1", "linear", "softplus"))
        _one_of("scales.init", self.init, ("zero", "he"))
        _one_of("scales.group", self.group, ("sample", "image"))
        _require(self.max >= 0, "scales.max", "zero or more", self.max)
        for name in ("images", "log_every"):
            _require(getattr(self, name) > 0, f"scales.{name}", "positive", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """A search space of one's own, for the backbones `detnas-supernet` (its supernet) and
    `detnas:<name>:<genes>` (one network); stages are those that give c2, c3, ...
    """

    name: str = ""
    """What backbones and messages call it; empty where there is none."""
    blocks: tuple[int, ...] = ()
    """Blocks of each stage; the first one of a stage halves the map."""
    stem: int = 0
    """Channels of the 3x3 stem of stride 2."""
    channels: tuple[int, ...] = ()
    """Channels of each stage: even, and more than before."""
    last: int = 0
    """Channels of a classifier's last 1x1 convolution."""
    ops: tuple[str, ...] = ("shuffle3", "shuffle5", "shuffle7", "xception")
    """Blocks that genes 0, 1, ... stand for."""
    shuffle: int = 2
    """Convention of the channel shuffle: 1 (two groups interleaved, then halves) or 2 (even and odd
    channels)."""


@dataclass(frozen=True, kw_only=True)
class NasConfig:
    """Training of supernets (DetNAS)."""

    sampling: str = "uniform"
    """Path of a step: uniform, or macs-bins (the released code's, for the small space alone)."""
    search_images: int = 5000
    """Training images held out for the search, at most a fifth of the split; detectors only."""
    eval_paths: int = 3
    """Paths, drawn from the seed, whose mean metric evaluates a supernet; 0 evaluates nothing."""
    eval_calibration: int = 50
    """Batches that the norms of a path are averaged over before it is evaluated."""

    def __post_init__(self) -> None:
        _one_of("nas.sampling", self.sampling, ("uniform", "macs-bins"))
        for name in ("search_images", "eval_calibration"):
            _require(getattr(self, name) > 0, f"nas.{name}", "positive", getattr(self, name))
        _require(self.eval_paths >= 0, "nas.eval_paths", "zero or more", self.eval_paths)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they reach the network."""

    path: str = "synthetic"
    """Folder or file of a data set in any layout detkit reads, or `synthetic`."""
    split: str = "train"
    """Split trained on (`detkit eval` takes its own, `val` by default)."""
    val_split: str = "val"
    """Split evaluated on while training."""
    images: str = ""
    """Image folder, where an annotation file stands alone."""
    short_side: int = 800
    """Detectors: the shorter side after resizing; classifiers: the side of the square crop."""
    long_side: int = 1333
    """Detectors: upper limit of the longer side."""
    train_long_side: int = 0
    """The same when training; 0 takes long_side."""
    multi_scale: tuple[int, ...] = ()
    """Shorter sides to draw from when training; empty for short_side alone."""
    flip: float = 0.5
    """Chance of a horizontal flip when training."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter when training."""
    lighting: float = 0.0
    """Deviation of AlexNet's colour noise along ImageNet's principal colours when training."""
    skip_empty: bool = False
    """Detectors: leave images without an object (crowds do not count) out of training."""
    min_crop: float = 1.0
    """Detectors: smallest share of each side kept by a random crop when training (1 turns it off);
    classifiers: smallest share of the area kept."""
    eval_crop: float = 0.875
    """Classifiers: side of the central square evaluated on, as a share of the shorter side."""
    workers: int = 2
    """Loader processes."""
    on_bad_image: str = "skip"
    """Unusable files: skip them and list them, or fail."""
    max_pixels: int = 178_956_970
    """Images with more pixels than this count as unusable (decompression bombs)."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """RGB mean subtracted from images in 0..1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """RGB deviation images are divided by (1/255 leaves values in 0..255)."""
    channels: str = "rgb"
    """Order in which the network gets red, green and blue: rgb or bgr."""
    resize: str = "antialias"
    """Detectors: antialias (bilinear, as wide as the step when shrinking), or torchvision (its
    detectors' own: pixels are normalised first, bilinear without antialias, sides rounded down)."""
    pad_multiple: int = 32
    """Batches are padded to a multiple of this many pixels."""

    def __post_init__(self) -> None:
        _one_of("data.on_bad_image", self.on_bad_image, ("skip", "fail"))
        _one_of("data.resize", self.resize, ("antialias", "torchvision"))
        _one_of("data.channels", self.channels, ("rgb", "bgr"))
        _require(
            self.train_long_side >= 0, "data.train_long_side", "zero or more", self.train_long_side
        )
        _require(0 <= self.flip <= 1, "data.flip", "in 0..1", self.flip)
        _require(self.lighting >= 0, "data.lighting", "zero or more", self.lighting)
        _require(0 < self.min_crop <= 1, "data.min_crop", "in (0, 1]", self.min_crop)
        _require(0 < self.eval_crop <= 1, "data.eval_crop", "in (0, 1]", self.eval_crop)
        _require(
            len(self.mean) == len(self.std) == 3,
            "data.mean and data.std",
            "three numbers",
            self.mean,
        )
        _require(all(s > 0 for s in self.std), "data.std", "positive", self.std)
        _require(self.short_side > 0, "data.short_side", "positive", self.short_side)
        _require(
            self.long_side >= self.short_side,
            "data.long_side",
            "at least data.short_side",
            self.long_side,
        )
        _require(
            all(s > 0 for s in self.multi_scale), "data.multi_scale", "positive", self.multi_scale
        )
        _require(self.workers >= 0, "data.workers", "zero or more", self.workers)
        for name in ("pad_multiple", "max_pixels"):
            _require(getattr(self, name) > 0, f"data.{name}", "positive", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how many at once, in which precision; the schedule scales to the length given."""

    steps: int = 0
    """Optimiser steps; at most one of steps, epochs and minutes is set."""
    epochs: float = 0.0
    """Passes over the training split."""
    minutes: float = 0.0
    """Wall minutes of the training loop."""
    batch_size: int = 16
    """Images per optimiser step over all processes."""
    accumulate: int = 1
    """Parts each process splits its share of the batch into."""
    amp: str = "off"
    """Mixed precision: off, bf16, fp16, or auto (bf16 where the hardware has it)."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights, per step; 0 turns it off."""
    clip: float = 0.0
    """Largest gradient norm; 0 turns clipping off."""
    label_smoothing: float = 0.0
    """Classifiers: share of the target spread over all classes."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    stall_seconds: float = 600.0
    """Stop with exit 7 when no step has finished for this long."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between writes of last.pth."""
    tensorboard: bool = False
    """Write the lines of metrics.jsonl as TensorBoard's event files too (extra [tensorboard])."""

    def __post_init__(self) -> None:
        _one_of("train.amp", self.amp, ("off", "auto", "bf16", "fp16"))
        given = [k for k in ("steps", "epochs", "minutes") if getattr(self, k)]
        _require(len(given) <= 1, "train", "given one of steps, epochs and minutes", given)
        for name in ("steps", "epochs", "minutes", "clip", "label_smoothing"):
            _require(getattr(self, name) >= 0, f"train.{name}", "zero or more", getattr(self, name))
        for name in ("batch_size", "accumulate", "log_every", "save_every", "stall_seconds"):
            _require(getattr(self, name) > 0, f"train.{name}", "positive", getattr(self, name))
        _require(0 <= self.ema < 1, "train.ema", "in [0, 1)", self.ema)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and learning-rate schedule."""

    name: str = "sgd"
    """sgd or adamw."""
    lr: float = 0.02
    """Learning rate for 16 images per step; the rate used is lr * batch_size / 16."""
    momentum: float = 0.9
    """Momentum of SGD, first beta of AdamW."""
    nesterov: bool = False
    """Nesterov momentum (SGD)."""
    weight_decay: float = 1e-4
    """Weight decay."""
    norm_decay: bool = True
    """Decay norm weights and biases too; false leaves the weights of more than one dimension."""
    bias_decay: bool = True
    """Decay biases, those of norms among them; norm_decay = false decays none of them."""
    bias_lr_factor: float = 1.0
    """Learning-rate factor of biases."""
    warmup_steps: int = 500
    """Steps of linear warm-up, at most a tenth of the schedule."""
    warmup_factor: float = 1 / 3
    """Share of the learning rate at the first step."""
    schedule: str = "step"
    """step, cosine, or linear to 0."""
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)
    """Shares of the schedule after which the rate is multiplied by gamma."""
    gamma: float = 0.1
    """Factor at each milestone."""

    def __post_init__(self) -> None:
        _one_of("optim.name", self.name, ("sgd", "adamw"))
        _one_of("optim.schedule", self.schedule, ("step", "cosine", "linear"))
        for name in ("lr", "weight_decay", "warmup_steps"):
            _require(getattr(self, name) >= 0, f"optim.{name}", "zero or more", getattr(self, name))
        _require(
            0 < self.warmup_factor <= 1, "optim.warmup_factor", "in (0, 1]", self.warmup_factor
        )
        _require(
            all(0 < m < 1 for m in self.milestones),
            "optim.milestones",
            "shares in (0, 1)",
            self.milestones,
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation while training."""

    every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    metric: str = "AP"
    """What `best.pth` is best at: AP, AP50, voc07, voc12, segm_AP for detectors; else top1."""
    patience: int = 0
    """Stop after this many evaluations without a better metric; 0 never stops early."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "eval.every", "zero or more", self.every)
        _require(self.patience >= 0, "eval.patience", "zero or more", self.patience)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Search over the paths of a trained supernet (DetNAS, section 3.3)."""

    method: str = "evolution"
    """evolution, or random: the baseline of as many evaluations."""
    fitness: str = "detection"
    """detection: eval.metric of the fine-tuned supernet on held-out images; classification: top-1
    of the pre-trained one."""
    split: str = ""
    """Images that score networks: those held out, or another split by name, or a .json file with
    the ids of images trained on and held out."""
    population: int = 50
    """Networks evaluated per generation."""
    generations: int = 20
    """Generations, the first and random one included."""
    parents: int = 10
    """Best networks so far that offspring is made of."""
    mutants: int = -1
    """Largest number of mutants per generation; -1 takes two fifths of the population."""
    crossovers: int = -1
    """Largest number of crosses per generation, -1 as above; random networks fill the rest."""
    mutation_prob: float = 0.1
    """Chance of each gene of a mutant to be drawn again."""
    seed: int = 0
    """Seed of all proposals; the images follow from the supernet's train.seed."""
    max_macs: int = 0
    """Most multiply-adds of stem and blocks for one image of 224x224; 0 for no limit."""
    max_latency_ms: float = 0.0
    """Longest time of stem and blocks for one image, as a table of measured blocks adds up; 0 for
    no limit."""
    latency_device: str = "cpu"
    """Where the table is measured: cpu or cuda."""
    calibration_steps: int = 500
    """Batches that the norms' statistics of each network are measured on."""
    calibration_batch: int = 8
    """Images in each of them, from the supernet's training images."""
    calibration_momentum: float = 0.0
    """0 averages all batches alike; else the share of the newest in a running average."""
    batch_size: int = 8
    """Images detected at once; only those of one padded size go together."""
    cache_mib: int = 8192
    """Memory of all processes of a machine for decoded and resized images, which each keeps for
    itself; what does not fit is read again for every network."""
    retries: int = 1
    """How often an evaluation that broke off is tried again before it counts as failed."""
    early_stop: float = 0.0
    """Share of the images after which a hopeless network is dropped; 0 never drops one."""
    early_quantile: float = 0.5
    """Hopeless: its metric so far is below this quantile of earlier generations' ..."""
    early_margin: float = 0.02
    """... by more than this."""

    def __post_init__(self) -> None:
        _one_of("search.method", self.method, ("evolution", "random"))
        _one_of("search.fitness", self.fitness, ("detection", "classification"))
        _one_of("search.latency_device", self.latency_device, ("cpu", "cuda"))
        for name in ("population", "generations", "parents", "calibration_steps", "batch_size"):
            _require(getattr(self, name) > 0, f"search.{name}", "positive", getattr(self, name))
        for name in ("seed", "max_macs", "max_latency_ms", "cache_mib", "retries", "early_margin"):
            value = getattr(self, name)
            _require(value >= 0, f"search.{name}", "zero or more", value)
        for name in ("mutants", "crossovers"):
            value = getattr(self, name)
            _require(value >= -1, f"search.{name}", "zero or more, or -1", value)
        for name in ("mutation_prob", "calibration_momentum", "early_quantile"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"search.{name}", "in 0..1", value)
        _require(0 <= self.early_stop < 1, "search.early_stop", "in [0, 1)", self.early_stop)
        _require(
            self.calibration_batch > 1,
            "search.calibration_batch",
            "two or more",
            self.calibration_batch,
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run; stored resolved in the run folder and in each checkpoint."""

    model: ModelConfig = field(default_factory=ModelConfig)
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    rpn: RpnConfig = field(default_factory=RpnConfig)
    box: BoxConfig = field(default_factory=BoxConfig)
    thin: ThinConfig = field(default_factory=ThinConfig)
    retina: RetinaConfig = field(default_factory=RetinaConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    scales: ScalesConfig = field(default_factory=ScalesConfig)
    space: SpaceConfig = field(default_factory=SpaceConfig)
    nas: NasConfig = field(default_factory=NasConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    search: SearchConfig = field(default_factory=SearchConfig)


def to_plain(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain types (tuples become lists), as TOML and checkpoints store them."""
    return {
        section: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        for section, values in dataclasses.asdict(config).items()
    }


def from_plain(plain: Mapping[str, Mapping[str, Any]], base: Config | None = None) -> Config:
    """``base`` (or the defaults) with the values of ``plain``.

    Raises:
        ConfigError: an unknown table or key, or a value of the wrong type or out of range.
    """
    base = base or Config()
    sections = {f.name: getattr(base, f.name) for f in dataclasses.fields(Config)}
    for section, values in plain.items():
        if section not in sections:
            raise ConfigError(f"config: unknown table {section!r}{suggest(section, sections)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"config: {section} must be a table of settings, got {values!r}")
        current = sections[section]
        sections[section] = _replace(section, current, values)
    return Config(**sections)


def _replace(section: str, current: Any, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(type(current))
    for key in values:
        if key not in hints:
            known = [f"{section}.{k}" for k in hints]
            raise ConfigError(
                f"config: unknown key {section}.{key}{suggest(f'{section}.{key}', known)}"
            )
    typed = {k: _typed(f"{section}.{k}", v, hints[k]) for k, v in values.items()}
    if section == "train" and any(
        typed.get(k) for k in _LENGTHS
    ):  # the last one given replaces an earlier layer's
        typed = {**dict.fromkeys(_LENGTHS, 0), **typed}
    return dataclasses.replace(current, **typed)


def _typed(key: str, value: Any, hint: Any) -> Any:
    """``value`` as the annotated type; ints pass for floats, nothing else is converted."""
    if isinstance(hint, types.GenericAlias):  # tuple[item, ...]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}: must be a list, got {value!r}")
        item = typing.get_args(hint)[0]
        return tuple(_typed(key, v, item) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{key}: must be {hint.__name__}, got {value!r}")
    return value


class Layer(dict[str, Any]):
    """Tables of settings that know where they come from, for :func:`origins`.

    Args:
        tables: The settings.
        origin: Where they come from, in words; or what says it, given table and key.
    """

    def __init__(self, tables: Mapping[str, Any], origin: str | Callable[[str, str], str]) -> None:
        super().__init__(tables)
        self.origin_of = origin if callable(origin) else lambda table, key: origin


def origins(
    layers: Iterable[Mapping[str, Mapping[str, Any]]], base: str = ""
) -> dict[str, dict[str, str]]:
    """Where each setting of :func:`resolve` comes from, by table and key.

    Args:
        layers: As of :func:`resolve`, without errors; those that are no :class:`Layer` are called
            ``settings``.
        base: Origin of what no layer gives; by default the detector's defaults and those of all.
    """
    layers = list(layers)
    found = {
        table: dict.fromkeys(values, base or "default")
        for table, values in to_plain(Config()).items()
    }
    if not base:
        detector = named_detector(layers)
        layers.insert(0, Layer(DETECTOR_DEFAULTS.get(detector, {}), f"default of {detector}"))
    for layer in layers:
        origin_of = layer.origin_of if isinstance(layer, Layer) else lambda table, key: "settings"
        for table, values in layer.items():
            found[table] |= {key: origin_of(table, key) for key in values}
            given = [key for key in _LENGTHS if table == "train" and values.get(key)]
            if given:  # one of them unsets the others
                found[table] |= dict.fromkeys(_LENGTHS, origin_of(table, given[0]))
    return found


def parse_override(text: str) -> Layer:
    """``{"optim": {"lr": 0.01}}`` from ``optim.lr=0.01``; the value is TOML or a bare word."""
    key, sign, raw = text.partition("=")
    parts = key.strip().split(".")
    if not sign or len(parts) != 2:
        plain = to_plain(Config())
        keys: dict[str, str] = {}
        for table, values in plain.items():
            for name in values:  # of two tables the first one's
                keys.setdefault(name, f"{table}.{name}")
        near = difflib.get_close_matches(key.strip(), keys, n=1, cutoff=0.6) if sign else []
        hint = f"did you mean {keys[near[0]]!r}?" if near else "for example --set optim.lr=0.01"
        raise ConfigError(f"--set: must read table.key=value, got {text!r}; {hint}")
    try:
        value = tomllib.loads(f"v = {raw.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    return Layer({parts[0]: {parts[1]: value}}, "--set")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file; raises ConfigError when it is missing or malformed."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: must be readable, got {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}: must be valid TOML, got {error}") from error


def recipes() -> dict[str, Path]:
    """Name (``tiny/pretrain``) to file of every recipe that detkit ships."""
    root = Path(str(resources.files("detkit"))) / "recipes"
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.rglob("*.toml"))}


def recipe_path(name: str) -> Path:
    """File of a shipped recipe, or of one's own where the name ends in ``.toml``.

    Raises:
        ConfigError: an unknown name; says the nearest one.
    """
    if name.endswith(".toml"):
        return Path(name)
    known = recipes()
    if name not in known:
        raise ConfigError(
            f"--recipe: unknown recipe {name!r}{suggest(name, known)}; `detkit models` lists them"
        )
    return known[name]


def resolve(
    layers: Iterable[Mapping[str, Mapping[str, Any]]], base: Config | None = None
) -> Config:
    """Apply layers of plain tables in order, last wins.

    Without ``base`` they stand on what the paper of the chosen detector fixes
    (``DETECTOR_DEFAULTS``).

    Raises:
        ConfigError: an unknown key, an unusable value, or one that the detector would ignore.
    """
    layers = list(layers)
    start = _start(layers, base)
    config = merged(layers, base)
    _refuse_unused(to_plain(start), to_plain(config))
    _refuse_unused_nas(config)
    return config


def merged(layers: Iterable[Mapping[str, Mapping[str, Any]]], base: Config | None = None) -> Config:
    """As :func:`resolve`, without refusing what the model would ignore: layers are to follow."""
    layers = list(layers)
    config = _start(layers, base)
    for layer in layers:
        config = from_plain(layer, config)
    return config


def _start(layers: Iterable[Mapping[str, Mapping[str, Any]]], base: Config | None) -> Config:
    return base or from_plain(DETECTOR_DEFAULTS.get(named_detector(layers), {}))


def _refuse_unused_nas(config: Config) -> None:
    """Refuse the tables of DetNAS where the backbone has no use for them."""
    backbone = config.model.backbone
    if config.nas != NasConfig() and not is_supernet(backbone):
        changed = [k for k, v in to_plain(config)["nas"].items() if v != getattr(NasConfig(), k)]
        raise ConfigError(
            f"nas.{changed[0]}: must stay as it is for {backbone}, which is no supernet, "
            f"got {getattr(config.nas, changed[0])!r}"
        )
    own = backbone.split(":")[0] == SUPERNET or backbone.split(":")[:2] == [
        "detnas",
        config.space.name,
    ]
    if config.space != SpaceConfig() and not own:
        raise ConfigError(
            f"space: must be left out for {backbone}, which is not of it, got a space "
            f"{config.space.name!r}; its backbones are {SUPERNET} and detnas:<name>:<genes>"
        )


def _refuse_unused(start: dict[str, dict[str, Any]], config: dict[str, dict[str, Any]]) -> None:
    """Refuse settings that were changed from ``start`` though the detector has no use for them."""
    detector = config["model"]["detector"]
    unused = UNUSED.get(detector, ())
    changed = [
        f"{table}.{key}"
        for table, values in config.items()
        for key in values
        if (table in unused or f"{table}.{key}" in unused) and values[key] != start[table][key]
    ]
    if changed:
        table, key = changed[0].split(".")
        others = f"; neither does it use {', '.join(changed[1:])}" if changed[1:] else ""
        raise ConfigError(
            f"{changed[0]}: must stay {start[table][key]!r} for {detector}, which does not use it, "
            f"got {config[table][key]!r}{others}"
        )


def named_detector(layers: Iterable[Mapping[str, Mapping[str, Any]]]) -> str:
    """The detector of the last layer that names one, else the default one."""
    name = ModelConfig.detector
    for layer in layers:
        model = layer.get("model")
        if isinstance(model, Mapping):
            name = str(model.get("detector", name))
    return name


def write_toml(config: Config, path: str | Path) -> None:
    """Write the resolved config beside the results."""
    Path(path).write_text(tomli_w.dumps(to_plain(config)), encoding="utf-8")
