"""Finding out what lies at a path and reading one split of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from detkit.config import DataConfig, suggest
from detkit.data import coco, folder, synthetic, voc, yolo
from detkit.data.clean import clean, require_masks, require_usable
from detkit.data.dataset import ClassificationDataset, DetectionDataset
from detkit.data.problems import Report
from detkit.data.raw import CleanOptions, RawSet
from detkit.data.records import PackedJson
from detkit.errors import ConfigError, DataError
from detkit.types import CategoryMap

SYNTHETIC = "synthetic"
"""The path that means the built-in set."""

_LAYOUTS = {
    "coco": coco.is_coco,
    "voc": voc.is_voc,
    "yolo": yolo.is_yolo,
    "folder": folder.is_image_folder,
}


def layout(path: str) -> str:
    """``synthetic``, ``coco``, ``voc``, ``yolo`` or ``folder``.

    Raises:
        DataError: nothing detkit reads lies at ``path``; the message says what was looked for.
    """
    if path == SYNTHETIC:
        return SYNTHETIC
    root = Path(path)
    if not root.exists():
        raise DataError(f"{path}: must be a data set's folder or file or `synthetic`, got nothing")
    for name, found in _LAYOUTS.items():
        if found(root):
            return name
    have = ", ".join(sorted(p.name for p in root.iterdir())[:12]) if root.is_dir() else "a file"
    trees = (
        f"COCO\n{coco.EXPECTED}\nVOC\n{voc.EXPECTED}\n"
        f"YOLO\n{yolo.EXPECTED}\nImageFolder\n{folder.EXPECTED}"
    )
    raise DataError(
        f"{path}: must be a data set detkit reads, got {have or 'an empty folder'}; "
        f"expected one of\n{trees}"
    )


def splits(path: str) -> list[str]:
    """Names of the splits at ``path``; errors as :func:`layout`."""
    kind = layout(path)
    if kind == SYNTHETIC:
        return list(synthetic.IMAGES)
    modules = {"coco": coco.splits, "voc": voc.splits, "yolo": yolo.splits, "folder": folder.splits}
    return modules[kind](Path(path))


def unions(path: str) -> list[str]:
    """Splits at ``path`` that hold nothing of their own: VOC's lists of others' images."""
    return voc.unions(Path(path)) if layout(path) == "voc" else []


def open_detection(
    path: str, split: str, config: DataConfig, *, masks: bool = False, need_images: bool = True
) -> DetectionDataset:
    """Open one split of a detection set in any layout.

    Args:
        path: Folder, annotation file, or ``synthetic``.
        split: ``train``, ``val`` or another the set has.
        config: Image folder, pixel limit, what to do with unusable files; not its path and split.
        masks: Give targets masks; objects without one are left out, and counted in the report.
        need_images: False reads the annotations only, for scoring a results file.

    Raises:
        DataError: nothing readable at ``path``, no such split, no usable image, or an unusable one
            where ``config.on_bad_image`` is ``fail``; with ``masks``, no object has one.
    """
    kind = layout(path)
    if kind == SYNTHETIC:
        return _synthetic_detection(split, config, masks=masks)
    if kind == "folder":
        raise DataError(
            f"{path}: must hold boxes, got an ImageFolder set; it is for `detkit pretrain`"
        )
    raw = read_raw(path, kind, split, config, need_images=need_images)
    options = CleanOptions(read_images=need_images, max_pixels=config.max_pixels, masks=masks)
    records, report = clean(raw, options)
    require_usable(report, raw.source, config.on_bad_image)
    if masks:
        require_masks(report, raw.source)
    return DetectionDataset(
        records,
        raw.categories,
        report,
        tuple(raw.roots),
        raw.source,
        masks=masks,
        max_pixels=config.max_pixels,
        on_bad_image=config.on_bad_image,
    )


def read_raw(
    path: str, kind: str, split: str, config: DataConfig, *, need_images: bool = True
) -> RawSet:
    """What the annotation files of a split of a detection set say, before any check."""
    if config.images and kind != "coco":
        raise ConfigError(
            f"data.images: must be empty for a {kind} set, whose image folders are fixed, "
            f"got {config.images!r}"
        )
    if kind == "voc":
        return voc.read(Path(path), split)
    if kind == "yolo":
        return yolo.read(Path(path), split, max_pixels=config.max_pixels)
    return coco.read(coco.find(Path(path), split, config.images), need_images=need_images)


def open_classification(path: str, split: str, config: DataConfig) -> ClassificationDataset:
    """Open one split of an ImageFolder or the built-in set; see :func:`open_detection`."""
    kind = layout(path)
    if kind == SYNTHETIC:
        return _synthetic_classification(split)
    if kind != "folder":
        raise DataError(
            f"{path}: must be an ImageFolder to train a classifier, got boxes; "
            f"expected\n{folder.EXPECTED}"
        )
    classes, samples, root, report = folder.read(Path(path), split, max_pixels=config.max_pixels)
    require_usable(report, str(root), config.on_bad_image)
    return ClassificationDataset(
        PackedJson(s.file for s in samples),
        np.array([s.label for s in samples], dtype=np.int64),
        np.array([s.size for s in samples], dtype=np.int32),
        CategoryMap(classes),
        report,
        root,
        str(root),
        max_pixels=config.max_pixels,
        on_bad_image=config.on_bad_image,
    )


def _synthetic_detection(split: str, config: DataConfig, *, masks: bool) -> DetectionDataset:
    coco_json, scenes = synthetic.content(split, synthetic.IMAGES.get(split, 0))
    pixels = []
    for drawn in scenes:
        synthetic.add_to(coco_json, drawn)
        pixels.append(drawn.image)
    raw = RawSet(
        synthetic.categories(), coco_json["images"], coco_json["annotations"], [Path()], SYNTHETIC
    )
    records, report = clean(raw, CleanOptions(read_images=False, masks=masks))
    return DetectionDataset(
        records, raw.categories, report, (), SYNTHETIC, masks=masks, pixels=np.stack(pixels)
    )


def _synthetic_classification(split: str) -> ClassificationDataset:
    count = synthetic.CROPS.get(split, 0)
    if not count:
        raise DataError(
            f"synthetic: split must be one of {', '.join(synthetic.CROPS)}, got {split!r}"
            f"{suggest(split, synthetic.CROPS)}"
        )
    pairs = [synthetic.crop(split, i) for i in range(count)]
    side = synthetic.CROP_SIZE
    return ClassificationDataset(
        PackedJson(f"{i + 1:06d}.png" for i in range(count)),
        np.array([label for _, label in pairs], dtype=np.int64),
        np.full((count, 2), side, dtype=np.int32),
        synthetic.categories(),
        Report(images=count, annotations=count),
        Path(),
        SYNTHETIC,
        pixels=np.stack([image for image, _ in pairs]),
    )
