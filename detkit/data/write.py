"""Detection sets as COCO json, VOC and YOLO files; each writer counts what its layout cannot hold.

Every one writes what the reader of that layout gives back: boxes to nine decimals of a pixel
(VOC), ten of the image's side (YOLO), or to the last bit (COCO).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from detkit.data.images import is_image_name
from detkit.data.yaml import read_yaml
from detkit.data.yolo import label_file
from detkit.errors import DataError, StorageError

_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "PPM": ".ppm"}
_YOLO_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "minival"), "val"),
    "test": "test",
}


@dataclass(frozen=True)
class Object:
    """One annotation.

    Attributes:
        id: Its id.
        label: 1..K.
        box: x, y, width, height in pixels.
        area: Square pixels.
        crowd: A region of objects that are not told apart.
        difficult: VOC's flag.
        segmentation: Polygons, RLE, or None.
    """

    id: int
    label: int
    box: tuple[float, ...]
    area: float
    crowd: bool
    difficult: bool
    segmentation: Any


@dataclass(frozen=True)
class Item:
    """One image: id, file, its name in the set, (height, width) in the grid of its boxes."""

    id: int | str
    path: Path
    name: str
    size: tuple[int, int]
    objects: list[Object]


@dataclass(frozen=True)
class Split:
    """What is written of a split.

    Attributes:
        name: Its name.
        items: Its images.
        categories: K names.
        category_ids: K ids.
        has_ids: Whether the ids mean something, as in COCO json, and were not just counted.
    """

    name: str
    items: list[Item]
    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    has_ids: bool

    @property
    def boxes(self) -> int:
        """Annotations of all its images."""
        return sum(len(item.objects) for item in self.items)


@dataclass(frozen=True)
class Options:
    """How to write: hard links to images, polygons in YOLO, or only counting."""

    link: bool = False
    polygons: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Tally:
    """What was written: boxes by split, and how often which thing was lost."""

    boxes: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)


class _Target:
    """The folder that is written to: no image twice, no two files of one name."""

    def __init__(self, folder: Path, options: Options, lost: Counter[str]) -> None:
        self.folder = folder
        self.options = options
        self.lost = lost
        self._sources: dict[str, Path] = {}

    def image(self, item: Item, place: str, name: str, *, by_stem: bool) -> PurePosixPath:
        """Put an image under ``place`` and return its name there.

        Args:
            item: The image.
            place: Folder below the target.
            name: The name it should have.
            by_stem: No two images may differ in their endings alone.
        """
        free = self._free(item.path, place, PurePosixPath(name), by_stem)
        if str(free) != item.name:
            self.lost["file names, changed to be unique or to fit"] += 1
        target = self.folder / place / free
        if not self.options.dry_run and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _put(item.path, target, self.options.link)
        return free

    def _free(self, source: Path, place: str, name: PurePosixPath, by_stem: bool) -> PurePosixPath:
        number, wanted = 1, name
        while True:
            key = str(wanted.with_suffix("") if by_stem else wanted).casefold()
            if self._sources.setdefault(f"{place}/{key}", source) == source:
                return wanted
            number += 1
            wanted = name.with_name(f"{name.stem}-{number}{name.suffix}")

    def text(self, name: str, content: str) -> None:
        """Write a text file."""
        if self.options.dry_run:
            return
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def _put(source: Path, target: Path, link: bool) -> None:
    if not link:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        raise StorageError(
            f"{target}: must be on a file system where {source} can be linked (--link), "
            f"got {error.strerror}; leave --link out to copy"
        ) from error


def _with_ending(item: Item) -> str:
    """The name with an ending that readers know images by."""
    name = PurePosixPath(item.name)
    if is_image_name(item.name):
        return item.name
    with Image.open(item.path) as image:
        kind = image.format or ""
    suffix = _SUFFIXES.get(kind, f".{kind.lower()}")
    return str(name.with_name(f"{name.name.lstrip('.') or 'image'}{suffix}"))


# -- COCO


def write_coco(splits: list[Split], folder: Path, options: Options, tally: Tally) -> None:
    """``annotations/instances_<split>.json`` and ``images/<split>/``; holds everything."""
    target = _Target(folder, options, tally.lost)
    for split in splits:
        images, annotations = [], []
        for item in split.items:
            name = target.image(item, f"images/{split.name}", item.name, by_stem=False)
            height, width = item.size
            entry = {"id": item.id, "file_name": str(name), "height": height, "width": width}
            images.append(entry)
            tally.boxes[split.name] += len(item.objects)
            annotations += [_coco_annotation(o, item, split) for o in item.objects]
        pairs = zip(split.category_ids, split.categories, strict=True)
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": n} for i, n in pairs],
        }
        target.text(f"annotations/instances_{split.name}.json", json.dumps(content))


def _coco_annotation(found: Object, item: Item, split: Split) -> dict[str, Any]:
    annotation = {
        "id": found.id,
        "image_id": item.id,
        "category_id": split.category_ids[found.label - 1],
        "bbox": list(found.box),
        "area": found.area,
        "iscrowd": int(found.crowd),
        "segmentation": found.segmentation or [],
    }
    return annotation | ({"difficult": 1} if found.difficult else {})  # VOC's, and no key of COCO's


# -- VOC


def write_voc(splits: list[Split], folder: Path, options: Options, tally: Tally) -> None:
    """``Annotations/``, ``JPEGImages/`` and ``ImageSets/Main/``; 1-based, inclusive corners.

    Corners are whole numbers where the box is in whole pixels, else decimals, so that no box moves.
    Crowd regions become difficult objects, which VOC's metrics ignore as COCO's do crowds.
    """
    target = _Target(folder, options, tally.lost)
    for split in splits:
        _count_ids(split, tally.lost)
        unused = set(split.categories) - {
            split.categories[o.label - 1] for s in splits for i in s.items for o in i.objects
        }
        tally.lost["categories without objects"] = len(unused)
        stems = []
        for item in split.items:
            flat = re.sub(r"[\s/]+", "_", _with_ending(item))
            name = target.image(item, "JPEGImages", flat, by_stem=True)
            stems.append(name.stem)
            target.text(f"Annotations/{name.stem}.xml", _voc_sheet(item, str(name), split, tally))
        target.text(f"ImageSets/Main/{split.name}.txt", "".join(f"{s}\n" for s in stems))


def _voc_sheet(item: Item, name: str, split: Split, tally: Tally) -> str:
    root = ET.Element("annotation")
    ET.SubElement(root, "filename").text = name
    size = ET.SubElement(root, "size")
    for key, value in zip(("height", "width"), item.size, strict=True):
        ET.SubElement(size, key).text = str(value)
    ET.SubElement(size, "depth").text = "3"
    for found in item.objects:
        if min(found.box[2:]) <= 1:  # inclusive corners that coincide are read as no box
            tally.lost["boxes of one pixel or less, left out"] += 1
            continue
        _count_mask(found, tally.lost)
        tally.lost["crowd regions, written as difficult"] += found.crowd
        tally.lost["boxes in parts of pixels, written as decimals"] += any(v % 1 for v in found.box)
        tally.boxes[split.name] += 1
        _voc_object(root, found, split)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _voc_object(root: ET.Element, found: Object, split: Split) -> None:
    x, y, w, h = found.box
    element = ET.SubElement(root, "object")
    ET.SubElement(element, "name").text = split.categories[found.label - 1]
    ET.SubElement(element, "difficult").text = str(int(found.difficult or found.crowd))
    box = ET.SubElement(element, "bndbox")
    corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
    for key, value in corners.items():
        ET.SubElement(box, key).text = _decimal(value, 9)


def _decimal(value: float, places: int) -> str:
    text = f"{value:.{places}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


# -- YOLO


def yolo_split(name: str) -> str | None:
    """Which of YOLO's train, val and test a split is; years do not count."""
    return _YOLO_SPLITS.get(re.sub(r"(2014|2017)$", "", name))


