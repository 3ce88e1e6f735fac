"""Searches on synthetic fitness: limits, no repeats, better than chance, killed at any moment."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from detkit.errors import (
    ConfigError,
    DataError,
    DetkitError,
    NonFiniteError,
    StorageError,
    TrainingInterrupted,
    VerificationError,
)
from detkit.models.backbones.shuffle_supernet import ShuffleSupernet
from detkit.models.classifier import Classifier
from detkit.models.search_space import SPACES, Genes, SearchSpace
from detkit.nas.calibrate import calibrate, statistics
from detkit.nas.candidates import Candidate, Dropped, Evaluator, Journal, SearchResult, within
from detkit.nas.cost import cost_table
from detkit.nas.evolution import EvaluateAll, EvolutionSettings, cross, evolve, mutate
from detkit.nas.paths import MacsBinPaths, UniformPaths, path_sampler, random_genes
from detkit.nas.random_search import random_search
from detkit.nas.work_queue import LocalQueue
from detkit.types import ClassificationBatch

SMALL, TINY = SPACES["small"], SPACES["tiny"]
TABLE = cost_table(SMALL)
LIMIT = 300_000_000
SHORT = EvolutionSettings(population=12, generations=5, parents=4, mutants=5, crossovers=4, seed=3)
FEW = SearchSpace(name="few", blocks=(1, 1, 1), stem=4, channels=(8, 12, 16), last=16)


def macs(genes: Genes) -> dict[str, float]:
    return {"macs": TABLE.body(genes).macs}


def additive(space: SearchSpace, seed: int) -> Callable[[Genes], dict[str, float]]:
    """Each position gives its share, whatever stands elsewhere."""
    share = np.random.default_rng(seed).normal(size=(len(space), len(space.ops)))
    return lambda genes: {"AP": float(sum(share[i, g] for i, g in enumerate(genes)))}


def evaluator(
    folder: Path,
    evaluate: Callable[[Genes], Mapping[str, float]],
    space: SearchSpace = SMALL,
    costs: Callable[[Genes], Mapping[str, float]] = macs,
) -> Evaluator:
    return Evaluator(space, evaluate, "AP", Journal(folder / "c.jsonl"), costs, LocalQueue())


def lines(folder: Path) -> list[dict[str, object]]:
    """Lines without what differs between runs of the same search."""
    found = [json.loads(text) for text in (folder / "c.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


# --- paths of training ----------------------------------------------------------------------------


def test_paths_follow_from_seed_and_step_alone() -> None:
    for name in ("uniform", "macs-bins"):
        one, other = path_sampler(name, SMALL, 7), path_sampler(name, SMALL, 7)
        paths = [one(step) for step in range(20)]
        assert [other(step) for step in reversed(range(20))] == paths[::-1]
        assert len(set(paths)) == 20
        assert path_sampler(name, SMALL, 8)(0) != paths[0]


def test_uniform_paths_take_every_block_alike() -> None:
    sampler = UniformPaths(SMALL, 1)
    paths = np.array([sampler(step) for step in range(2000)])
    counts = np.stack([(paths == gene).sum(0) for gene in range(4)])
    assert counts.min() > 400 and counts.max() < 600  # 500, five deviations of 19
    assert all(type(gene) is int for gene in sampler(0))


def test_random_networks_cost_what_the_paper_space_says() -> None:
    """DetNAS: body 294.0 +- 11.8 M, 0.688 of them within 300 M, 0.012 as classifiers."""
    rng = np.random.default_rng(0)
    bodies = np.array([TABLE.body(random_genes(SMALL, rng)).macs for _ in range(4000)]) / 1e6
    assert abs(bodies.mean() - 294.0) < 0.8 and abs(bodies.std() - 11.8) < 0.6
    assert abs((bodies <= 300).mean() - 0.688) < 0.03
    full = bodies + TABLE.tail.macs / 1e6
    assert (full <= 300).mean() < 0.025


def test_macs_bins_are_equally_likely() -> None:
    sampler = MacsBinPaths(TABLE, 1)
    full = [TABLE.full(sampler(step)).macs // 10_000_000 for step in range(280)]
    counts = Counter(full)
    assert set(counts) == set(range(29, 36))  # 290 to 360 M
    assert min(counts.values()) > 20 and max(counts.values()) < 62  # 40 each
    missed = MacsBinPaths(TABLE, 1, edges=(0, 1))
    assert len(missed(0)) == 20  # gives up after its tries


def test_path_sampling_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="must go with the small space, .* got 'large'"):
        path_sampler("macs-bins", SPACES["large"], 0)
    with pytest.raises(ConfigError, match="must be uniform or macs-bins, got 'bins'"):
        path_sampler("bins", SMALL, 0)
    with pytest.raises(ConfigError, match="seed and step: must be zero or more"):
        UniformPaths(SMALL, -1)(0)


# --- evolution ------------------------------------------------------------------------------------


def in_memory(score: Callable[[Genes], Mapping[str, float]]) -> EvaluateAll:
    """Evaluates without a file."""
    count = itertools.count()

    def evaluate(generation: int, made: Sequence[Genes]) -> list[Candidate]:
        return [Candidate(next(count), generation, genes, score(genes)["AP"]) for genes in made]

    return evaluate


def test_the_papers_search_keeps_its_rules() -> None:
    allowed = within(macs, {"macs": LIMIT})
    result = evolve(SMALL, EvolutionSettings(), in_memory(additive(SMALL, 0)), allowed)
    genes = [candidate.genes for candidate in result.history]
    assert len(genes) == len(set(genes)) == 1000
    assert all(TABLE.body(g).macs <= LIMIT for g in genes)
    assert [c.index for c in result.history] == list(range(1000))
    assert Counter(c.generation for c in result.history) == dict.fromkeys(range(20), 50)
    best = result.best_so_far()
    assert all(a <= b for a, b in itertools.pairwise(best))
    assert result.best.fitness == best[-1] == max(c.fitness for c in result.history)
    ranked = sorted((c.fitness for c in result.history), reverse=True)
    assert [c.fitness for c in result.top(50)] == ranked[:50]


@pytest.mark.parametrize("seed", range(4))
def test_evolution_beats_random_search_at_the_same_budget(seed: int) -> None:
    allowed = within(macs, {"macs": LIMIT})
    score = additive(SMALL, seed)
    result = evolve(SMALL, EvolutionSettings(seed=seed), in_memory(score), allowed)
    baseline = random_search(SMALL, 1000, in_memory(score), allowed, seed=seed)
    assert len({c.genes for c in baseline.history}) == len(result.history) == 1000
    assert all(TABLE.body(c.genes).macs <= LIMIT for c in baseline.history)
    assert baseline.history[:50] == result.history[:50]
    assert result.best.fitness > baseline.best.fitness


def test_a_line_tells_all_about_its_candidate(tmp_path: Path) -> None:
    result = evolve(
        SMALL, SHORT, evaluator(tmp_path, additive(SMALL, 0)), within(macs, {"macs": LIMIT})
    )
    for candidate, line in zip(result.history, lines(tmp_path), strict=True):
        assert line == {
            "index": candidate.index,
            "generation": candidate.generation,
            "genes": SMALL.text(candidate.genes),
            "macs": TABLE.body(candidate.genes).macs,
            "fitness": candidate.fitness,
            "metrics": {"AP": candidate.fitness},
            "rank": 0,
        }
    text = (tmp_path / "c.jsonl").read_text().splitlines()
    assert all(json.loads(line)["seconds"] >= 0 for line in text)


class Killed(BaseException):
    """As a signal or a power cut would: nothing in the search may catch it."""


@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_it_goes_on_with_the_same_sequence(tmp_path: Path, seed: int) -> None:
    """Inside an evaluation, or while its line is being written."""
    rng = np.random.default_rng(seed)
    score = additive(SMALL, 1)
    allowed = within(macs, {"macs": LIMIT})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()

    def fragile(genes: Genes) -> dict[str, float]:
        if sum(genes) % 7 == 0:
            raise RuntimeError("this one never works")
        return score(genes)

    expected = evolve(SMALL, SHORT, evaluator(whole, fragile), allowed)
    assert any(c.fitness == -math.inf for c in expected.history)
    kills = 0
    while True:
        left = int(rng.integers(1, 25))

        def mortal(genes: Genes) -> dict[str, float]:
            nonlocal left
            left -= 1
            if not left:
                raise Killed
            return fragile(genes)

        try:
            found = evolve(SMALL, SHORT, evaluator(broken, mortal), allowed)
            break
        except Killed:
            kills += 1
            if rng.random() < 0.5:
                with (broken / "c.jsonl").open("a") as file:
                    file.write('{"index": 3, "gen')
    assert kills >= 2
    assert found == expected
    assert lines(broken) == lines(whole)


def test_a_finished_search_evaluates_nothing_again(tmp_path: Path) -> None:
    allowed = within(macs, {"macs": LIMIT})
    expected = evolve(SMALL, SHORT, evaluator(tmp_path, additive(SMALL, 0)), allowed)

    def never(genes: Genes) -> dict[str, float]:
        raise Killed

    assert evolve(SMALL, SHORT, evaluator(tmp_path, never), allowed) == expected


def test_the_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    allowed = within(macs, {"macs": LIMIT})
    evolve(SMALL, SHORT, evaluator(tmp_path, additive(SMALL, 0)), allowed)
    other = EvolutionSettings(population=12, generations=5, mutants=5, crossovers=4, seed=4)
    with pytest.raises(ConfigError, match=r"candidate 0 must be .*; the file is of a search with"):
        evolve(SMALL, other, evaluator(tmp_path, additive(SMALL, 0)), allowed)
    (tmp_path / "c.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(DataError, match="line 1 must be a JSON object"):
        evaluator(tmp_path, additive(SMALL, 0))


def test_failures_are_logged_and_do_not_become_parents(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def score(genes: Genes) -> dict[str, float]:
        if genes[0] == 0:
            raise RuntimeError("out of memory")
        return {"AP": math.nan if genes[0] == 1 else sum(genes), "AP50": math.nan}

    with caplog.at_level(logging.WARNING, "detkit"):
        result = evolve(SMALL, SHORT, evaluator(tmp_path, score), lambda genes: True)
    assert len(result.history) == 60
    for candidate, line in zip(result.history, lines(tmp_path), strict=True):
        assert (candidate.fitness == -math.inf) == (candidate.genes[0] < 2)
        if candidate.genes[0] == 0:
            assert line["error"] == "RuntimeError: out of memory" and line["fitness"] is None
        elif candidate.genes[0] == 1:
            assert line["error"] == "NonFiniteError: AP: must be a finite number, got nan"
        else:
            assert line["metrics"] == {"AP": candidate.fitness, "AP50": None}
    assert "failed: RuntimeError: out of memory" in caplog.text
    assert len(result.top(60)) < 60 and all(c.genes[0] > 1 for c in result.top(60))


def test_a_search_whose_every_candidate_fails_stops(tmp_path: Path) -> None:
    def score(genes: Genes) -> dict[str, float]:
        raise RuntimeError("wrong shape")

    with pytest.raises(VerificationError, match="got 12 failures, the last one RuntimeError: wro"):
        evolve(SMALL, SHORT, evaluator(tmp_path, score), lambda genes: True)


@pytest.mark.parametrize(
    ("error", "stops"),
    [
        (StorageError("disk full"), True),
        (TrainingInterrupted("asked to stop", 15), True),
        (DataError("no image"), True),
        (NonFiniteError("statistics"), False),
        (ValueError("odd"), False),
    ],
)
def test_only_a_candidates_own_failure_is_one(
    tmp_path: Path, error: Exception, stops: bool
) -> None:
    calls = 0

    def score(genes: Genes) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise error
        return {"AP": 1.0}

    search = evaluator(tmp_path, score)
    if stops:
        with pytest.raises(type(error)):
            evolve(SMALL, SHORT, search, lambda genes: True)
        assert len(lines(tmp_path)) == 4
    else:
        assert len(evolve(SMALL, SHORT, search, lambda genes: True).top(60)) == 59


def test_a_wrong_metric_or_limit_names_the_known_ones(tmp_path: Path) -> None:
    search = evaluator(tmp_path, lambda genes: {"AP5": 1.0})
    with pytest.raises(ConfigError, match="must be one of AP5, got 'AP'; did you mean 'AP5'"):
        evolve(SMALL, SHORT, search, lambda genes: True)
    with pytest.raises(ConfigError, match="limits: must be on macs, got latency_ms"):
        within(macs, {"macs": 1, "latency_ms": 2})((0,) * 20)


def test_a_journal_that_cannot_be_written_stops_the_search(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="must be writable, got No such file"):
        evolve(SMALL, SHORT, evaluator(tmp_path / "gone", additive(SMALL, 0)), lambda genes: True)


def test_a_small_space_is_used_up_and_the_search_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = EvolutionSettings(population=20, generations=9, mutants=8, crossovers=8)
    search = evaluator(tmp_path, additive(FEW, 0), FEW, lambda genes: {})
    with caplog.at_level(logging.WARNING, "detkit"):
        result = evolve(FEW, settings, search, lambda genes: True)
    every = set(itertools.product(range(4), repeat=3))
    assert {c.genes for c in result.history} == every and len(result.history) == 64
    assert "no new network after 64 evaluations, ending early" in caplog.text


def test_a_limit_no_network_keeps_is_refused(tmp_path: Path) -> None:
    search = evaluator(tmp_path, additive(FEW, 0), FEW, lambda genes: {})
    settings = EvolutionSettings(population=2, generations=2, mutants=1, crossovers=1)
    with pytest.raises(ConfigError, match="must admit a network, got none in 2000 draws"):
        evolve(FEW, settings, search, lambda genes: False)
    with pytest.raises(ConfigError, match="must admit a network"):
        random_search(FEW, 2, search, lambda genes: False)


def test_mutants_and_crosses() -> None:
    rng = np.random.default_rng(0)
    parents = [(0,) * 20, (3,) * 20]
    made = np.array([mutate(parents[:1], 0.1, 4, rng) for _ in range(4000)])
    assert abs((made != 0).mean() - 0.075) < 0.005  # may redraw itself
    assert abs((made == 0).all(1).mean() - 0.21) < 0.03
    crosses = np.array([cross(parents, rng) for _ in range(4000)])
    mixed = ((crosses == 0).any(1) & (crosses == 3).any(1)).mean()
    assert abs(mixed - 0.5) < 0.04  # half of them have one parent twice
    assert abs((crosses == 3).mean() - 0.5) < 0.03
    assert mutate(parents, 0.0, 4, rng) in parents


def test_a_search_over_a_supernet_leaves_it_as_it_was(tmp_path: Path) -> None:
    """Each network with statistics of its own; the score of one does not depend on the others."""
    model = Classifier(ShuffleSupernet(TINY), 4)
    supernet = model.backbone
    batch = ClassificationBatch(torch.randn(4, 3, 64, 64), torch.arange(4))

    def score(genes: Genes) -> dict[str, float]:
        supernet.set_path(genes)
        with statistics(model, calibrate(model, [batch])), torch.no_grad():
            return {"AP": -float(model(batch)["loss"])}

    before = {key: value.clone() for key, value in model.state_dict().items()}
    table = cost_table(TINY)
    search = evaluator(tmp_path, score, TINY, lambda genes: {"macs": table.body(genes).macs})
    settings = EvolutionSettings(population=4, generations=3, parents=2, mutants=2, crossovers=1)
    result = evolve(TINY, settings, search, lambda genes: True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len({c.fitness for c in result.history}) > 6
    for candidate in reversed(result.history):
        assert score(candidate.genes)["AP"] == candidate.fitness


def test_equal_fitness_keeps_the_earlier_one() -> None:
    history = [
        Candidate(i, 0, (i,), fitness) for i, fitness in enumerate([1.0, 2.0, 2.0, -math.inf])
    ]
    result = SearchResult(tuple(history))
    assert [c.index for c in result.top(9)] == [1, 2, 0]
    assert result.best.index == 1
    assert result.best_so_far() == [1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"population": 0}, "search population: must be positive"),
        ({"population": 30}, "must be at most the population of 30 together, got 40"),
        ({"mutants": -1}, "search mutants: must be zero or more"),
        ({"mutation_probability": 1.5}, "must be in 0..1"),
    ],
)
def test_wrong_settings(change: dict[str, int], message: str) -> None:
    with pytest.raises(DetkitError, match=message):
        EvolutionSettings(**change)
    with pytest.raises(ConfigError, match="must be positive, got 0, 50"):
        random_search(TINY, 0, lambda n, genes: [], lambda genes: True)


def test_what_broke_off_is_tried_again_a_few_times(tmp_path: Path) -> None:
    tries: Counter[Genes] = Counter()

    def shaky(genes: Genes) -> dict[str, float]:
        tries[genes] += 1
        if genes[0] == 0 and tries[genes] < 3:
            raise RuntimeError("a passing trouble")
        if genes[0] == 1:
            raise RuntimeError("a lasting one")
        if genes[0] == 2:
            raise NonFiniteError("its own fault")
        return {"AP": 1.0}

    networks = [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)]
    journal = Journal(tmp_path / "c.jsonl")
    evaluate = Evaluator(
        FEW, shaky, "AP", journal, lambda genes: {"macs": 7}, LocalQueue(), retries=2
    )
    found = evaluate(0, networks)
    assert [c.fitness for c in found] == [1.0, -math.inf, -math.inf, 1.0]
    assert [tries[genes] for genes in networks] == [3, 3, 1, 1]
    assert [bool(c.error) for c in found] == [False, True, True, False]
    assert found[0].metrics == {"AP": 1.0} and found[0].costs == {"macs": 7}


def test_a_dropped_network_is_neither_a_parent_nor_a_failure(tmp_path: Path) -> None:
    def hopeless(genes: Genes) -> dict[str, float]:
        if genes[0]:
            raise Dropped({"early": 0.1})
        return {"AP": 0.5, "early": 0.4}

    told: list[Mapping[str, object]] = []
    evaluate = Evaluator(
        FEW,
        hopeless,
        "AP",
        Journal(tmp_path / "c.jsonl"),
        lambda genes: {},
        LocalQueue(),
        on_line=told.append,
    )
    found = evaluate(0, [(0, 0, 0), (1, 0, 0)])
    assert SearchResult(tuple(found)).top(2) == [found[0]]
    assert found[1].fitness == -math.inf and not found[1].error
    assert found[1].metrics == {"early": 0.1}
    assert [line.get("dropped", False) for line in told] == [False, True]
