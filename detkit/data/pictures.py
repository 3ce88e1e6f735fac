"""Images without annotations: found by name, or given as they are, for detectors to look at."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from detkit.config import DataConfig
from detkit.data.dataset import DetectionDataset
from detkit.data.images import is_image_name, read_header, to_rgb
from detkit.data.problems import ImageFileError, Report
from detkit.data.records import PackedJson, Records
from detkit.errors import DataError
from detkit.types import CategoryMap

Picture = str | Path | Image.Image | NDArray[np.uint8]
"""A file, or an image in memory: of PIL, or (H, W, 3) RGB or (H, W) grey values."""


def find_pictures(names: Iterable[str | Path], without: Path | None = None) -> list[Path]:
    """The image files that names stand for, each once, in the order given.

    A file counts whatever it is called; a folder stands for every image in it and below, by name; a
    pattern with ``*``, ``?``, ``[...]`` or ``**`` for the images and folders it matches.

    Args:
        names: Files, folders and patterns.
        without: A folder whose images are left out, where results are written into what is read.

    Raises:
        DataError: A name stands for nothing.
    """
    found: dict[str, Path] = {}
    hidden = None if without is None else Path(os.path.abspath(without))
    for name in names:
        paths = _images_of(name)
        if hidden is not None:
            paths = [p for p in paths if not Path(os.path.abspath(p)).is_relative_to(hidden)]
        if not paths:
            raise DataError(
                f"images: must be files, folders or patterns of images, got {name}: "
                + _nothing(Path(name))
            )
        for path in paths:
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def _images_of(name: str | Path) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        return _below(path)
    if path.exists() or not glob.has_magic(str(name)):
        return [path] if path.exists() else []
    matches = [Path(match) for match in sorted(glob.glob(str(name), recursive=True))]
    folders = [image for match in matches if match.is_dir() for image in _below(match)]
    return [match for match in matches if match.is_file() and is_image_name(match.name)] + folders


def _below(folder: Path) -> list[Path]:
    """Images in a folder and below, by name; hidden files and folders are left out."""
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(where, name) for name in sorted(files) if is_image_name(name)]
    return found


def _nothing(path: Path) -> str:
    if path.is_dir():
        return "a folder without images"
    return "no match" if glob.has_magic(str(path)) else "no such file"


def open_pictures(
    pictures: Sequence[Picture], categories: CategoryMap, config: DataConfig
) -> DetectionDataset:
    """Images as a split without truth, so that :func:`eval_batches` takes them.

    Image k of ``pictures`` has id k + 1. Files are turned as EXIF says, and so are images of PIL.
    Unusable ones are left out and listed in the report.

    Args:
        pictures: Files and images.
        categories: Of the detector.
        config: Pixel limit, and what to do with unusable files.

    Raises:
        DataError: An image is of a kind that is not understood; an unusable file where
            ``config.on_bad_image`` is ``fail``.
    """
    report, opened = Report(), _Opened()
    for number, picture in enumerate(pictures, 1):
        try:
            opened.add(number, picture, config.max_pixels)
        except ImageFileError as problem:
            if config.on_bad_image == "fail":
                raise
            report.add(problem.rule, problem.file, problem.what, "skip", number)
    report.images = len(opened.ids)
    return DetectionDataset(
        opened.records(),
        categories,
        report,
        (Path(),),
        "images",
        max_pixels=config.max_pixels,
        on_bad_image=config.on_bad_image,
        pixels=opened.pixels,
    )


class _Opened:
    """Columns of the records while they are gathered."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.files: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.pixels: list[NDArray[np.uint8] | None] = []

    def add(self, number: int, picture: Picture, max_pixels: int) -> None:
        if isinstance(picture, str | Path):
            if Path(picture).is_dir():
                raise ImageFileError("image-unreadable", str(picture), "a folder")
            name, pixels = str(picture), None
            size = read_header(Path(picture), max_pixels).shown
        else:
            name, pixels = f"image {number}", as_pixels(picture)
            size = (pixels.shape[0], pixels.shape[1])
        self.ids.append(number)
        self.files.append(name)
        self.sizes.append(size)
        self.pixels.append(pixels)

    def records(self) -> Records:
        count = len(self.ids)
        return Records(
            image_ids=PackedJson(self.ids),
            files=PackedJson(self.files),
            roots=np.zeros(count, dtype=np.int16),
            sizes=np.array(self.sizes, dtype=np.int32).reshape(-1, 2),
            as_stored=np.zeros(count, dtype=np.bool_),
            first=np.zeros(count + 1, dtype=np.int64),
            annotation_ids=np.zeros(0, dtype=np.int64),
            bboxes=np.zeros((0, 4)),
            labels=np.zeros(0, dtype=np.int64),
            areas=np.zeros(0),
            iscrowd=np.zeros(0, dtype=np.bool_),
            difficult=np.zeros(0, dtype=np.bool_),
            segmentations=PackedJson([]),
        )


def as_pixels(picture: Any) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of an image in memory, turned upright.

    Raises:
        DataError: Neither an image of PIL nor a uint8 array of its shape, or an empty one.
    """
    if isinstance(picture, Image.Image):
        picture = np.array(to_rgb(ImageOps.exif_transpose(picture)))
    shape = getattr(picture, "shape", None)
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
        got = getattr(picture, "dtype", type(picture).__name__)
        raise DataError(
            f"image: must be a file name, a PIL image or a uint8 array of RGB values, got {got}"
        )
    if picture.ndim == 2:
        picture = np.repeat(picture[:, :, None], 3, axis=2)
    if picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise DataError(
            f"image: must be of shape (height, width, 3) or (height, width), got {shape}"
        )
    return np.ascontiguousarray(picture)
