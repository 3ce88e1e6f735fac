"""COCO metrics of a list of detections; no torch.

pycocotools does the matching, or hotcoco where it is installed, which gives the very same numbers
many times as fast; both are used in this file only. Before they see them, truth and results are
normalised (`truth.py`, `results.py`) and all ids renumbered from 1: pycocotools takes a match with
annotation id 0 for no match, and counts a repeated id as that many times the last of them. On clean
input the numbers are its own.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from detkit.engine.analysis import analyse
from detkit.engine.results import normalise_results
from detkit.engine.summary import numbers, per_class
from detkit.engine.truth import normalise_truth
from detkit.engine.voc import evaluate_voc
from detkit.errors import DataError
from detkit.garbage import no_collection

__all__ = ["Scorer", "evaluate", "normalise_truth"]

Record = dict[str, Any]
Array = npt.NDArray[np.float64]
OnMatches = Callable[[str, Sequence[Record | None]], None]

METRICS = ("coco", "voc07", "voc12")


def evaluate(
    truth: Record,
    results: Sequence[Record],
    *,
    analysis: bool = False,
    metric: str = "coco",
    iou_types: Sequence[str] | None = None,
    on_matches: OnMatches | None = None,
    source: str = "results",
) -> Record:
    """Score detections against COCO ground truth.

    Args:
        truth: COCO ground truth {"images", "annotations", "categories"}; left as it is.
        results: detections in COCO's results format, in original pixels; left as they are.
        analysis: add AP and AR by IoU and area (DetNet, tables 3 and 4).
        metric: "coco", or "voc07" / "voc12" for VOC's mean average precision at IoU 0.5.
        iou_types: "bbox" and/or "segm"; by default boxes, and masks where truth and results have
            them (no results at all count as both).
        on_matches: called with each IoU type and pycocotools' matches of each class, area and
            image (in this order, the image changing fastest; images in order of their ids), for
            what needs more than the numbers; they are made for "coco" only.
        source: name of the detections in messages.

    Returns:
        For "coco" ``{"bbox": {AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl},
        "segm"?: {…}, "per_class": {name: {…}}, "images": n, "detections": n,
        "normalised": [line, …], "analysis"?: {…}}``: values in 0..1, None where there is no
        truth to score against; ``per_class`` and ``analysis`` are of the first IoU type.
        For VOC ``{metric: {"mAP": v}, "per_class": {name: {"AP": v}}, "images", "detections",
        "normalised"}``.
        As in pycocotools, a detection with a box is small, medium or large by its box, for masks
        too; one without a box by its mask.

    Raises:
        DataError: truth or results are unusable; the message says where.
        ValueError: an unknown metric or IoU type.
    """
    return Scorer(truth, metric=metric, iou_types=iou_types)(
        results, analysis=analysis, on_matches=on_matches, source=source
    )


class Scorer:
    """Many lists of detections against one truth, which is made ready once.

    Args:
        truth: as of :func:`evaluate`.
        metric: as of :func:`evaluate`.
        iou_types: as of :func:`evaluate`.

    Raises:
        DataError: the truth is unusable; the message says where.
        ValueError: an unknown metric or IoU type.
    """

    def __init__(
        self, truth: Record, *, metric: str = "coco", iou_types: Sequence[str] | None = None
    ) -> None:
        if metric not in METRICS:
            known = ", ".join(METRICS)
            raise ValueError(f"evaluate: metric must be one of {known}, got {metric!r}")
        if iou_types is not None and not (iou_types and set(iou_types) <= {"bbox", "segm"}):
            raise ValueError(f"evaluate: iou_types must be bbox and/or segm, got {iou_types}")
        self._metric = metric
        self._kinds = iou_types
        self._truth, self._notes = normalise_truth(truth)
        self._known: dict[str, _Known] = {}

    def __call__(
        self,
        results: Sequence[Record],
        *,
        analysis: bool = False,
        on_matches: OnMatches | None = None,
        source: str = "results",
    ) -> Record:
        """Scores of ``results``, as :func:`evaluate` gives them."""
        truth = self._truth
        with no_collection():
            detections, more = normalise_results(results, truth, source=source)
        counts = {"images": len(truth["images"]), "detections": len(detections)}
        if self._metric == "coco":
            kinds = _iou_types(truth, detections) if self._kinds is None else tuple(self._kinds)
            scores = self._coco_scores(detections, kinds, analysis, on_matches)
            if "segm" in kinds:
                more = more + _boxes_as_masks(truth, detections)
        else:
            boxed = [{**d, "bbox": _box(d, _sizes(truth))} for d in detections]
            voc = evaluate_voc(truth, boxed, year=2007 if self._metric == "voc07" else 2012)
            scores = {self._metric: {"mAP": voc["mAP"]}, "per_class": voc["per_class"]}
        return {**scores, **counts, "normalised": self._notes + more}

    def _coco_scores(
        self,
        detections: list[Record],
        kinds: tuple[str, ...],
        analysis: bool,
        on_matches: OnMatches | None,
    ) -> Record:
        for kind in kinds:
            if kind not in self._known:
                self._known[kind] = _Known(self._truth, kind)
        known = {kind: self._known[kind] for kind in kinds}
        tables = {k: known[k].tables(detections, on_matches=on_matches) for k in kinds}
        scores: Record = {kind: numbers(table) for kind, table in tables.items()}
        names = [c["name"] for c in sorted(self._truth["categories"], key=lambda c: c["id"])]
        scores["per_class"] = per_class(tables[kinds[0]], names)
        if analysis:
            agnostic = known[kinds[0]].tables(detections, use_categories=False)
            scores["analysis"] = analyse(tables[kinds[0]], agnostic)
        return scores


def _iou_types(truth: Record, detections: list[Record]) -> tuple[str, ...]:
    found = not detections or any(row.get("segmentation") for row in detections)
    masks = found and any(row.get("segmentation") for row in truth["annotations"])
    return ("bbox", "segm") if masks else ("bbox",)


def _boxes_as_masks(truth: Record, detections: list[Record]) -> list[str]:
    rows = {"annotations": truth["annotations"], "detections": detections}
    lacking = {k: sum(not r.get("segmentation") for r in v) for k, v in rows.items()}
    return [f"{k} without a mask, their box taken as one: {n}" for k, n in lacking.items() if n]


class _Known:
    """The truth as pycocotools wants it, all ids counted from 1.

    Images and categories keep the order of their ids, which decides between equal scores.
    """

    def __init__(self, truth: Record, kind: str) -> None:
        order = sorted(
            (image["id"] for image in truth["images"]), key=lambda i: (isinstance(i, str), i)
        )
        self.kind = kind
        self.image_ids = {image: n for n, image in enumerate(order, 1)}
        categories = sorted(c["id"] for c in truth["categories"])
        self.category_ids = {c: k for k, c in enumerate(categories, 1)}
        self.sizes = sizes = _sizes(truth)
        self.names = [{"id": k, "name": str(k)} for k in range(1, len(categories) + 1)]
        self.images = [
            {"id": n, "height": sizes[i][0], "width": sizes[i][1]} if i in sizes else {"id": n}
            for i, n in self.image_ids.items()
        ]
        self.rows = [self._annotation(n, a) for n, a in enumerate(truth["annotations"], 1)]
        self._indexed: dict[str, Any] = {}

    def tables(
        self,
        detections: list[Record],
        use_categories: bool = True,
        on_matches: OnMatches | None = None,
    ) -> dict[str, Array]:
        """Precision (T, R, K, A, M) and recall (T, K, A, M); -1 where there is no truth.

        T IoU thresholds .5:.05:.95, R recall points 0:.01:1, K classes in order of category id (a
        single one where categories do not count), A areas all, small, medium, large, M most
        detections 1, 10, 100 (100 alone where categories do not count).
        """
        library = "pycocotools" if on_matches is not None else matching_library()
        with no_collection():
            found = [self._detection(n, d) for n, d in enumerate(detections, 1)]
        coco = self._coco(library, found)
        if library not in self._indexed:
            self._indexed[library] = self._coco(library, self.rows)
        with _quiet():
            scorer = _coco_eval(library)(self._indexed[library], coco, self.kind)
            if not use_categories:
                scorer.params.useCats = 0
                scorer.params.maxDets = [100]
            scorer.evaluate()
            scorer.accumulate()
        if on_matches is not None:
            on_matches(self.kind, scorer.evalImgs)
        return {key: np.asarray(scorer.eval[key]) for key in ("precision", "recall")}

    def _coco(self, library: str, rows: list[Record]) -> Any:
        """The library's index of annotations or detections."""
        coco = import_module("hotcoco" if library == "hotcoco" else "pycocotools.coco").COCO()
        coco.dataset = {"images": self.images, "annotations": rows, "categories": self.names}
        with _quiet():
            coco.createIndex()
        return coco

    def _row(self, n: int, record: Record) -> Record:
        box = _box(record, self.sizes)
        new = {
            "id": n,
            "image_id": self.image_ids[record["image_id"]],
            "category_id": self.category_ids[record["category_id"]],
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        if self.kind == "segm":
            new["segmentation"] = _mask(record, box, self.sizes)
        return new

    def _annotation(self, n: int, record: Record) -> Record:
        return self._row(n, record) | {k: record[k] for k in ("area", "iscrowd") if k in record}

    def _detection(self, n: int, record: Record) -> Record:
        new = self._row(n, record)
        new["score"] = record["score"]
        if not record.get("bbox"):
            new["area"] = _mask_area(record, self.sizes)
        return new


def matching_library() -> str:
    """``hotcoco`` where it is installed (the extra ``fast-eval``), else ``pycocotools``.

    Who matched whom always comes from pycocotools: hotcoco lists it in another order.
    """
    return "hotcoco" if find_spec("hotcoco") else "pycocotools"


def _coco_eval(library: str) -> Any:
    return import_module("hotcoco" if library == "hotcoco" else "pycocotools.cocoeval").COCOeval


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """Keep silent what pycocotools prints on stdout, which may be our JSON."""
    return contextlib.redirect_stdout(io.StringIO())


Sizes = dict[int | str, tuple[int, int]]


def _sizes(truth: Record) -> Sizes:
    """(height, width) by image id, of the images that state them."""
    stated = (i for i in truth["images"] if i.get("height") and i.get("width"))
    return {i["id"]: (i["height"], i["width"]) for i in stated}


def _box(record: Record, sizes: Sizes) -> list[float]:
    """Its box, or that around its mask."""
    if record.get("bbox"):
        return list(record["bbox"])
    from pycocotools import mask  # here: on half a million boxes the import alone takes a second

    return [float(v) for v in mask.toBbox(_mask(record, [], sizes))]


def _mask_area(record: Record, sizes: Sizes) -> float:
    from pycocotools import mask

    return float(mask.area(_mask(record, [], sizes)))


def _mask(record: Record, box: list[float], sizes: Sizes) -> Record:
    """Compressed run lengths of its mask, or of its box where it has none."""
    from pycocotools import mask

    shape = record.get("segmentation")
    if isinstance(shape, dict) and not isinstance(shape["counts"], list):
        return shape
    if record["image_id"] not in sizes:
        raise DataError(f"truth: image {record['image_id']!r} must have height and width, got none")
    height, width = sizes[record["image_id"]]
    if isinstance(shape, dict):
        return dict(mask.frPyObjects(shape, height, width))
    if not shape:
        x, y, w, h = box
        shape = [[x, y, x, y + h, x + w, y + h, x + w, y]]
    far = 10 * max(height, width)  # pycocotools follows outlines pixel by pixel and crashes on 1e30
    near = [[min(max(v, -far), far) for v in polygon] for polygon in shape]
    return dict(mask.merge(mask.frPyObjects(near, height, width)))
