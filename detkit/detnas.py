"""Search over the paths of a trained supernet (DetNAS, arXiv 1903.10979, section 3.3).

What `detkit search` does: open a supernet and the images held out for it, score paths, search under
limits, keep every evaluation. Loops, norms and work queue themselves are in :mod:`detkit.nas`;
:mod:`detkit.retrain` writes the recipes for the winner.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from detkit import config as configs
from detkit.config import Config, SearchConfig
from detkit.data.cache import MIB
from detkit.engine import checkpoint as checkpoints
from detkit.engine import distributed
from detkit.engine.rehearsal import peak_memory
from detkit.engine.run import RunFolder, check_new, create_run, runs
from detkit.engine.signals import StopSignals
from detkit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TrainingInterrupted,
)
from detkit.fitness import STAGES, Fitness, Opened, open_supernet
from detkit.loading import pick_device
from detkit.models.search_space import Genes, SearchSpace, network_tables
from detkit.nas.candidates import (
    FAILED,
    Candidate,
    Costs,
    Evaluate,
    Evaluator,
    Journal,
    SearchResult,
    within,
)
from detkit.nas.cost import CostTable, cost_table
from detkit.nas.evolution import EvolutionSettings, evolve
from detkit.nas.latency import LatencyTable, load_latency, measure_latency
from detkit.nas.paths import PROPOSALS, generator, random_genes
from detkit.nas.random_search import random_search
from detkit.nas.work_queue import LocalQueue, WorkQueue, work_queue
from detkit.pod import padded_size
from detkit.scales import weights_hash
from detkit.storage import write_whole

Record = dict[str, Any]

log = logging.getLogger("detkit")

COMMAND = "search"
TOP = 10
"""Networks told about at the end."""
REHEARSED_IMAGES = 4
"""Images that score the networks of ``--dry-run``."""
DRAWS = 2
"""Counts the ways in which evaluations drew their random numbers; one more with each change."""
_MOST_PROCESSES = 16
_CALM = ("generations", "cache_mib", "retries")  # settings that leave the sequence as it is


class SearchFolder:
    """Files of one search, in a run folder; making the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.run = RunFolder(path)
        self.journal = self.run.path / "candidates.jsonl"
        self.result = self.run.path / "search.json"
        self.latency = self.run.path / "latency.json"

    @property
    def draws(self) -> int:
        """:data:`DRAWS` of the version that began it; 1 before any was written."""
        found: int = self.read().get("draws", 1)
        return found

    @property
    def is_search(self) -> bool:
        """Whether a search was started here."""
        return self.run.is_run and self.result.is_file()

    def read(self) -> Record:
        """What ``search.json`` holds; raises DataError where it is none."""
        try:
            found = json.loads(self.result.read_text(encoding="utf-8"))
            return {**found, "supernet": dict(found["supernet"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.result}: must be the result of a search, got {error!r}") from (
                error
            )

    def write(self, record: Record) -> None:
        """Write ``search.json`` whole or not at all; raises StorageError."""
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        write_whole(self.result, text.encode())


# -- the search itself


def run_search(
    space: SearchSpace,
    settings: SearchConfig,
    evaluate: Evaluate,
    metric: str,
    journal: str | Path,
    *,
    costs: Costs | None = None,
    limits: Mapping[str, float] | None = None,
    queue: WorkQueue | None = None,
    begin: Callable[[Sequence[Candidate]], None] | None = None,
    on_line: Callable[[Mapping[str, Any]], None] | None = None,
    on_generation: Callable[[SearchResult], None] | None = None,
) -> SearchResult:
    """Search with any fitness; it goes on where ``journal`` ends.

    Args:
        space: The space.
        settings: Method and its numbers.
        evaluate: Metrics of a network.
        metric: Which of them is the fitness.
        journal: File of the evaluations; its folder must exist.
        costs: Numbers of a network that are known beforehand; multiply-adds by default.
        limits: Largest allowed value of some of them.
        queue: Who evaluates what, if not this process everything.
        begin: Called before each generation with the candidates of earlier ones.
        on_line: Called with each line that this process has written.
        on_generation: Called after each generation with all candidates so far.

    Raises:
        ConfigError: Settings out of range, limits that no network keeps, or the journal of another
            search.
        VerificationError: No evaluation succeeded.
    """
    if costs is None:
        costs = partial(network_costs, cost_table(space), None)
    evaluator = Evaluator(
        space,
        evaluate,
        metric,
        Journal(journal),
        costs,
        queue or LocalQueue(),
        retries=settings.retries,
        on_line=on_line,
    )
    history: list[Candidate] = []

    def evaluate_all(generation: int, genes: Sequence[Genes]) -> list[Candidate]:
        if begin is not None:
            begin(history)
        found = evaluator(generation, genes)
        history.extend(found)
        if on_generation is not None:
            on_generation(SearchResult(tuple(history)))
        return found

    allowed = within(costs, limits or {})
    if settings.method == "random":
        count = settings.population * settings.generations
        seed, batch = settings.seed, settings.population
        return random_search(space, count, evaluate_all, allowed, seed=seed, batch=batch)
    return evolve(space, evolution_settings(settings), evaluate_all, allowed)


def evolution_settings(settings: SearchConfig) -> EvolutionSettings:
    """The numbers of an evolution; raises ConfigError where they do not go together."""
    share = settings.population * 2 // 5
    return EvolutionSettings(
        population=settings.population,
        generations=settings.generations,
        parents=settings.parents,
        mutants=share if settings.mutants < 0 else settings.mutants,
        crossovers=share if settings.crossovers < 0 else settings.crossovers,
        mutation_probability=settings.mutation_prob,
        seed=settings.seed,
    )


def network_costs(table: CostTable, latency: LatencyTable | None, genes: Genes) -> dict[str, float]:
    """Multiply-adds of a body for one image of 224x224, and its milliseconds where measured."""
    found: dict[str, float] = {"macs": table.body(genes).macs}
    return found if latency is None else found | {"latency_ms": latency.body(genes)}


def limits_of(settings: SearchConfig) -> dict[str, float]:
    """Limits by the name of the cost they are on."""
    wanted = {"macs": settings.max_macs, "latency_ms": settings.max_latency_ms}
    return {name: limit for name, limit in wanted.items() if limit}


def check_limits(opened: Opened, latency: LatencyTable | None = None) -> None:
    """Refuse limits below the smallest network, before anything is drawn; raises ConfigError."""
    search, name = opened.config.search, opened.space.name
    smallest = cost_table(opened.space).body_macs_range()[0]
    if search.max_macs and search.max_macs < smallest:
        raise ConfigError(
            f"search.max_macs: must be at least {smallest:,}, the smallest network of the {name} "
            f"space, got {search.max_macs:,}"
        )
    if latency is not None:
        fastest = latency.stem + sum(min(times) for times in latency.blocks)
        if search.max_latency_ms < fastest:
            raise ConfigError(
                f"search.max_latency_ms: must be at least {fastest:.3g}, the fastest network of "
                f"the {name} space on {latency.device}, got {search.max_latency_ms:g}"
            )


# -- the command


@dataclass(frozen=True)
class SearchProgress:
    """How far a search is.

    Attributes:
        done: Networks evaluated.
        total: Networks that will be, unless the space runs out of new ones.
        line: The newest line of ``candidates.jsonl``.
        best: Largest fitness so far; None before the first.
        left: Time to go at the pace so far, in words.
    """

    done: int
    total: int
    line: Mapping[str, Any]
    best: float | None
    left: str


OnProgress = Callable[[SearchProgress], None]


def search(
    supernet: str | Path,
    *,
    data: str | None = None,
    overrides: Iterable[Mapping[str, Any]] = (),
    out: str | Path | None = None,
    device: str = "auto",
    resume: str | None = None,
    on_progress: OnProgress | None = None,
) -> Record:
    """Search a trained supernet for the fittest network that keeps the limits.

    Under torchrun all processes evaluate, each another network.

    Args:
        supernet: Checkpoint of a supernet, or a run folder with one.
        data: Where the data set lies that it was trained on, if elsewhere now.
        overrides: Layers of settings on top of the checkpoint's: ``search``, ``data``, ``eval``.
        out: The run folder itself; by default a new one under ``runs/search``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        resume: ``auto`` (``out``, else the newest search with the same settings, else a new one) or
            the folder of a search.
        on_progress: Called after each evaluation of the first process.

    Returns:
        What ``search.json`` holds, and ``run``, its folder.

    Raises:
        DetkitError: Unusable settings, data or checkpoints; TrainingInterrupted after a signal.
    """
    with distributed.process_group(pick_device(device)) as place:
        opened = open_supernet(supernet, overrides, data=data)
        check_limits(opened)
        if opened.config.search.method == "evolution":
            evolution_settings(opened.config.search)
        folder = _folder(opened, out, resume)
        with StopSignals() as signals, work_queue(partial(_stop, signals)) as queue:
            return _search(opened, folder, queue, place, signals, on_progress)


def _search(
    opened: Opened,
    folder: SearchFolder,
    queue: WorkQueue,
    device: torch.device,
    signals: StopSignals,
    on_progress: OnProgress | None,
) -> Record:
    settings, begun = opened.config.search, time.monotonic()
    latency = _latency(opened, folder, queue)
    check_limits(opened, latency)
    fitness = Fitness(opened, device)
    follow = _Follower(folder, settings, opened.metric, on_progress if queue.rank == 0 else None)

    def on_line(line: Mapping[str, Any]) -> None:
        follow(line)
        _stop(signals)

    def on_generation(found: SearchResult) -> None:
        if queue.rank == 0:
            folder.write(_record(opened, found, begun, finished=False))

    with folder.run.logging():
        result = run_search(
            opened.space,
            settings,
            fitness,
            opened.metric,
            folder.journal,
            costs=partial(network_costs, cost_table(opened.space), latency),
            limits=limits_of(settings),
            queue=queue,
            begin=fitness.begin,
            on_line=on_line,
            on_generation=on_generation,
        )
    record = _record(opened, result, begun, finished=True)
    if queue.rank == 0:
        folder.write(record)
    return {"run": str(folder.run.path)} | record


def _stop(signals: StopSignals) -> None:
    """End the search where a signal asked for it; what is evaluated is kept."""
    if signals.received is not None:
        raise TrainingInterrupted(
            f"search: stopped by signal {signals.received}; --resume auto goes on", signals.received
        )


class _Follower:
    """Tells about each evaluation in the log and to ``tell``."""

    def __init__(
        self,
        folder: SearchFolder,
        settings: SearchConfig,
        metric: str,
        tell: OnProgress | None,
    ) -> None:
        self._journal = folder.journal
        self._total = settings.population * settings.generations
        self._metric = metric
        self._tell = tell
        self._begun = time.monotonic()
        lines = Journal(folder.journal).read() if distributed.is_main() else []
        self._before = len(lines)
        self._best = max((v for line in lines if (v := line["fitness"]) is not None), default=None)

    def __call__(self, line: Mapping[str, Any]) -> None:
        fitness = line["fitness"]
        if fitness is not None:
            self._best = fitness if self._best is None else max(self._best, fitness)
        done = self._journal.read_bytes().count(b"\n")  # of all processes
        pace = (time.monotonic() - self._begun) / max(1, done - self._before)
        left = duration(pace * max(0, self._total - done))
        event = {
            "kind": "candidate",
            **line,
            "done": done,
            "total": self._total,
            "best": self._best,
        }
        shown = "failed" if fitness is None else f"{self._metric} {fitness:.4f}"
        log.info(
            "%d of %d: %s %s, %.1f M multiply-adds, %.1f s; best %s, %s left",
            done,
            self._total,
            line["genes"],
            "dropped early" if line.get("dropped") else shown,
            line["macs"] / 1e6,
            line["seconds"],
            "none" if self._best is None else f"{self._best:.4f}",
            left,
            extra={"event": event},
        )
        if self._tell is not None:
            self._tell(SearchProgress(done, self._total, line, self._best, left))


def duration(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _record(opened: Opened, result: SearchResult, begun: float, *, finished: bool) -> Record:
    """What ``search.json`` holds."""
    history, settings = result.history, opened.config.search
    top = [_network(opened, candidate) for candidate in result.top(TOP)]
    return {
        "finished": finished,
        "draws": DRAWS,
        "method": settings.method,
        "fitness": settings.fitness,
        "metric": opened.metric,
        "limits": limits_of(settings),
        "seed": settings.seed,
        "evaluations": len(history),
        "failed": sum(bool(c.error) for c in history),
        "dropped": sum(c.fitness == FAILED and not c.error for c in history),
        "best": top[0] if top else None,
        "top": top,
        "space": opened.space.to_plain(),
        "supernet": {"file": opened.file, "hash": _hash(opened)},
        "data": {
            "path": opened.config.data.path,
            "images": len(opened.images),
            "training_images": len(opened.training),
        },
        "seconds": time.monotonic() - begun,
    }


def _hash(opened: Opened) -> str:
    return weights_hash(checkpoints.deployed(opened.stored))


def _network(opened: Opened, candidate: Candidate) -> Record:
    return {
        "genes": opened.space.text(candidate.genes),
        "backbone": network_tables(opened.space, candidate.genes)["model"]["backbone"],
        "fitness": candidate.fitness,
        **candidate.costs,
        "metrics": dict(candidate.metrics),
        "index": candidate.index,
        "generation": candidate.generation,
    }


# -- folders


def _folder(opened: Opened, out: str | Path | None, resume: str | None) -> SearchFolder:
    """The folder to write to, chosen and made by the first process."""
    found: str | None = None
    if distributed.is_main():
        previous = _previous(opened.config, out, resume)
        if previous is not None:
            _check_same(previous, opened)
            configs.write_toml(opened.config, previous.run.config_path)
            log.info("continuing %s", previous.run.path)
        else:
            previous = _new_folder(opened, out)
            log.info("run folder %s", previous.run.path)
        found = str(previous.run.path)
    return SearchFolder(str(distributed.broadcast(found)))


def _previous(config: Config, out: str | Path | None, resume: str | None) -> SearchFolder | None:
    if resume is None:
        return None
    if resume != "auto":
        folder = SearchFolder(resume)
        if not folder.is_search:
            raise CheckpointError(f"--resume {resume}: must be the folder of a search, got none")
        return folder
    if out is not None:
        return SearchFolder(out) if SearchFolder(out).is_search else None
    for run in runs(COMMAND):
        folder = SearchFolder(run.path)
        same = folder.is_search and folder.draws == DRAWS
        if same and _differences(run.config(), config) == []:
            return folder
    return None


def _new_folder(opened: Opened, out: str | Path | None) -> SearchFolder:
    if out is not None:
        _refuse_search(out)
    settings = opened.config.search
    name = f"{opened.space.name}-{settings.method}"
    folder = SearchFolder(create_run(COMMAND, name, opened.config, out=out).path)
    folder.write(_record(opened, SearchResult(()), time.monotonic(), finished=False))
    return folder


def _refuse_search(out: str | Path) -> None:
    if SearchFolder(out).is_search:
        raise ConfigError(
            f"--out {out}: must be a new folder, got one that holds a search; continue it with "
            "--resume auto or name another"
        )


def _check_same(folder: SearchFolder, opened: Opened) -> None:
    """Refuse to go on with another supernet, or with settings or a version of another sequence."""
    if folder.draws != DRAWS:
        raise ConfigError(
            f"{folder.run.path}: must be begun by a version that draws random numbers as this one "
            f"(way {DRAWS}), got way {folder.draws}, whose scores would not compare; take another "
            "folder for a new search"
        )
    stored = folder.read()["supernet"].get("hash")
    ours = _hash(opened)
    if stored != ours:
        raise CheckpointError(
            f"{opened.file}: must be the supernet that {folder.run.path} searches "
            f"({str(stored)[:12]}), got another ({ours[:12]})"
        )
    different = _differences(folder.run.config(), opened.config)
    if different:
        key, theirs, ours_ = different[0]
        raise ConfigError(
            f"{key}: must stay {theirs!r} as in {folder.run.path}, got {ours_!r}; take another "
            "folder for another search"
        )


def _differences(stored: Config, config: Config) -> list[tuple[str, Any, Any]]:
    """Settings that change what a search evaluates: key, stored value, new value."""
    found = []
    for table in fields(Config):
        if table.name not in ("data", "search", "eval"):
            continue
        theirs, ours = getattr(stored, table.name), getattr(config, table.name)
        for field in fields(ours):
            calm = table.name == "search" and field.name in _CALM
            calm = calm or (table.name == "data" and field.name in ("workers", "path"))
            pair = getattr(theirs, field.name), getattr(ours, field.name)
            if pair[0] != pair[1] and not calm:
                found.append((f"{table.name}.{field.name}", *pair))
    return found


def _latency(opened: Opened, folder: SearchFolder, queue: WorkQueue) -> LatencyTable | None:
    """The table beside the run, measured by the first process where there is none yet."""
    settings = opened.config.search
    if not settings.max_latency_ms:
        return None

    def measure() -> str:
        if not folder.latency.is_file():
            device = pick_device(settings.latency_device)
            height, width = image_size(opened)
            log.info("measuring blocks on %s, images of %dx%d", device, height, width)
            measure_latency(opened.space, device, height, width).save(folder.latency)
        return "there"

    queue.share("latency", measure)
    return load_latency(folder.latency, opened.space)


def image_size(opened: Opened) -> tuple[int, int]:
    """Height and width of a padded landscape image of the test-time size."""
    data = opened.config.data
    if opened.config.search.fitness == "classification":
        return data.short_side, data.short_side
    return padded_size(opened.config)


def processes(
    device: str, gpus: int | None = None, wanted: int | None = None
) -> tuple[int, int | None]:
    """How many processes `detkit search` shares a search between, and threads of each.

    On a CPU one per thread that torch would take (cores, or ``OMP_NUM_THREADS``), sixteen at most,
    as each holds a supernet and images of its own: networks side by side on one thread each are
    faster than one network on all threads.

    Args:
        device: As of :func:`search`.
        gpus: What --gpus says.
        wanted: What --processes says.

    Raises:
        ConfigError: --processes for a GPU, or together with --gpus.
    """
    on_cpu = pick_device(device).type == "cpu"
    if wanted and (gpus or not on_cpu):
        raise ConfigError(
            f"--processes: must be left to searches on a CPU, got {wanted}; --gpus takes as many "
            "GPUs"
        )
    if gpus or not on_cpu:
        return gpus or 1, None
    threads = torch.get_num_threads()
    count = wanted or min(threads, _MOST_PROCESSES)
    return count, max(1, threads // count)


def newest_supernet(fitness: str = "detection") -> str:
    """``best.pth``, else ``last.pth``, of the newest run that trained a supernet.

    Raises:
        ConfigError: There is none.
    """
    command = STAGES[fitness]
    for run in runs(command):
        checkpoint = run.checkpoint()
        if checkpoint is not None and configs.is_supernet(run.config().model.backbone):
            return str(checkpoint)
    raise ConfigError(
        f"supernet: one must be given where runs/{command} holds none, got neither; train one with "
        f"`detkit {command} --backbone detnas-supernet-tiny`"
    )


def newest_search() -> str:
    """Folder of the newest search under ``runs/search``; raises ConfigError where there is none."""
    for run in runs(COMMAND):
        if SearchFolder(run.path).is_search:
            return str(run.path)
    raise ConfigError("search: one must be given where runs/search holds none, got neither")


def rehearse_search(
    supernet: str | Path,
    overrides: Iterable[Mapping[str, Any]] = (),
    *,
    out: str | Path | None = None,
    device: str = "auto",
    resume: str | None = None,
) -> Record:
    """What ``--dry-run`` does: evaluate two networks on a few images and write nothing.

    Args and errors are those of :func:`search`.

    Returns:
        The object that ``detkit search --dry-run --json`` prints; docs/training.md describes it.
    """
    overrides = list(overrides)
    with distributed.process_group(pick_device(device)) as place:
        opened = open_supernet(supernet, overrides)
        check_limits(opened)
        settings = opened.config.search
        if settings.method == "evolution":
            evolution_settings(settings)
        previous = _previous(opened.config, out, resume)
        if previous is not None:
            _check_same(previous, opened)
        elif out is not None and distributed.is_main():
            _refuse_search(out)
            check_new(out)
        found = _rehearsed(opened, place)
        memory, world = peak_memory(place), distributed.world_size()
    low, high = cost_table(opened.space).body_macs_range()
    total = min(settings.population * settings.generations, opened.space.size)
    before = 0 if previous is None else len(Journal(previous.journal).read())
    calibration = settings.calibration_steps * found["seconds_per_calibration_batch"]
    scoring = len(opened.images) * found["seconds_per_image"]
    return {
        "dry_run": True,
        "command": COMMAND,
        "device": str(place),
        "processes": world,
        "supernet": opened.file,
        "space": opened.space.name,
        "networks": opened.space.size,
        "macs": [low, high],
        "limits": limits_of(settings),
        "metric": opened.metric,
        "search_images": len(opened.images),
        "training_images": len(opened.training),
        "calibration_images": settings.calibration_steps * settings.calibration_batch,
        "classes": len(opened.images.categories),
        "evaluations": total,
        "done_before": before,
        "measured": found,
        "memory": memory | {"cache_at_most": settings.cache_mib * MIB},
        "eta": {
            "seconds": max(0, total - before) * (calibration + scoring) / world,
            "calibration_seconds": calibration,
            "scoring_seconds": scoring,
            "estimate": True,
        },
        "continues": None if previous is None else str(previous.run.path),
        "config": configs.to_plain(opened.config),
        "origins": configs.origins(overrides, f"supernet {opened.file}"),
    }


def _rehearsed(opened: Opened, device: torch.device) -> Record:
    """Seconds per calibration batch and per image of the second of two networks, and its score."""
    search = replace(opened.config.search, calibration_steps=2, early_stop=0.0)
    count = min(REHEARSED_IMAGES, len(opened.images))
    spread = [i * len(opened.images) // count for i in range(count)]
    few = replace(
        opened, config=replace(opened.config, search=search), images=opened.images.take(spread)
    )
    fitness = Fitness(few, device)
    for network in range(2):
        genes = random_genes(opened.space, generator(search.seed, PROPOSALS, network))
        begun = time.monotonic()
        metrics = fitness(genes)
        seconds = time.monotonic() - begun
    value, scoring = metrics[opened.metric], fitness.scoring_seconds
    return {
        "images": count,
        "fitness": value if math.isfinite(value) else None,
        "seconds_per_calibration_batch": max(0.0, seconds - scoring) / search.calibration_steps,
        "seconds_per_image": scoring / count,
    }
