"""From what annotation files say to records that can be used: the rules about detection sets.

Readers of all layouts deliver a :class:`RawSet`; ``clean`` repairs what has one right repair,
leaves out what has none, and reports both. ``detkit data check`` and training share it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from detkit.data.images import confine, read_header
from detkit.data.objects import BORDER_SLACK, Annotation, clean_annotations
from detkit.data.problems import ImageFileError, Report
from detkit.data.raw import CleanOptions, RawImage, RawSet, is_finite, is_id, is_number, is_side
from detkit.data.records import PackedJson, Records
from detkit.errors import DataError


def clean(raw: RawSet, options: CleanOptions) -> tuple[Records, Report]:
    """Records of the usable images and annotations of ``raw``, in file order, and the findings."""
    report = Report(limit=options.limit)
    for p in raw.problems:
        report.add(p.rule, p.file, p.what, p.action, p.image_id, p.annotation_id)
    entries = _entries(raw, report)
    images = [i for i in entries.values() if _is_readable(i, raw, options, report)]
    _decide_orientation(images, raw.annotations, report)
    images = [i for i in images if _size_agrees(i, report)]
    annotations = clean_annotations(raw, images, set(entries), options, report)
    report.images = len(images)
    report.annotations = sum(map(len, annotations))
    labels = Counter(a["label"] for of_image in annotations for a in of_image)
    report.per_category = {n: labels[k] for k, n in enumerate(raw.categories.names, 1)}
    return _pack(images, annotations), report


def require_usable(report: Report, source: str, on_bad_image: str) -> None:
    """Raise DataError where no image is usable, or any is not and ``on_bad_image`` is ``fail``."""
    if on_bad_image == "fail" and report.skipped_files:
        first = report.skipped_files[0]
        raise DataError(
            f"{source}: every file must be usable with data.on_bad_image=fail, got {first}"
        )
    if report.images == 0:
        raise DataError(
            f"{source}: at least one usable image is needed, got none ({report.summary()}); "
            "`detkit data check` lists every problem"
        )


def require_masks(report: Report, source: str) -> None:
    """Raise DataError where objects were left out for want of a mask and none has one."""
    missing = [p for p in report.problems if p.rule == "segmentation-missing"]
    if missing and report.annotations == 0:
        count = report.counts["segmentation-missing"]
        raise DataError(
            f"{source}: objects must have masks for a detector that learns them, "
            f"got {count} without and none with one, the first {missing[0]}"
        )


def _entries(raw: RawSet, report: Report) -> dict[int | str, RawImage]:
    """The sound image entries by id."""
    found: dict[int | str, RawImage] = {}
    for entry in raw.images:
        image = _entry(entry, raw.source, report)
        if image is None:
            continue
        if image.id in found:
            report.add("image-id-duplicate", image.file, "an id used before", "skip", image.id)
        else:
            found[image.id] = image
    return found


def _entry(entry: Any, source: str, report: Report) -> RawImage | None:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    identity: Any = fields.get("id")
    file: Any = fields.get("file_name")
    if not is_id(identity) or not isinstance(file, str) or not file:
        report.add("image-record", str(file or source), f"{entry!r:.60}", "skip")
        return None
    height: Any = fields.get("height")
    width: Any = fields.get("width")
    known = is_side(height) and is_side(width)
    size = (int(height), int(width)) if known else (0, 0)
    return RawImage(identity, file, int(fields.get("root", 0)), *size)


def _is_readable(image: RawImage, raw: RawSet, options: CleanOptions, report: Report) -> bool:
    """Whether the file can be used; fills in the header, and the size where the entry has none."""
    if not options.read_images:
        return True
    try:
        path = confine(raw.roots[image.root], image.file)
        image.header = read_header(path, options.max_pixels)
        options.decode(path, options.max_pixels)
    except ImageFileError as problem:
        report.add(problem.rule, image.file, problem.what, "skip", image.id)
        return False
    if not image.height:
        image.height, image.width = image.header.shown
        if not raw.bare:
            report.add("image-size-missing", image.file, "none; the file's", "fix", image.id)
    return True


def _decide_orientation(images: list[RawImage], annotations: list[Any], report: Report) -> None:
    """Mark the images whose boxes are in the grid of the stored pixels.

    Where EXIF swaps the sides, the annotated size tells the grid, unless the boxes fit the other
    one alone: labelling tools show the turned image and note the size of the stored one. Where
    neither can (half turns, mirrors, squares), the other turned images of the set decide; without
    any, boxes are as shown.
    """
    votes = 0
    undecided = []
    turned = [i for i in images if i.header is not None and i.header.orientation != 1]
    ends = _ends(turned, annotations)
    for image in turned:
        if image.header is None or image.header.stored == image.header.shown:
            undecided.append(image)
            continue
        image.as_stored = (image.height, image.width) == image.header.stored
        _follow_boxes(image, ends[image.id], report)
        votes += 1 if image.as_stored else -1
    for image in undecided:
        image.as_stored = votes > 0
    for image in turned:
        if image.as_stored:
            what = "boxes on the stored pixels; its EXIF orientation is not applied"
            report.add("image-orientation", image.file, what, "fix", image.id)


def _ends(images: list[RawImage], annotations: list[Any]) -> dict[int | str, list[Any]]:
    """Right and bottom ends of the boxes of each image, of those that are numbers."""
    found: dict[int | str, list[Any]] = {image.id: [] for image in images}
    for entry in annotations if found else ():
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        owner, box = fields.get("image_id"), fields.get("bbox")
        if not is_id(owner) or owner not in found or not isinstance(box, list) or len(box) != 4:
            continue
        if all(is_number(v) and is_finite(v) for v in box):
            found[owner].append((box[0] + box[2], box[1] + box[3]))
    return found


def _follow_boxes(image: RawImage, ends: list[Any], report: Report) -> None:
    """Take the other grid where all boxes fit that and not the one of the annotated size."""
    if image.header is None or (image.height, image.width) not in (
        image.header.stored,
        image.header.shown,
    ):
        return

    def fits(height: int, width: int) -> bool:
        return all(x <= width + BORDER_SLACK and y <= height + BORDER_SLACK for x, y in ends)

    if fits(image.height, image.width) or not fits(image.width, image.height):
        return
    image.height, image.width = image.width, image.height
    image.as_stored = not image.as_stored
    if not image.as_stored:
        what = "size of the stored pixels, but boxes that fit the image as shown; taken as shown"
        report.add("image-orientation", image.file, what, "fix", image.id)


def _size_agrees(image: RawImage, report: Report) -> bool:
    if image.header is None:
        return True
    height, width = image.header.stored if image.as_stored else image.header.shown
    if (image.height, image.width) == (height, width):
        return True
    what = f"{image.width}x{image.height} for a file of {width}x{height}"
    report.add("image-size", image.file, what, "skip", image.id)
    return False


def _pack(images: list[RawImage], annotations: list[list[Annotation]]) -> Records:
    flat = [a for of_image in annotations for a in of_image]
    counts = [len(a) for a in annotations]
    return Records(
        image_ids=PackedJson(i.id for i in images),
        files=PackedJson(i.file for i in images),
        roots=np.array([i.root for i in images], dtype=np.int16),
        sizes=np.array([(i.height, i.width) for i in images], dtype=np.int32).reshape(-1, 2),
        as_stored=np.array([i.as_stored for i in images], dtype=np.bool_),
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        annotation_ids=np.array([a["id"] for a in flat], dtype=np.int64),
        bboxes=np.array([a["bbox"] for a in flat], dtype=np.float64).reshape(-1, 4),
        labels=np.array([a["label"] for a in flat], dtype=np.int64),
        areas=np.array([a["area"] for a in flat], dtype=np.float64),
        iscrowd=np.array([a["iscrowd"] for a in flat], dtype=np.bool_),
        difficult=np.array([a["difficult"] for a in flat], dtype=np.bool_),
        segmentations=PackedJson(a["segmentation"] for a in flat),
    )
