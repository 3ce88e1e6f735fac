"""COCO json in the layouts of 2017, of 2014 (trainval35k, minival), of Roboflow, or as one file.

A split is one or more parts, each an annotation file with an image folder; parts must not share
image ids and must declare the same categories.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detkit.config import suggest
from detkit.data.raw import RawSet
from detkit.errors import DataError
from detkit.types import CategoryMap

EXPECTED = """\
  annotations/instances_train.json (or instances_train2017.json), images/train/ (or train2017/)
  annotations/instances_val.json (or instances_val2017.json), images/val/ (or val2017/)"""
"""The tree a message shows."""

# Split name to the names of annotation files that make it up, best choice first.
_PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "train": (("train",), ("train2017",), ("train2014",)),
    # minival is a part of val2014 and of no usual training split, so it goes first.
    "val": (("val",), ("val2017",), ("minival2014",), ("val2014",), ("valid",), ("validation",)),
    "valid": (("valid",), ("val",), ("val2017",)),
    "trainval35k": (
        ("trainval35k",),
        ("train2014", "valminusminival2014"),
        ("train2014", "val35k2014"),
        ("train2014", "val35k"),
    ),
    "minival": (("minival",), ("minival2014",), ("val2017",)),
    "valminusminival": (("valminusminival2014",),),
    "test": (("test",), ("test2017",)),
}
_NAMES = ("instances_{}.json", "{}.json", "{}_annotations.coco.json")
_ROBOFLOW = "_annotations.coco.json"
_IMAGE_FOLDERS = ("images/{}", "{}", "{}/images", "images", "JPEGImages", "")


@dataclass(frozen=True)
class Part:
    """An annotation file and the folders its images may be in, best guess first."""

    annotations: Path
    folders: tuple[Path, ...]


def is_coco(path: Path) -> bool:
    """Whether ``path`` is a json file or a folder with COCO annotation files in a usual place."""
    return path.suffix == ".json" if path.is_file() else bool(splits(path))


def splits(path: Path) -> list[str]:
    """Names of the splits that a folder holds, by its annotation files."""
    if path.is_file():
        return ["train"]
    names = [f.stem for f in sorted(_annotation_folder(path).glob("*.json"))]
    known = {n for choices in _PARTS.values() for choice in choices for n in choice}
    found = [
        n.removeprefix("instances_") for n in names if n.startswith("instances_") or n in known
    ]
    found += [p.parent.name for p in sorted(path.glob(f"*/{_ROBOFLOW}"))]
    return list(dict.fromkeys(found))


def find(path: Path, split: str, images: str = "") -> list[Part]:
    """The parts of a split; raises DataError with the expected tree and what was found.

    Args:
        path: The data set's folder, or one annotation file (then every split is that file).
        split: ``train``, ``val``, ``trainval35k``, ``minival``, or the name in an annotation file
            ``instances_<name>.json``; several are joined by ``+``. Where there is a minival2014,
            ``val`` is that one, since the rest of val2014 is trained on.
        images: Image folder given by the user, instead of the usual places.
    """
    given = (Path(images),) if images else ()
    if path.is_file():
        beside = path.parent if path.parent.name != "annotations" else path.parent.parent
        stem = path.stem.removeprefix("instances_")
        return [Part(path, given or _folders(beside, stem))]
    parts = [part for name in split.split("+") for part in _find_one(path, name)]
    return [Part(p.annotations, given) for p in parts] if given else parts


def _find_one(path: Path, split: str) -> list[Part]:
    for names in _PARTS.get(split, ((split,),)):
        files = [_annotation_file(path, n) for n in names]
        if all(files):
            return [
                Part(f, (f.parent,) if f.name == _ROBOFLOW else _folders(path, n))
                for f, n in zip(files, names, strict=True)
                if f is not None
            ]
    known = splits(path)
    have = ", ".join(known) or "no annotation file"
    hint = suggest(split, known) or f"; expected\n{EXPECTED}"
    raise DataError(f"{path}: annotations of split {split!r} must exist, got {have}{hint}")


def _annotation_folder(path: Path) -> Path:
    return path / "annotations" if (path / "annotations").is_dir() else path


def _annotation_file(path: Path, name: str) -> Path | None:
    folder = _annotation_folder(path)
    candidates = [folder / pattern.format(name) for pattern in _NAMES] + [path / name / _ROBOFLOW]
    return next((c for c in candidates if c.is_file()), None)


def _folders(path: Path, name: str) -> tuple[Path, ...]:
    """Where the images of annotation file ``name`` may be: those of minival2014 are in val2014."""
    names = [name]
    if name.endswith("2014"):
        names.append("train2014" if name.startswith("train") else "val2014")
    elif name.startswith("val35k"):
        names.append("val2014")
    return tuple(path / pattern.format(n) for n in names for pattern in _IMAGE_FOLDERS)


def read(parts: list[Part], *, need_images: bool = True) -> RawSet:
    """All parts as one raw set.

    Raises:
        DataError: a file is no COCO json, categories differ, or no image folder is found.
    """
    images: list[Any] = []
    annotations: list[Any] = []
    roots: list[Path] = []
    categories: CategoryMap | None = None
    for number, part in enumerate(parts):
        content = _load(part.annotations)
        declared = _categories(content["categories"], part.annotations)
        if categories is not None and declared != categories:
            first = parts[0].annotations.name
            raise DataError(
                f"{part.annotations}: must declare the categories of {first}, got {declared}"
            )
        categories = declared
        roots.append(_image_folder(part, content["images"], need_images))
        images += [{**i, "root": number} if isinstance(i, dict) else i for i in content["images"]]
        annotations += content["annotations"]
    if categories is None:
        raise DataError("coco: at least one annotation file is needed, got none")
    source = ", ".join(str(p.annotations) for p in parts)
    return RawSet(categories, images, annotations, roots, source)


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: must be readable, got {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: must be JSON, got {error}") from error
    keys = ("images", "annotations", "categories")
    wrong = [
        k for k in keys if not isinstance(content, dict) or not isinstance(content.get(k), list)
    ]
    if wrong:
        have = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: must be an object with lists {', '.join(keys)}, got {have}")
    return {k: content[k] for k in keys}


def _categories(entries: list[Any], path: Path) -> CategoryMap:
    pairs = []
    for entry in entries:
        identity, name = (
            (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        )
        if not isinstance(identity, int) or isinstance(identity, bool) or not isinstance(name, str):
            raise DataError(f"{path}: a category must have an integer id and a name, got {entry!r}")
        pairs.append((identity, name))
    pairs.sort()
    try:
        return CategoryMap([n for _, n in pairs], [i for i, _ in pairs])
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _image_folder(part: Part, images: list[Any], need_images: bool) -> Path:
    """The candidate with the most of the first images; any where images are not needed."""
    if not need_images:
        return part.folders[0]
    folders = [f for f in dict.fromkeys(part.folders) if f.is_dir()]
    entries = [i for i in images[:20] if isinstance(i, dict)]
    names = [e["file_name"] for e in entries if isinstance(e.get("file_name"), str)]
    hits = [sum(os.path.isfile(f / n) for n in names) for f in folders]
    if not folders or (names and max(hits) == 0):
        tried = "\n".join(f"  {f}" for f in dict.fromkeys(part.folders))
        example = f" (looked for {names[0]:.60})" if names else ""
        raise DataError(
            f"{part.annotations}: its images must be in a folder beside it, got none{example}; "
            f"name the folder with --images, or put them in one of\n{tried}"
        )
    return folders[hits.index(max(hits))].resolve()
