"""Reports of runs: reads their folders, runs their detectors where that is new, writes the page.

What `detkit report` calls; the page itself is made in :mod:`detkit.report`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from detkit import __version__, foreign
from detkit import config as configs
from detkit.api import detect_images
from detkit.config import Config, to_plain
from detkit.data import DetectionDataset, open_detection
from detkit.detnas import SearchFolder
from detkit.engine import checkpoint as checkpoints
from detkit.engine.checkpoint import Checkpoint
from detkit.engine.run import RunFolder, runs
from detkit.errors import ConfigError, DataError, StorageError
from detkit.loading import build, fixed_layers, net_of, pick_device, restore
from detkit.models.count import shapes_only
from detkit.models.search_space import SearchSpace
from detkit.nas.candidates import Journal
from detkit.report.analysis import require_matplotlib
from detkit.report.document import document
from detkit.report.evaluation import Evaluation, evaluation
from detkit.report.runs import Run, short_names
from detkit.scales import weights_hash
from detkit.storage import write_whole

Record = dict[str, Any]
OnImage = Callable[[int, int], None]

log = logging.getLogger("detkit")

COMMANDS = ("pretrain", "finetune", "search")
"""Commands whose runs a report tells about."""

DETECTORS = ("detector", "gsl", "fd")
"""Kinds of checkpoints that detect."""


def write_report(
    sources: Sequence[str | Path] = (),
    *,
    output: str | Path | None = None,
    data: str | None = None,
    split: str | None = None,
    overrides: Iterable[Mapping[str, Any]] = (),
    images: int | None = None,
    device: str = "auto",
    on_image: OnImage | None = None,
) -> Record:
    """One HTML page about one or several runs that needs nothing but itself.

    A detector is run on its validation split once; its detections are kept beside it, under the
    hash of its weights, settings and images, so that the next report is made at once.

    Args:
        sources: run folders, or checkpoints in them; the newest run by default.
        output: the page; ``report.html`` in the first run's folder by default.
        data: data set path; by default the one each run was trained on.
        split: split of the data set; by default each run's validation split.
        overrides: layers of settings on top of each run's, for reading images and detecting.
        images: detect on so many images, evenly spaced over the split; None for all.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        on_image: called with (images done, images in all) of each run in turn.

    Returns:
        ``{"report": file, "bytes": n, "sections": [...], "runs": [{"name", "run", "checkpoint",
        "detections", "metrics", "notes"}]}``.

    Raises:
        ConfigError: no run, an option out of range, or no matplotlib.
        DetkitError: an unusable checkpoint, data set or file.
    """
    require_matplotlib("detkit report")
    if images is not None and images < 1:
        raise ConfigError(f"--limit: must be at least 1, got {images}")
    files = [_checkpoint(source) for source in sources or [_newest()]]
    target = Path(output) if output is not None else files[0][0] / "report.html"
    if target.is_dir() or not target.parent.is_dir():
        raise ConfigError(f"-o: must be a file in a folder that exists, got {target}")
    names = short_names([folder for folder, _ in files])
    if len(set(files)) != len(files):
        raise ConfigError(f"RUN: must be given once each, got {', '.join(names)}")
    place = _Place(data, split, list(overrides), images, device, on_image)
    found = [
        place.read(name, RunFolder(folder), file)
        for name, (folder, file) in zip(names, files, strict=True)
    ]
    page, sections = document(found, footer=f"Written by detkit {__version__}.")
    write_whole(target, page.encode())
    return {
        "report": str(target),
        "bytes": len(page.encode()),
        "sections": sections,
        "runs": [_summary(run, file) for run, (_, file) in zip(found, files, strict=True)],
    }


def _newest() -> Path:
    found = runs(COMMANDS)
    if not found:
        raise ConfigError(
            "RUN: one must be given where runs/ holds none, got none; run `detkit demo` first"
        )
    log.info("using %s", found[0].path)
    return found[0].path


def _checkpoint(source: str | Path) -> tuple[Path, Path | None]:
    """Run folder and checkpoint of what the user names."""
    path = Path(source)
    run = RunFolder(path.parent if path.is_file() else path)
    if not run.is_run:
        inside = sorted(p.parent.name for p in path.glob("*/config.toml"))
        hint = f"; in it are {', '.join(inside[:5])}" if inside else ""
        raise ConfigError(
            f"{path}: must be a run folder (with config.toml) or a checkpoint in one, got neither"
            f"{hint}"
        )
    return run.path, path if path.is_file() else run.checkpoint()


def _summary(run: Run, file: Path | None) -> Record:
    scores = run.evaluation.scores if run.evaluation is not None else {}
    return {
        "name": run.name,
        "run": str(run.folder),
        "checkpoint": None if file is None else str(file),
        "metrics": {kind: scores[kind] for kind in ("bbox", "segm") if kind in scores},
        "images": scores.get("images"),
        "notes": list(run.notes),
    }


class _Place:
    """Where and how the runs of one report detect."""

    def __init__(
        self,
        data: str | None,
        split: str | None,
        overrides: Sequence[Mapping[str, Any]],
        images: int | None,
        device: str,
        on_image: OnImage | None,
    ) -> None:
        self._data, self._split, self._overrides = data, split, overrides
        self._images, self._device, self._on_image = images, device, on_image

    def read(self, name: str, run: RunFolder, file: Path | None) -> Run:
        """All that is known of a run; its detector is run if need be."""
        config, lines = run.config(), run.read_metrics()
        candidates = Journal(run.path / "candidates.jsonl").look()
        if candidates or SearchFolder(run.path).is_search:
            return _search(name, run, config, candidates)
        stored = None if file is None else foreign.load(file)
        notes = _state(run, lines, stored)
        found: Evaluation | None = None
        if stored is not None and file is not None and stored["kind"] in DETECTORS:
            try:
                found = self._evaluate(run, file, stored)
            except DataError as error:
                if self._data is not None:
                    raise
                notes.append(f"Detections are left out: {error}")
        scales = None if stored is None else stored.get("scales")
        return Run(
            name=name,
            folder=run.path,
            config=config,
            lines=lines,
            log=_text(run.log),
            facts=_facts(config, lines, stored, found),
            kind="" if stored is None else stored["kind"],
            scales=scales,
            labels={layer["path"]: layer["label"] for layer in (scales or {}).get("layers", [])},
            evaluation=found,
            notes=notes,
        )

    def _evaluate(self, run: RunFolder, file: Path, stored: Checkpoint) -> Evaluation:
        config = configs.resolve(self._overrides, checkpoints.config_of(stored))
        path, split = self._data or config.data.path, self._split or config.data.val_split
        dataset = open_detection(path, split, config.data)
        chosen = _evenly(len(dataset), self._images)
        ids = [dataset.image_ids[i] for i in chosen]
        weights = weights_hash(checkpoints.deployed(stored))
        wanted = _hash([to_plain(config), path, split, ids])
        kept = run.path / f"detections-{wanted[:10]}-{weights[:10]}.json"
        rows, damaged = _stored(kept) or self._detect(file, stored, dataset, chosen, kept)
        dataset.damaged |= damaged
        truth = _only(dataset.truth(), ids)
        places = {image_id: i for i, image_id in zip(chosen, ids, strict=True)}
        source = f"{path}, split {split}, {len(truth['images'])} images"
        return evaluation(source, truth, rows, partial(_open, dataset, places))

    def _detect(
        self,
        file: Path,
        stored: Checkpoint,
        dataset: DetectionDataset,
        chosen: Sequence[int],
        target: Path,
    ) -> tuple[list[Record], set[int]]:
        log.info("%s: detecting on %d images, kept in %s", file, len(chosen), target.name)
        loaded = restore(stored, str(file), pick_device(self._device), self._overrides)
        rows = detect_images(loaded, dataset, self._on_image, chosen)
        damaged = sorted(dataset.damaged)
        text = json.dumps({"damaged": damaged, "detections": rows})
        for old in target.parent.glob(f"{target.stem.rsplit('-', 1)[0]}-*.json"):
            old.unlink()  # of earlier weights on the same images
        try:
            write_whole(target, text.encode())
        except StorageError as error:
            log.warning("detections are not kept: %s", error)
        return rows, set(damaged)


def _search(name: str, run: RunFolder, config: Config, candidates: list[Record]) -> Run:
    """What is known of a search; its ``search.json`` comes with the first generation."""
    folder, notes = SearchFolder(run.path), []
    result = folder.read() if folder.is_search else None
    total = config.search.population * config.search.generations
    if result is None or not result["finished"]:
        notes.append(f"The search stands at {len(candidates)} of {total} networks.")
    known = {} if result is None else result["supernet"]
    facts: Record = {
        "kind": "search",
        "supernet": known.get("file"),
        "data": config.data.path,
        "networks": len(candidates),
    }
    ordered = sorted(candidates, key=lambda line: int(line["index"]))
    return Run(
        name=name,
        folder=run.path,
        config=config,
        log=_text(run.log),
        facts=facts,
        candidates=ordered,
        result=result,
        space=None if result is None else SearchSpace.from_plain(result["space"]),
        notes=notes,
    )


def _evenly(total: int, most: int | None) -> list[int]:
    """All places, or ``most`` of them at equal distances."""
    count = total if most is None else min(most, total)
    return [i * total // count for i in range(count)]


def _only(truth: Record, ids: Sequence[int | str]) -> Record:
    kept = set(ids)
    return {
        **truth,
        "images": [image for image in truth["images"] if image["id"] in kept],
        "annotations": [row for row in truth["annotations"] if row["image_id"] in kept],
    }


def _open(
    dataset: DetectionDataset, places: Mapping[int | str, int], image_id: int | str
) -> Image.Image:
    return dataset.image(places[image_id])


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _stored(path: Path) -> tuple[list[Record], set[int]] | None:
    """Detections kept by an earlier report; None where there are none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["detections"], set(content["damaged"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: must hold detections, got %s; detecting again", path, error)
        return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _state(run: RunFolder, lines: Sequence[Record], stored: Checkpoint | None) -> list[str]:
    """What a reader should know first: an unfinished training, a missing checkpoint."""
    notes = []
    trained = [line for line in lines if line["kind"] == "train"]
    if not trained:
        notes.append("No training step is logged yet.")
    elif trained[-1]["progress"] < 1:
        share = f"{trained[-1]['progress']:.0%}"
        notes.append(f"Training stands at step {trained[-1]['step']}, {share} of its schedule.")
    if stored is None:
        notes.append("There is no checkpoint yet, so nothing is detected.")
    elif trained and not any(line["kind"] == "eval" for line in lines):
        notes.append("No evaluation is logged yet.")
    if stored is not None and stored["kind"] == "supernet":
        does = "classifies" if _classifies(stored) else "detects"
        notes.append(f"A supernet {does} along one path only; `detkit search` tries its paths.")
    return notes


def _classifies(stored: Checkpoint) -> bool:
    """Whether it holds a backbone or a supernet that was trained as a classifier."""
    return stored["kind"] == "backbone" or stored.get("stage") == "pretrain"


def _facts(
    config: Config,
    lines: Sequence[Record],
    stored: Checkpoint | None,
    found: Evaluation | None,
) -> Record:
    """Rows of the table of runs."""
    facts: Record = {}
    kind = "" if stored is None else stored["kind"]
    if stored is None or not _classifies(stored):
        facts["detector"] = config.model.detector
    facts["backbone"] = config.model.backbone
    if kind:
        facts["kind"] = kind
    facts["data"] = config.data.path
    trained = [line for line in lines if line["kind"] == "train"]
    if trained:
        facts["steps"] = trained[-1]["step"]
        facts["minutes"] = f"{trained[-1]['elapsed_seconds'] / 60:.1f}"
    if stored is not None:
        facts["classes"] = len(stored["categories"]["names"])
        facts["parameters"] = _parameters(stored)
    if found is not None:
        facts |= {"images scored": found.scores["images"], "AP": found.scores["bbox"]["AP"]}
        if "segm" in found.scores:
            facts["mask AP"] = found.scores["segm"]["AP"]
    return facts


def _parameters(stored: Checkpoint) -> int:
    config, classes = checkpoints.config_of(stored), len(stored["categories"]["names"])
    with shapes_only():
        model = build(config, classes, net_of(stored), fixed_layers(stored))
    return sum(p.numel() for p in model.parameters())
