"""Small data sets written by tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth random colours, which JPEG keeps nearly as they are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save(path: Path, height: int = 40, width: int = 60, **options: Any) -> Path:
    """Write a picture, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(height, width).save(path, **options)
    return path


def image(number: int, file: str | None = None, **more: Any) -> dict[str, Any]:
    """A COCO image entry of the size that :func:`save` writes."""
    entry = {"id": number, "file_name": file or f"{number}.jpg", "height": 40, "width": 60}
    return {k: v for k, v in {**entry, **more}.items() if v is not None}


def box(number: Any, image_id: Any = 1, **more: Any) -> dict[str, Any]:
    """A COCO annotation without a fault; None leaves a key out."""
    entry = {
        "id": number,
        "image_id": image_id,
        "category_id": 3,
        "bbox": [5, 5, 20, 10],
        "area": 200,
        "iscrowd": 0,
    }
    return {k: v for k, v in {**entry, **more}.items() if v is not None}


def write_coco(
    folder: Path,
    images: list[Any],
    annotations: list[Any],
    *,
    split: str = "train",
    write_images: bool = True,
    categories: list[Any] | None = None,
) -> Path:
    """A COCO set of one split; every image entry with a plain name gets a file."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    content = {
        "images": images,
        "annotations": annotations,
        "categories": CATEGORIES if categories is None else categories,
    }
    path = folder / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    names = [i.get("file_name") for i in images if isinstance(i, dict)] if write_images else []
    for name in names:
        target = folder / "images" / split / str(name)
        if isinstance(name, str) and "/" not in name and not target.exists():
            save(target)
    return folder
