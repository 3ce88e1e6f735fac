"""Does DetNAS search? A space small enough to evaluate whole tells.

    1. A supernet of eight blocks that are each one of two (256 networks) learns synthetic shapes:
       as a classifier, then as a detector.
    2. Truth: all 256 paths are scored on the held-out images.
    3. Evolution and random search, ten seeds each, look their scores up there; counted is how many
       evaluations it takes each to meet one of the best 2 %.
    4. Eight networks, evenly spaced along the truth, are trained on their own, from nothing to a
       detector; their APs on the validation split are ranked against their scores as paths.

    python benchmarks/nas_experiment.py [--out DIR] [--json FILE]

It is `detkit pretrain`, `finetune`, `search` and `eval` as anybody would type them. Trainings that
DIR already holds are not run again, and the truth goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train_detectors import detkit

from detkit.bench.machine import machine
from detkit.config import SearchConfig
from detkit.detnas import run_search
from detkit.models.search_space import Genes, SearchSpace
from detkit.nas.candidates import SearchResult
from detkit.nas.early_stop import kendall_tau

Record = dict[str, Any]

SPACE = SearchSpace(
    name="eight",
    blocks=(2, 2, 2, 2),
    stem=8,
    channels=(24, 48, 96, 192),
    last=256,
    ops=("shuffle3", "xception"),
)
METRIC = "AP"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What the numbers depend on."""

    train: int = 1000
    """Training images ..."""
    held: int = 150
    """... of which so many are held out for the search."""
    val: int = 200
    """Validation images, for the networks trained on their own."""
    size: int = 128
    """Side of an image in pixels."""
    pretrain_epochs: float = 30.0
    """Passes of the supernet as a classifier."""
    epochs: float = 16.0
    """Passes of the supernet as a detector."""
    calibration_steps: int = 20
    """Batches of 8 images that a path's norms are averaged over."""
    seeds: int = 10
    """Searches of each kind."""
    alone: int = 8
    """Networks trained on their own ..."""
    repeats: int = 1
    """... so many times each, by other seeds ..."""
    alone_pretrain_epochs: float = 10.0
    """... for so many passes as classifiers ..."""
    alone_epochs: float = 6.0
    """... and as detectors."""


SEARCH: dict[str, Any] = {"population": 10, "parents": 5, "mutation_prob": 0.25}
"""As in the paper two genes of a mutant are drawn again on average, and parents are rarer than
networks of a generation."""
GENERATIONS = 26


# -- trainings and truth


