"""AP and AR by IoU threshold and object size: tables 3 and 4 of the DetNet paper.

AR is averaged over classes; the class-agnostic one, which the paper's caption names, stands beside
it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Table = dict[str, dict[str, float | None]]

AREAS = ("all", "small", "medium", "large")
"""Small is an area below 32**2 pixels, large one above 96**2."""

THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
"""COCO's IoU thresholds."""

IOUS = {"mean": slice(None)} | {f"{t:g}": slice(i, i + 1) for i, t in enumerate(THRESHOLDS)}
"""Column to its place among the thresholds; "mean" is over all ten."""

PAPER_COLUMNS = ("mean", "0.5", "0.6", "0.7", "0.8", "0.85")
"""Columns of the paper's tables."""


def analyse(tables: dict[str, Array], agnostic: dict[str, Array]) -> dict[str, Table]:
    """AP and AR per area and IoU from pycocotools' arrays, at most 100 detections per image.

    Args:
        tables: precision (T, R, K, A, M) and recall (T, K, A, M), matched within each
            class; -1 where undefined.
        agnostic: the same, matched regardless of class (K = 1).

    Returns:
        {"AP": {area: {iou: value}}, "AR": …, "AR_class_agnostic": …} with the columns
        of `IOUS`; None where no object has that area.
    """
    return {
        "AP": _table(tables["precision"][..., -1]),
        "AR": _table(tables["recall"][..., -1]),
        "AR_class_agnostic": _table(agnostic["recall"][..., -1]),
    }


def _table(values: Array) -> Table:
    """Means over everything but the area (last axis) and the IoU threshold (first axis)."""
    return {
        area: {iou: _mean(values[columns][..., a]) for iou, columns in IOUS.items()}
        for a, area in enumerate(AREAS)
    }


def _mean(values: Array) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None
