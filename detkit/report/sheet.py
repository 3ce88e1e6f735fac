"""A contact sheet: some images of a data set with their boxes, masks and names."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from detkit.data.dataset import ClassificationDataset, DetectionDataset
from detkit.report.figures import draw_boxes, grid, titled

CELL = 480
"""Largest side of one image on the sheet, in pixels."""
COLUMNS = 4


def contact_sheet(
    dataset: DetectionDataset | ClassificationDataset, count: int = 12, seed: int | None = None
) -> Image.Image:
    """Images of a split with their truth drawn in, each under its file name.

    Args:
        dataset: The split.
        count: How many images at most.
        seed: Draws them at random; None takes some of every class first, then evenly from all.

    Raises:
        DataError: An image cannot be read.
        ValueError: The split is empty.
    """
    chosen = choose(dataset, count, seed)
    cells = [_cell(dataset, index) for index in chosen]
    return grid(cells, columns=min(COLUMNS, len(cells)))


def choose(
    dataset: DetectionDataset | ClassificationDataset, count: int, seed: int | None
) -> list[int]:
    """Indices in rising order: one image of each class, rare ones first, then evenly from all."""
    total = len(dataset)
    count = min(count, total)
    if seed is not None:
        drawn = np.random.default_rng(seed).choice(total, count, replace=False)
        return sorted(int(i) for i in drawn)
    chosen: dict[int, None] = {}
    for images in sorted(_images_of_classes(dataset), key=len):
        if len(images) and len(chosen) < count and not chosen.keys() & set(images):
            chosen[images[len(images) // 2]] = None
    rest = [i for i in range(total) if i not in chosen]
    missing = count - len(chosen)
    places = (np.arange(missing) + 0.5) * len(rest) / max(missing, 1)
    return sorted([*chosen, *(rest[int(p)] for p in places)])


def _images_of_classes(dataset: DetectionDataset | ClassificationDataset) -> list[list[int]]:
    if isinstance(dataset, ClassificationDataset):
        labels, owners = dataset.labels + 1, np.arange(len(dataset))
    else:
        labels = dataset.records.labels
        owners = np.repeat(np.arange(len(dataset)), np.diff(dataset.records.first))
    numbers = range(1, len(dataset.categories) + 1)
    return [np.unique(owners[labels == k]).tolist() for k in numbers]


def _cell(dataset: DetectionDataset | ClassificationDataset, index: int) -> Image.Image:
    image = dataset.image(index)
    file = str(dataset.files[index])
    image.thumbnail((CELL, CELL))
    if isinstance(dataset, ClassificationDataset):
        picture, title = draw_boxes(image, [], {}), file
    else:
        height, width = dataset.size(index)
        rows = [
            _scaled(row, image.width / width, image.height / height)
            for row in dataset.annotations(index)
        ]
        names = dict(zip(dataset.categories.ids, dataset.categories.names, strict=True))
        picture, title = draw_boxes(image, rows, names), f"{file}: {len(rows)}"
    picture.thumbnail((CELL, CELL))  # drawing enlarges what is narrow
    return titled(picture, title)


def _scaled(row: dict[str, Any], across: float, down: float) -> dict[str, Any]:
    """An annotation in pixels of the smaller image; run lengths are drawn to its size anyway."""
    factors = (across, down)
    scaled = row | {"bbox": [v * factors[k % 2] for k, v in enumerate(row["bbox"])]}
    if isinstance(row.get("segmentation"), list):
        scaled["segmentation"] = [
            [v * factors[k % 2] for k, v in enumerate(polygon)] for polygon in row["segmentation"]
        ]
    return scaled
