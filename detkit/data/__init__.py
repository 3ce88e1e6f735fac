"""Data sets in the layouts people have, read, checked and turned into batches.

Batches need torch, which is imported with the first of their names.
"""

from typing import TYPE_CHECKING

from detkit.data.dataset import ClassificationDataset, DetectionDataset
from detkit.data.open import open_classification, open_detection

if TYPE_CHECKING:
    from detkit.data.loader import eval_batches, steps_per_epoch, train_batches

__all__ = [
    "ClassificationDataset",
    "DetectionDataset",
    "eval_batches",
    "open_classification",
    "open_detection",
    "steps_per_epoch",
    "train_batches",
]


def __getattr__(name: str) -> object:
    if name in __all__:  # those above are found without this function
        from detkit.data import loader

        return getattr(loader, name)
    raise AttributeError(f"module 'detkit.data' has no attribute {name!r}")
