"""Settings of the heads: boxes of RoIs, position-sensitive maps, RetinaNet, masks."""

from __future__ import annotations

from dataclasses import dataclass

from detkit.config.checks import one_of, positive, require, share, zero_or_more


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
        one_of("box.head", self.head, ("2fc", "4conv1fc"))
        one_of("box.ps_pool", self.ps_pool, ("max", "avg", "cells"))
        one_of("box.ohem_scope", self.ohem_scope, ("image", "batch"))
        require(self.ps_offset in (0, 0.5), "box.ps_offset", "0 or 0.5", self.ps_offset)
        zero_or_more(
            self,
            "box",
            "sampling_ratio",
            "channels",
            "ohem",
            "smooth_l1_beta",
            "regression_weight",
            "min_size",
        )
        positive(self, "box", "canonical_size")
        require(self.roi_max_level in (5, 6), "box.roi_max_level", "5 or 6", self.roi_max_level)
        require(
            len(self.weights) == 4 and min(self.weights) > 0,
            "box.weights",
            "four positive numbers",
            self.weights,
        )
        share(self, "box", "positive_fraction", "fg_iou", "score_threshold", "nms_iou")
        positive(self, "box", "resolution", "batch_per_image", "max_detections")


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
        require(self.kernel % 2 == 1, "thin.kernel", "odd", self.kernel)
        positive(self, "thin", "channels", "kernel", "mid_channels", "lr_factor")


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
        one_of("retina.p6_from", self.p6_from, ("c5", "p5"))
        one_of("retina.divisor", self.divisor, ("positives", "positives+images"))
        share(self, "retina", "fg_iou", "bg_iou", "alpha")
        require(
            self.bg_iou <= self.fg_iou,
            "retina.bg_iou",
            f"at most retina.fg_iou={self.fg_iou}",
            self.bg_iou,
        )
        require(0 < self.prior < 1, "retina.prior", "between 0 and 1", self.prior)
        zero_or_more(self, "retina", "gamma", "smooth_l1_beta")
        positive(self, "retina", "convs", "pre_nms")


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
        positive(self, "mask", "resolution", "convs", "channels")
        zero_or_more(self, "mask", "sampling_ratio")
        require(0 < self.threshold < 1, "mask.threshold", "between 0 and 1", self.threshold)
