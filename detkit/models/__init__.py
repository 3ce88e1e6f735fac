"""Networks: backbones, necks, heads, and the named models built from them."""

from detkit.models.count import Part, count_backbone, count_classifier, count_detector
from detkit.models.zoo import BACKBONES, DETECTORS, build_backbone, build_classifier, build_detector

__all__ = [
    "BACKBONES",
    "DETECTORS",
    "Part",
    "build_backbone",
    "build_classifier",
    "build_detector",
    "count_backbone",
    "count_classifier",
    "count_detector",
]
