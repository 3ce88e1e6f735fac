"""From what annotation files say to records that can be used: every rule about a detection set is applied here.

Readers of all layouts deliver a :class:`RawSet`; ``clean`` repairs what has one right repair, leaves out what has
none, and reports both. ``detkit data check`` and training go through this same function.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from detkit.data.images import Header, check_complete, confine, read_header
from detkit.data.masks import segmentation_area, segmentation_box, segmentation_fault
from detkit.data.problems import ImageProblem, Problem, Report
from detkit.data.records import PackedJson, Records
from detkit.errors import DataError
from detkit.types import CategoryMap

# A box may pass its image by this many pixels before that counts as a finding: rounding in exports.
_BORDER_SLACK = 1.0


@dataclass
class RawSet:
    """What a reader found, not yet checked.

    Attributes:
        categories: The category map the files declare.
        images: Dicts with ``id``, ``file_name``, ``root`` (index into ``roots``) and, where known, ``width`` and
            ``height``.
        annotations: Dicts as in COCO json: ``id``, ``image_id``, ``category_id``, ``bbox`` (x, y, width, height),
            and optionally ``area``, ``iscrowd``, ``difficult``, ``segmentation``.
        roots: Image folders, resolved.
        source: The annotation file or folder, for messages.
        problems: Findings of the reader itself.
        bare: True for formats that have no ids, areas and crowd flags: their absence is no finding.
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
    """How strict to be: read image files or not, the pixel limit, masks needed or not, findings listed per rule."""

    read_images: bool = True
    max_pixels: int = 178_956_970
    masks: bool = False
    limit: int | None = 20
    decode: Callable[[Path, int], None] = check_complete
    """Called with each file and the pixel limit; raises ImageProblem where the pixels cannot be read."""


@dataclass
class _Image:
    id: int | str
    file: str
    root: int
    height: int
    width: int
    as_stored: bool = False
    header: Header | None = None


def clean(raw: RawSet, options: CleanOptions) -> tuple[Records, Report]:
    """Records of the usable images and annotations of ``raw``, in file order, and what was found."""
    report = Report(limit=options.limit)
    for p in raw.problems:
        report.add(p.rule, p.file, p.what, p.action, p.image_id, p.annotation_id)
    images, known = _clean_images(raw, options, report)
    _decide_orientation(images, report)
    images = [i for i in images if _size_agrees(i, report)]
    annotations = _clean_annotations(raw, images, known, options, report)
    report.images = len(images)
    report.annotations = sum(len(a) for a in annotations)
    return _pack(images, annotations), report


def require_usable(report: Report, source: str, on_bad_image: str) -> None:
    """Raise DataError where no image is usable, or where one is not and ``on_bad_image`` is ``fail``."""
    if on_bad_image == "fail" and report.skipped_files:
        raise DataError(
            f"{source}: every file must be usable with data.on_bad_image=fail, got {report.skipped_files[0]}"
        )
    if report.images == 0:
        raise DataError(
            f"{source}: at least one usable image is needed, got none ({report.summary()}); "
            "`detkit data check` lists every problem"
        )


def _clean_images(
    raw: RawSet, options: CleanOptions, report: Report
) -> tuple[list[_Image], set[Any]]:
    """Images whose entry and file are usable, and the ids of all entries."""
    images: list[_Image] = []
    known: set[Any] = set()
    for entry in raw.images:
        image = _image_entry(entry, raw.source, report)
        if image is None:
            continue
        if image.id in known:
            report.add("image-id-duplicate", image.file, "an id used before", "skip", image.id)
            continue
        known.add(image.id)
        if options.read_images:
            try:
                path = confine(raw.roots[image.root], image.file)
                image.header = read_header(path, options.max_pixels)
                options.decode(path, options.max_pixels)
            except ImageProblem as problem:
                report.add(problem.rule, image.file, problem.what, "skip", image.id)
                continue
        if image.height <= 0 and image.header is not None:
            image.height, image.width = image.header.shown
            if not raw.bare:
                report.add(
                    "image-size-missing", image.file, "none; taken from the file", "fix", image.id
                )
        images.append(image)
    return images, known


