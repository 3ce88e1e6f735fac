"""Settings of DetNAS: a search space of one's own, supernets, the search."""

from __future__ import annotations

from dataclasses import dataclass

from detkit.config.checks import one_of, positive, require, share, zero_or_more

SUPERNET = "detnas-supernet"
"""How the names of supernets begin; alone it is the supernet of the table ``space``."""


def is_supernet(backbone: str) -> bool:
    """Whether ``backbone`` names a supernet of DetNAS."""
    return backbone.startswith(SUPERNET)


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """A search space of one's own, for the backbones `detnas-supernet` (its supernet) and
    `detnas:<name>:<genes>` (one network); stages are those that give c2, c3, ...
    """

    name: str = ""
    """What backbones and messages call it; empty where there is none."""
    blocks: tuple[int, ...] = ()
    """Blocks of each stage; the first one of a stage halves the map."""
    stem: int = 0
    """Channels of the 3x3 stem of stride 2."""
    channels: tuple[int, ...] = ()
    """Channels of each stage: even, and more than before."""
    last: int = 0
    """Channels of a classifier's last 1x1 convolution."""
    ops: tuple[str, ...] = ("shuffle3", "shuffle5", "shuffle7", "xception")
    """Blocks that genes 0, 1, ... stand for."""
    shuffle: int = 2
    """Convention of the channel shuffle: 1 (two groups interleaved, then halves) or 2 (even and odd
    channels)."""


@dataclass(frozen=True, kw_only=True)
class NasConfig:
    """Training of supernets (DetNAS)."""

    sampling: str = "uniform"
    """Path of a step: uniform, or macs-bins (the released code's, for the small space alone)."""
    search_images: int = 5000
    """Training images held out for the search, at most a fifth of the split; detectors only."""
    eval_paths: int = 3
    """Paths, drawn from the seed, whose mean metric evaluates a supernet; 0 evaluates nothing."""
    eval_calibration: int = 50
    """Batches that the norms of a path are averaged over before it is evaluated."""

    def __post_init__(self) -> None:
        one_of("nas.sampling", self.sampling, ("uniform", "macs-bins"))
        positive(self, "nas", "search_images", "eval_calibration")
        zero_or_more(self, "nas", "eval_paths")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Search over the paths of a trained supernet (DetNAS, section 3.3)."""

    method: str = "evolution"
    """evolution, or random: the baseline of as many evaluations."""
    fitness: str = "detection"
    """detection: eval.metric of the fine-tuned supernet on held-out images; classification: top-1
    of the pre-trained one."""
    split: str = ""
    """Images that score networks: those held out, or another split by name, or a .json file with
    the ids of images trained on and held out."""
    population: int = 50
    """Networks evaluated per generation."""
    generations: int = 20
    """Generations, the first and random one included."""
    parents: int = 10
    """Best networks so far that offspring is made of."""
    mutants: int = -1
    """Largest number of mutants per generation; -1 takes two fifths of the population."""
    crossovers: int = -1
    """Largest number of crosses per generation, -1 as above; random networks fill the rest."""
    mutation_prob: float = 0.1
    """Chance of each gene of a mutant to be drawn again."""
    seed: int = 0
    """Seed of all proposals; the images follow from the supernet's train.seed."""
    max_macs: int = 0
    """Most multiply-adds of stem and blocks for one image of 224x224; 0 for no limit."""
    max_latency_ms: float = 0.0
    """Longest time of stem and blocks for one image, as a table of measured blocks adds up; 0 for
    no limit."""
    latency_device: str = "cpu"
    """Where the table is measured: cpu or cuda."""
    calibration_steps: int = 500
    """Batches that the norms' statistics of each network are measured on."""
    calibration_batch: int = 8
    """Images in each of them, from the supernet's training images."""
    calibration_momentum: float = 0.0
    """0 averages all batches alike; else the share of the newest in a running average."""
    batch_size: int = 8
    """Images detected at once; only those of one padded size go together."""
    cache_mib: int = 8192
    """Memory of all processes of a machine for decoded and resized images, which each keeps for
    itself; what does not fit is read again for every network."""
    retries: int = 1
    """How often an evaluation that broke off is tried again before it counts as failed."""
    early_stop: float = 0.0
    """Share of the images after which a hopeless network is dropped; 0 never drops one."""
    early_quantile: float = 0.5
    """Hopeless: its metric so far is below this quantile of earlier generations' ..."""
    early_margin: float = 0.02
    """... by more than this."""

    def __post_init__(self) -> None:
        one_of("search.method", self.method, ("evolution", "random"))
        one_of("search.fitness", self.fitness, ("detection", "classification"))
        one_of("search.latency_device", self.latency_device, ("cpu", "cuda"))
        positive(
            self,
            "search",
            "population",
            "generations",
            "parents",
            "calibration_steps",
            "batch_size",
        )
        zero_or_more(
            self,
            "search",
            "seed",
            "max_macs",
            "max_latency_ms",
            "cache_mib",
            "retries",
            "early_margin",
        )
        for name in ("mutants", "crossovers"):
            value = getattr(self, name)
            require(value >= -1, f"search.{name}", "zero or more, or -1", value)
        share(self, "search", "mutation_prob", "calibration_momentum", "early_quantile")
        require(0 <= self.early_stop < 1, "search.early_stop", "in [0, 1)", self.early_stop)
        require(
            self.calibration_batch > 1,
            "search.calibration_batch",
            "two or more",
            self.calibration_batch,
        )
