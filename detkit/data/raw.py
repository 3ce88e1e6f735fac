"""What readers deliver and what cleaning looks at."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detkit.data.images import Header, check_complete
from detkit.data.problems import Problem
from detkit.types import CategoryMap


@dataclass
class RawSet:
    """What a reader found, not yet checked.

    Attributes:
        categories: The category map the files declare.
        images: Dicts with ``id``, ``file_name``, ``root`` (an index into ``roots``) and, where
            known, ``width`` and ``height``.
        annotations: Dicts as in COCO json: ``id``, ``image_id``, ``category_id``, ``bbox``
            (x, y, width, height), and maybe ``area``, ``iscrowd``, ``difficult``,
            ``segmentation``.
        roots: Image folders, resolved.
        source: The annotation file or folder, for messages.
        problems: Findings of the reader itself.
        bare: True for formats without ids, areas and crowd flags, where none of these is missing.
    """

    categories: CategoryMap
    images: list[Any]
    annotations: list[Any]
    roots: list[Path]
    source: str
    problems: list[Problem] = field(default_factory=list)
    bare: bool = False


@dataclass(frozen=True)
class CleanOptions:
    """What to look at.

    Attributes:
        read_images: Open the image files; False trusts the annotation files.
        max_pixels: Images with more pixels are unusable.
        masks: Objects without a segmentation are unusable.
        limit: Findings listed per rule, None for all.
        decode: Called with each file and the pixel limit; raises ImageFileError where its pixels
            cannot be read.
    """

    read_images: bool = True
    max_pixels: int = 178_956_970
    masks: bool = False
    limit: int | None = 20
    decode: Callable[[Path, int], None] = check_complete


@dataclass
class RawImage:
    """A sound image entry: size 0 x 0 where it is not known yet."""

    id: int | str
    file: str
    root: int
    height: int
    width: int
    as_stored: bool = False
    header: Header | None = None


def is_id(value: Any) -> bool:
    """Whether a JSON value can be an id."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number (true is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: float) -> bool:
    """Whether a JSON number fits a float."""
    return abs(value) <= sys.float_info.max  # JSON has integers beyond floats; NaN is not below


def is_side(value: Any) -> bool:
    """Whether a JSON value can be a width or height in pixels."""
    return is_number(value) and 0 < value < 2**31 and value == int(value)
