"""Pascal VOC: ``Annotations/*.xml``, ``JPEGImages/*``, ``ImageSets/Main/<split>.txt``.

Corners are 1-based and inclusive, so x = xmin - 1 and width = xmax - xmin + 1. ``<folder>``,
``<filename>`` and ``<path>`` are not used: the image is the file with the annotation's name.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detkit.config import suggest
from detkit.data.images import is_image_name
from detkit.data.problems import Problem
from detkit.data.raw import RawSet
from detkit.errors import DataError
from detkit.types import CategoryMap

EXPECTED = """\
  Annotations/*.xml
  JPEGImages/*.jpg
  ImageSets/Main/train.txt, val.txt"""
"""The tree a message shows."""


@dataclass
class _Sheet:
    """One XML file: size, objects as (class, box or None, difficult), or why it cannot be read."""

    size: tuple[int, int] | None = None
    objects: list[tuple[str, tuple[float, float, float, float] | None, bool]] = field(
        default_factory=list
    )
    fault: str = ""


def is_voc(path: Path) -> bool:
    """Whether ``path`` has the folders Annotations and JPEGImages."""
    return (path / "Annotations").is_dir() and (path / "JPEGImages").is_dir()


def splits(path: Path) -> list[str]:
    """Names of the lists in ImageSets/Main; those of single classes (``cat_train``) are left
    out.
    """
    names = sorted(p.stem for p in (path / "ImageSets" / "Main").glob("*.txt"))
    return [n for n in names if n.rpartition("_")[2] not in names or "_" not in n]


def unions(path: Path) -> list[str]:
    """Splits whose images all stand in smaller ones, as those of ``trainval`` do."""
    lists = {name: set(_stems(_listing(path, name))) for name in splits(path)}
    smaller = {
        name: [other for other in lists.values() if len(other) < len(own)]
        for name, own in lists.items()
    }
    return [name for name, own in lists.items() if own and own <= set().union(*smaller[name])]


def _listing(path: Path, split: str) -> Path:
    return path / "ImageSets" / "Main" / f"{split}.txt"


def _stems(listing: Path) -> list[str]:
    lines = listing.read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def read(path: Path, split: str) -> RawSet:
    """One split as a raw set; its categories are the sorted class names of every annotation file.

    Raises:
        DataError: no list for this split, or no object in the whole set.
    """
    listing = _listing(path, split)
    if not listing.is_file():
        have = ", ".join(splits(path)) or "no list"
        hint = suggest(split, splits(path)) or f"; expected\n{EXPECTED}"
        raise DataError(f"{path}: ImageSets/Main/{split}.txt must exist, got {have}{hint}")
    sheets = {p.stem: _read_sheet(p) for p in sorted((path / "Annotations").glob("*.xml"))}
    names = sorted({name for sheet in sheets.values() for name, _, _ in sheet.objects if name})
    if not names:
        raise DataError(f"{path}: Annotations must hold objects, got none in {len(sheets)} files")
    files = {Path(n).stem: n for n in sorted(_image_names(path / "JPEGImages"), reverse=True)}
    categories = CategoryMap(names)
    raw = RawSet(categories, [], [], [(path / "JPEGImages").resolve()], str(listing), bare=True)
    ids = {name: k for k, name in enumerate(names, 1)}
    stems = _stems(listing)
    for number, stem in enumerate(stems, 1):
        sheet = sheets.get(stem, _Sheet(fault="no such file"))
        _add(raw, number, stem, files.get(stem, f"{stem}.jpg"), sheet, ids)
    return raw


def _add(
    raw: RawSet, number: int, stem: str, file: str, sheet: _Sheet, ids: dict[str, int]
) -> None:
    """Append one image and its objects to ``raw``, or the reason why its sheet cannot be used."""
    if sheet.fault:
        what = f"Annotations/{stem}.xml: {sheet.fault}"
        raw.problems.append(Problem("label-file", file, number, None, what, "skip"))
        return
    image: dict[str, Any] = {"id": number, "file_name": file, "root": 0}
    if sheet.size is not None:
        image["width"], image["height"] = sheet.size
    raw.images.append(image)
    for name, corners, difficult in sheet.objects:
        if corners is not None and (corners[2] <= corners[0] or corners[3] <= corners[1]):
            # Inclusive corners that coincide would be a box of one pixel; they are slips of the
            # mouse, so they count as empty.
            what = f"corners {corners}"
            raw.problems.append(Problem("box-empty", file, number, None, what, "skip"))
            continue
        annotation: dict[str, Any] = {"image_id": number, "category_id": ids.get(name)}
        if corners is not None:
            x0, y0, x1, y1 = corners
            annotation["bbox"] = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
        raw.annotations.append({**annotation, "difficult": difficult})


def _image_names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if is_image_name(p.name)]


def _read_sheet(path: Path) -> _Sheet:
    try:
        root = ET.parse(path).getroot()
    except (OSError, ET.ParseError, ValueError) as error:
        return _Sheet(fault=str(error))
    sheet = _Sheet()
    width, height = _number(root, "size/width"), _number(root, "size/height")
    if width and height:
        sheet.size = (int(width), int(height))
    for item in root.findall("object"):
        values = [_number(item, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        x0, y0, x1, y1 = values
        whole = x0 is not None and y0 is not None and x1 is not None and y1 is not None
        corners = (x0, y0, x1, y1) if whole else None
        name = (item.findtext("name") or "").strip()
        sheet.objects.append((name, corners, bool(_number(item, "difficult"))))  # type: ignore[arg-type]
    return sheet


def _number(element: ET.Element, path: str) -> float | None:
    """The number at ``path``, or None where there is none."""
    try:
        return float(element.findtext(path) or "")
    except ValueError:
        return None
