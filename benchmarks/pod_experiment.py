"""Does POD do what its paper says? Six ways to spend one or two schedules, over several seeds.

A small Faster R-CNN FPN on shapes from tiny to filling the image, all from one backbone:

    base-1x   the plain detector, one schedule
    base-2x   the plain detector, a schedule twice as long
    gsl-1x    with learnt scales
    fd-1x     decomposed as gsl-1x learnt, the weights those of the backbone, one schedule
    fd-wt     decomposed likewise, gsl-1x's own weights, a second schedule: compare with base-2x
    base-1+1  base-1x's own weights, a second schedule: base-2x's epochs in fd-wt's two schedules

    python benchmarks/pod_experiment.py [--seeds 3] [--epochs 2] [--out DIR] [--json FILE]

Each training leaves a line in DIR/records.jsonl when it ends; those found there are not run again,
so a killed experiment loses the training it was in.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detkit import api, pod
from detkit.bench.machine import machine
from detkit.data import synthetic
from detkit.engine import checkpoint as checkpoints
from detkit.errors import ConfigError

Record = dict[str, Any]

METRICS = ("AP", "AP50", "APs", "APm", "APl")
ARMS = {"base-1x": 1, "base-2x": 2, "gsl-1x": 1, "fd-1x": 1, "fd-wt": 1, "base-1+1": 1}
"""Arms in the order they are trained, and their schedules' lengths."""
PAIRS = (
    ("gsl-1x", "base-1x"),
    ("fd-1x", "base-1x"),
    ("fd-wt", "base-2x"),
    ("fd-wt", "base-1+1"),
    ("fd-wt", "fd-1x"),
    ("base-2x", "base-1x"),
)
"""Arms whose differences seed by seed are told."""
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

DETECTOR: dict[str, dict[str, Any]] = {
    "model": {
        "detector": "frcnn-fpn",
        "backbone": "resnet50-tiny",
        "norm": "bn",
        "neck_channels": 32,
    },
    "anchors": {"sizes": [12, 24, 48, 96, 192]},
    "rpn": {
        "batch_per_image": 128,
        "drop_straddling": False,
        "pre_nms_train": 200,
        "post_nms_train": 100,
        "pre_nms_test": 200,
        "post_nms_test": 100,
    },
    "box": {"channels": 128, "canonical_size": 96.0, "batch_per_image": 32},
    "train": {"batch_size": 4, "ema": 0.995, "clip": 10.0},
    "optim": {
        "name": "adamw",
        "lr": 0.003,
        "weight_decay": 0.05,
        "norm_decay": False,
        "warmup_steps": 50,
        "warmup_factor": 0.1,
        "schedule": "cosine",
    },
}
"""The settings that all arms share."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What the numbers depend on; records of other settings are refused."""

    seeds: int = 3
    """Trainings of each arm."""
    epochs: float = 2.0
    """Passes over the training images of a schedule of length 1."""
    images: int = 1500
    """Training images."""
    val: int = 300
    """Validation images."""
    size: int = 192
    """Side of an image in pixels."""
    smallest: int = 8
    """Smallest longer side of an object; they run up to the image's, log-uniformly."""
    scale_images: int = 500
    """Training images that the scales are averaged over."""
    pretrain_steps: int = 300
    """Steps of the backbone on crops of single shapes."""

    def __post_init__(self) -> None:
        if not 2 <= self.seeds <= len(STUDENT) + 1:
            raise ConfigError(f"--seeds: must be in 2..{len(STUDENT) + 1}, got {self.seeds}")


# -- trainings


