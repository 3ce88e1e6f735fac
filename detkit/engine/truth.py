"""COCO ground truth made safe to score against, with a line for everything that had to be changed.

The rules, in order (pycocotools is silently wrong on most of these, and stops on the rest):

- an image listed twice counts once; annotations of unknown images or categories are dropped;
- a segmentation that is neither polygons of three points nor run lengths of the image's size is
  removed;
- a box that is missing, not finite, or of no positive size can match nothing (or, when NaN,
  anything): dropped, save where usable polygons give the box;
- `iscrowd` that is missing or not 0 or 1 becomes 0;
- `area` that is missing, not finite or negative becomes the mask's, or the box's without a mask;
- annotation ids that are missing, repeated, 0 or no integers (pycocotools takes a match with id
  0 for none) make all ids be renumbered from 1; one id twice on the very same object is one
  object.
"""

from __future__ import annotations

import sys
from typing import Any

from detkit import rle
from detkit.errors import DataError

Record = dict[str, Any]


def normalise_truth(truth: Record) -> tuple[Record, list[str]]:
    """A copy of COCO ground truth that follows this file's rules, with a line per rule applied.

    Args:
        truth: {"images", "annotations", "categories"}; boxes are [x, y, width, height] in
            pixels. Left as it is.

    Returns:
        the copy (annotations of clean input keep their ids, order and values), and lines such as
        ``"annotations dropped, box is not finite: 2 (ids 7, 9)"``.

    Raises:
        DataError: a list is missing, or images or categories have no usable ids.
    """
    for key in ("images", "annotations", "categories"):
        if not isinstance(truth, dict) or not isinstance(truth.get(key), list):
            raise DataError(f"truth: must be an object with the list {key!r}, got none")
    notes = _Notes()
    categories = _categories(truth["categories"])
    images = _images(truth["images"], notes)
    category_ids = {c["id"] for c in categories}
    annotations = []
    for row, annotation in enumerate(truth["annotations"]):
        kept = _annotation(row, annotation, images, category_ids, notes)
        if kept is not None:
            annotations.append(kept)
    annotations = _renumber(annotations, notes)
    lists = {"images": list(images.values()), "annotations": annotations, "categories": categories}
    return {**truth, **lists}, notes.lines()


class _Notes:
    """Counts each rule applied, with the first few ids."""

    def __init__(self) -> None:
        self.ids: dict[str, list[object]] = {}

    def add(self, rule: str, identity: object) -> None:
        self.ids.setdefault(rule, []).append(identity)

    def lines(self) -> list[str]:
        return [f"{rule}: {len(ids)} (ids {_some(ids)})" for rule, ids in self.ids.items()]


def _some(ids: list[object]) -> str:
    shown = ", ".join(str(i) for i in ids[:5])
    return shown + (", …" if len(ids) > 5 else "")


def _categories(categories: list[Record]) -> list[Record]:
    seen: set[object] = set()
    named = []
    for row, category in enumerate(categories):
        identity = category.get("id") if isinstance(category, dict) else None
        if not _is_id(identity, int):
            raise DataError(f"truth: categories[{row}] must have an integer id, got {category!r}")
        name = str(category.get("name", identity))
        if identity in seen or name in seen:
            twice = f"{identity} {name!r} twice"
            raise DataError(f"truth: category ids and names must be unique, got {twice}")
        seen.update((identity, name))
        named.append({**category, "name": name})
    if not named:
        raise DataError("truth: must have at least one category, got none")
    return named


def _images(images: list[Record], notes: _Notes) -> dict[int | str, Record]:
    kept: dict[int | str, Record] = {}
    for row, image in enumerate(images):
        identity = image.get("id") if isinstance(image, dict) else None
        if not (_is_id(identity, int) or _is_id(identity, str)):
            raise DataError(f"truth: images[{row}] must have an integer or text id, got {image!r}")
        if identity in kept:
            notes.add("images dropped, id listed twice", identity)
        else:
            kept[identity] = image  # type: ignore[index]  # _is_id says int or str
    return kept