def write_yolo(splits: list[Split], folder: Path, options: Options, tally: Tally) -> None:
    """``data.yaml``, ``images/<split>/`` and ``labels/<split>/``; an empty file is an empty image.

    Crowd regions are left out, since every line is an object to be learnt.
    """
    target = _Target(folder, options, tally.lost)
    _data_yaml(splits, target)
    for split in splits:
        if split.categories != splits[0].categories:
            raise DataError(
                f"--to yolo: splits must have the same categories, got {splits[0].categories} "
                f"in {splits[0].name} and {split.categories} in {split.name}"
            )
        _count_ids(split, tally.lost)
        place = f"images/{split.name}"
        for item in split.items:
            name = target.image(item, place, _with_ending(item), by_stem=True)
            lines = list(_yolo_lines(item, options.polygons, tally))
            tally.boxes[split.name] += len(lines)
            text = "".join(f"{line}\n" for line in lines)
            target.text(str(label_file(Path(place), str(name))), text)


def _data_yaml(splits: list[Split], target: _Target) -> None:
    """``data.yaml``, before all else: a name that does not fit stops the writing."""
    names = {str(k): name for k, name in enumerate(splits[0].categories)}
    listed = "".join(f"  {k}: {_quoted(name)}\n" for k, name in names.items())
    places = "".join(f"{s.name}: images/{s.name}\n" for s in splits)
    target.text("data.yaml", f"path: .\n{places}names:\n{listed}")
    if target.options.dry_run:
        return
    try:
        found = read_yaml(target.folder / "data.yaml", ("names",))["names"]
    except DataError:
        found = {}
    if found != names:
        raise DataError(
            f"--to yolo: category names must fit a line of yaml, got {list(names.values())}"
        )


def _yolo_lines(item: Item, polygons: bool, tally: Tally) -> Iterator[str]:
    height, width = item.size
    for found in item.objects:
        if found.crowd:
            tally.lost["crowd regions, left out"] += 1
            continue
        tally.lost["difficult flags"] += found.difficult
        x, y, w, h = found.box
        values = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
        shape = found.segmentation
        if polygons and isinstance(shape, list) and len(shape) == 1:
            points = np.reshape(shape[0], (-1, 2))
            values = (points / (width, height)).ravel().tolist()
            around = [*points.min(axis=0), *np.ptp(points, axis=0)]
            apart = float(np.abs(np.subtract(around, found.box)).max())
            tally.lost["boxes moved by half a pixel or more to their polygon's"] += apart >= 0.5
        else:
            _count_mask(found, tally.lost)
        yield " ".join([str(found.label - 1), *(_decimal(v, 10) for v in values)])


def _quoted(name: str) -> str:
    if '"' in name or "\\" in name:
        return "'" + name.replace("'", "''") + "'"
    return f'"{name}"'


# -- what is lost


def _count_ids(split: Split, lost: Counter[str]) -> None:
    if split.has_ids:
        lost["ids of images and annotations"] += len(split.items) + split.boxes
        if split.category_ids != tuple(range(1, len(split.categories) + 1)):
            lost["category ids"] = len(split.categories)


def _count_mask(found: Object, lost: Counter[str]) -> None:
    lost["masks"] += bool(found.segmentation)


WRITERS: dict[str, Callable[[list[Split], Path, Options, Tally], None]] = {
    "coco": write_coco,
    "voc": write_voc,
    "yolo": write_yolo,
}
"""Layout to its writer: splits, folder, how, and where to count what is lost."""
