"""COCO results: a list of {"image_id", "category_id", "bbox", "score", "segmentation"?}.

Refused, with the row: missing keys, wrong types, unknown image or category ids, a score that is not
finite, a mask that does not fit its image. Kept and counted: a box that is not finite or has a
negative side becomes one of size 0, a false positive that overlaps nothing (pycocotools lets a NaN
box match whatever truth comes last).
"""

from __future__ import annotations

import itertools
import json
import numbers
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detkit import rle
from detkit.errors import DataError
from detkit.garbage import no_collection

Record = dict[str, Any]


def load_results(path: str | Path) -> Any:
    """What a results file holds, unchecked; raises DataError where it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        with no_collection():
            return json.loads(text)
    except OSError as error:
        raise DataError(f"{path}: must be a readable results file, got {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: must be valid JSON, got {error}") from error


def read_results(path: str | Path, truth: Record) -> list[Record]:
    """The detections of a COCO results file, checked against ``truth``.

    Args:
        path: a JSON list of detections; boxes are in pixels of the original images.
        truth: COCO ground truth whose image and category ids the detections use.

    Raises:
        DataError: the file cannot be read, is no such list, or a row is unusable (it is named).
    """
    rows = load_results(path)
    normalise_results(rows, truth, source=str(path))
    return rows  # type: ignore[no-any-return]  # checked just above


def normalise_results(
    results: Sequence[Record], truth: Record, *, source: str = "results"
) -> tuple[list[Record], list[str]]:
    """The detections, copied where a rule of this file changes them, and a line per rule applied.

    Args:
        results: detections in COCO's results format.
        truth: COCO ground truth whose image and category ids the detections use.
        source: name used in messages.

    Raises:
        DataError: a row is unusable; the message names it.
    """
    if not isinstance(results, list | tuple):
        kind = "an object" if isinstance(results, dict) else type(results).__name__
        raise DataError(f"{source}: must be a list of detections, got {kind}")
    images = {image["id"]: image for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    if _plain_boxes(results, images, categories):
        return list(results), []
    bad: list[int] = []
    clean = []
    for row, result in enumerate(results):
        _check_row(f"{source}: row {row}", result, images, categories)
        if "bbox" in result and not _is_box(result["bbox"]):
            bad.append(row)
            result = {**result, "bbox": [0.0, 0.0, 0.0, 0.0]}
        clean.append(result)
    shown = ", ".join(str(r) for r in bad[:5]) + (", …" if len(bad) > 5 else "")
    rule = "detections whose box is not finite or has a negative side, counted as false positives"
    return clean, [f"{rule}: {len(bad)} (rows {shown})"] if bad else []


def _plain_boxes(
    results: Sequence[Record], images: dict[Any, Record], categories: set[int]
) -> bool:
    """Whether these are boxes alone that keep every rule, seen column by column.

    Ten times as fast as row by row, which is left for masks and for finding what is wrong.
    """
    if set(map(type, results)) != {dict} or any("segmentation" in row for row in results):
        return False
    try:
        boxes, scores, image_ids, category_ids = (
            [row[key] for row in results] for key in ("bbox", "score", "image_id", "category_id")
        )
        if not (images.keys() >= set(image_ids) and categories >= set(category_ids)):
            return False
    except (KeyError, TypeError):  # a key is missing, or an id is a list
        return False
    kinds = {*map(type, image_ids), *map(type, category_ids)}  # True and 1.0 are in {1}, yet no ids
    if not kinds <= {int, str} or set(map(type, boxes)) != {list} or set(map(len, boxes)) != {4}:
        return False
    values = [*itertools.chain.from_iterable(boxes), *scores]
    if not set(map(type, values)) <= {int, float}:
        return False
    try:
        given = np.asarray(values, dtype=np.float64)
    except OverflowError:  # an integer beyond the floats
        return False
    sides = given[: 4 * len(boxes)].reshape(-1, 4)[:, 2:]
    return bool(np.isfinite(given).all() and (sides >= 0).all())


def _check_row(where: str, result: object, images: dict[Any, Record], categories: set[int]) -> None:
    if not isinstance(result, dict):
        raise DataError(f"{where}: must be an object, got {result!r}")
    for key in ("image_id", "category_id", "score"):
        if key not in result:
            raise DataError(f"{where}: must have {key!r}, got the keys {sorted(result)}")
    if not result.get("bbox") and not result.get("segmentation"):
        raise DataError(f"{where}: must have 'bbox' or 'segmentation', got {sorted(result)}")
    _check_id(where, "image_id", result["image_id"], images)
    _check_id(where, "category_id", result["category_id"], categories)
    score = result["score"]
    if not _is_real(score) or not abs(score) <= sys.float_info.max:
        raise DataError(f"{where}: score must be a finite number, got {score!r}")
    if "bbox" in result:
        _check_box(where, result["bbox"])
    if result.get("segmentation"):
        _check_mask(where, result["segmentation"], images[result["image_id"]])


def _check_id(where: str, key: str, value: object, known: Any) -> None:
    usable = isinstance(value, numbers.Integral | str) and not isinstance(value, bool)
    if usable and value in known:
        return
    hint = ""
    if isinstance(value, str) and value.lstrip("-").isdigit() and int(value) in known:
        hint = "; write the id as a number"
    elif usable and str(value) in known:
        hint = "; write the id as text"
    must = f"must be one of the {len(known)} in the truth"
    raise DataError(f"{where}: {key} {must}, got {value!r}{hint}")


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_box(where: str, box: object) -> None:
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_real(v) for v in box):
        raise DataError(f"{where}: bbox must be four numbers [x, y, width, height], got {box!r}")


def _is_box(box: Sequence[float]) -> bool:
    return all(abs(v) <= sys.float_info.max for v in box) and min(box[2], box[3]) >= 0


def _check_mask(where: str, mask: object, image: Record) -> None:
    height, width = image.get("height", 0), image.get("width", 0)
    if isinstance(mask, list):
        if len(rle.usable_polygons(mask)) != len(mask):
            must = "must have three points or more, all finite"
            raise DataError(f"{where}: polygons {must}, got {str(mask)[:80]}")
    elif not rle.fits(mask, height, width):
        size = mask.get("size") if isinstance(mask, dict) else mask
        must = f"must be run lengths that fill its image's size [{height}, {width}]"
        raise DataError(f"{where}: segmentation {must}, got size {str(size)[:80]}")
