"""Evolutionary search (DetNAS, arXiv 1903.10979, section 3.3): the best parents, mutated, crossed.

What to evaluate and what is allowed are given by the caller. No network is proposed twice, and
nothing is retried without an end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from numpy.random import Generator

from detkit.errors import ConfigError
from detkit.models.search_space import Genes, SearchSpace
from detkit.nas.candidates import Candidate, SearchResult, fittest
from detkit.nas.paths import PROPOSALS, generator, random_genes

log = logging.getLogger("detkit")

EvaluateAll = Callable[[int, Sequence[Genes]], Sequence[Candidate]]
"""Candidates of a generation, from its number and networks, in the same order."""

Allowed = Callable[[Genes], bool]
"""Whether a network keeps the limits of the search."""

_TRIES = 10  # draws per mutant or cross wanted
_RANDOM_TRIES = 1000  # draws per random network wanted


@dataclass(frozen=True, kw_only=True)
class EvolutionSettings:
    """How a search by evolution goes; the defaults are the paper's.

    Raises:
        ConfigError: Numbers out of range.
    """

    population: int = 50
    """Networks evaluated per generation."""
    generations: int = 20
    """Generations, the first and random one included."""
    parents: int = 10
    """Best networks of all history that offspring is made of."""
    mutants: int = 20
    """Largest number of mutants per generation."""
    crossovers: int = 20
    """Largest number of crosses per generation; random networks fill the rest."""
    mutation_probability: float = 0.1
    """Chance of each gene to be drawn again."""
    seed: int = 0
    """Seed of all proposals."""

    def __post_init__(self) -> None:
        for name in ("population", "generations", "parents"):
            _require(getattr(self, name) > 0, name, "positive", getattr(self, name))
        for name in ("mutants", "crossovers", "seed"):
            _require(getattr(self, name) >= 0, name, "zero or more", getattr(self, name))
        offspring = self.mutants + self.crossovers
        _require(
            offspring <= self.population,
            "mutants and crossovers",
            f"at most the population of {self.population} together",
            offspring,
        )
        _require(
            0 <= self.mutation_probability <= 1,
            "mutation_probability",
            "in 0..1",
            self.mutation_probability,
        )


def _require(condition: bool, name: str, must: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"search {name}: must be {must}, got {value!r}")


class Proposals:
    """Makes networks that are allowed and were never made before.

    Args:
        space: The space.
        allowed: Whether a network keeps the limits.
    """

    def __init__(self, space: SearchSpace, allowed: Allowed) -> None:
        self._space = space
        self._allowed = allowed
        self._seen: set[Genes] = set()

    def draw(self, count: int, tries: int, make: Callable[[], Genes]) -> list[Genes]:
        """At most ``count`` networks out of ``tries`` calls of ``make``."""
        found: list[Genes] = []
        for _ in range(tries):
            if len(found) == count:
                break
            genes = make()
            if genes not in self._seen and self._allowed(genes):
                self._seen.add(genes)
                found.append(genes)
        return found

    def random(self, count: int, rng: Generator) -> list[Genes]:
        """At most ``count`` uniform networks; fewer where the space has hardly any left."""
        return self.draw(count, count * _RANDOM_TRIES, lambda: random_genes(self._space, rng))

    def offspring(
        self, parents: Sequence[Genes], settings: EvolutionSettings, rng: Generator
    ) -> list[Genes]:
        """Mutants and crosses of ``parents``, and random networks for what is missing."""
        found: list[Genes] = []
        if parents:
            chance, ops = settings.mutation_probability, len(self._space.ops)
            tries = settings.mutants * _TRIES
            found += self.draw(settings.mutants, tries, lambda: mutate(parents, chance, ops, rng))
            tries = settings.crossovers * _TRIES
            found += self.draw(settings.crossovers, tries, lambda: cross(parents, rng))
        return found + self.random(settings.population - len(found), rng)


def mutate(parents: Sequence[Genes], chance: float, ops: int, rng: Generator) -> Genes:
    """One parent, each gene drawn again with ``chance`` from all ``ops``, its own value too."""
    parent = parents[int(rng.integers(len(parents)))]
    redrawn = rng.random(len(parent)) < chance
    drawn = rng.integers(ops, size=len(parent))
    return tuple(
        int(new) if again else old for old, new, again in zip(parent, drawn, redrawn, strict=True)
    )


def cross(parents: Sequence[Genes], rng: Generator) -> Genes:
    """Two parents, which may be the same one, each gene from either."""
    one, other = (parents[int(i)] for i in rng.integers(len(parents), size=2))
    first = rng.random(len(one)) < 0.5
    return tuple(a if take else b for a, b, take in zip(one, other, first, strict=True))


def evolve(
    space: SearchSpace, settings: EvolutionSettings, evaluate: EvaluateAll, allowed: Allowed
) -> SearchResult:
    """Search by evolution.

    The proposals of a generation follow from the seed, its number and the results before it. Where
    no new network is found that keeps the limits, the search ends before its time and says so.

    Args:
        space: The space.
        settings: Numbers of the search.
        evaluate: Evaluates a generation (:class:`detkit.nas.candidates.Evaluator`).
        allowed: Whether a network keeps the limits (:func:`detkit.nas.candidates.within`).

    Raises:
        ConfigError: Not one network keeps the limits.
    """
    proposals = Proposals(space, allowed)
    history: list[Candidate] = []
    for generation in range(settings.generations):
        rng = generator(settings.seed, PROPOSALS, generation)
        parents = [candidate.genes for candidate in fittest(history, settings.parents)]
        genes = proposals.offspring(parents, settings, rng)
        if not genes:
            require_some(history, settings.population)
            log.warning("search: no new network after %d evaluations, ending early", len(history))
            break
        history += evaluate(generation, genes)
    return SearchResult(tuple(history))


def require_some(history: Sequence[Candidate], wanted: int) -> None:
    """Raise ConfigError where the first draws of a search found nothing that is allowed."""
    if not history:
        raise ConfigError(
            f"search limits: must admit a network, got none in {wanted * _RANDOM_TRIES} draws"
        )
