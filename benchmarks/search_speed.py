"""Networks per hour of a search as a user runs it, against two loops that keep nothing.

    python benchmarks/search_speed.py [SUPERNET] [--rounds 3] [--networks 8]
        [--set search.calibration_steps=25] [--early 0.5] [--json FILE]

``search`` is `detkit search`, a process of one thread per core. ``straightforward`` is one process
on all cores that builds the model and reads its checkpoint, opens the data, decodes and resizes
every image and prepares the truth for each network, and detects one image at a time. ``published``
does the same as the released code of DetNAS does it: a fresh process averages the norms and writes
the whole model, a second one reads and scores it. All three take turns and must agree in every
metric to the last digit (1e-4 where there are several threads, which round otherwise). Without
SUPERNET a random one of the tiny space is searched on the synthetic set.

With ``--early SHARE`` networks are also scored after that share of the images, nobody is dropped,
and the ranking error of the early stop of the settings is reported.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detkit import config as configs
from detkit.bench.machine import machine
from detkit.data import eval_batches, train_batches
from detkit.data.dataset import DetectionDataset
from detkit.engine import checkpoint as checkpoints
from detkit.engine.checkpoint import Checkpoint
from detkit.engine.detections import detect_dataset
from detkit.engine.evaluate import evaluate
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
Overrides = list[Mapping[str, Any]]
WAYS = ("published", "straightforward", "search")


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


def parsed(settings: list[str]) -> Overrides:
    """Layers of settings of texts like ``search.calibration_steps=12``."""
    return [configs.parse_override(text) for text in settings]


def own_norms(opened: Opened, model: nn.Module, genes: Genes) -> dict[str, torch.Tensor]:
    """Statistics of a path, from images read anew."""
    find_supernet(model).set_path(genes)
    momentum = opened.config.search.calibration_momentum or None
    return calibrate(model, calibration(opened), momentum=momentum, seed=opened.config.train.seed)


def score(opened: Opened, model: nn.Module) -> Metrics:
    """Metrics of a model that runs a path, one image at a time."""
    images = opened.images
    if not isinstance(images, DetectionDataset):
        raise TypeError("benchmark: the supernet must be a detector")
    rows = detect_dataset(model, eval_batches(images, opened.config), images.categories, "cpu")
    return dict(evaluate(images.truth(), rows, iou_types=("bbox",))["bbox"])


def straightforward(file: str, overrides: Overrides, genes: Genes) -> Metrics:
    """Metrics of one network, everything from its file on done for it alone."""
    opened = open_supernet(file, overrides)
    stored: Checkpoint = checkpoints.load(file)
    model = restore(stored, file).model
    norms = own_norms(opened, model, genes)
    with torch.no_grad(), with_statistics(model, norms):
        return score(opened, model)


def published(file: str, settings: list[str], genes: Genes) -> Metrics:
    """The same in two fresh processes with a checkpoint of the whole model between them."""
    with tempfile.TemporaryDirectory() as folder:
        between, answer = str(Path(folder) / "path.pth"), str(Path(folder) / "metrics.json")
        for step, target in ((_calibrated, between), (_scored, answer)):
            arguments = (file, settings, genes, between, target, torch.get_num_threads())
            process = multiprocessing.get_context("spawn").Process(target=step, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{step.__name__}: must succeed, got exit code {process.exitcode}")
        found: Metrics = json.loads(Path(answer).read_text(encoding="utf-8"))
        return found


def _calibrated(
    file: str, settings: list[str], genes: Genes, _: str, target: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    opened = open_supernet(file, parsed(settings))
    model = restore(opened.stored, file).model
    model.load_state_dict(own_norms(opened, model, genes), strict=False)
    torch.save(model.state_dict(), target)


def _scored(
    file: str, settings: list[str], genes: Genes, between: str, target: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    opened = open_supernet(file, parsed(settings))
    model = restore(opened.stored, file).model.eval()
    model.load_state_dict(torch.load(between, weights_only=True))
    find_supernet(model).set_path(genes)
    with torch.no_grad():
        metrics = score(opened, model)
    Path(target).write_text(json.dumps(metrics), encoding="utf-8")


def search(file: str, settings: list[str], networks: int, seed: int) -> list[dict[str, Any]]:
    """Lines of a search that evaluates ``networks`` random networks on all threads."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "search")
        line = [sys.executable, "-m", "detkit.cli", "search", file, "--out", out, "--seed"]
        line += [str(seed), "--population", str(networks), "--generations", "1"]
        line += ["--device", "cpu", *(part for text in settings for part in ("--set", text))]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        subprocess.run(line, check=True, capture_output=True, env=os.environ | threads)
        text = (Path(out) / "candidates.jsonl").read_text(encoding="utf-8")
    return [json.loads(row) for row in text.splitlines()]


