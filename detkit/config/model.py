"""Settings of the network up to its proposals: backbone, neck, anchors, RPN, scales."""

from __future__ import annotations

from dataclasses import dataclass

from detkit.config.checks import one_of, positive, require, share, zero_or_more

NORMS = ("frozen_bn", "bn", "sync_bn", "gn")
SCALES = ("off", "learn", "split")


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
        one_of("model.norm", self.norm, NORMS)
        one_of("model.scales", self.scales, SCALES)
        one_of("model.head_norm", self.head_norm, ("none", "bn", "sync_bn", "gn"))
        zero_or_more(self, "model", "norm_eps")
        require(0 < self.norm_momentum <= 1, "model.norm_momentum", "in (0, 1]", self.norm_momentum)
        require(0 <= self.frozen_stages <= 6, "model.frozen_stages", "in 0..6", self.frozen_stages)
        positive(self, "model", "neck_channels")


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
        one_of("anchors.style", self.style, ("torchvision", "caffe"))
        positive(self, "anchors", "octave_scales")
        require(
            min(self.sizes, default=0) > 0,
            "anchors.sizes",
            "positive numbers",
            self.sizes,
        )
        require(
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
        one_of("rpn.post_nms_scope", self.post_nms_scope, ("image", "batch"))
        share(self, "rpn", "positive_fraction", "fg_iou", "bg_iou", "nms_iou")
        zero_or_more(self, "rpn", "channels", "smooth_l1_beta", "min_size")
        require(
            self.bg_iou <= self.fg_iou,
            "rpn.bg_iou",
            f"at most rpn.fg_iou={self.fg_iou}",
            self.bg_iou,
        )
        positive(
            self,
            "rpn",
            "batch_per_image",
            "pre_nms_train",
            "post_nms_train",
            "pre_nms_test",
            "post_nms_test",
        )


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
        one_of("scales.map", self.map, ("elu1", "linear", "softplus"))
        one_of("scales.init", self.init, ("zero", "he"))
        one_of("scales.group", self.group, ("sample", "image"))
        zero_or_more(self, "scales", "max")
        positive(self, "scales", "images", "log_every")
