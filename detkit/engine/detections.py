"""The detections of a model on a data set, as COCO results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detkit.engine.inference import inference
from detkit.engine.memory import explained
from detkit.types import Batch, CategoryMap, Detections

Record = dict[str, Any]


def detect_dataset(
    model: nn.Module,
    batches: Iterable[Batch],
    categories: CategoryMap,
    device: torch.device | str,
    *,
    on_batch: Callable[[Batch], None] | None = None,
) -> list[Record]:
    """Detections of ``model`` on every image, as COCO results in the pixels of the files.

    Args:
        model: has ``detect(images, sizes, output_sizes) -> list[Detections]``, labels 1..K, boxes
            and masks in pixels of images of ``output_sizes`` (of ``images`` where that is None);
            in eval mode here.
        batches: each image once; ``original_sizes`` None means that they were not resized.
        categories: labels to the data set's category ids.
        device: where the images go.
        on_batch: called after each batch, for progress.

    Returns:
        one {"image_id", "category_id", "bbox" [x, y, width, height], "score", "segmentation"?} per
        detection; boxes are clipped to the image, masks are compressed run lengths.
    """
    results: list[Record] = []
    with inference(model):
        for batch in batches:
            with explained(_evaluating(batch), [batch], training=False):
                found = model.detect(  # type: ignore[operator]
                    batch.images.to(device), batch.sizes, batch.original_sizes
                )
                results.extend(_batch_results(batch, found, categories))
            if on_batch is not None:
                on_batch(batch)
    return results


def _evaluating(batch: Batch) -> str:
    return f"evaluation of {', '.join(batch.files)}" if batch.files else "evaluation"


def _batch_results(
    batch: Batch, detections: Sequence[Detections], categories: CategoryMap
) -> list[Record]:
    if not len(detections) == len(batch.image_ids) == len(batch.sizes):
        raise ValueError(
            f"detect_dataset: each of {len(batch.sizes)} images must have an id and detections, "
            f"got {len(batch.image_ids)} ids and {len(detections)} detections"
        )
    shown = batch.sizes if batch.original_sizes is None else batch.original_sizes
    return [
        result
        for image_id, found, size in zip(batch.image_ids, detections, shown.tolist(), strict=True)
        for result in _image_results(image_id, found, size, categories)
    ]


def _image_results(
    image_id: int | str, found: Detections, size: list[int], categories: CategoryMap
) -> list[Record]:
    """COCO results of one image of ``size`` (height, width), in whose pixels ``found`` is."""
    boxes = found["boxes"].detach().cpu().double()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)  # xyxy to xywh
    labels, scores = found["labels"].tolist(), found["scores"].tolist()
    if labels and not 1 <= min(labels) <= max(labels) <= len(categories):
        raise ValueError(
            f"detect_dataset: labels must be in 1..{len(categories)}, "
            f"got {min(labels)}..{max(labels)}"
        )
    ids = [categories.category_id(label) for label in labels]
    results: list[Record] = [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for category_id, box, score in zip(ids, boxes.tolist(), scores, strict=True)
    ]
    if "masks" in found:
        for result, mask in zip(results, found["masks"], strict=True):
            result["segmentation"] = _encode(mask[: size[0], : size[1]].cpu())
    return results


def _encode(mask: Tensor) -> Record:
    from pycocotools import mask as coder

    code = coder.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": [int(s) for s in code["size"]], "counts": code["counts"].decode("ascii")}
