"""What a report knows of a run: its folder's files, its checkpoint's facts, its detections."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detkit.config import Config, to_plain
from detkit.models.search_space import SearchSpace
from detkit.report.evaluation import Evaluation

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a report.

    Attributes:
        name: What the page calls it; no two runs share one.
        folder: Where it is.
        config: Its resolved settings.
        lines: Of ``metrics.jsonl``.
        log: Of ``log.txt``.
        facts: Name to value for the table of runs.
        kind: Of its checkpoint; empty where it has none.
        scales: What its checkpoint keeps of learnt scales or split layers.
        labels: Path of a layer with a learnt scale to its short name.
        evaluation: Its detections, where it is a detector that could be run.
        candidates: Evaluated networks of a search, in order.
        result: What ``search.json`` holds.
        space: Of a search.
        notes: What is missing, and why.
    """

    name: str
    folder: Path
    config: Config
    lines: Sequence[Record] = ()
    log: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)
    kind: str = ""
    scales: Record | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    candidates: Sequence[Record] = ()
    result: Record | None = None
    space: SearchSpace | None = None
    notes: Sequence[str] = ()

    def of(self, kind: str) -> list[Record]:
        """Lines of ``metrics.jsonl`` of one kind."""
        return [line for line in self.lines if line["kind"] == kind]

    def settings(self) -> dict[str, str]:
        """``table.key`` to its value as text."""
        return {
            f"{table}.{key}": json.dumps(value, ensure_ascii=False)
            for table, values in to_plain(self.config).items()
            for key, value in values.items()
        }


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths that tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({n})" for n, path in enumerate(paths, 1)]
