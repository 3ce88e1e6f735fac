"""Evaluated candidates: each once, each a line of ``candidates.jsonl`` as soon as it is done.

A search is a function of its settings and of the results so far, so this file is all it needs to
go on after it was killed: the loop runs again from the start, finds its candidates there, and
evaluates from the first one that is missing. The state of the random generators follows from the
seed and the generation.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detkit.config import suggest
from detkit.errors import (
    ConfigError,
    DataError,
    DetkitError,
    NonFiniteError,
    VerificationError,
)
from detkit.models.search_space import Genes, SearchSpace
from detkit.nas.work_queue import WorkQueue
from detkit.storage import writing

log = logging.getLogger("detkit")

Evaluate = Callable[[Genes], Mapping[str, float]]
"""Metrics of a network, the fitness among them; may raise :class:`Dropped`."""

Costs = Callable[[Genes], Mapping[str, float]]
"""Numbers known without an evaluation, such as ``macs`` or ``latency_ms``."""

FAILED = -math.inf


class Dropped(Exception):  # noqa: N818 - what happened, and no error
    """The evaluation of a hopeless network ended early.

    Attributes:
        metrics: What is known of it.
    """

    def __init__(self, metrics: Mapping[str, float]) -> None:
        super().__init__("evaluation ended early")
        self.metrics = metrics


@dataclass(frozen=True)
class Candidate:
    """A network that a search has evaluated.

    Attributes:
        index: Its place in the sequence, from 0.
        generation: The generation that made it.
        genes: The network.
        fitness: Larger is better; ``-inf`` where its evaluation failed or was ended early.
        metrics: All that was measured; None where it is not a finite number.
        costs: Numbers known without an evaluation.
        error: Why its evaluation failed, or nothing.
    """

    index: int
    generation: int
    genes: Genes
    fitness: float
    metrics: Mapping[str, float | None] = field(default_factory=dict, compare=False)
    costs: Mapping[str, float] = field(default_factory=dict, compare=False)
    error: str = field(default="", compare=False)


@dataclass(frozen=True)
class SearchResult:
    """All candidates of a search, in order.

    Attributes:
        history: At least one, at least one of them evaluated without a failure.
    """

    history: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The fittest; the earliest of equals."""
        return self.top(1)[0]

    def top(self, count: int) -> list[Candidate]:
        """The ``count`` fittest, best first; failed and dropped ones are left out."""
        return fittest(self.history, count)

    def best_so_far(self) -> list[float]:
        """Largest fitness among the first 1, 2, ... candidates."""
        found, best = [], FAILED
        for candidate in self.history:
            best = max(best, candidate.fitness)
            found.append(best)
        return found


