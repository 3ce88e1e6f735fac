"""Kinds of detectors as the settings tell them apart, so that tests name none."""

from detkit.config import UNUSED

ONE_STAGE = frozenset(name for name, unused in UNUSED.items() if "rpn" in unused)
PYRAMIDS = frozenset(name for name, unused in UNUSED.items() if "model.neck_channels" not in unused)
