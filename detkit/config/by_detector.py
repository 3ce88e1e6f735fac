"""What each detector fixes, and what it has no part for."""

from __future__ import annotations

from typing import Any

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