def fittest(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The ``count`` fittest, best first, the earlier of equals first; others are left out."""
    alive = [c for c in candidates if c.fitness > FAILED]
    return sorted(alive, key=lambda c: (-c.fitness, c.index))[:count]


def within(costs: Costs, limits: Mapping[str, float]) -> Callable[[Genes], bool]:
    """Whether all costs of a network that have a limit keep it (``macs`` at most 300e6).

    Raises:
        ConfigError: When called: a limit on a cost that is not known.
    """

    def allowed(genes: Genes) -> bool:
        found = costs(genes)
        unknown = limits.keys() - found.keys()
        if unknown:
            raise ConfigError(
                f"limits: must be on {', '.join(found)}, got {', '.join(sorted(unknown))}"
            )
        return all(found[name] <= limit for name, limit in limits.items())

    return allowed


class Journal:
    """``candidates.jsonl``: one line per evaluation, in the order they were done.

    Several processes may add lines to one file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line that outlives a crash; raises StorageError when the disk refuses."""
        text = json.dumps(line, allow_nan=False) + "\n"
        with writing(self.path), self.path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All lines; one cut off by a crash is removed from the file.

        Raises:
            DataError: Something else is in the file.
        """
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(self.path, end)
        return self._lines(content[:end])

    def look(self) -> list[dict[str, Any]]:
        """All whole lines; the file, which a search may be writing to, is left as it is.

        Raises:
            DataError: Something else is in the file.
        """
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        return self._lines(content[: content.rfind(b"\n") + 1])

    def _lines(self, content: bytes) -> list[dict[str, Any]]:
        return [self._parse(i, text) for i, text in enumerate(content.splitlines(), 1)]

    def _parse(self, number: int, text: bytes) -> dict[str, Any]:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        wanted = {"index", "generation", "genes", "fitness"}
        if not isinstance(line, dict) or not wanted <= line.keys():
            raise DataError(
                f"{self.path}: line {number} must be a JSON object with {', '.join(wanted)}, "
                f"got {text[:40]!r}"
            )
        return line


class Evaluator:
    """Evaluates the candidates of a search, generation by generation, on all processes.

    An evaluation that raises, or whose fitness is not a finite number, is a failure: it is logged
    with its reason, its fitness is ``-inf``, and the search goes on. One that broke off by an
    exception of another kind than detkit's own may have met a passing trouble and is tried again,
    ``retries`` times at most. Errors that are not the candidate's fault (any DetkitError but
    NonFiniteError) end the search; it can go on later.

    Args:
        space: The space.
        evaluate: Metrics of a network. Each process calls it for other networks, so it must not
            wait for other processes.
        metric: Which of the metrics is the fitness.
        journal: Where evaluations are kept and found again; its folder must exist. All processes
            see the same file.
        costs: Numbers that go into the line of a network beside its metrics.
        queue: Who evaluates what.
        retries: Further tries for an evaluation that broke off.
        on_line: Called with each line that this process has written.
    """

    def __init__(
        self,
        space: SearchSpace,
        evaluate: Evaluate,
        metric: str,
        journal: Journal,
        costs: Costs,
        queue: WorkQueue,
        *,
        retries: int = 0,
        on_line: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._space = space
        self._evaluate = evaluate
        self._metric = metric
        self._journal = journal
        self._costs = costs
        self._queue = queue
        self._retries = retries
        self._on_line = on_line
        lines = json.loads(queue.share("journal", lambda: json.dumps(journal.read())))
        self._known: dict[int, dict[str, Any]] = {line["index"]: line for line in lines}
        self._count = 0
        self._alive = False

    def __call__(self, generation: int, genes: Sequence[Genes]) -> list[Candidate]:
        """Candidates of a generation, in the order of ``genes``.

        Raises:
            ConfigError: The journal holds the candidates of another search.
            VerificationError: Not one evaluation since the start has succeeded.
            StorageError: The journal cannot be written.
        """
        first = self._count
        names = [self._space.text(g) for g in genes]
        missing = [i for i in range(len(genes)) if not self._is_known(first + i, names[i])]
        done = self._queue.run(
            str(generation),
            len(missing),
            lambda i: json.dumps(self._one(first + missing[i], generation, genes[missing[i]])),
        )
        for text in done:
            line = json.loads(text)
            self._known[line["index"]] = line
        self._count += len(genes)
        found = [self._candidate(self._known[first + i], g) for i, g in enumerate(genes)]
        self._require_success(found)
        return found

    def _is_known(self, index: int, name: str) -> bool:
        line = self._known.get(index)
        if line is not None and line["genes"] != name:
            raise ConfigError(
                f"{self._journal.path}: candidate {index} must be {name}, got {line['genes']}; "
                f"the file is of a search with other settings, take another folder"
            )
        return line is not None

    def _one(self, index: int, generation: int, genes: Genes) -> dict[str, Any]:
        begun = time.monotonic()
        line: dict[str, Any] = {
            "index": index,
            "generation": generation,
            "genes": self._space.text(genes),
            **self._costs(genes),
        }
        try:
            metrics = self._metrics(index, genes)
            line |= {"fitness": self._fitness(metrics), "metrics": _shown(metrics)}
        except Dropped as dropped:
            line |= {"fitness": None, "metrics": _shown(dropped.metrics), "dropped": True}
        except Exception as error:
            if _ends_the_search(error):
                raise
            reason = f"{type(error).__name__}: {error}"
            log.warning("candidate %d (%s) failed: %s", index, line["genes"], reason)
            line |= {"fitness": None, "metrics": {}, "error": reason}
        line |= {"seconds": time.monotonic() - begun, "rank": self._queue.rank}
        self._journal.append(line)
        if self._on_line is not None:
            self._on_line(line)
        return line

    def _metrics(self, index: int, genes: Genes) -> dict[str, float]:
        """Metrics of a network, tried again where the evaluation broke off."""
        for left in reversed(range(self._retries + 1)):
            try:
                return {name: float(value) for name, value in self._evaluate(genes).items()}
            except (Dropped, DetkitError):
                raise
            except Exception as error:
                if not left:
                    raise
                log.warning(
                    "candidate %d broke off (%s: %s), trying again",
                    index,
                    type(error).__name__,
                    error,
                )
        raise ValueError(f"retries: must be zero or more, got {self._retries}")

    def _fitness(self, metrics: Mapping[str, float]) -> float:
        if self._metric not in metrics:
            raise ConfigError(
                f"search metric: must be one of {', '.join(metrics)}, got {self._metric!r}"
                f"{suggest(self._metric, metrics)}"
            )
        fitness = metrics[self._metric]
        if not math.isfinite(fitness):
            raise NonFiniteError(f"{self._metric}: must be a finite number, got {fitness}")
        return fitness

    def _candidate(self, line: Mapping[str, Any], genes: Genes) -> Candidate:
        fitness = FAILED if line["fitness"] is None else float(line["fitness"])
        costs = {name: line[name] for name in self._costs(genes) if name in line}
        return Candidate(
            line["index"],
            line["generation"],
            genes,
            fitness,
            line.get("metrics", {}),
            costs,
            line.get("error", ""),
        )

    def _require_success(self, found: Sequence[Candidate]) -> None:
        self._alive = self._alive or any(c.fitness > FAILED for c in found)
        if found and not self._alive:
            reason = self._known[found[-1].index].get("error")
            raise VerificationError(
                f"search: at least one candidate must be evaluated, got {self._count} failures, "
                f"the last one {reason}; remove {self._journal.path} to try again"
            )


def _shown(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: v if math.isfinite(v) else None for name, v in metrics.items()}


def _ends_the_search(error: Exception) -> bool:
    """Wrong settings, data, disk or a signal: not the candidate's fault."""
    return isinstance(error, DetkitError) and not isinstance(error, NonFiniteError)
