"""Networks: backbones, necks, heads, and the named models built from them."""

from detkit.models.zoo import BACKBONES, DETECTORS, build_backbone, build_classifier, build_detector

__all__ = ["BACKBONES", "DETECTORS", "build_backbone", "build_classifier", "build_detector"]
