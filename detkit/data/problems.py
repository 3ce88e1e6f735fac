"""What can be wrong with a data set: a name per rule, a record per finding, a report per split."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from detkit.errors import DataError

Action = Literal["fix", "skip"]

RULES: dict[str, str] = {
    "image-record": "an image entry has an id and a file name",
    "image-id-duplicate": "image ids are unique",
    "image-path": "a file name stays inside its image folder",
    "image-missing": "the image file exists",
    "image-unreadable": "the file is an image that can be decoded",
    "image-truncated": "the image file is complete",
    "image-too-large": "an image has at most data.max_pixels pixels",
    "image-size": "the annotated width and height are those of the file",
    "image-size-missing": "an image entry gives width and height",
    "image-orientation": "an image that EXIF turns is annotated as it is shown",
    "label-file": "an annotation file can be read",
    "label-line": "a line of a label file reads `class x y w h` or `class x1 y1 x2 y2 x3 y3 ...`",
    "annotation-record": "an annotation has an image, a category and a box of four numbers",
    "annotation-image": "an annotation belongs to an image of the set",
    "annotation-category": "an annotation's category is declared",
    "annotation-id-missing": "an annotation has an integer id",
    "annotation-id-zero": "annotation ids are not 0, which evaluation code reads as no match",
    "annotation-id-duplicate": "annotation ids are unique",
    "box-missing": "an annotation with a segmentation has a box too",
    "box-nonfinite": "box coordinates are finite",
    "box-empty": "a box has positive width and height",
    "box-outside": "a box overlaps its image",
    "box-clipped": "a box lies inside its image",
    "area-missing": "an annotation has an area",
    "iscrowd-missing": "an annotation says whether it is a crowd",
    "segmentation-invalid": "a segmentation is polygons of three or more points, or RLE",
    "segmentation-missing": "an object has a segmentation, where masks are asked for",
    "class-unknown": "a class folder of this split exists in the train split",
}
"""Rule name to what must hold."""

IMAGE_RULES = frozenset(r for r in RULES if r.startswith("image-")) | {
    "label-file",
    "class-unknown",
}
"""Rules about whole files; the others are about single annotations."""


@dataclass(frozen=True)
class Problem:
    """One finding.

    Attributes:
        rule: A key of :data:`RULES`.
        file: Image or annotation file, as the data set names it.
        image_id: Image id, or None where there is none.
        annotation_id: Annotation id, or None.
        what: What was found, one phrase.
        action: ``fix`` (repaired while reading) or ``skip`` (image or annotation left out).
    """

    rule: str
    file: str
    image_id: int | str | None
    annotation_id: int | str | None
    what: str
    action: Action

    def __str__(self) -> str:
        where = [self.file]
        if self.image_id is not None:
            where.append(f"image {self.image_id}")
        if self.annotation_id is not None:
            where.append(f"annotation {self.annotation_id}")
        return f"{self.rule}: {', '.join(where)}: {self.what}"


class ImageFileError(DataError):
    """An image file that cannot be used: ``rule`` is a key of :data:`RULES`."""

    def __init__(self, rule: str, file: str, what: str) -> None:
        super().__init__(f"{file}: {RULES[rule]}, got {what}")
        self.rule = rule
        self.file = file
        self.what = what

    def __reduce__(self) -> tuple[type[ImageFileError], tuple[str, str, str]]:
        return ImageFileError, (self.rule, self.file, self.what)


@dataclass
class Report:
    """What reading one split found.

    Attributes:
        counts: Findings per rule; every finding counts, listed or not.
        problems: The findings: all skipped files, and up to ``limit`` others per rule.
        images: Usable images.
        annotations: Usable annotations.
        per_category: Usable annotations by category name.
        limit: How many fixes and left-out annotations per rule are listed; None lists all.
    """

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    images: int = 0
    annotations: int = 0
    per_category: dict[str, int] = field(default_factory=dict)
    limit: int | None = 20

    def add(
        self,
        rule: str,
        file: str,
        what: str,
        action: Action,
        image_id: int | str | None = None,
        annotation_id: int | str | None = None,
    ) -> None:
        """Count one finding and list it, unless its rule has reached the limit."""
        self.counts[rule] += 1
        whole_file = rule in IMAGE_RULES and action == "skip"
        if whole_file or self.limit is None or self.counts[rule] <= self.limit:
            self.problems.append(Problem(rule, file, image_id, annotation_id, what, action))

    @property
    def skipped_files(self) -> list[Problem]:
        """The findings that made a whole file unusable."""
        return [p for p in self.problems if p.action == "skip" and p.rule in IMAGE_RULES]

    def summary(self) -> str:
        """``2 image-missing, 1 box-empty`` or ``no problems``."""
        return ", ".join(f"{n} {rule}" for rule, n in sorted(self.counts.items())) or "no problems"

    def to_plain(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "images": self.images,
            "annotations": self.annotations,
            "per_category": self.per_category,
            "counts": dict(sorted(self.counts.items())),
            "problems": [asdict(p) for p in self.problems],
        }