def settings(out: Path) -> Path:
    """A configuration file with the space."""
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in SPACE.to_plain().items()}
    lines = ["[space]", *(f"{key} = {json.dumps(value)}" for key, value in lists.items())]
    file = out / "space.toml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def sized(experiment: Experiment) -> list[str]:
    """Settings of every detector."""
    size = experiment.size
    values = {
        "data.short_side": size,
        "data.long_side": size,
        "data.multi_scale": [],
        "anchors.sizes": [8, 16, 32, 64, 128],
        "nas.search_images": experiment.held,
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def trained(out: Path, *arguments: str) -> Record:
    """What a training command reports; of a finished one, what it reported."""
    done = out / "done.json"
    if done.is_file():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    report = detkit(*arguments, "--out", str(out), "--resume", "auto", "--workers", "0")
    done.write_text(json.dumps(report), encoding="utf-8")
    return report


def supernet(experiment: Experiment, out: Path) -> str:
    """The checkpoint of the supernet, trained as a classifier and then as a detector."""
    space = ("--config", str(settings(out)), "--backbone", "detnas-supernet")
    if not (out / "data").exists():
        counts = ("--train", str(experiment.train), "--val", str(experiment.val))
        detkit("data", "synth", str(out / "data"), *counts, "--size", str(experiment.size))
    classes = trained(
        out / "classes",
        *("pretrain", "--recipe", "tiny/supernet-pretrain", *space),
        *("--epochs", str(experiment.pretrain_epochs)),
    )
    detector = trained(
        out / "supernet",
        *("finetune", "--recipe", "tiny/supernet-frcnn-fpn", *space, "--data", str(out / "data")),
        *("--init-from", classes["checkpoint"], "--epochs", str(experiment.epochs)),
        *sized(experiment),
    )
    return str(detector["checkpoint"])


def truth(experiment: Experiment, checkpoint: str, out: Path) -> dict[Genes, float]:
    """Score of every path: a random search that leaves nothing out."""
    folder = out / "truth"
    detkit(
        *("search", checkpoint, "--method", "random", "--population", str(SPACE.size)),
        *("--generations", "1", "--out", str(folder), "--resume", "auto"),
        *("--set", f"search.calibration_steps={experiment.calibration_steps}"),
    )
    lines = [json.loads(line) for line in (folder / "candidates.jsonl").open(encoding="utf-8")]
    found = {SPACE.parse(line["genes"]): line["fitness"] for line in lines}
    if len(found) != SPACE.size or None in found.values():
        raise SystemExit(f"{folder}: must hold a score of all {SPACE.size} paths")
    return found


def alone(experiment: Experiment, chosen: Sequence[Genes], out: Path) -> list[list[float]]:
    """APs of networks that are trained on their own, one per repeat.

    By the recipes that the search writes for its winner, with other genes and shorter.
    """
    recipe = out / "alone.toml"
    detkit("search", str(out / "truth"), "--export", str(recipe))
    found: list[list[float]] = []
    for genes in chosen:
        text = SPACE.text(genes)
        net = ("--backbone", f"detnas:{SPACE.name}:{text}")
        found.append([])
        for seed in range(experiment.repeats):
            folder, chance = out / "alone" / f"{text}-{seed}", ("--seed", str(seed))
            classes = trained(
                folder / "classes",
                *("pretrain", "--recipe", str(recipe), *net, *chance),
                *("--epochs", str(experiment.alone_pretrain_epochs)),
            )
            detector = trained(
                folder / "detector",
                *("finetune", "--recipe", str(recipe.with_stem("alone-finetune")), *net, *chance),
                *("--init-from", classes["checkpoint"], "--epochs", str(experiment.alone_epochs)),
            )
            found[-1].append(float(detector["metrics"][METRIC]))
    return found


# -- searches on the truth


def searches(experiment: Experiment, known: Mapping[Genes, float]) -> Record:
    """Evaluations until one of the best 2 % is met, of evolutions and random searches."""
    ranked = sorted(known, key=lambda genes: -known[genes])
    best = set(ranked[: max(1, len(ranked) // 50)])
    record: Record = {"best": len(best), "share": 0.2, "limit": len(known) // 5}
    for method in ("evolution", "random"):
        needed = [first_hit(replay(method, seed, known), best) for seed in range(experiment.seeds)]
        record[method] = {
            "evaluations": needed,
            "median": statistics.median(needed),
            "within_limit": sum(count <= record["limit"] for count in needed),
        }
    return record


def replay(method: str, seed: int, known: Mapping[Genes, float]) -> SearchResult:
    """A search whose evaluations are looked up."""
    config = SearchConfig(method=method, seed=seed, generations=GENERATIONS, **SEARCH)
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "candidates.jsonl"
        return run_search(SPACE, config, lambda g: {METRIC: known[g]}, METRIC, journal)


def first_hit(result: SearchResult, best: set[Genes]) -> int:
    """Number of the first evaluation of one of ``best``; one more than all where there is none."""
    hits = [c.index + 1 for c in result.history if c.genes in best]
    return min(hits, default=len(result.history) + 1)


# -- summary


def run(experiment: Experiment, out: Path) -> Record:
    """All of it; what ``--json`` writes."""
    out.mkdir(parents=True, exist_ok=True)
    known = truth(experiment, supernet(experiment, out), out)
    ranked = sorted(known, key=lambda genes: -known[genes])
    step = (len(ranked) - 1) / (experiment.alone - 1)
    chosen = [ranked[round(i * step)] for i in range(experiment.alone)]
    apart = alone(experiment, chosen, out)
    scores = [known[genes] for genes in chosen]
    return {
        "machine": machine(),
        "experiment": asdict(experiment) | {"search": SEARCH, "space": SPACE.to_plain()},
        "truth": spread(list(known.values())) | {"scores": in_text(known)},
        "searches": searches(experiment, known),
        "alone": {
            "genes": [SPACE.text(genes) for genes in chosen],
            "as_path": scores,
            "alone": apart,
            "tau": kendall_tau(scores, [statistics.mean(aps) for aps in apart]),
        },
    }


def in_text(known: Mapping[Genes, float]) -> dict[str, float]:
    """Scores by gene string, best first."""
    return {SPACE.text(g): round(known[g], 5) for g in sorted(known, key=lambda g: -known[g])}


def spread(values: Sequence[float]) -> Record:
    """Least, mean, deviation and largest."""
    mean, deviation = statistics.mean(values), statistics.pstdev(values)
    return {"min": min(values), "mean": mean, "std": deviation, "max": max(values)}


def show(found: Record) -> None:
    """The summary as text."""
    scores = found["truth"]
    print("256 paths: AP {min:.3f} to {max:.3f}, {mean:.3f} ± {std:.3f}".format(**scores))
    told = found["searches"]
    for method in ("evolution", "random"):
        row = told[method]
        print(
            f"{method}: one of the best {told['best']} after {row['median']:g} evaluations (median "
            f"of {row['evaluations']}); within {told['limit']}: {row['within_limit']} searches"
        )
    apart = found["alone"]
    for genes, path, aps in zip(apart["genes"], apart["as_path"], apart["alone"], strict=True):
        print(f"{genes}  as a path {path:.3f}, alone " + ", ".join(f"{ap:.3f}" for ap in aps))
    print(f"rank correlation (Kendall's tau): {apart['tau']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in asdict(Experiment()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, default=Path("runs/nas_experiment"))
    parser.add_argument("--json", type=Path)
    options = vars(parser.parse_args())
    out, target = options.pop("out"), options.pop("json")
    logging.getLogger("detkit").setLevel(logging.ERROR)  # searches that visit the whole space
    found = run(Experiment(**options), out)
    show(found)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
