"""Two detectors, or their detections, on the same images: what `detkit eval --compare` calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from detkit import config as configs
from detkit import foreign
from detkit.api import detect_split
from detkit.data import DetectionDataset, open_detection
from detkit.engine import compare as bootstrap
from detkit.engine.results import read_results
from detkit.engine.run import RunFolder
from detkit.errors import CheckpointError, ConfigError
from detkit.scoring import with_fixes

Record = dict[str, Any]
OnImage = Callable[[int, int], None]


@dataclass
class _Side:
    """What one side found, and the split as it read it; a results file reads no images."""

    rows: list[Record]
    dataset: DetectionDataset


def compare(
    a: str | Path,
    b: str | Path,
    *,
    data: str | None = None,
    split: str = "val",
    overrides: Iterable[Mapping[str, Any]] = (),
    analysis: bool = False,
    device: str = "auto",
    fold: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    on_image: OnImage | None = None,
) -> Record:
    """Score two detectors on the same images, with bootstrap intervals of their difference.

    Images that one side cannot read count for neither.

    Args:
        a: run folder, detector checkpoint (``.pth``) or COCO results file (``.json``).
        b: the other one, of any of these kinds.
        data: data set path; by default the one the checkpoints were trained on.
        split: split of the data set.
        overrides: layers of settings on top of each checkpoint's.
        analysis: add AP and AR by IoU and area to both.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        fold: fold the batch norms of the checkpoints into their convolutions.
        resamples: bootstrap draws of the images.
        seed: of the draws.
        on_image: called with (images done, images in all).

    Returns:
        The dict that ``detkit eval --compare A B --json`` prints: see
        :func:`detkit.engine.compare.compare`.

    Raises:
        DetkitError: unusable checkpoint, data set, results file or number of draws.
    """
    if resamples < 1:
        raise ConfigError(f"--resamples: must be at least 1, got {resamples}")
    sources, layers = [_source(a), _source(b)], list(overrides)
    if fold and all(source.suffix == ".json" for source in sources):
        raise ConfigError("--fold: must go with a checkpoint, got results files alone")
    path = data or _data_path(sources, layers)
    listed = open_detection(path, split, configs.resolve(layers).data, need_images=False)
    truth = listed.truth()
    sides = {
        n: _Side(read_results(source, truth), listed)  # refused before a model runs
        for n, source in enumerate(sources)
        if source.suffix == ".json"
    }
    models = [n for n in range(len(sources)) if n not in sides]
    for turn, n in enumerate(models):
        show = None if on_image is None else partial(_progress, on_image, turn, len(models))
        sides[n] = _Side(
            *detect_split(
                sources[n],
                data=path,
                split=split,
                overrides=layers,
                device=device,
                fold=fold,
                on_image=show,
            )
        )
    ordered = [sides[models[0]] if models else sides[0], *sides.values()]  # first: whose truth
    truth, left_out = _shared_truth([side.dataset for side in ordered])
    usable = {image["id"] for image in truth["images"]}
    rows = [[row for row in sides[n].rows if row["image_id"] in usable] for n in (0, 1)]
    result = bootstrap.compare(truth, *rows, analysis=analysis, resamples=resamples, seed=seed)
    for n, name in enumerate("ab"):
        scores = with_fixes(result[name], sides[n].dataset)
        result[name] = scores | {"normalised": left_out + scores["normalised"]}
    return result


def _source(given: str | Path) -> Path:
    """The file behind one side: a folder's checkpoint, or the file itself."""
    path = Path(given)
    if path.is_dir():
        found = RunFolder(path).checkpoint()
        if found is None:
            raise CheckpointError(
                f"--compare {path}: must be a run folder with best.pth or last.pth, got neither"
            )
        return found
    if path.suffix not in (".pth", ".json") or not path.is_file():
        kind = "another file" if path.exists() else "nothing there"
        raise ConfigError(
            f"--compare {path}: must be a run folder, a .pth checkpoint or a .json results file, "
            f"got {kind}"
        )
    return path


def _data_path(sources: Sequence[Path], layers: Sequence[Mapping[str, Any]]) -> str:
    """The data set all checkpoints were trained on."""
    stored = [foreign.load(s) for s in sources if s.suffix == ".pth"]
    bases = [configs.from_plain(s["config"]) for s in stored] or [configs.Config()]
    paths = sorted({configs.resolve(layers, base).data.path for base in bases})
    if len(paths) > 1:
        raise ConfigError(
            f"--data: must be given where the two were trained on different sets, got {paths}"
        )
    return paths[0]


def _progress(on_image: OnImage, turn: int, turns: int, done: int, total: int) -> None:
    on_image(turn * total + done, turns * total)


def _shared_truth(datasets: Sequence[DetectionDataset]) -> tuple[Record, list[str]]:
    """Truth of the first, without images that another could not read, and a line on those."""
    truth = datasets[0].truth()
    usable = [{image["id"] for image in dataset.truth()["images"]} for dataset in datasets]
    kept, dropped = set.intersection(*usable), len(set.union(*usable) - set.intersection(*usable))
    images = [image for image in truth["images"] if image["id"] in kept]
    annotations = [row for row in truth["annotations"] if row["image_id"] in kept]
    lines = [f"images that one side could not read, left out of both: {dropped}"] if dropped else []
    return {**truth, "images": images, "annotations": annotations}, lines