def run(experiment: Experiment, out: Path, device: str = "auto") -> list[Record]:
    """Train what ``out`` does not hold yet; the records of all trainings, in order.

    Raises:
        ConfigError: ``out`` holds an experiment of other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    _claim(experiment, out)
    data, backbone = _data(experiment, out), _backbone(experiment, out, device)
    file = out / "records.jsonl"
    done = {(r["seed"], r["arm"]): r for r in _lines(file)}
    for seed in range(experiment.seeds):
        for arm in ARMS:
            if (seed, arm) not in done:
                record = _train(experiment, arm, seed, data, backbone, out, device)
                with file.open("a", encoding="utf-8") as records:
                    records.write(json.dumps(record) + "\n")
                done[seed, arm] = record
    return [done[seed, arm] for seed in range(experiment.seeds) for arm in ARMS]


def _claim(experiment: Experiment, out: Path) -> None:
    """Write the settings into a new folder, or check them against those of an old one."""
    file = out / "experiment.json"
    ours = asdict(experiment) | {"detector": DETECTOR}
    if not file.exists():
        file.write_text(json.dumps(ours, indent=1), encoding="utf-8")
    elif (theirs := json.loads(file.read_text(encoding="utf-8"))) != ours:
        keys = sorted(key for key in ours if theirs.get(key) != ours[key])
        raise ConfigError(
            f"--out {out}: must be a new folder or hold the same experiment, got one with other "
            f"{', '.join(keys)}"
        )


def _lines(file: Path) -> list[Record]:
    """The records of a file; a last line that was cut short does not count, and is cut off."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def _made(folder: Path, make: Callable[[Path], object]) -> Path:
    """``folder``, made by ``make`` under another name first: a half-made one is never used."""
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(folder)
    return folder


def _data(experiment: Experiment, out: Path) -> Path:
    return _made(
        out / "shapes",
        lambda folder: synthetic.write(
            folder,
            images_train=experiment.images,
            images_val=experiment.val,
            size=experiment.size,
            sides=(experiment.smallest, experiment.size),
        ),
    )


def _backbone(experiment: Experiment, out: Path, device: str) -> Path:
    """The backbone that every arm and seed starts from."""
    length = {"data": {"workers": 0}, "train": {"steps": experiment.pretrain_steps}}

    def make(folder: Path) -> None:
        config = api.resolve_config("pretrain", [length], recipe="demo/pretrain")
        api.train("pretrain", config, out=folder, device=device)

    return _made(out / "backbone", make) / "best.pth"


def _train(
    experiment: Experiment,
    arm: str,
    seed: int,
    data: Path,
    backbone: Path,
    out: Path,
    device: str,
) -> Record:
    """Train one arm with one seed; what is told of it."""
    folder = out / f"{arm}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of a training that was cut short
    own: dict[str, dict[str, Any]] = {
        "data": {
            "path": str(data),
            "short_side": experiment.size,
            "long_side": experiment.size,
            "workers": 0,
        },
        "scales": {"images": experiment.scale_images},
        "train": {"seed": seed, "epochs": ARMS[arm] * experiment.epochs},
    }
    record: Record = {"arm": arm, "seed": seed}
    source, layers = backbone, [DETECTOR, own]
    if arm == "gsl-1x":
        layers.append({"model": {"scales": "learn"}})
    elif arm == "base-1+1":
        source = out / f"base-1x-{seed}" / "best.pth"
    elif arm.startswith("fd"):
        source = out / f"{arm}-{seed}.pth"
        weights = "transfer" if arm == "fd-wt" else str(backbone)
        options = pod.Decomposition(weights=weights)
        plan = pod.decompose(out / f"gsl-1x-{seed}" / "best.pth", source, options=options)
        record["layers"] = [_layer(row) for row in plan["layers"]]
        record["split"] = sum(len(row["parts"]) > 1 for row in plan["layers"])
        record["detector"] = plan["totals"]["detector"]
    config = api.resolve_config("finetune", layers, init_from=source)
    begun = time.monotonic()
    result = api.train("finetune", config, out=folder, device=device, init_from=source)
    record["seconds"] = round(time.monotonic() - begun, 1)
    stored = checkpoints.load(result["checkpoint"])
    record["steps"] = stored["progress"]["step"]
    record["metrics"] = {name: result["metrics"][name] for name in METRICS}
    if arm == "gsl-1x":
        labels = {layer["path"]: layer["label"] for layer in stored["scales"]["layers"]}
        stats = stored["scales"]["stats"]
        record["scales"] = {labels[path]: _scale(found) for path, found in stats.items()}
    return record


def _layer(row: Mapping[str, Any]) -> Record:
    """Label and parts of a decomposed layer."""
    return {key: row[key] for key in ("label", "case", "parts")}


