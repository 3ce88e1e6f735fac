"""Looking a data set over: every problem of every split, by the rules that training applies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detkit.config import DataConfig
from detkit.data import folder
from detkit.data.clean import clean
from detkit.data.images import load_image
from detkit.data.open import SYNTHETIC, layout, open_detection, read_raw, splits, unions
from detkit.data.problems import RULES, Report
from detkit.data.raw import CleanOptions
from detkit.errors import DataError


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check` found.

    Attributes:
        path: The data set.
        layout: ``coco``, ``voc``, ``yolo``, ``folder`` or ``synthetic``.
        splits: Every finding of each split.
    """

    path: str
    layout: str
    splits: dict[str, Report]
    unions: tuple[str, ...] = ()
    """Splits left out, since all their images are in others."""

    @property
    def problems(self) -> int:
        """Findings in all splits."""
        return sum(sum(report.counts.values()) for report in self.splits.values())

    def to_plain(self) -> dict[str, Any]:
        """Plain types for JSON: the splits with their problems, and what the broken rules ask."""
        broken = sorted({rule for report in self.splits.values() for rule in report.counts})
        return {
            "path": self.path,
            "layout": self.layout,
            "problems": self.problems,
            "splits": {name: report.to_plain() for name, report in self.splits.items()},
            "rules": {rule: RULES[rule] for rule in broken},
            "unions": list(self.unions),
        }


def check(path: str, split: str | None = None, config: DataConfig | None = None) -> CheckReport:
    """Apply every rule to one split of a data set, or to all; decodes every image.

    Args:
        path: Folder, annotation file, or ``synthetic``.
        split: One split; None checks all, but those whose images are all in others.
        config: Pixel limit and image folder; the defaults without.

    Raises:
        DataError: nothing readable at ``path``, no split, or an annotation file that is no such
            file.
    """
    config = config or DataConfig()
    kind = layout(path)
    left_out = unions(path) if split is None else []
    names = [split] if split is not None else [n for n in splits(path) if n not in left_out]
    if not names:
        raise DataError(f"{path}: must have at least one split, got none")
    reports = {n: _check_split(path, kind, n, config) for n in names}
    return CheckReport(path, kind, reports, tuple(left_out))


def _check_split(path: str, kind: str, split: str, config: DataConfig) -> Report:
    if kind == SYNTHETIC:
        return open_detection(path, split, config).report
    if kind == "folder":
        *_, report = folder.read(
            Path(path), split, max_pixels=config.max_pixels, limit=None, decode=decode
        )
        return report
    options = CleanOptions(max_pixels=config.max_pixels, limit=None, decode=decode)
    return clean(read_raw(path, kind, split, config), options)[1]


def decode(path: Path, max_pixels: int) -> None:
    """Read every pixel; raises ImageFileError where one cannot be."""
    load_image(path, max_pixels)
