"""Detectors on images of one's own: what they found, drawn, and as COCO results."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from detkit import rle
from detkit.config import Config
from detkit.data.dataset import DetectionDataset
from detkit.data.loader import eval_batches
from detkit.data.pictures import Picture, find_pictures, open_pictures
from detkit.engine.detections import Record, detect_dataset
from detkit.errors import CheckpointError, ConfigError, DataError
from detkit.models.zoo import WITH_MASKS
from detkit.report.figures import draw_boxes
from detkit.storage import writing
from detkit.types import CategoryMap

if TYPE_CHECKING:
    from detkit.loading import Loaded

log = logging.getLogger("detkit")

SCORE = 0.3
"""Lowest score of a detection that is kept, unless another is asked for."""

_REASONS = {
    "backbone": "a classifier finds no boxes; `detkit finetune --init-from` makes a detector of it",
    "supernet": "a supernet is every network of its space at once; `detkit search` chooses one",
}


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """What a detector found in one image, best score first.

    Attributes:
        file: The image's file, or ``image <number>`` for one in memory.
        size: (height, width) of the upright image, in whose pixels boxes and masks are.
        categories: Names and data set ids of the labels.
        results: The detections as COCO results: ``image_id``, ``category_id``, ``bbox`` [x, y,
            width, height], ``score`` and, of a detector with masks, ``segmentation``.
        has_masks: Whether the detector gives masks.
    """

    file: str
    size: tuple[int, int]
    categories: CategoryMap
    results: list[Record]
    has_masks: bool
    _source: DetectionDataset
    _index: int

    def __len__(self) -> int:
        return len(self.results)

    def __repr__(self) -> str:
        return f"Prediction({self.file!r}, {summary(self.names)})"

    @property
    def boxes(self) -> Tensor:
        """(R, 4) float32, xyxy in pixels of the upright image."""
        xywh = torch.tensor([row["bbox"] for row in self.results], dtype=torch.float64)
        xywh = xywh.reshape(-1, 4)
        return torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1).float()

    @property
    def scores(self) -> Tensor:
        """(R,) float32 in 0..1."""
        return torch.tensor([row["score"] for row in self.results], dtype=torch.float32)

    @property
    def labels(self) -> Tensor:
        """(R,) int64 in 1..K."""
        labels = [self.categories.label(row["category_id"]) for row in self.results]
        return torch.tensor(labels, dtype=torch.int64)

    @property
    def names(self) -> list[str]:
        """R category names."""
        return [self.categories.name(label) for label in self.labels.tolist()]

    @property
    def masks(self) -> Tensor | None:
        """(R, H, W) bool in pixels of the upright image; None of a detector without masks."""
        if not self.has_masks:
            return None
        masks = torch.zeros(len(self), *self.size, dtype=torch.bool)
        for mask, row in zip(masks, self.results, strict=True):
            mask.copy_(torch.from_numpy(rle.decode(row["segmentation"])))
        return masks

    def image(self) -> Image.Image:
        """The upright image in RGB; raises ImageFileError where its file is gone."""
        return self._source.image(self._index)

    def draw(self, path: str | Path | None = None) -> Image.Image:
        """The image with boxes, masks, names and scores, enlarged where it is small.

        Args:
            path: Where to write it, too; the ending tells the format.

        Raises:
            StorageError: The file cannot be written.
            ConfigError: The ending is of no image format.
        """
        names = dict(zip(self.categories.ids, self.categories.names, strict=True))
        picture = draw_boxes(self.image(), self.results, names)
        if path is not None:
            save_picture(picture, Path(path))
        return picture


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write an image; raises StorageError, or ConfigError where the ending is of no format."""
    try:
        with writing(path):
            picture.save(path)
    except ValueError as error:
        raise ConfigError(
            f"{path}: must end as an image format does, such as .png, got {path.suffix!r}"
        ) from error


def summary(names: Iterable[str]) -> str:
    """``3 cat, 1 dog``, most frequent first, or ``nothing``."""
    counts = Counter(names).most_common()
    return ", ".join(f"{count} {name}" for name, count in counts) or "nothing"


def require_detector(kind: str, what: str) -> None:
    """Raises CheckpointError where a checkpoint of this kind holds no detector."""
    if kind in _REASONS:
        raise CheckpointError(f"{what}: must be a detector, got kind {kind!r}; {_REASONS[kind]}")


def predict_pictures(
    loaded: Loaded, pictures: Sequence[Picture], score: float, batch_size: int
) -> list[Prediction]:
    """One prediction per image; see :meth:`detkit.loading.Loaded.predict`."""
    data = replace(loaded.config.data, on_bad_image="fail", workers=0)
    config = replace(loaded.config, data=data)
    dataset = open_pictures(pictures, loaded.categories, config.data)
    return [one for _, one in _predictions(loaded, config, dataset, score, batch_size)]