def _is_id(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _annotation(
    row: int,
    annotation: object,
    images: dict[int | str, Record],
    category_ids: set[int],
    notes: _Notes,
) -> Record | None:
    if not isinstance(annotation, dict):
        raise DataError(f"truth: annotations[{row}] must be an object, got {annotation!r}")
    identity = annotation.get("id", f"row {row}")
    if not _known(annotation.get("image_id"), images):
        notes.add("annotations dropped, unknown image", identity)
        return None
    if not _known(annotation.get("category_id"), category_ids):
        notes.add("annotations dropped, unknown category", identity)
        return None
    fixed = dict(annotation)
    _fix_segmentation(fixed, images[fixed["image_id"]], identity, notes)
    if not _fix_box(fixed, identity, notes):
        return None
    if "iscrowd" not in fixed or fixed["iscrowd"] not in (0, 1):
        notes.add("annotations without iscrowd 0 or 1, taken as 0", identity)
        fixed["iscrowd"] = 0
    if not _number(fixed.get("area")) or fixed["area"] < 0:
        mask = fixed.get("segmentation")
        fixed["area"] = rle.mask_area(mask) if mask else fixed["bbox"][2] * fixed["bbox"][3]
        notes.add("annotations without a usable area, taken from the mask or the box", identity)
    return fixed


def _known(identity: object, known: Any) -> bool:
    return isinstance(identity, int | str) and not isinstance(identity, bool) and identity in known


def _number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # False for NaN, infinity, and integers beyond floats


def _fix_segmentation(annotation: Record, image: Record, identity: object, notes: _Notes) -> None:
    """Keep usable polygons or run lengths, else remove the key ([] and None are plain absence)."""
    given = annotation.pop("segmentation", None)
    if not given:
        return
    usable: object = rle.usable_polygons(given)
    if isinstance(given, dict) and rle.fits(given, image.get("height", 0), image.get("width", 0)):
        usable = given
    if usable:
        annotation["segmentation"] = usable
    if usable != given:
        notes.add("segmentations cut to what is usable", identity)


def _fix_box(annotation: Record, identity: object, notes: _Notes) -> bool:
    """True where the annotation has a box of positive size, taken from its polygons if need be."""
    if _is_box(annotation.get("bbox")):
        return True
    mask = annotation.get("segmentation")
    if isinstance(mask, list):
        xs = [x for p in mask for x in p[0::2]]
        ys = [y for p in mask for y in p[1::2]]
        annotation["bbox"] = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        if min(annotation["bbox"][2:]) > 0:
            notes.add("annotations without a usable box, taken from the polygons", identity)
            return True
    notes.add("annotations dropped, box is not four finite numbers of positive size", identity)
    return False


def _is_box(box: object) -> bool:
    if not isinstance(box, list | tuple) or len(box) != 4:
        return False
    return all(_number(v) for v in box) and min(box[2:]) > 0


def _renumber(annotations: list[Record], notes: _Notes) -> list[Record]:
    ids = [a.get("id") for a in annotations]
    if all(_is_usable_id(i) for i in ids) and len(set(ids)) == len(ids):
        return annotations
    kept: list[Record] = []
    first: dict[str, list[Record]] = {}
    for annotation in annotations:
        identity = annotation.get("id")
        same = first.setdefault(str(identity), [])
        if identity is not None and any(_same_object(annotation, other) for other in same):
            notes.add("annotations dropped, the same object twice under one id", identity)
            continue
        if same or not _is_usable_id(identity):
            notes.add("annotation ids missing, repeated or 0, all renumbered", identity)
        same.append(annotation)
        kept.append(annotation)
    return [{**a, "id": n} for n, a in enumerate(kept, 1)]


def _is_usable_id(identity: object) -> bool:
    return isinstance(identity, int) and not isinstance(identity, bool) and identity != 0


def _same_object(a: Record, b: Record) -> bool:
    keys = ("image_id", "category_id", "iscrowd")
    return list(a["bbox"]) == list(b["bbox"]) and all(a[k] == b[k] for k in keys)
