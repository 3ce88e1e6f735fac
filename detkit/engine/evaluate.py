"""COCO metrics of a list of detections, and the detections of a model on a data set.

pycocotools does the matching, in this file only. Before it sees the input, truth and results are normalised (`truth.py`,
`results.py`) and all ids are renumbered from 1, because it takes a match with annotation id 0 for no match and counts a
repeated id twice as the last of them. On clean input the numbers are its own.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from detkit.engine.analysis import analyse
from detkit.engine.results import normalise_results
from detkit.engine.truth import normalise_truth
from detkit.engine.voc import evaluate_voc
from detkit.errors import DataError
from detkit.types import Batch, CategoryMap, Detections

__all__ = ["detect_dataset", "evaluate", "normalise_truth"]

Record = dict[str, Any]
Array = npt.NDArray[np.float64]

METRICS = ("coco", "voc07", "voc12")

# number -> (from precision or recall, index of the IoU threshold or all, index of the area, index of the most detections)
_NUMBERS: dict[str, tuple[str, int | None, int, int]] = {
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


def evaluate(
    truth: Record,
    results: Sequence[Record],
    *,
    analysis: bool = False,
    metric: str = "coco",
    iou_types: Sequence[str] | None = None,
) -> Record:
    """Score detections against COCO ground truth.

    Args:
        truth: COCO ground truth ({"images", "annotations", "categories"}); left as it is.
        results: detections in COCO's results format, boxes in original pixels; left as they are.
        analysis: add AP and AR by IoU and area (DetNet, tables 3 and 4).
        metric: "coco", or "voc07" / "voc12" for the VOC mean average precision at IoU 0.5.
        iou_types: "bbox" and/or "segm"; by default boxes, and masks where both truth and results have them.

    Returns:
        For "coco" ``{"bbox": {AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl}, "segm"?: {…},
        "per_class": {name: {…}}, "images": n, "detections": n, "normalised": [line, …], "analysis"?: {…}}``, all values
        in 0..1 and None where there is no truth to score against. ``per_class`` and ``analysis`` are of the first IoU
        type. For VOC ``{metric: {"mAP": v}, "per_class": {name: {"AP": v}}, "images", "detections", "normalised"}``.
        As in pycocotools, a detection that has a box is small, medium or large by its box, for masks too.

    Raises:
        DataError: truth or results are unusable; the message says where.
    """
    if metric not in METRICS:
        raise ValueError(f"evaluate: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    truth, notes = normalise_truth(truth)
    results, more = normalise_results(results, truth)
    counts = {"images": len(truth["images"]), "detections": len(results), "normalised": notes + more}
    if metric != "coco":
        year = 2007 if metric == "voc07" else 2012
        scores = evaluate_voc(truth, results, year=year)
        return {metric: {"mAP": scores["mAP"]}, "per_class": scores["per_class"], **counts}
    kinds = tuple(iou_types) if iou_types is not None else _iou_types(truth, results)
    if not kinds or not set(kinds) <= {"bbox", "segm"}:
        raise ValueError(f"evaluate: iou_types must be bbox and/or segm, got {kinds}")
    tables = {kind: _tables(truth, results, kind) for kind in kinds}
    scores = {kind: _numbers(table) for kind, table in tables.items()}
    scores["per_class"] = _per_class(tables[kinds[0]], truth)
    scores.update(counts)
    if analysis:
        agnostic = _tables(truth, results, kinds[0], use_categories=False)
        scores["analysis"] = analyse(tables[kinds[0]], agnostic)
    return scores


def _iou_types(truth: Record, results: Sequence[Record]) -> tuple[str, ...]:
    masks = all(any(r.get("segmentation") for r in rows) for rows in (truth["annotations"], results))
    return ("bbox", "segm") if masks else ("bbox",)


def _tables(truth: Record, results: Sequence[Record], kind: str, use_categories: bool = True) -> dict[str, Array]:
    """pycocotools' precision (T, R, K, A, M) and recall (T, K, A, M) arrays; -1 where there is no truth.

    T IoU thresholds .5:.05:.95, R recall points 0:.01:1, K classes in order of category id (one if they do not count),
    A areas all, small, medium, large, M most detections 1, 10, 100.
    """
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports on stdout, which may be our JSON
        images, annotations, detections = _renumbered(truth, results, kind)
        names = [{"id": k} for k in range(1, len(truth["categories"]) + 1)]
        scorer = COCOeval(_coco(images, annotations, names), _coco(images, detections, names), kind)
        scorer.params.useCats = int(use_categories)
        if not use_categories:
            scorer.params.maxDets = [100]
        scorer.evaluate()
        scorer.accumulate()
    return {key: scorer.eval[key] for key in ("precision", "recall")}


def _coco(images: list[Record], annotations: list[Record], categories: list[Record]) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
    coco.createIndex()
    return coco


def _renumbered(truth: Record, results: Sequence[Record], kind: str) -> tuple[list[Record], list[Record], list[Record]]:
    """Images, annotations and detections with ids from 1; the order of images and categories is that of their ids."""
    order = sorted(truth["images"], key=lambda image: (isinstance(image["id"], str), image["id"]))
    image_ids = {image["id"]: n for n, image in enumerate(order, 1)}
    category_ids = {c: k for k, c in enumerate(sorted(c["id"] for c in truth["categories"]), 1)}
    images = [{"id": n, **_size(image, kind)} for n, image in enumerate(order, 1)]

    def renumber(n: int, row: Record, box: Sequence[float], area: float, score: float, crowd: int) -> Record:
        ids = {"id": n, "image_id": image_ids[row["image_id"]], "category_id": category_ids[row["category_id"]]}
        shape = {"segmentation": row.get("segmentation") or _rectangle(box)} if kind == "segm" else {}
        return {**ids, "bbox": list(box), "area": area, "score": score, "iscrowd": crowd, **shape}

    annotations = [
        renumber(n, a, a["bbox"], a["area"], 0.0, a["iscrowd"]) for n, a in enumerate(truth["annotations"], 1)
    ]
    detections = [renumber(n, r, *_box_and_area(r), r["score"], 0) for n, r in enumerate(results, 1)]
    return images, annotations, detections


def _size(image: Record, kind: str) -> Record:
    if kind == "bbox":
        return {}
    if "height" not in image or "width" not in image:
        raise DataError(f"truth: images need height and width to score masks, image {image['id']!r} has none")
    return {"height": image["height"], "width": image["width"]}


def _rectangle(box: Sequence[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x, y + h, x + w, y + h, x + w, y]]


def _box_and_area(result: Record) -> tuple[Sequence[float], float]:
    """Box and area of a detection as pycocotools takes them: those of the box, else those of the mask."""
    box = result.get("bbox")
    if box:
        return box, box[2] * box[3]
    from pycocotools import mask

    segmentation = result["segmentation"]
    return mask.toBbox(segmentation).tolist(), float(mask.area(segmentation))


def _numbers(table: dict[str, Array]) -> dict[str, float | None]:
    """The twelve numbers, averaged over the classes that have truth."""
    numbers = {}
    for name, (source, threshold, area, most) in _NUMBERS.items():
        values = table[source][..., area, most]  # precision (T, R, K) or recall (T, K)
        values = values if threshold is None else values[threshold]
        values = values[values > -1]
        numbers[name] = float(values.mean()) if values.size else None
    return numbers


def _per_class(table: dict[str, Array], truth: Record) -> dict[str, dict[str, float | None]]:
    ordered = sorted(truth["categories"], key=lambda c: c["id"])
    return {
        category["name"]: _numbers({"precision": table["precision"][:, :, [k]], "recall": table["recall"][:, [k]]})
        for k, category in enumerate(ordered)
    }


def detect_dataset(
    model: nn.Module,
    batches: Iterable[Batch],
    categories: CategoryMap,
    device: torch.device | str,
    *,
    on_batch: Callable[[Batch], None] | None = None,
) -> list[Record]:
    """Detections of ``model`` on every image, as COCO results in the pixels of the original files.

    Args:
        model: has ``detect(images, sizes) -> list[Detections]``, labels 1..K; put in eval mode here and back after.
        batches: each image once; ``original_sizes`` None means that the images were not resized.
        categories: labels to the data set's category ids.
        device: where the images go.
        on_batch: called after each batch, for progress.

    Returns:
        one {"image_id", "category_id", "bbox" [x, y, width, height], "score", "segmentation"?} per detection; boxes are
        clipped to the image, masks are compressed run lengths.
    """
    was_training = model.training
    model.eval()
    results: list[Record] = []
    try:
        # not inference_mode: anchors a model keeps from here could not be used in training any more
        with torch.no_grad():
            for batch in batches:
                detections = model.detect(batch.images.to(device), batch.sizes)  # type: ignore[operator]
                results.extend(_batch_results(batch, detections, categories))
                if on_batch is not None:
                    on_batch(batch)
    finally:
        model.train(was_training)
    return results


def _batch_results(batch: Batch, detections: Sequence[Detections], categories: CategoryMap) -> list[Record]:
    if not len(detections) == len(batch.image_ids) == len(batch.sizes):
        raise ValueError(
            f"detect_dataset: detect must give one result for each of {len(batch.sizes)} images "
            f"with ids, got {len(detections)} results and {len(batch.image_ids)} ids"
        )
    original_sizes = batch.sizes if batch.original_sizes is None else batch.original_sizes
    results = []
    for image_id, found, size, original in zip(
        batch.image_ids, detections, batch.sizes.tolist(), original_sizes.tolist(), strict=True
    ):
        results.extend(_image_results(image_id, found, size, original, categories))
    return results


def _image_results(
    image_id: int | str, found: Detections, size: list[int], original: list[int], categories: CategoryMap
) -> list[Record]:
    """COCO results of one image; ``size`` and ``original`` are (height, width) as detected and as on disk."""
    boxes = original_boxes(found["boxes"], size, original)
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)  # xyxy to xywh
    labels = found["labels"].tolist()
    if labels and not 1 <= min(labels) <= max(labels) <= len(categories):
        raise ValueError(f"detect_dataset: labels must be in 1..{len(categories)}, got {min(labels)}..{max(labels)}")
    results = [
        {"image_id": image_id, "category_id": categories.category_id(label), "bbox": box, "score": score}
        for label, box, score in zip(labels, boxes.tolist(), found["scores"].tolist(), strict=True)
    ]
    if "masks" in found:
        for result, mask in zip(results, found["masks"], strict=True):
            result["segmentation"] = _encode(original_mask(mask, size, original))
    return results


def original_boxes(boxes: Tensor, size: Sequence[int], original: Sequence[int]) -> Tensor:
    """Boxes (R, 4) xyxy of an image resized to ``size`` (height, width), in pixels of its ``original`` size, clipped.

    Returns float64 on the CPU; each axis has its own factor, because the resized sides are whole pixels.
    """
    limits = torch.tensor([original[1], original[0]] * 2, dtype=torch.float64)
    given = torch.tensor([size[1], size[0]] * 2, dtype=torch.float64)
    scaled = boxes.detach().cpu().double() * (limits / given)
    return torch.minimum(scaled.clamp(min=0), limits)


def original_mask(mask: Tensor, size: Sequence[int], original: Sequence[int]) -> Tensor:
    """Mask (H, W) of a padded, resized image as bool (height, width) of the original; bilinear, threshold one half."""
    cut = mask[: size[0], : size[1]].detach().cpu().float()[None, None]  # (1, 1, h, w)
    resized = nn.functional.interpolate(cut, size=tuple(original), mode="bilinear", align_corners=False)
    return resized[0, 0] >= 0.5


def _encode(mask: Tensor) -> Record:
    from pycocotools import mask as coder

    code = coder.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": [int(s) for s in code["size"]], "counts": code["counts"].decode("ascii")}