def _image_entry(entry: Any, source: str, report: Report) -> _Image | None:
    if not isinstance(entry, dict):
        report.add("image-record", source, f"{entry!r:.60}", "skip")
        return None
    identity, file = entry.get("id"), entry.get("file_name")
    if not _is_id(identity) or not isinstance(file, str) or not file:
        report.add(
            "image-record", str(file or source), f"id {identity!r}, file_name {file!r}", "skip"
        )
        return None
    height, width = entry.get("height"), entry.get("width")
    if not (_is_positive_int(height) and _is_positive_int(width)):
        height = width = 0
    return _Image(identity, file, int(entry.get("root", 0)), int(height), int(width))


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_positive_int(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value == int(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _decide_orientation(images: list[_Image], report: Report) -> None:
    """Mark the images whose boxes are in the grid of the stored pixels.

    Where EXIF swaps the sides, the annotated size tells the grid. Where it cannot tell (half turns, mirrors,
    squares), the other turned images of the set decide; without any, boxes are as shown.
    """
    turned = [i for i in images if i.header is not None and i.header.orientation != 1]
    undecided = []
    stored = shown = 0
    for image in turned:
        header = image.header
        if header is None or header.stored == header.shown:
            undecided.append(image)
        elif (image.height, image.width) == header.stored:
            image.as_stored = True
            stored += 1
        else:
            shown += 1
    for image in undecided:
        image.as_stored = stored > shown
    for image in turned:
        if image.as_stored:
            report.add(
                "image-orientation",
                image.file,
                "boxes in the stored grid; read as stored",
                "fix",
                image.id,
            )


def _size_agrees(image: _Image, report: Report) -> bool:
    if image.header is None:
        return True
    height, width = image.header.stored if image.as_stored else image.header.shown
    if (image.height, image.width) == (height, width):
        return True
    what = f"{image.width}x{image.height} for a file of {width}x{height}"
    report.add("image-size", image.file, what, "skip", image.id)
    return False


def _clean_annotations(
    raw: RawSet, images: list[_Image], known: set[Any], options: CleanOptions, report: Report
) -> list[list[dict[str, Any]]]:
    """Usable annotations of each image, with every key set."""
    position = {image.id: i for i, image in enumerate(images)}
    found: list[list[dict[str, Any]]] = [[] for _ in images]
    cleaner = _AnnotationCleaner(raw, options, report)
    for entry in raw.annotations:
        image_id = entry.get("image_id") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not _is_id(image_id):
            report.add("annotation-record", raw.source, f"{entry!r:.60}", "skip")
            continue
        if image_id in position:
            index = position[image_id]
            annotation = cleaner.clean(entry, images[index])
            if annotation is not None:
                found[index].append(annotation)
        elif image_id not in known:
            report.add(
                "annotation-image",
                raw.source,
                "an image id without entry",
                "skip",
                image_id,
                _id_of(entry),
            )
    cleaner.number(a for annotations in found for a in annotations)
    return found


def _id_of(entry: dict[str, Any]) -> int | str | None:
    value = entry.get("id")
    return value if _is_id(value) else None


class _AnnotationCleaner:
    """Applies the rules about single annotations."""

    def __init__(self, raw: RawSet, options: CleanOptions, report: Report) -> None:
        self.labels = {identity: k for k, identity in enumerate(raw.categories.ids, 1)}
        self.bare = raw.bare
        self.options = options
        self.report = report
        self.used: set[int] = set()
        self.unnumbered: list[dict[str, Any]] = []

    def clean(self, entry: dict[str, Any], image: _Image) -> dict[str, Any] | None:
        """The annotation with every key set, or None where it is unusable."""
        identity = _id_of(entry)

        def skip(rule: str, what: str) -> None:
            self.report.add(rule, image.file, what, "skip", image.id, identity)

        def fix(rule: str, what: str) -> None:
            if not self.bare or rule.startswith(("box", "segmentation")):
                self.report.add(rule, image.file, what, "fix", image.id, identity)

        label = self.labels.get(entry.get("category_id"))  # type: ignore[arg-type]
        if label is None:
            return skip("annotation-category", f"category id {entry.get('category_id')!r}")
        segmentation = entry.get("segmentation") or None
        if segmentation is not None:
            fault = segmentation_fault(segmentation, image.height, image.width)
            if fault:
                fix("segmentation-invalid", f"{fault}; the segmentation is left out")
                segmentation = None
        if segmentation is None and self.options.masks:
            return skip("segmentation-missing", "none")
        box = entry.get("bbox")
        if box is None and segmentation is not None:
            box = segmentation_box(segmentation, image.height, image.width)
            fix("box-missing", "none; taken from the segmentation")
        wrong = _box_problem(box, image)
        if wrong is not None:
            return skip(*wrong)
        x, y, w, h = (float(v) for v in box)  # type: ignore[union-attr]
        if image.width and _outreach(x, y, w, h, image) > _BORDER_SLACK:
            fix("box-clipped", f"{box} in {image.width}x{image.height}; clipped for training")
        area = entry.get("area")
        if not _is_number(area) or not math.isfinite(area) or area < 0:  # type: ignore[arg-type]
            known = segmentation is not None and image.height > 0
            area = segmentation_area(segmentation, image.height, image.width) if known else w * h
            fix("area-missing", "none; computed")
        crowd = entry.get("iscrowd")
        if crowd not in (0, 1):
            fix(
                "iscrowd-missing", "none; taken as 0" if crowd is None else f"{crowd!r}; taken as 0"
            )
            crowd = 0
        annotation = {
            "bbox": (x, y, w, h),
            "label": label,
            "area": float(area),  # type: ignore[arg-type]
            "iscrowd": bool(crowd),
            "difficult": bool(entry.get("difficult", 0)),
            "segmentation": segmentation,
        }
        self._identify(annotation, entry.get("id"), fix)
        return annotation

    def _identify(
        self, annotation: dict[str, Any], value: Any, fix: Callable[[str, str], None]
    ) -> None:
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value
            and value not in self.used
        ):
            annotation["id"] = value
            self.used.add(value)
            return
        self.unnumbered.append(annotation)
        if value in self.used and value is not False:
            fix("annotation-id-duplicate", f"id {value} again; renumbered")
        elif value == 0 and value is not False:
            fix("annotation-id-zero", "id 0; renumbered")
        else:
            fix("annotation-id-missing", f"{value!r}; numbered")

    def number(self, annotations: Iterable[dict[str, Any]]) -> None:
        """Give annotations without a usable id the next free ones, in order."""
        following = max(self.used, default=0) + 1
        for annotation in annotations:
            if "id" not in annotation:
                annotation["id"] = max(following, 1)
                following = annotation["id"] + 1


def _box_problem(box: Any, image: _Image) -> tuple[str, str] | None:
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_number(v) for v in box):
        return "annotation-record", f"box {box!r:.60}"
    if not all(math.isfinite(v) for v in box):
        return "box-nonfinite", f"box {box}"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return "box-empty", f"box {box}"
    if image.width and (x >= image.width or y >= image.height or x + w <= 0 or y + h <= 0):
        return "box-outside", f"box {box} in {image.width}x{image.height}"
    return None


def _outreach(x: float, y: float, w: float, h: float, image: _Image) -> float:
    """Pixels by which a box passes the border of its image."""
    return max(-x, -y, x + w - image.width, y + h - image.height)


def _pack(images: list[_Image], annotations: list[list[dict[str, Any]]]) -> Records:
    flat = [a for per_image in annotations for a in per_image]
    counts = [len(a) for a in annotations]
    return Records(
        image_ids=PackedJson(i.id for i in images),
        files=PackedJson(i.file.replace(os.sep, "/") for i in images),
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
