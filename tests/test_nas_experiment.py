"""The experiment on search: how it counts, and that it runs from end to end."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from detkit.models.search_space import SearchSpace

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("nas_experiment")


def test_searches_are_counted_up_to_the_first_of_the_best(experiment: ModuleType) -> None:
    """On a score that blocks add up to, evolution needs fewer evaluations than chance."""
    space = experiment.SPACE
    worth = np.random.default_rng(0).normal(size=(len(space), len(space.ops)))
    networks = np.ndindex(*[len(space.ops)] * len(space))
    known = {genes: float(sum(worth[i, g] for i, g in enumerate(genes))) for genes in networks}
    found = experiment.searches(experiment.Experiment(seeds=10), known)
    best = sorted(known, key=lambda genes: -known[genes])[: found["best"]]
    result = experiment.replay("evolution", 3, known)
    first = found["evolution"]["evaluations"][3]
    assert (found["best"], found["limit"]) == (5, 51)
    assert result.history[first - 1].genes in best
    assert not any(c.genes in best for c in result.history[: first - 1])
    assert found["evolution"]["within_limit"] >= 9
    assert found["evolution"]["median"] < found["random"]["median"]


def test_a_search_that_never_meets_the_best_counts_more_than_all(experiment: ModuleType) -> None:
    known = dict.fromkeys(np.ndindex(*[2] * len(experiment.SPACE)), 0.5)
    result = experiment.replay("random", 0, known)
    assert experiment.first_hit(result, set()) == len(result.history) + 1


@pytest.mark.slow
def test_the_experiment_runs_from_end_to_end(
    experiment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SearchSpace(
        name="four",
        blocks=(1, 1, 1, 1),
        stem=8,
        channels=(16, 24, 32, 40),
        last=48,
        ops=("shuffle3", "xception"),
    )
    monkeypatch.setattr(experiment, "SPACE", small)
    settings = experiment.Experiment(
        train=20,
        held=4,
        val=5,
        size=96,
        pretrain_epochs=0.1,
        epochs=0.2,
        calibration_steps=1,
        seeds=1,
        alone=2,
        repeats=1,
        alone_pretrain_epochs=0.1,
        alone_epochs=0.2,
    )
    out = tmp_path / "out"
    found = experiment.run(settings, out)
    assert len(found["truth"]["scores"]) == small.size
    assert experiment.run(settings, out)["alone"] == found["alone"]  # nothing is trained again
