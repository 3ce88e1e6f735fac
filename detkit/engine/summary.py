"""COCO's twelve numbers from the precision and recall arrays, over all classes and for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# number: taken from precision or recall, IoU threshold (all where None), area, most detections;
# the last three are indices into pycocotools' arrays
NUMBERS: dict[str, tuple[str, int | None, int, int]] = {
    "AP": ("precision", None, 0, 2),
    "AP50": ("precision", 0, 0, 2),
    "AP75": ("precision", 5, 0, 2),
    "APs": ("precision", None, 1, 2),
    "APm": ("precision", None, 2, 2),
    "APl": ("precision", None, 3, 2),
    "AR1": ("recall", None, 0, 0),
    "AR10": ("recall", None, 0, 1),
    "AR100": ("recall", None, 0, 2),
    "ARs": ("recall", None, 1, 2),
    "ARm": ("recall", None, 2, 2),
    "ARl": ("recall", None, 3, 2),
}


def numbers(tables: dict[str, Array]) -> dict[str, float | None]:
    """The twelve numbers, each averaged over the classes that have truth; None where none has.

    Args:
        tables: "precision" (T, R, K, A, M) and "recall" (T, K, A, M) as pycocotools gives them for
            its default thresholds, -1 where undefined.
    """
    result = {}
    for name, (source, threshold, area, most) in NUMBERS.items():
        values = tables[source][..., area, most]  # precision (T, R, K) or recall (T, K)
        values = values if threshold is None else values[threshold]
        values = values[values > -1]
        result[name] = float(values.mean()) if values.size else None
    return result


def per_class(tables: dict[str, Array], names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """The twelve numbers of each class; ``names`` in the order of the arrays' K axis."""
    precision, recall = tables["precision"], tables["recall"]
    return {
        name: numbers({"precision": precision[:, :, [k]], "recall": recall[:, [k]]})
        for k, name in enumerate(names)
    }
