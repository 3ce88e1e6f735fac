"""ImageFolder: ``train/<class>/*.jpg``, ``val/<class>/*.jpg``; class folders sort as text."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from detkit.config import suggest
from detkit.data.images import check_complete, confine, is_image_name, read_header
from detkit.data.problems import ImageFileError, Report
from detkit.errors import DataError

EXPECTED = """\
  train/<class>/*.jpg
  val/<class>/*.jpg"""
"""The tree a message shows."""

_ALIASES = {"val": ("val", "valid", "validation", "test"), "train": ("train", "training")}


@dataclass(frozen=True)
class Sample:
    """A usable image: file name in the split's folder, label 0..K-1, (height, width) as shown."""

    file: str
    label: int
    size: tuple[int, int]


def is_image_folder(path: Path) -> bool:
    """Whether ``path`` has a train folder with class folders of images in it."""
    train = _split_folder(path, "train")
    return train is not None and any(_image_names(train / c) for c in _class_names(train))


def splits(path: Path) -> list[str]:
    """Those of ``train`` and ``val`` that exist."""
    return [s for s in ("train", "val") if _split_folder(path, s) is not None]


def read(
    path: Path,
    split: str,
    *,
    max_pixels: int,
    limit: int | None = 20,
    decode: Callable[[Path, int], None] = check_complete,
) -> tuple[list[str], list[Sample], Path, Report]:
    """Class names, every usable image in order, the split's folder, and the report.

    The classes are those of the train split, so that a label means the same in every split.
    """
    root = _split_folder(path, split)
    if root is None:
        folders = sorted(p.name for p in path.iterdir() if p.is_dir())
        hint = suggest(split, folders) or f"; expected\n{EXPECTED}"
        raise DataError(
            f"{path}: a folder for split {split!r} must exist, "
            f"got {', '.join(folders) or 'no folder'}{hint}"
        )
    train = _split_folder(path, "train") or root
    classes = _class_names(train)
    if not classes:
        raise DataError(f"{train}: must hold one folder per class, got none; expected\n{EXPECTED}")
    labels = {name: k for k, name in enumerate(classes)}
    root = root.resolve()
    report = Report(limit=limit)
    samples = list(_usable(root, labels, max_pixels, decode, report))
    report.images = report.annotations = len(samples)
    counts = Counter(s.label for s in samples)
    report.per_category = {name: counts[k] for name, k in labels.items()}
    return classes, samples, root, report


def _usable(
    root: Path,
    labels: dict[str, int],
    max_pixels: int,
    decode: Callable[[Path, int], None],
    report: Report,
) -> Iterator[Sample]:
    for name in _class_names(root):
        for file in _image_names(root / name):
            relative = f"{name}/{file}"
            if name not in labels:
                report.add("class-unknown", relative, f"class {name!r}", "skip")
                continue
            try:
                path = confine(root, relative)
                header = read_header(path, max_pixels)
                decode(path, max_pixels)
            except ImageFileError as problem:
                report.add(problem.rule, relative, problem.what, "skip")
                continue
            yield Sample(relative, labels[name], header.shown)


def _split_folder(path: Path, split: str) -> Path | None:
    candidates = (path / name for name in _ALIASES.get(split, (split,)))
    return next((c for c in candidates if c.is_dir()), None)


def _class_names(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _image_names(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if is_image_name(e.name))
