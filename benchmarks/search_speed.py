"""Networks per hour of a search, against a loop that starts from nothing for each of them.

    python benchmarks/search_speed.py [SUPERNET] [--networks 4] [--set search.calibration_steps=25]
        [--early 0.5] [--json FILE]

The straightforward loop builds the model and reads its checkpoint, opens the data, decodes and
resizes every image and prepares the truth for each network, and detects one image at a time. Both
take turns, network by network, and must agree in every metric to the last digit. Without SUPERNET a
random one of the tiny space is searched on the synthetic set.

With ``--early SHARE`` networks are also scored after that share of the images, nobody is dropped,
and the ranking error of the early stop of the settings is reported.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from detkit import config as configs
from detkit.data import eval_batches, train_batches
from detkit.data.dataset import DetectionDataset
from detkit.engine import checkpoint as checkpoints
from detkit.engine.checkpoint import Checkpoint
from detkit.engine.evaluate import detect_dataset, evaluate
from detkit.fitness import Fitness, Opened, open_supernet
from detkit.loading import restore
from detkit.models.backbones.shuffle_supernet import find_supernet
from detkit.models.search_space import Genes
from detkit.nas.calibrate import calibrate
from detkit.nas.calibrate import statistics as with_statistics
from detkit.nas.candidates import Candidate
from detkit.nas.early_stop import EARLY, EarlyStop, ranking_error
from detkit.nas.paths import UniformPaths
from detkit.types import Batch

Metrics = dict[str, float | None]


def random_supernet(folder: Path) -> Path:
    """A supernet of the tiny space with random weights, as a fine-tuning would leave it."""
    from detkit.data import open_detection
    from detkit.loading import build
    from detkit.nas.split import SearchSplit

    recipe = configs.read_toml(configs.recipe_path("tiny/supernet-frcnn-fpn"))
    config = configs.resolve([recipe, {"data": {"workers": 0}, "box": {"score_threshold": 0.0}}])
    dataset = open_detection(config.data.path, config.data.split, config.data)
    torch.manual_seed(0)
    model = build(config, dataset.categories)
    split = SearchSplit.draw(dataset.image_ids, config.nas.search_images, 0)
    payload: Any = {
        "format": checkpoints.FORMAT,
        "kind": "supernet",
        "config": configs.to_plain(config),
        "categories": dataset.categories.to_plain(),
        "model": model.state_dict(),
        "space": find_supernet(model).space.to_plain(),
        "stage": "finetune",
        "search_split": split.to_plain(),
        "provenance": {},
    }
    path = folder / "supernet.pth"
    checkpoints.save(path, payload)
    return path


def calibration(opened: Opened) -> Iterator[Batch]:
    """The training batches, read anew."""
    search = opened.config.search
    seen = replace(
        opened.config, train=replace(opened.config.train, batch_size=search.calibration_batch)
    )
    batches = train_batches(opened.training, seen)
    return (part for (part,) in islice(batches, search.calibration_steps))


def straightforward(file: str, overrides: list[Mapping[str, Any]], genes: Genes) -> Metrics:
    """Metrics of one network, everything from its file on done for it alone."""
    opened = open_supernet(file, overrides)
    stored: Checkpoint = checkpoints.load(file)
    model = restore(stored, file).model
    images = opened.images
    if not isinstance(images, DetectionDataset):
        raise TypeError("benchmark: the supernet must be a detector")
    find_supernet(model).set_path(genes)
    momentum = opened.config.search.calibration_momentum or None
    norms = calibrate(model, calibration(opened), momentum=momentum, seed=opened.config.train.seed)
    with torch.no_grad(), with_statistics(model, norms):
        rows = detect_dataset(model, eval_batches(images, opened.config), images.categories, "cpu")
    return dict(evaluate(images.truth(), rows, iou_types=("bbox",))["bbox"])


def taken(run: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    found = run()
    return found, time.perf_counter() - begun


def compare(file: str, overrides: list[Mapping[str, Any]], networks: int) -> dict[str, Any]:
    """Both ways in turns, after one network to warm up."""
    opened = open_supernet(file, overrides)
    fitness, setup = taken(lambda: Fitness(opened, torch.device("cpu")))
    sampler = UniformPaths(opened.space, 1)
    seconds: dict[str, list[float]] = {"straightforward": [], "search": []}
    for step in range(networks + 1):
        genes = sampler(step)
        slow, slow_seconds = taken(partial(straightforward, file, overrides, genes))
        fast, fast_seconds = taken(partial(fitness, genes))
        shown = {k: None if math.isnan(v) else v for k, v in fast.items()}
        if shown != slow:
            raise SystemExit(f"{opened.space.text(genes)}: {shown} is not {slow}")
        if step:
            seconds["straightforward"].append(slow_seconds)
            seconds["search"].append(fast_seconds)
        text = f"{opened.space.text(genes)}  AP {slow['AP']}"
        print(f"{text}  {slow_seconds:.2f} s, {fast_seconds:.2f} s")
    middle = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "supernet": file,
        "images": len(opened.images),
        "calibration": [
            opened.config.search.calibration_steps,
            opened.config.search.calibration_batch,
        ],
        "threads": torch.get_num_threads(),
        "setup_seconds": setup,
        "seconds": middle,
        "networks_per_hour": {way: 3600 / value for way, value in middle.items()},
        "ratio": middle["straightforward"] / middle["search"],
        "identical": True,
    }


def early_error(
    file: str, overrides: list[Mapping[str, Any]], share: float, networks: int
) -> dict[str, Any]:
    """Ranking error of an early stop after ``share`` of the images, on random networks."""
    opened = open_supernet(file, [*overrides, {"search": {"early_stop": share}}])
    fitness, search = Fitness(opened, torch.device("cpu")), opened.config.search
    sampler = UniformPaths(opened.space, 2)
    history = []
    for index in range(networks):
        metrics = dict(fitness(sampler(index)))
        history.append(
            Candidate(index, index // 8, sampler(index), metrics[opened.metric], metrics)
        )
    stop = EarlyStop(search.early_quantile, search.early_margin)
    spread = [c.metrics[EARLY] for c in history]
    return {"share": share, **asdict(stop), "early": spread, **asdict(ranking_error(history, stop))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("supernet", nargs="?")
    parser.add_argument("--networks", type=int, default=4)
    parser.add_argument("--early", type=float, default=0.0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    overrides: list[Mapping[str, Any]] = [configs.parse_override(text) for text in options.set]
    with tempfile.TemporaryDirectory() as folder:
        file = options.supernet or str(random_supernet(Path(folder)))
        result = compare(file, overrides, options.networks)
        if options.early:
            result["early_stop"] = early_error(file, overrides, options.early, options.networks * 8)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
