"""YOLO: ``data.yaml`` naming image folders and classes, or just ``images/`` beside ``labels/``.

A label file has the image's name and one line per object: ``class x y width height`` with the
centre and size as shares of the shown image, or ``class x1 y1 x2 y2 ...``, a polygon. An image
without a label file has no objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detkit.config import suggest
from detkit.data.images import confine, is_image_name, read_header
from detkit.data.problems import ImageFileError, Problem
from detkit.data.raw import RawSet
from detkit.data.yaml import read_yaml
from detkit.errors import DataError
from detkit.types import CategoryMap

EXPECTED = """\
  data.yaml with train, val and names, or
  images/train/*.jpg, labels/train/*.txt
  images/val/*.jpg, labels/val/*.txt"""
"""The tree a message shows."""

_KEYS = ("path", "train", "val", "test", "names", "nc")
_ALIASES = {"val": ("val", "valid", "validation"), "train": ("train", "training")}


_MOST_DIGITS = 5  # a slip in a label file must not make a list of a billion classes


@dataclass(frozen=True)
class _Layout:
    """Image folders (or list files) of each split, and the class names if they are known."""

    splits: dict[str, list[Path]]
    names: list[str] | None


def is_yolo(path: Path) -> bool:
    """Whether ``path`` is or holds a data.yaml, or holds images/ and labels/."""
    return _yaml_file(path) is not None or _has_pairs(path)


def splits(path: Path) -> list[str]:
    """Names of the splits that the layout names."""
    return list(_layout(path).splits)


def read(path: Path, split: str, *, max_pixels: int) -> RawSet:
    """One split as a raw set, ids of images and annotations numbered from 1, of classes from 0.

    Raises:
        DataError: the yaml cannot be read or says too little, no such split, or a missing folder.
    """
    layout = _layout(path)
    if split not in layout.splits:
        have = ", ".join(layout.splits) or "none"
        hint = suggest(split, layout.splits) or f"; expected\n{EXPECTED}"
        raise DataError(f"{path}: split {split!r} must exist, got {have}{hint}")
    pairs = [pair for source in layout.splits[split] for pair in _listed(source)]
    roots = sorted({root for root, _ in pairs})
    names = layout.names
    if names is None:
        names = _numbered_names(layout)
    categories = CategoryMap(names, range(len(names)))
    raw = RawSet(categories, [], [], roots, str(path), bare=True)
    for number, (root, name) in enumerate(pairs, 1):
        image: dict[str, Any] = {"id": number, "file_name": name, "root": roots.index(root)}
        try:
            height, width = read_header(confine(root, name), max_pixels).shown
        except ImageFileError:
            raw.images.append(image)  # the check of the images finds and reports the same
            continue
        raw.images.append({**image, "height": height, "width": width})
        _add_labels(raw, number, root, name, (width, height))
    return raw


def _layout(path: Path) -> _Layout:
    file = _yaml_file(path)
    if file is not None:
        return _from_yaml(file)
    found: dict[str, list[Path]] = {}
    for split in ("train", "val", "test"):
        folders = [path / "images" / n for n in _ALIASES.get(split, (split,))]
        existing = [f for f in folders if f.is_dir()]
        if existing:
            found[split] = existing[:1]
    classes = next(
        (f for f in (path / "classes.txt", path / "labels" / "classes.txt") if f.is_file()), None
    )
    names = classes.read_text(encoding="utf-8").split("\n") if classes else []
    return _Layout(
        found or {"train": [path / "images"]}, [n.strip() for n in names if n.strip()] or None
    )


def _yaml_file(path: Path) -> Path | None:
    """The yaml at ``path``: itself, data.yaml, or the only one that names classes."""
    if path.is_file():
        return path if path.suffix in (".yaml", ".yml") else None
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (path / name).is_file():
            return path / name
    others = [p for p in sorted(path.glob("*.y*ml")) if "names:" in p.read_text(encoding="utf-8")]
    return others[0] if len(others) == 1 else None


def _has_pairs(path: Path) -> bool:
    return (path / "images").is_dir() and (path / "labels").is_dir()


def _from_yaml(file: Path) -> _Layout:
    content = read_yaml(file, _KEYS)
    names = content.get("names")
    if isinstance(names, dict):
        if sorted(names) != [str(k) for k in sorted(range(len(names)), key=str)]:
            raise DataError(f"{file}: names must be numbered from 0 on, got {sorted(names)}")
        names = [names[str(k)] for k in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{file}: names must list the classes, got {names!r}")
    if content.get("nc", str(len(names))) != str(len(names)):
        raise DataError(
            f"{file}: nc must be the number of names, {len(names)}, got {content['nc']}"
        )
    found = {}
    for split in ("train", "val", "test"):
        value = content.get(split)
        values = value if isinstance(value, list) else [value] if value else []
        if values:
            found[split] = [_resolved(file, content.get("path"), str(v)) for v in values]
    return _Layout(found, names)


def _resolved(file: Path, base: Any, value: str) -> Path:
    """A path of the yaml: below ``path``, below the yaml's folder, or, as Roboflow writes it,
    ../.
    """
    folder = file.parent
    bases = [folder / base, folder] if isinstance(base, str) and base else [folder]
    candidates = [b / value for b in bases] + [folder / value.removeprefix("../")]
    for candidate in candidates:
        if candidate.exists():
            return candidate.resolve()
    tried = ", ".join(str(c) for c in dict.fromkeys(candidates))
    raise DataError(
        f"{file}: {value} must be a folder of images or a list of them, got none at {tried}"
    )


def _listed(source: Path) -> list[tuple[Path, str]]:
    """(image folder, file name) of every image of a folder, or of the lines of a list file."""
    if source.is_file():
        root = source.parent.resolve()
        lines = source.read_text(encoding="utf-8").splitlines()
        return [(root, line.strip().removeprefix("./")) for line in lines if line.strip()]
    if not source.is_dir():
        raise DataError(
            f"{source}: must be a folder of images, got nothing there; expected\n{EXPECTED}"
        )
    root = source.resolve()
    names = sorted(
        p.relative_to(source).as_posix() for p in source.rglob("*") if is_image_name(p.name)
    )
    return [(root, n) for n in names]


def label_file(root: Path, name: str) -> Path:
    """Labels of image ``name`` in ``root``: labels/ for the path's last images/, ending in .txt."""
    parts = list((root / name).parts)
    for k in range(len(parts) - 2, -1, -1):
        if parts[k] == "images":
            parts[k] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _numbered_names(layout: _Layout) -> list[str]:
    """Class names "0", "1", ... up to the largest number in any label file of any split."""
    largest = -1
    pairs = [p for sources in layout.splits.values() for s in sources for p in _listed(s)]
    for root, name in pairs:
        file = label_file(root, name)
        lines = (
            file.read_text(encoding="utf-8", errors="replace").splitlines()
            if file.is_file()
            else []
        )
        numbers = [line.split()[0] for line in lines if line.split()]
        for number in filter(str.isdecimal, numbers):
            if len(number) > _MOST_DIGITS:
                raise DataError(
                    f"{file}: class numbers must have at most {_MOST_DIGITS} digits where no "
                    f"data.yaml names the classes, got {number:.20}"
                )
            largest = max(largest, int(number))
    if largest < 0:
        raise DataError("labels: at least one object is needed to know the classes, got none")
    return [str(k) for k in range(largest + 1)]


def _add_labels(raw: RawSet, number: int, root: Path, name: str, size: tuple[int, int]) -> None:
    file = label_file(root, name)
    if not file.is_file():
        return
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raw.images.pop()
        raw.problems.append(Problem("label-file", name, number, None, str(error), "skip"))
        return
    for row, line in enumerate(lines, 1):
        if not line.strip():
            continue
        annotation = _parse(line, size)
        if annotation is None:
            what = f"line {row} {line.strip()[:60]!r}"
            raw.problems.append(Problem("label-line", name, number, None, what, "skip"))
        else:
            raw.annotations.append({**annotation, "image_id": number})


def _parse(line: str, size: tuple[int, int]) -> dict[str, Any] | None:
    """Category, box and maybe polygon of a line, in pixels; None where it is neither form."""
    try:
        category, *values = (float(v) for v in line.split())
    except ValueError:
        return None
    if category != category // 1:
        return None
    width, height = size
    if len(values) == 4:
        x, y, w, h = values
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        return {"category_id": int(category), "bbox": box}
    if len(values) < 6 or len(values) % 2:
        return None
    xs, ys = [v * width for v in values[::2]], [v * height for v in values[1::2]]
    polygon = [v for point in zip(xs, ys, strict=True) for v in point]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return {"category_id": int(category), "bbox": box, "segmentation": [polygon]}