@dataclass(frozen=True)
class Cost:
    """What one network took: seconds on the clock, and of all processors."""

    wall: float
    cpu: float


def taken(run: Callable[[], Any]) -> tuple[Any, Cost]:
    """What ``run`` gives, and what it cost with the processes it started."""
    clock, busy = time.perf_counter(), processor_seconds()
    found = run()
    return found, Cost(time.perf_counter() - clock, processor_seconds() - busy)


def processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    use = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in use)


def alone(run: Callable[[], Any]) -> float:
    """Processor seconds of ``run`` on one thread, as in a process of a search."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _, cost = taken(run)
    torch.set_num_threads(threads)
    return cost.cpu


def pace(lines: list[dict[str, Any]]) -> float:
    """Seconds per network of a search that is under way: of the process that took longest."""
    busy: dict[int, float] = {}
    for line in lines:
        busy[line["rank"]] = busy.get(line["rank"], 0.0) + line["seconds"]
    return max(busy.values()) / len(lines)


def compare(file: str, settings: list[str], rounds: int, networks: int) -> dict[str, Any]:
    """All ways in turns; a search evaluates several networks, the others its first one."""
    overrides = parsed(settings)
    opened = open_supernet(file, overrides)
    fitness = Fitness(opened, torch.device("cpu"))
    costs: dict[str, list[Cost]] = {way: [] for way in WAYS}
    # A search has one thread per network, and sums on two round differently.
    apart, allowed = 0.0, 0.0 if torch.get_num_threads() == 1 else 1e-4
    for step in range(rounds):
        lines = search(file, settings, networks, step)
        first = next(line for line in lines if line["index"] == 0)
        genes = opened.space.parse(first["genes"])
        costs["search"].append(Cost(pace(lines), alone(partial(fitness, genes))))
        others = {
            "published": partial(published, file, settings, genes),
            "straightforward": partial(straightforward, file, overrides, genes),
        }
        for way, run in others.items():
            metrics, cost = taken(run)
            apart = max(apart, difference(metrics, first["metrics"]))
            if apart > allowed:
                raise SystemExit(f"{first['genes']}, {way}: {metrics} is not {first['metrics']}")
            costs[way].append(cost)
        shown = ", ".join(f"{way} {costs[way][-1].wall:.2f} s" for way in WAYS)
        print(f"{first['genes']}  AP {first['fitness']:.4f}  {shown}", flush=True)
    return {
        "supernet": file,
        "machine": machine(),
        "images": len(opened.images),
        "calibration": [
            opened.config.search.calibration_steps,
            opened.config.search.calibration_batch,
        ],
        "largest_difference": apart,
        "networks_of_a_search": networks,
        "seconds": _table({way: [c.wall for c in found] for way, found in costs.items()}),
        "processor_seconds": _table({way: [c.cpu for c in found] for way, found in costs.items()}),
    }


def difference(metrics: Metrics, others: Metrics) -> float:
    """Of the same metrics; infinite where one of them is undefined in one of both alone."""
    if {k for k, v in metrics.items() if v is None} != {k for k, v in others.items() if v is None}:
        return math.inf
    return max(abs(v - (others[k] or 0)) for k, v in metrics.items() if v is not None)


def _table(found: Mapping[str, list[float]]) -> dict[str, Any]:
    """Of each way: seconds of each round, networks per hour at their median, ratio to the search.

    The ratio is the median of the rounds' own, since what else the machine does changes.
    """
    ours = found["search"]
    return {
        way: {
            "each": [round(value, 3) for value in values],
            "per_hour": round(3600 / statistics.median(values), 1),
            "ratio": round(statistics.median(v / o for v, o in zip(values, ours, strict=True)), 3),
        }
        for way, values in found.items()
    }


def early_error(file: str, overrides: Overrides, share: float, networks: int) -> dict[str, Any]:
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", type=int, default=8)
    parser.add_argument("--early", type=float, default=0.0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    overrides = parsed(options.set)
    with tempfile.TemporaryDirectory() as folder:
        file = options.supernet or str(random_supernet(Path(folder)))
        result = {}
        if options.rounds:
            result = compare(file, options.set, options.rounds, options.networks)
        if options.early:
            result["early_stop"] = early_error(file, overrides, options.early, options.networks * 3)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
