"""The rules about single annotations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detkit.data.masks import segmentation_area, segmentation_box, segmentation_fault
from detkit.data.problems import Report
from detkit.data.raw import CleanOptions, RawImage, RawSet, is_finite, is_id, is_number

BORDER_SLACK = 1.0
"""A box may pass its image by this many pixels before that is reported: exporters round."""

Annotation = dict[str, Any]


def clean_annotations(
    raw: RawSet,
    images: list[RawImage],
    known: set[int | str],
    options: CleanOptions,
    report: Report,
) -> list[list[Annotation]]:
    """Usable annotations of each image, with every key set; ``known`` holds all image ids."""
    position = {image.id: i for i, image in enumerate(images)}
    found: list[list[Annotation]] = [[] for _ in images]
    cleaner = _Cleaner(raw, options, report)
    for entry in raw.annotations:
        image_id = entry.get("image_id") if isinstance(entry, dict) else None
        if not is_id(image_id):
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
    return value if is_id(value) else None


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

    def clean(self, entry: Annotation, image: RawImage) -> Annotation | None:
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

    def _segmentation(self, entry: Annotation, image: RawImage, fix: Callable[..., None]) -> Any:
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
        image: RawImage,
        box: float,
        fix: Callable[..., None],
    ) -> float:
        area: Any = entry.get("area")
        if is_number(area) and is_finite(area) and area >= 0:
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
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**62:
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
    entry: Annotation, segmentation: Any, image: RawImage, fix: Callable[..., None]
) -> tuple[float, float, float, float]:
    """The box of an annotation: finite, of positive size, with a part inside the image."""
    box = entry.get("bbox")
    if box is None and segmentation is not None and image.height:
        box = segmentation_box(segmentation, image.height, image.width)
        fix("box-missing", "none; the segmentation's")
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(is_number, box)):
        raise _UnusableError("annotation-record", f"box {box!r:.60}")
    if not all(map(is_finite, box)):
        raise _UnusableError("box-nonfinite", f"box {box}")
    x, y, w, h = map(float, box)
    if w <= 0 or h <= 0:
        raise _UnusableError("box-empty", f"box {box}")
    if image.height:
        what = f"box {box} in {image.width}x{image.height}"
        if x >= image.width or y >= image.height or x + w <= 0 or y + h <= 0:
            raise _UnusableError("box-outside", what)
        if max(-x, -y, x + w - image.width, y + h - image.height) > BORDER_SLACK:
            fix("box-clipped", f"{what}; clipped for training")
    return x, y, w, h
