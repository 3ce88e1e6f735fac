"""A file of detections scored on a data set: no model, and no torch, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from detkit import config as configs
from detkit.data.open import open_detection
from detkit.engine.evaluate import evaluate
from detkit.engine.results import load_results


def score_file(
    detections: str | Path,
    *,
    data: str | None = None,
    split: str = "val",
    overrides: Iterable[Mapping[str, Any]] = (),
    analysis: bool = False,
    metric: str = "coco",
) -> dict[str, Any]:
    """Score a COCO results file.

    Args:
        detections: the file.
        data: data set path; by default that of the settings. Its images need not be there.
        split: split of the data set.
        overrides: layers of settings, of which the tables ``data`` count.
        analysis: add AP and AR by IoU and area.
        metric: ``coco``, ``voc07`` or ``voc12``.

    Returns:
        The dict that ``detkit eval --json`` prints.

    Raises:
        DetkitError: unusable settings, data set or results file.
    """
    config = configs.resolve(overrides)
    dataset = open_detection(data or config.data.path, split, config.data, need_images=False)
    rows, source = load_results(detections), str(detections)
    scores = evaluate(dataset.truth(), rows, analysis=analysis, metric=metric, source=source)
    return with_fixes(scores, dataset)


def with_fixes(scores: dict[str, Any], dataset: Any) -> dict[str, Any]:
    """``scores`` with what was repaired or left out while the data set was read."""
    found = sorted(dataset.report.counts.items())
    lines = [f"{rule}: {count} while reading the data set" for rule, count in found]
    return scores | {"normalised": lines + scores["normalised"]}
