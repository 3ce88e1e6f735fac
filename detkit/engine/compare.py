"""Two sets of detections on the same images: their metrics, and how sure the difference is.

The interval is a paired bootstrap over images (Efron, Bootstrap methods: another look at the
jackknife, 1979): images are drawn with replacement, the same for both sides, and the metrics are
taken anew. Detections are matched once; a draw changes only how often each image counts, so AP is
accumulated with a weight per image. Weights of one give the ordinary AP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from detkit.engine.analysis import AREAS
from detkit.engine.evaluate import evaluate
from detkit.engine.summary import NUMBERS
from detkit.errors import DataError

Record = dict[str, Any]
Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

METRICS = tuple(name for name, (source, *_) in NUMBERS.items() if source == "precision")
"""What is compared: AP, AP50, AP75, APs, APm, APl."""

CONFIDENCE = 0.95
_THRESHOLDS = 10  # pycocotools' IoU thresholds .5:.05:.95
_RECALLS = np.linspace(0, 1, 101)
_BLOCK = 1 << 18
"""Numbers held at once per array: as many as stay in a processor's cache."""


def compare(
    truth: Record,
    a: Sequence[Record],
    b: Sequence[Record],
    *,
    analysis: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Record:
    """Metrics of two sets of detections and of ``b`` less ``a``, with intervals of 95 %.

    Args:
        truth: COCO ground truth of both; left as it is.
        a: detections in COCO's results format, as for `evaluate`.
        b: the others.
        analysis: add AP and AR by IoU and area to both.
        resamples: bootstrap draws.
        seed: of the draws.

    Returns:
        ``{"a", "b"}`` as `evaluate` gives them and ``"difference": {"bbox": {metric: {"value",
        "low", "high"}}, "segm"?: {…}, "per_class": {name: {"AP": {…}}}}``, ``"images"``,
        ``"resamples"``, ``"seed"``. ``segm`` is there where both have masks; ``per_class`` is of
        boxes. A difference is None where a metric is undefined, and so are its limits where no
        draw defines it.

    Raises:
        DataError: truth or detections are unusable.
        ValueError: fewer than one draw.
    """
    if resamples < 1:
        raise ValueError(f"compare: resamples must be at least 1, got {resamples}")
    if not truth.get("images"):
        raise DataError("truth: must have at least one image to draw, got none")
    sides = (_Side(truth, a, analysis), _Side(truth, b, analysis))
    weights = draw_weights(sides[0].scores["images"], resamples, seed)
    difference: Record = {}
    for kind in [kind for kind in sides[0].rankings if kind in sides[1].rankings]:
        drawn = [weighted_ap(side.rankings[kind], weights) for side in sides]  # (S, K, A, T) each
        difference[kind] = _differences([side.scores[kind] for side in sides], drawn)
        if kind == "bbox":
            classes = [side.scores["per_class"] for side in sides]
            difference["per_class"] = _class_differences(classes, drawn)
    return {
        "a": sides[0].scores,
        "b": sides[1].scores,
        "difference": difference,
        "images": weights.shape[1],
        "resamples": resamples,
        "seed": seed,
    }


def draw_weights(images: int, resamples: int, seed: int) -> Counts:
    """How often each image is drawn: (resamples, images), each row sums to ``images``."""
    rng = np.random.default_rng(seed)
    weights = np.empty((resamples, images), dtype=np.int64)
    for row in weights:
        row[:] = np.bincount(rng.integers(images, size=images), minlength=images)
    return weights


@dataclass(frozen=True)
class Ranking:
    """Detections of one class and area, best score first, as far as they can count.

    Most detections are misses at every IoU threshold; of those only the image matters. The other
    ones, E of them, are hits at some threshold, or count at some and are ignored at others.

    Attributes:
        images: (E,) image of each.
        hit: (T, E) matches a truth box that counts.
        counted: (T, E) is a hit or a miss, not ignored.
        misses: (F,) image of each detection that is a miss at every threshold.
        before: (E,) how many of ``misses`` stand before each of the E.
        truth: (I,) truth boxes that count, by image.
    """

    images: npt.NDArray[np.intp]
    hit: Flags
    counted: Flags
    misses: npt.NDArray[np.intp]
    before: npt.NDArray[np.intp]
    truth: Counts


class _Side:
    """Scores of one set of detections, and what is needed to score it again on other images."""

    def __init__(self, truth: Record, results: Sequence[Record], analysis: bool) -> None:
        self.rankings: dict[str, list[list[Ranking]]] = {}
        images = len({image["id"] for image in truth["images"]})

        def keep(kind: str, matches: Sequence[Record | None]) -> None:
            rows = [matches[i : i + images] for i in range(0, len(matches), images)]
            ranked = [rank(row) for row in rows]
            areas = len(AREAS)
            self.rankings[kind] = [ranked[i : i + areas] for i in range(0, len(ranked), areas)]

        self.scores = evaluate(truth, results, analysis=analysis, on_matches=keep)


def rank(matches: Sequence[Record | None]) -> Ranking:
    """Put pycocotools' matches of one class and area, one entry per image, in order of score."""
    found = [(image, match) for image, match in enumerate(matches) if match is not None]
    truth = np.zeros(len(matches), dtype=np.int64)
    for image, match in found:
        truth[image] = np.count_nonzero(np.asarray(match["gtIgnore"]) == 0)
    rows = [(image, match) for image, match in found if len(match["dtScores"])]
    if not rows:
        none, empty = np.zeros((_THRESHOLDS, 0), dtype=np.bool_), np.zeros(0, dtype=np.intp)
        return Ranking(empty, none, none, empty, empty, truth)
    scores = np.concatenate([match["dtScores"] for _, match in rows])
    order = np.argsort(-scores, kind="stable")  # equal scores stay in the order of the images
    images = np.repeat([image for image, _ in rows], [len(m["dtScores"]) for _, m in rows])[order]
    matched = np.concatenate([match["dtMatches"] for _, match in rows], axis=1)[:, order] > 0
    counted = np.concatenate([match["dtIgnore"] for _, match in rows], axis=1)[:, order] == 0
    hit = matched & counted
    varied = hit.any(0) | (counted.any(0) != counted.all(0))
    missed = counted.all(0) & ~varied
    return Ranking(
        images=images[varied],
        hit=hit[:, varied],
        counted=counted[:, varied],
        misses=images[missed],
        before=np.cumsum(missed)[varied],
        truth=truth,
    )


def weighted_ap(rankings: Sequence[Sequence[Ranking]], weights: Counts) -> Array:
    """AP of each draw, class, area and IoU threshold, (S, K, A, T); NaN where there is no truth.

    Args:
        rankings: of each class (K) and area (A).
        weights: (S, I) whole numbers, how often each draw takes each image.
    """
    values = np.empty((len(weights), len(rankings), len(rankings[0]), _THRESHOLDS))
    for k, row in enumerate(rankings):
        for a, ranking in enumerate(row):
            size = max(1, _BLOCK // max(1, len(ranking.images) + len(ranking.misses)))
            for start in range(0, len(weights), size):
                part = slice(start, start + size)
                values[part, k, a] = _average_precision(ranking, weights[part])
    return values


def _average_precision(ranking: Ranking, weights: Counts) -> Array:
    """AP (S, T) of one class and area at each threshold; NaN in draws without truth."""
    positives = weights @ ranking.truth  # (S,)
    own = weights[:, ranking.images]  # (S, E)
    missed = np.zeros((len(weights), len(ranking.misses) + 1), dtype=np.int64)
    np.cumsum(weights[:, ranking.misses], axis=1, out=missed[:, 1:])
    missed = missed[:, ranking.before]  # (S, E)
    values = np.zeros((len(weights), len(ranking.hit)))
    for t, (hit, counted) in enumerate(zip(ranking.hit, ranking.counted, strict=True)):
        if hit.any():
            seen = (np.cumsum(own * counted, axis=1) + missed)[:, hit]
            values[:, t] = _area(np.cumsum(own[:, hit], axis=1), seen, np.maximum(positives, 1))
    values[positives == 0] = np.nan
    return values


def _area(found: Counts, seen: Counts, positives: Counts) -> Array:
    """Mean of the precision at 101 recalls, (S,), as pycocotools takes it.

    Precision falls between hits, so its highest value from a recall on is that of a hit.

    Args:
        found: (S, H) truth found up to each hit.
        seen: (S, H) detections up to each hit.
        positives: (S,) truth in all, at least 1.
    """
    precision = found / (seen + np.spacing(1))
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(_RECALLS, found / positives[:, None], side="right")  # (S, H)
    steps = np.diff(reached, axis=1, prepend=0)
    return np.asarray((best * steps).sum(1) / len(_RECALLS))


def _differences(scores: Sequence[Record], drawn: Sequence[Array]) -> Record:
    """The interval of each metric, of both sides' numbers and AP values (S, K, A, T)."""
    a, b = scores
    return {
        metric: _interval(a[metric], b[metric], *(_number(values, metric) for values in drawn))
        for metric in METRICS
    }


def _class_differences(scores: Sequence[Record], drawn: Sequence[Array]) -> Record:
    """The interval of each class's AP; classes stand in the order of the K axis."""
    a, b = scores
    means = [values[:, :, 0].mean(-1) for values in drawn]  # (S, K) each
    return {
        name: {"AP": _interval(a[name]["AP"], b[name]["AP"], *(mean[:, k] for mean in means))}
        for k, name in enumerate(a)
    }


def _number(values: Array, metric: str) -> Array:
    """One of METRICS for each draw, (S,), of AP values (S, K, A, T)."""
    _, threshold, area, _ = NUMBERS[metric]
    chosen = values[:, :, area]  # (S, K, T)
    chosen = chosen if threshold is None else chosen[..., [threshold]]
    return _mean(chosen.reshape(len(values), -1))


def _mean(values: Array) -> Array:
    """Mean over the defined values of each row; NaN where there is none."""
    defined = ~np.isnan(values)
    count = defined.sum(1)
    total = np.where(defined, values, 0).sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _interval(a: float | None, b: float | None, drawn_a: Array, drawn_b: Array) -> Record:
    """``b - a`` and the limits between which CONFIDENCE of the draws lie."""
    differences = drawn_b - drawn_a
    differences = differences[~np.isnan(differences)]
    if a is None or b is None or not differences.size:
        return {"value": None, "low": None, "high": None}
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return {"value": b - a, "low": float(low), "high": float(high)}
