"""What a split holds: images, boxes, their sizes, class by class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from detkit.data.dataset import ClassificationDataset, DetectionDataset

SMALL, LARGE = 32.0**2, 96.0**2
"""COCO's limits of area between small, medium and large objects, in square pixels."""


def statistics(dataset: DetectionDataset | ClassificationDataset) -> dict[str, Any]:
    """Counts and sizes of a split, as ``detkit data show --json`` prints them.

    Returns:
        ``images``; ``width`` and ``height`` of images as [least, median, most] pixels; and
        ``per_class`` by name. Of boxes also ``boxes``, ``empty_images``, ``boxes_per_image``
        [least, median, most], ``crowd``, ``difficult``, ``masks``, and per class ``boxes``,
        ``images``, ``small``, ``medium``, ``large`` by COCO's areas and ``side``, the square root
        of the box's area, as [least, median, most] pixels; of classes ``images``.
    """
    if isinstance(dataset, ClassificationDataset):
        sizes = dataset.sizes
        counts = np.bincount(dataset.labels, minlength=len(dataset.categories))
        own: dict[str, Any] = {
            name: {"images": int(n)}
            for name, n in zip(dataset.categories.names, counts, strict=True)
        }
        return {"images": len(dataset), **_sides(sizes), "per_class": own}
    records = dataset.records
    per_image = np.diff(records.first)
    of_box = np.repeat(np.arange(len(records)), per_image)
    names = dataset.categories.names
    rows = {
        name: _class_row(dataset, records.labels == k, of_box) for k, name in enumerate(names, 1)
    }
    return {
        "images": len(records),
        "boxes": len(records.labels),
        "empty_images": int((per_image == 0).sum()),
        "boxes_per_image": _spread(per_image, whole=True),
        "crowd": int(records.iscrowd.sum()),
        "difficult": int(records.difficult.sum()),
        "masks": sum(shape is not None for shape in records.segmentations),
        **_sides(records.sizes),
        "per_class": rows,
    }


def _class_row(
    dataset: DetectionDataset, chosen: NDArray[np.bool_], of_box: NDArray[np.int64]
) -> dict[str, Any]:
    records = dataset.records
    areas = records.areas[chosen]
    sides = np.sqrt(records.bboxes[chosen, 2] * records.bboxes[chosen, 3])
    return {
        "boxes": int(chosen.sum()),
        "images": len(np.unique(of_box[chosen])),
        "small": int((areas < SMALL).sum()),
        "medium": int(((areas >= SMALL) & (areas <= LARGE)).sum()),
        "large": int((areas > LARGE).sum()),
        "side": _spread(sides),
    }


def _sides(sizes: NDArray[np.int32]) -> dict[str, Any]:
    return {
        "width": _spread(sizes[:, 1], whole=True),
        "height": _spread(sizes[:, 0], whole=True),
    }


def _spread(values: NDArray[Any], *, whole: bool = False) -> list[float] | None:
    """[least, median, most], to a tenth or as whole numbers; None of nothing."""
    if not len(values):
        return None
    found = [float(values.min()), float(np.median(values)), float(values.max())]
    return [int(v) if whole else round(v, 1) for v in found]
