"""Data sets in the layouts people have, read, checked and turned into batches."""

from detkit.data.dataset import ClassificationDataset, DetectionDataset
from detkit.data.loader import eval_batches, steps_per_epoch, train_batches
from detkit.data.open import open_classification, open_detection

__all__ = [
    "ClassificationDataset",
    "DetectionDataset",
    "eval_batches",
    "open_classification",
    "open_detection",
    "steps_per_epoch",
    "train_batches",
]
