"""All that a report tells about the detections of one run on one split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from detkit.engine.confusion import Counts, confusion, image_quality
from detkit.engine.error_types import ErrorTypes, error_types
from detkit.engine.matches import Matches, ScoreCurves, match, score_curves

Record = dict[str, Any]
Open = Callable[[int | str], Image.Image]
"""The pixels of an image, by its id in the data set."""


@dataclass(frozen=True)
class Evaluation:
    """Detections of a run, scored and sorted.

    Attributes:
        source: data set and split.
        truth: normalised ground truth of the images.
        results: detections in COCO's results format.
        scores: as :func:`detkit.engine.evaluate.evaluate` gives them, with the analysis.
        matches: of each IoU type.
        curves: precision, recall and F1 of the boxes by score.
        table: confusion matrix at ``curves.threshold``.
        errors: kinds of errors of the boxes.
        quality: of each image at ``curves.threshold``, 0..1; None for an empty one.
        open: gives the images.
    """

    source: str
    truth: Record
    results: Sequence[Record]
    scores: Record
    matches: dict[str, Matches]
    curves: ScoreCurves
    table: Counts
    errors: ErrorTypes
    quality: Sequence[float | None]
    open: Open


def evaluation(
    source: str, truth: Record, results: Sequence[Record], open_image: Open
) -> Evaluation:
    """Score detections and work out everything a report draws.

    Args:
        source: data set and split, for headings.
        truth: COCO ground truth.
        results: detections in COCO's results format, all with boxes.
        open_image: gives the pixels of an image by its id.

    Raises:
        DataError: truth or results are unusable.
    """
    truth, scores, matches = match(truth, results)
    boxes = matches["bbox"]
    curves = score_curves(boxes)
    return Evaluation(
        source=source,
        truth=truth,
        results=results,
        scores=scores,
        matches=matches,
        curves=curves,
        table=confusion(truth, results, boxes, curves.threshold),
        errors=error_types(truth, results, boxes),
        quality=image_quality(truth, results, boxes, curves.threshold),
        open=open_image,
    )
