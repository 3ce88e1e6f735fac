"""Which path each training step of a supernet takes (DetNAS, arXiv 1903.10979, section 3.1).

A sampler's answer follows from its seed and the step's number alone, so that all processes agree
without talking and a resumed run goes on with the same paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from numpy.random import PCG64, Generator, SeedSequence

from detkit.errors import ConfigError
from detkit.models.search_space import SPACES, Genes, SearchSpace
from detkit.nas.cost import CostTable, cost_table

PathSampler = Callable[[int], Genes]
"""Genes of step 0, 1, ..."""

Sampling = Literal["uniform", "macs-bins"]

# One stream of chance per purpose, so that no two choices share numbers.
PATHS, PROPOSALS, SPLIT, EVAL_PATHS = range(4)

# Full multiply-adds in millions between which the released code draws paths of its small space.
_EDGES = tuple(m * 1_000_000 for m in range(290, 361, 10))
_TRIES = 500


def random_genes(space: SearchSpace, rng: Generator) -> Genes:
    """A network drawn uniformly."""
    return tuple(int(gene) for gene in rng.integers(len(space.ops), size=len(space)))


@dataclass(frozen=True)
class UniformPaths:
    """Every network equally likely at every step: the paper's single-path sampling.

    Attributes:
        space: The space.
        seed: Zero or more.
    """

    space: SearchSpace
    seed: int

    def __call__(self, step: int) -> Genes:
        """Genes of a step."""
        return random_genes(self.space, generator(self.seed, PATHS, step))


@dataclass(frozen=True)
class MacsBinPaths:
    """The released code's sampling: a bin of full multiply-adds, then a network inside it.

    All bins are equally likely, which puts more weight on rare light and heavy networks than
    uniform sampling does. A bin that 500 draws miss gives way to the last draw.

    Attributes:
        table: Costs of the space.
        seed: Zero or more.
        edges: Multiply-adds between which the bins lie; a bin holds its lower edge.
    """

    table: CostTable
    seed: int
    edges: Sequence[int] = _EDGES

    def __call__(self, step: int) -> Genes:
        """Genes of a step."""
        rng = generator(self.seed, PATHS, step)
        bin_ = int(rng.integers(len(self.edges) - 1))
        low, high = self.edges[bin_], self.edges[bin_ + 1]
        for _ in range(_TRIES):
            genes = random_genes(self.table.space, rng)
            if low <= self.table.full(genes).macs < high:
                break
        return genes


def path_sampler(sampling: Sampling, space: SearchSpace, seed: int) -> PathSampler:
    """The sampler of a name.

    Raises:
        ConfigError: An unknown name, or bins for a space that has none.
    """
    if sampling == "uniform":
        return UniformPaths(space, seed)
    if sampling != "macs-bins":
        raise ConfigError(f"path sampling: must be uniform or macs-bins, got {sampling!r}")
    if replace(space, shuffle=SPACES["small"].shuffle) != SPACES["small"]:
        raise ConfigError(
            f"path sampling: macs-bins must go with the small space, whose bins are published, "
            f"got {space.name!r}"
        )
    return MacsBinPaths(cost_table(space), seed)


def generator(seed: int, purpose: int, step: int) -> Generator:
    """Chance that belongs to one step of one purpose (:data:`PATHS`, :data:`PROPOSALS`, ...)."""
    if seed < 0 or step < 0:
        raise ConfigError(f"seed and step: must be zero or more, got {seed} and {step}")
    return Generator(PCG64(SeedSequence([seed, purpose, step])))