def _scale(found: Mapping[str, Any]) -> Record:
    """Mean and deviation over images, and their ratio, of the scales (h, w) of a layer."""
    ratio = [std / mean for mean, std in zip(found["mean"], found["std"], strict=True)]
    return {"mean": found["mean"], "std": found["std"], "std_over_mean": ratio}


# -- summary


def summary(records: Sequence[Record]) -> Record:
    """Means and deviations over seeds of each arm, differences seed by seed, scales by layer.

    A metric is None where the validation split has no object of its size.
    """
    scores: dict[str, dict[str, list[Any]]] = {
        arm: {name: [r["metrics"][name] for r in records if r["arm"] == arm] for name in METRICS}
        for arm in ARMS
    }
    return {
        "arms": {
            arm: {name: _spread(values) for name, values in found.items()}
            for arm, found in scores.items()
        },
        "differences": {
            f"{a} - {b}": {name: _paired(scores[a][name], scores[b][name]) for name in METRICS}
            for a, b in PAIRS
        },
        "scales": _scales([r["scales"] for r in records if r["arm"] == "gsl-1x"]),
        "split": {
            arm: [r["split"] for r in records if r["arm"] == arm] for arm in ("fd-1x", "fd-wt")
        },
    }


def _spread(values: Sequence[Any]) -> Record | None:
    """Mean and sample deviation."""
    if None in values:
        return None
    return {"mean": statistics.mean(values), "std": statistics.stdev(values)}


def _paired(first: Sequence[Any], second: Sequence[Any]) -> Record | None:
    """Mean, sample deviation and 95 % interval of the mean (Student's t) of paired differences."""
    if None in first or None in second:
        return None
    each = [a - b for a, b in zip(first, second, strict=True)]
    mean, std = statistics.mean(each), statistics.stdev(each)
    half = STUDENT[len(each) - 2] * std / math.sqrt(len(each))
    return {"each": each, "mean": mean, "std": std, "low": mean - half, "high": mean + half}


def _scales(runs: Sequence[Mapping[str, Record]]) -> Record:
    """By layer and axis (h, w): the mean over seeds of the mean scale, its deviation from seed to
    seed, and the deviation from image to image relative to the mean, averaged over seeds.
    """
    return {
        label: {
            "mean": [statistics.mean(r[label]["mean"][axis] for r in runs) for axis in (0, 1)],
            "std_over_seeds": [
                statistics.stdev(r[label]["mean"][axis] for r in runs) for axis in (0, 1)
            ],
            "std_over_mean": [
                statistics.mean(r[label]["std_over_mean"][axis] for r in runs) for axis in (0, 1)
            ],
        }
        for label in runs[0]
    }


def table(found: Record) -> Iterator[str]:
    """The summary as lines of text; AP in percent."""
    yield "arm       " + "".join(f"{name:>14}" for name in METRICS)
    for arm, scores in found["arms"].items():
        cells = (_percent(scores[name], "") for name in METRICS)
        yield f"{arm:10}" + "".join(f"{cell:>14}" for cell in cells)
    for name, scores in found["differences"].items():
        low, high = (100 * scores["AP"][key] for key in ("low", "high"))
        yield f"{name:18} AP {_percent(scores['AP'], '+')} ({low:+.1f} to {high:+.1f} at 95 %)"
    for label, scale in found["scales"].items():
        pairs = zip(*scale.values(), strict=True)
        cells = (f"{m:.2f} ± {s:.2f} ({100 * r:.1f} %)" for m, s, r in pairs)
        yield f"{label:6} h, w: " + ", ".join(cells)


def _percent(found: Record | None, sign: str) -> str:
    return "-" if found is None else f"{100 * found['mean']:{sign}.1f} ± {100 * found['std']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in asdict(Experiment()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, default=Path("runs/pod_experiment"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = vars(parser.parse_args())
    out, device, target = options.pop("out"), options.pop("device"), options.pop("json")
    experiment = Experiment(**options)
    records = run(experiment, out, device)
    found = summary(records)
    print(*table(found), sep="\n")
    if target is not None:
        settings = asdict(experiment) | {"detector": DETECTOR}
        result = {"machine": machine(), "experiment": settings, **found, "records": records}
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
