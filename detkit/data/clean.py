"""From what annotation files say to records that can be used: the rules about detection sets.

Readers of all layouts deliver a :class:`RawSet`; ``clean`` repairs what has one right repair,
leaves out what has none, and reports both. ``detkit data check`` and training share it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from detkit.data.images import Header, check_complete, confine, read_header
from detkit.data.masks import segmentation_area, segmentation_box, segmentation_fault
from detkit.data.problems import ImageFileError, Problem, Report
from detkit.data.records import PackedJson, Records
from detkit.errors import DataError
from detkit.types import CategoryMap

# A box may pass its image by this many pixels before that is reported: exporters round.
_BORDER_SLACK = 1.0

Annotation = dict[str, Any]


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
class _Image:
    id: int | str
    file: str
    root: int
    height: int
    width: int
    as_stored: bool = False
    header: Header | None = None


def clean(raw: RawSet, options: CleanOptions) -> tuple[Records, Report]:
    """Records of the usable images and annotations of ``raw``, in file order, and the findings."""
    report = Report(limit=options.limit)
    for p in raw.problems:
        report.add(p.rule, p.file, p.what, p.action, p.image_id, p.annotation_id)
    entries = _entries(raw, report)
    images = [i for i in entries.values() if _is_readable(i, raw, options, report)]
    _decide_orientation(images, report)
    images = [i for i in images if _size_agrees(i, report)]
    annotations = _clean_annotations(raw, images, set(entries), options, report)
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


def _entries(raw: RawSet, report: Report) -> dict[int | str, _Image]:
    """The sound image entries by id."""
    found: dict[int | str, _Image] = {}
    for entry in raw.images:
        image = _entry(entry, raw.source, report)
        if image is None:
            continue
        if image.id in found:
            report.add("image-id-duplicate", image.file, "an id used before", "skip", image.id)
        else:
            found[image.id] = image
    return found


def _entry(entry: Any, source: str, report: Report) -> _Image | None:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    identity: Any = fields.get("id")
    file: Any = fields.get("file_name")
    if not _is_id(identity) or not isinstance(file, str) or not file:
        report.add("image-record", str(file or source), f"{entry!r:.60}", "skip")
        return None
    height: Any = fields.get("height")
    width: Any = fields.get("width")
    known = _is_side(height) and _is_side(width)
    size = (int(height), int(width)) if known else (0, 0)
    return _Image(identity, file, int(fields.get("root", 0)), *size)


def _is_readable(image: _Image, raw: RawSet, options: CleanOptions, report: Report) -> bool:
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


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_side(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value == int(value) and value > 0


def _decide_orientation(images: list[_Image], report: Report) -> None:
    """Mark the images whose boxes are in the grid of the stored pixels.

    Where EXIF swaps the sides, the annotated size tells the grid. Where it cannot (half turns,
    mirrors, squares), the other turned images of the set decide; without any, boxes are as shown.
    """
    votes = 0
    undecided = []
    turned = []
    for image in images:
        header = image.header
        if header is None or header.orientation == 1:
            continue
        turned.append(image)
        if header.stored == header.shown:
            undecided.append(image)
        else:
            image.as_stored = (image.height, image.width) == header.stored
            votes += 1 if image.as_stored else -1
    for image in undecided:
        image.as_stored = votes > 0
    for image in turned:
        if image.as_stored:
            what = "boxes on the stored pixels; its EXIF orientation is not applied"
            report.add("image-orientation", image.file, what, "fix", image.id)


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
    raw: RawSet, images: list[_Image], known: set[int | str], options: CleanOptions, report: Report
) -> list[list[Annotation]]:
    """Usable annotations of each image, with every key set; ``known`` holds all image ids."""
    position = {image.id: i for i, image in enumerate(images)}
    found: list[list[Annotation]] = [[] for _ in images]
    cleaner = _Cleaner(raw, options, report)
    for entry in raw.annotations:
        image_id = entry.get("image_id") if isinstance(entry, dict) else None
        if not _is_id(image_id):
            report.add("annotation-record", raw.source, f"{entry!r:.60}", "skip")
        elif image_id in position:
            index = position[image_id]
            annotation = cleaner.clean(entry, images[index])
            if annotation is not None:
                found[index].append(annotation)
        elif image_id not in known:
            what = "an image id without entry"
            report.add("annotation-image", raw.source, what, "skip", image_id, _id_of(entry))
    cleaner.number([a for of_image in found for a in of_image])
    return found


def _id_of(entry: Annotation) -> int | str | None:
    value = entry.get("id")
    return value if _is_id(value) else None


class _UnusableError(Exception):
    """An annotation that breaks a rule without a repair."""

    def __init__(self, rule: str, what: str) -> None:
        super().__init__(rule, what)
        self.rule = rule
        self.what = what


class _Cleaner:
    """Applies the rules about single annotations."""

    def __init__(self, raw: RawSet, options: CleanOptions, report: Report) -> None:
        self.categories = raw.categories
        self.bare = raw.bare
        self.masks = options.masks
        self.report = report
        self.used: set[int] = set()

    def clean(self, entry: Annotation, image: _Image) -> Annotation | None:
        """The annotation with every key but maybe ``id`` set, or None where it is unusable."""

        def fix(rule: str, what: str) -> None:
            self.report.add(rule, image.file, what, "fix", image.id, _id_of(entry))

        try:
            label = self._label(entry)
            segmentation = self._segmentation(entry, image, fix)
            x, y, w, h = _box(entry, segmentation, image, fix)
        except _UnusableError as problem:
            rule, what = problem.rule, problem.what
            self.report.add(rule, image.file, what, "skip", image.id, _id_of(entry))
            return None
        annotation = {
            "bbox": (x, y, w, h),
            "label": label,
            "area": self._area(entry, segmentation, image, w * h, fix),
            "iscrowd": self._crowd(entry, fix),
            "difficult": bool(entry.get("difficult", 0)),
            "segmentation": segmentation,
        }
        if not self.bare:
            self._identify(annotation, entry.get("id"), fix)
        return annotation

    def _label(self, entry: Annotation) -> int:
        value: Any = entry.get("category_id")
        try:
            return self.categories.label(value)
        except (KeyError, TypeError):
            raise _UnusableError("annotation-category", f"category id {value!r}") from None

    def _segmentation(self, entry: Annotation, image: _Image, fix: Callable[..., None]) -> Any:
        segmentation = entry.get("segmentation") or None
        fault = segmentation and segmentation_fault(segmentation, image.height, image.width)
        if fault:
            fix("segmentation-invalid", f"{fault}; left out")
            segmentation = None
        if segmentation is None and self.masks:
            raise _UnusableError("segmentation-missing", "none")
        return segmentation

    def _area(
        self,
        entry: Annotation,
        segmentation: Any,
        image: _Image,
        box: float,
        fix: Callable[..., None],
    ) -> float:
        area: Any = entry.get("area")
        if _is_number(area) and math.isfinite(area) and area >= 0:
            return float(area)
        if not self.bare:
            fix("area-missing", f"{area!r}; computed")
        if segmentation is not None and image.height:
            return segmentation_area(segmentation, image.height, image.width)
        return box

    def _crowd(self, entry: Annotation, fix: Callable[..., None]) -> bool:
        crowd = entry.get("iscrowd")
        if crowd not in (0, 1) and not self.bare:
            fix("iscrowd-missing", f"{crowd!r}; taken as 0")
        return crowd == 1

    def _identify(self, annotation: Annotation, value: Any, fix: Callable[..., None]) -> None:
        """Set ``id`` where the file's can be kept; :meth:`number` gives the others theirs."""
        if not isinstance(value, int) or isinstance(value, bool):
            fix("annotation-id-missing", f"{value!r}; numbered")
        elif value == 0:
            fix("annotation-id-zero", "id 0; renumbered")
        elif value in self.used:
            fix("annotation-id-duplicate", f"id {value} again; renumbered")
        else:
            annotation["id"] = value
            self.used.add(value)

    def number(self, annotations: list[Annotation]) -> None:
        """Give annotations without an id the next free ones, in order."""
        following = max(self.used | {0}) + 1
        for annotation in annotations:
            if "id" not in annotation:
                annotation["id"] = following
                following += 1


def _box(
    entry: Annotation, segmentation: Any, image: _Image, fix: Callable[..., None]
) -> tuple[float, float, float, float]:
    """The box of an annotation: finite, of positive size, with a part inside the image."""
    box = entry.get("bbox")
    if box is None and segmentation is not None and image.height:
        box = segmentation_box(segmentation, image.height, image.width)
        fix("box-missing", "none; the segmentation's")
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_number, box)):
        raise _UnusableError("annotation-record", f"box {box!r:.60}")
    if not all(map(math.isfinite, box)):
        raise _UnusableError("box-nonfinite", f"box {box}")
    x, y, w, h = map(float, box)
    if w <= 0 or h <= 0:
        raise _UnusableError("box-empty", f"box {box}")
    if image.height:
        what = f"box {box} in {image.width}x{image.height}"
        if x >= image.width or y >= image.height or x + w <= 0 or y + h <= 0:
            raise _UnusableError("box-outside", what)
        if max(-x, -y, x + w - image.width, y + h - image.height) > _BORDER_SLACK:
            fix("box-clipped", f"{what}; clipped for training")
    return x, y, w, h


def _pack(images: list[_Image], annotations: list[list[Annotation]]) -> Records:
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
