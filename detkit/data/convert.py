"""One layout into another: what is read, what the other cannot hold, and a folder that is whole.

Boxes are never lost silently: what is left out or cannot be written is counted in the result.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detkit.config import DataConfig, suggest
from detkit.data import masks, write
from detkit.data.check import CheckReport, decode
from detkit.data.clean import clean, require_usable
from detkit.data.images import read_header, turn_mask, turn_points
from detkit.data.open import SYNTHETIC, layout, read_raw, splits
from detkit.data.problems import Report
from detkit.data.raw import CleanOptions, RawSet
from detkit.data.records import Records
from detkit.data.write import Item, Object, Split
from detkit.errors import ConfigError, DataError, StorageError

LAYOUTS = tuple(write.WRITERS)
"""Layouts that can be written."""

CHANGES = "changes.json"
"""The list of changes that :func:`fix` leaves in its folder."""

_KNOWN = {
    *("id", "image_id", "category_id", "bbox", "area", "iscrowd", "difficult", "segmentation"),
    *("file_name", "width", "height", "root"),
}


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` and :func:`fix` did.

    Attributes:
        source: What was read.
        layout: Its layout.
        target: The folder written.
        to: Its layout.
        splits: Images and boxes written, by split.
        not_held: What the layout cannot hold, or holds otherwise, and how often.
        left_out: Findings by rule whose image or annotation was left out.
        repaired: Findings by rule that were repaired.
        notes: Splits that were not converted, and why.
    """

    source: str
    layout: str
    target: str
    to: str
    splits: dict[str, dict[str, int]]
    not_held: dict[str, int]
    left_out: dict[str, int]
    repaired: dict[str, int]
    notes: list[str]

    def to_plain(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Read:
    """One split as it was read."""

    name: str
    raw: RawSet
    records: Records
    report: Report


def convert(
    source: str,
    target: str | Path,
    to: str,
    *,
    only: Sequence[str] = (),
    link: bool = False,
    polygons: bool = False,
    config: DataConfig | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Write a detection set in another layout.

    Unusable images and annotations are left out by the rules of training; boxes are written as the
    files have them, those on stored pixels turned as EXIF says. ``target`` appears when all is
    written and not before.

    Args:
        source: Folder or annotation file of a set.
        target: New or empty folder outside of ``source``.
        to: ``coco``, ``voc`` or ``yolo``.
        only: Splits to convert; by default all, but those whose images are all in others.
        link: Hard links to the images instead of copies.
        polygons: Write masks of one polygon as such (YOLO), whose box is then that around it.
        config: Pixel limit and image folder.
        dry_run: Count, and write nothing.

    Raises:
        ConfigError: An unknown layout, or ``target`` holds files or is inside ``source``.
        DataError: Nothing usable to read.
        StorageError: The disk refuses.
    """
    if to not in write.WRITERS:
        raise ConfigError(f"--to: must be one of {', '.join(LAYOUTS)}, got {to!r}")
    if polygons and to != "yolo":
        raise ConfigError(f"--polygons: must go with --to yolo, got --to {to}")
    path = Path(target)
    _check_target(Path(source), path)
    read, notes = _chosen(_read_all(source, only, config or DataConfig()), bool(only), to)
    tally = write.Tally()
    found = [_split(one, _is_coco(source), clip=False, lost=tally.lost) for one in read]
    with _whole(path, dry_run) as folder:
        write.WRITERS[to](found, folder, write.Options(link, polygons, dry_run), tally)
    return _conversion(source, path, to, read, found, tally, notes)


def fix(
    source: str,
    target: str | Path,
    *,
    link: bool = False,
    config: DataConfig | None = None,
    dry_run: bool = False,
) -> tuple[Conversion, CheckReport]:
    """Write a cleaned copy of a detection set in its own layout, with a list of changes.

    Every image is decoded; what ``detkit data check`` finds is repaired or left out, and boxes are
    clipped to their image. ``changes.json`` lists every change with its reason.

    Args:
        source: Folder or annotation file of a set.
        target: New or empty folder outside of ``source``.
        link: Hard links to the images instead of copies.
        config: Pixel limit and image folder.
        dry_run: Find, and write nothing.

    Returns:
        What was done, and what :func:`detkit.data.check.check` returns.

    Raises:
        ConfigError: ``target`` holds files or is inside ``source``.
        DataError: Nothing usable to read.
        StorageError: The disk refuses.
    """
    path = Path(target)
    _check_target(Path(source), path)
    everything = CleanOptions(limit=None, decode=decode)
    read = _read_all(source, (), config or DataConfig(), everything)
    to = layout(source)
    tally = write.Tally()
    found = [_split(one, to == "coco", clip=True, lost=tally.lost) for one in read]
    reports = {one.name: one.report for one in read}
    changes = {name: [asdict(p) for p in report.problems] for name, report in reports.items()}
    with _whole(path, dry_run) as folder:
        write.WRITERS[to](found, folder, write.Options(link, True, dry_run), tally)
        if not dry_run:
            text = json.dumps({"source": source, "changes": changes}, indent=1)
            (folder / CHANGES).write_text(text, encoding="utf-8")
    return _conversion(source, path, to, read, found, tally, []), CheckReport(source, to, reports)


def _is_coco(source: str) -> bool:
    return layout(source) == "coco"


def _check_target(source: Path, target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: must be a new or empty folder, got one with files in it")
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target}: must lie outside of {source}, which is read")


def _read_all(
    source: str, only: Sequence[str], config: DataConfig, options: CleanOptions | None = None
) -> list[_Read]:
    """The splits of a set of boxes, checked as for training."""
    kind = layout(source)
    if kind == SYNTHETIC:
        raise DataError(
            "synthetic: must be in files to be converted, got the built-in set; "
            "`detkit data synth FOLDER` writes it"
        )
    if kind == "folder":
        raise DataError(f"{source}: must hold boxes, got an ImageFolder set")
    known = splits(source)
    for name in only:
        if name not in known:
            raise DataError(
                f"{source}: --split must be one of {', '.join(known)}, got {name!r}"
                f"{suggest(name, known)}"
            )
    found = []
    for name in only or known:
        raw = read_raw(source, kind, name, config)
        wanted = replace(options or CleanOptions(), max_pixels=config.max_pixels)
        records, report = clean(raw, wanted)
        require_usable(report, raw.source, config.on_bad_image)
        found.append(_Read(_name(Path(source), name), raw, records, report))
    if not found:
        raise DataError(f"{source}: must have at least one split, got none")
    return found


def _name(source: Path, split: str) -> str:
    """Of an annotation file, the split it is named after."""
    if source.suffix != ".json":
        return split
    stem = source.stem.removeprefix("instances_")
    return stem if stem.rstrip("0123456789") in ("train", "val", "valid", "test") else split


def _chosen(read: list[_Read], named: bool, to: str) -> tuple[list[_Read], list[str]]:
    """The splits to write, and why others are not: unions of others, names YOLO does not have."""
    notes: list[str] = []
    taken: set[Path] = set()
    kept = []
    for one in read if named else sorted(read, key=lambda r: len(r.records)):
        own = {_path(one, i) for i in range(len(one.records))}
        if own <= taken and not named:
            notes.append(f"split {one.name}: not written, its images are all in other splits")
            continue
        taken |= own
        kept.append(one)
    kept = [one for one in read if one in kept]
    if to != "yolo":
        return kept, notes
    by_name: dict[str, _Read] = {}
    for one in kept:
        name = write.yolo_split(one.name)
        if name is None or name in by_name:
            notes.append(f"split {one.name}: not written, YOLO has one train, val and test")
        else:
            by_name[name] = replace(one, name=name)
    if not by_name:
        names = ", ".join(one.name for one in kept)
        raise DataError(f"--to yolo: a split must be train, val or test, got {names}")
    return list(by_name.values()), notes


def _path(one: _Read, index: int) -> Path:
    return one.raw.roots[int(one.records.roots[index])] / str(one.records.files[index])


def _split(one: _Read, coco: bool, *, clip: bool, lost: Counter[str]) -> Split:
    """What is written of a split, upright; ``lost`` counts keys that no layout here has."""
    for entry in (*one.raw.images, *one.raw.annotations):
        if isinstance(entry, dict):
            lost.update(f"the key {key!r}" for key in entry.keys() - _KNOWN)
    items = [_item(one, index, clip) for index in range(len(one.records))]
    categories = one.raw.categories
    ids = categories.ids if coco else tuple(range(1, len(categories) + 1))
    return Split(one.name, items, categories.names, ids, has_ids=coco)


def _item(one: _Read, index: int, clip: bool) -> Item:
    records, path = one.records, _path(one, index)
    height, width = (int(v) for v in records.sizes[index])
    orientation = 1
    if records.as_stored[index]:
        header = read_header(path, 2**62)
        orientation, (height, width) = header.orientation, header.shown
    span = records.of_image(index)
    boxes = _boxes(records, index) if clip else records.bboxes[span]
    objects = [
        Object(
            int(records.annotation_ids[a]),
            int(records.labels[a]),
            tuple(box.tolist()),
            float(records.areas[a]),
            bool(records.iscrowd[a]),
            bool(records.difficult[a]),
            records.segmentations[a],
        )
        for a, box in zip(range(span.start, span.stop), boxes, strict=True)
    ]
    if orientation != 1:
        stored = (int(records.sizes[index][0]), int(records.sizes[index][1]))
        objects = [_turned(o, orientation, stored) for o in objects]
    name = str(records.files[index])
    return Item(records.image_ids[index], path, name, (height, width), objects)


def _boxes(records: Records, index: int) -> NDArray[np.float64]:
    """(G, 4) x, y, width, height, clipped to the image."""
    xyxy = records.boxes(index)
    return np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1)


def _turned(found: Object, orientation: int, stored: tuple[int, int]) -> Object:
    """An object on the stored pixels (height, width) as it is on those shown."""
    x, y, w, h = found.box
    corners = turn_points(np.array([[x, y], [x + w, y + h]]), orientation, stored)
    (x0, y0), (x1, y1) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    shape = found.segmentation
    if isinstance(shape, list):
        polygons = [np.reshape(p, (-1, 2)).astype(np.float64) for p in shape]
        shape = [turn_points(p, orientation, stored).ravel().tolist() for p in polygons]
    elif shape is not None:
        mask = turn_mask(masks.decode(shape, *stored), orientation)
        shape = {"size": list(mask.shape), "counts": masks.encode_counts(mask)}
    return replace(found, box=(x0, y0, x1 - x0, y1 - y0), segmentation=shape)


@contextmanager
def _whole(target: Path, dry_run: bool) -> Iterator[Path]:
    """A folder to write to that becomes ``target`` in one step, or is gone."""
    if dry_run:
        yield target
        return
    part = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(target)  # an empty folder of that name gives way
    except OSError as error:
        raise StorageError(
            f"{target}: must be writable, and what goes there readable, got {error}"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _conversion(
    source: str,
    target: Path,
    to: str,
    read: list[_Read],
    found: list[Split],
    tally: write.Tally,
    notes: list[str],
) -> Conversion:
    counts: dict[str, Counter[str]] = {"skip": Counter(), "fix": Counter()}
    for one in read:
        for rule, number in one.report.counts.items():
            listed = {p.action for p in one.report.problems if p.rule == rule}
            counts["skip" if "skip" in listed else "fix"][rule] += number
    return Conversion(
        source,
        layout(source),
        str(target),
        to,
        {s.name: {"images": len(s.items), "boxes": tally.boxes[s.name]} for s in found},
        dict(sorted((+tally.lost).items())),
        dict(sorted(counts["skip"].items())),
        dict(sorted(counts["fix"].items())),
        notes,
    )