def _predictions(
    loaded: Loaded, config: Config, dataset: DetectionDataset, score: float, batch_size: int
) -> Iterator[tuple[int, Prediction]]:
    """Id and detections of each image that can be read, in order."""
    if not 0 <= score <= 1:
        raise ConfigError(f"score: must be in 0..1, got {score}")
    if batch_size < 1:
        raise ConfigError(f"batch_size: must be 1 or more, got {batch_size}")
    device = next(loaded.model.parameters()).device
    masks = config.model.detector in WITH_MASKS
    index = {image_id: k for k, image_id in enumerate(dataset.image_ids)}
    for batch in eval_batches(dataset, config, batch_size=batch_size):
        rows = detect_dataset(loaded.model, [batch], dataset.categories, device)
        for image_id, file in zip(batch.image_ids, batch.files, strict=True):
            k = index[image_id]
            own = [r for r in rows if r["image_id"] == image_id and r["score"] >= score]
            size = dataset.size(k)
            yield image_id, Prediction(file, size, dataset.categories, own, masks, dataset, k)


def predict_folder(
    loaded: Loaded,
    name: str,
    images: Iterable[str | Path],
    out: Path,
    *,
    score: float = SCORE,
    batch_size: int = 1,
    on_image: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Detect in files, folders and patterns; write pictures and results to ``out``.

    Args:
        loaded: The detector.
        name: Its file, for messages.
        images: Files, folders and patterns, see :func:`find_pictures`.
        out: A new or empty folder.
        score: Lowest score that is kept.
        batch_size: Images at once.
        on_image: Called with (images done, images in all).

    Returns:
        What :func:`detkit.api.predict` returns.
    """
    require_detector(loaded.kind, name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: must be a new or empty folder, got one with files in it")
    paths = find_pictures(images, without=out)
    dataset = open_pictures(paths, loaded.categories, loaded.config.data)
    for problem in dataset.report.problems:
        log.warning("left out: %s", problem)
    _require_some(len(dataset), len(paths))
    targets = [out / name for name in picture_names(paths)]
    rows: list[Record] = []
    found: list[Record] = []
    for number, one in _predictions(loaded, loaded.config, dataset, score, batch_size):
        picture = targets[number - 1]
        with writing(picture):
            picture.parent.mkdir(parents=True, exist_ok=True)
        one.draw(picture)
        rows.append(_row(number, one, picture))
        found += one.results
        if on_image is not None:
            on_image(len(rows), len(dataset))
    _require_some(len(rows), len(paths))
    files = _write(out, loaded.categories, rows, found)
    skipped = [{"file": p.file, "why": p.what} for p in dataset.report.skipped_files]
    return {"out": str(out), **files, "images": rows, "skipped": skipped}


def _require_some(usable: int, given: int) -> None:
    if not usable:
        raise DataError(f"images: at least one must be readable, got none of {given}")


def _row(number: int, one: Prediction, picture: Path) -> Record:
    detections = [
        {"name": name, "score": row["score"], "bbox": row["bbox"]}
        for name, row in zip(one.names, one.results, strict=True)
    ]
    return {
        "id": number,
        "file": one.file,
        "height": one.size[0],
        "width": one.size[1],
        "picture": str(picture),
        "detections": detections,
    }


def picture_names(paths: Sequence[Path]) -> list[Path]:
    """A PNG for each image, in the folders the images have below the one they share.

    Images that differ in their ending alone keep it before ``.png``, and no two names are the same,
    whether or not the file system tells upper from lower case.
    """
    full = [Path(os.path.abspath(path)) for path in paths]
    shared = os.path.commonpath([path.parent for path in full]) if full else ""
    relative = [path.relative_to(shared) for path in full]
    plain = Counter(str(path.with_suffix("")).casefold() for path in relative)
    names: dict[str, Path] = {}
    for path in relative:
        alone = plain[str(path.with_suffix("")).casefold()] == 1
        wanted = path.with_suffix(".png") if alone else path.with_name(f"{path.name}.png")
        name, count = wanted, 1
        while str(name).casefold() in names:
            count += 1
            name = wanted.with_name(f"{wanted.stem}-{count}.png")
        names[str(name).casefold()] = name
    return list(names.values())


def _write(
    out: Path, categories: CategoryMap, rows: list[Record], found: list[Record]
) -> dict[str, str]:
    """``detections.json`` and, with what its ids mean, ``images.json``."""
    pairs = zip(categories.ids, categories.names, strict=True)
    images = [
        {"id": r["id"], "file_name": r["file"], "height": r["height"], "width": r["width"]}
        for r in rows
    ]
    key = {"images": images, "categories": [{"id": i, "name": n} for i, n in pairs]}
    files = {"results": out / "detections.json", "key": out / "images.json"}
    for path, content in ((files["key"], key), (files["results"], found)):
        with writing(path):
            path.write_text(json.dumps(content), encoding="utf-8")
    return {name: str(path) for name, path in files.items()}
