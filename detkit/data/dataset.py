"""Data sets as the loader sees them: how many images, the pixels of one, and the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detkit.data.images import load_image
from detkit.data.problems import ImageFileError, Report
from detkit.data.records import PackedJson, Records
from detkit.types import CategoryMap


@dataclass(eq=False)
class DetectionDataset:
    """One split of a detection set: images, boxes and, if asked for, masks.

    Attributes:
        records: What the annotation files say, as flat arrays.
        categories: Dataset category ids and labels 1..K.
        report: Fixes counted and files skipped; the loader adds files that fail while training.
        roots: Image folders.
        source: Where the set came from, for messages.
        masks: Whether targets carry masks.
        max_pixels: Pixel limit of one image.
        on_bad_image: What the loader does with a file that turns out damaged: ``skip`` or ``fail``.
        pixels: (H, W, 3) uint8 of each image that lives in memory, None for one in a file; None
            where all are in files.
        damaged: Indices of images that failed while loading.
    """

    records: Records
    categories: CategoryMap
    report: Report
    roots: tuple[Path, ...]
    source: str
    masks: bool = False
    max_pixels: int = 178_956_970
    on_bad_image: str = "skip"
    pixels: Sequence[NDArray[np.uint8] | None] | NDArray[np.uint8] | None = None
    damaged: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def image_ids(self) -> list[int | str]:
        """Ids of the usable images, in order."""
        return list(self.records.image_ids)

    @property
    def files(self) -> list[str]:
        """File names of the usable images, relative to their folder, in order."""
        return list(self.records.files)

    @property
    def has_masks(self) -> bool:
        """Whether any object has a segmentation."""
        return any(segmentation is not None for segmentation in self.records.segmentations)

    def path(self, index: int) -> Path | None:
        """File of image ``index``; None where it lives in memory."""
        if self._pixels(index) is not None:
            return None
        root = self.roots[int(self.records.roots[index])]
        return root / str(self.records.files[index])

    def _pixels(self, index: int) -> NDArray[np.uint8] | None:
        return None if self.pixels is None else self.pixels[index]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of image ``index`` in the pixel grid of its boxes."""
        height, width = self.records.sizes[index]
        return int(height), int(width)

    def image(self, index: int, at_least: tuple[int, int] | None = None) -> Image.Image:
        """RGB pixels of image ``index``.

        Args:
            index: Which image.
            at_least: (height, width) that is enough: a JPEG may come at 1/2, 1/4 or 1/8 of its
                size, never below this.

        Raises:
            ImageFileError: the file is gone or damaged.
        """
        pixels = self._pixels(index)
        if pixels is not None:
            return Image.fromarray(pixels)
        path = self.roots[int(self.records.roots[index])] / self.records.files[index]
        as_stored = bool(self.records.as_stored[index])
        image = load_image(path, self.max_pixels, as_stored=as_stored, at_least=at_least)
        return _same_size(image, self.size(index), path)

    def take(self, indices: Sequence[int]) -> DetectionDataset:
        """The images ``indices`` alone, in that order; the report is the whole set's."""
        pixels = None if self.pixels is None else [self.pixels[i] for i in indices]
        return replace(self, records=self.records.take(indices), pixels=pixels, damaged=set())

    def with_objects(self) -> DetectionDataset:
        """The images that hold an object which is no crowd."""
        r = self.records
        counted = np.concatenate([[0], np.cumsum(~r.iscrowd)])
        return self.take(np.flatnonzero(np.diff(counted[r.first])).tolist())

    def truth(self) -> dict[str, list[dict[str, Any]]]:
        """The split as normalised COCO ground truth: ``images``, ``annotations``, ``categories``.

        Every annotation has an id that is unique and not 0, ``area``, ``iscrowd`` and
        ``difficult``; boxes are those of the file, not clipped. Images that turned out damaged
        while loading are left out.
        """
        images, annotations = [], []
        for index in range(len(self)):
            if index in self.damaged:
                continue
            image_id = self.records.image_ids[index]
            height, width = self.size(index)
            file = self.records.files[index]
            images.append({"id": image_id, "file_name": file, "height": height, "width": width})
            annotations += self.annotations(index)
        pairs = zip(self.categories.ids, self.categories.names, strict=True)
        categories = [{"id": i, "name": n} for i, n in pairs]
        return {"images": images, "annotations": annotations, "categories": categories}

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """Objects of image ``index``, as :meth:`truth` has them."""
        r = self.records
        image_id = r.image_ids[index]
        found = []
        for a in range(int(r.first[index]), int(r.first[index + 1])):
            annotation = {
                "id": int(r.annotation_ids[a]),
                "image_id": image_id,
                "category_id": self.categories.category_id(int(r.labels[a])),
                "bbox": r.bboxes[a].tolist(),
                "area": float(r.areas[a]),
                "iscrowd": int(r.iscrowd[a]),
                "difficult": int(r.difficult[a]),
            }
            segmentation = r.segmentations[a]
            if segmentation is not None:
                annotation["segmentation"] = segmentation
            found.append(annotation)
        return found


@dataclass(eq=False)
class ClassificationDataset:
    """One split of a classification set.

    Attributes:
        names: I file names relative to ``root``.
        labels: (I,) int64 in 0..K-1.
        sizes: (I, 2) int32, (height, width) as shown.
        categories: Class names; label k of a batch is ``categories.names[k]``.
        report: Files skipped; the loader adds files that fail while training.
        root: Folder of the split.
        source: Where the set came from, for messages.
        max_pixels: Pixel limit of one image.
        on_bad_image: What the loader does with a file that turns out damaged: ``skip`` or ``fail``.
        pixels: (I, H, W, 3) uint8 where the images live in memory.
        damaged: Indices of images that failed while loading.
    """

    names: PackedJson
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32]
    categories: CategoryMap
    report: Report
    root: Path
    source: str
    max_pixels: int = 178_956_970
    on_bad_image: str = "skip"
    pixels: NDArray[np.uint8] | None = None
    damaged: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> ClassificationDataset:
        """The images ``indices`` alone, in that order; the report is the whole set's."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            names=self.names.take(indices),
            labels=self.labels[chosen],
            sizes=self.sizes[chosen],
            pixels=None if self.pixels is None else self.pixels[chosen],
            damaged=set(),
        )

    @property
    def files(self) -> list[str]:
        """File names of the usable images, in order."""
        return list(self.names)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of image ``index`` as shown."""
        height, width = self.sizes[index]
        return int(height), int(width)

    def image(self, index: int, at_least: tuple[int, int] | None = None) -> Image.Image:
        """RGB pixels of image ``index``.

        Args:
            index: Which image.
            at_least: (height, width) that is enough: a JPEG may come at 1/2, 1/4 or 1/8 of its
                size, never below this.

        Raises:
            ImageFileError: the file is gone or damaged.
        """
        if self.pixels is not None:
            return Image.fromarray(self.pixels[index])
        path = self.root / self.names[index]
        image = load_image(path, self.max_pixels, at_least=at_least)
        return _same_size(image, self.size(index), path)


def _same_size(image: Image.Image, size: tuple[int, int], path: Path) -> Image.Image:
    """``image``; raises where it has another size than when the set was opened."""
    height, width = size
    if any(image.size == (-(-width // k), -(-height // k)) for k in (1, 2, 4, 8)):
        return image
    raise ImageFileError(
        "image-size", str(path), f"{image.width}x{image.height}, earlier {width}x{height}"
    )
