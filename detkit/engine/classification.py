"""Top-1 accuracy of a classifier, over all images and per class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from detkit.engine.inference import inference
from detkit.engine.memory import explained
from detkit.errors import DataError
from detkit.types import ClassificationBatch


def top1(
    model: nn.Module,
    batches: Iterable[ClassificationBatch],
    device: torch.device | str,
    *,
    names: Sequence[str] | None = None,
    on_batch: Callable[[ClassificationBatch], None] | None = None,
) -> dict[str, Any]:
    """Share of images whose best class is the true one.

    Args:
        model: has ``classify(images) -> logits (N, K)``; put in eval mode here.
        batches: each image once.
        device: where the images go.
        names: the K class names; without them classes are called "0", "1", …
        on_batch: called after each batch, for progress.

    Returns:
        {"top1": value in 0..1, "images": n, "per_class": {name: {"top1": value, "images": n}}};
        a class without images has None.

    Raises:
        DataError: there are no images.
    """
    right: list[int] = []
    total: list[int] = []
    with inference(model):
        for batch in batches:
            with explained("evaluation", [batch], training=False):
                logits = model.classify(batch.images.to(device))  # type: ignore[operator]
            right, total = _count(logits.cpu(), batch.labels.cpu(), right, total)
            if on_batch is not None:
                on_batch(batch)
    if not sum(total):
        raise DataError("evaluation: there must be at least one image, got none")
    called = [str(k) for k in range(len(total))] if names is None else list(names)
    per_class = {
        name: {"top1": r / n if n else None, "images": n}
        for name, r, n in zip(called, right, total, strict=True)
    }
    return {"top1": sum(right) / sum(total), "images": sum(total), "per_class": per_class}


def _count(
    logits: torch.Tensor, labels: torch.Tensor, right: list[int], total: list[int]
) -> tuple[list[int], list[int]]:
    """Right answers and images per class, with a batch added; a non-finite row is never right."""
    classes = logits.shape[1]
    correct = (logits.argmax(dim=1) == labels) & torch.isfinite(logits).all(dim=1)  # (N,)
    counted = torch.bincount(labels, minlength=classes).tolist()
    hit = torch.bincount(labels[correct], minlength=classes).tolist()
    before = zip(right or [0] * classes, total or [0] * classes, strict=True)
    pairs = [(r + h, n + c) for (r, n), h, c in zip(before, hit, counted, strict=True)]
    return [r for r, _ in pairs], [n for _, n in pairs]
