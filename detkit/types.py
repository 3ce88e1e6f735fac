"""The values that travel between the parts: specs, targets, batches, detections, category maps.

Letters: N batch, C channels, H W map, G truth boxes, R detections, K classes (background excluded).
Boxes are xyxy floats in input pixels; labels are 1..K with 0 background.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from detkit.errors import DataError

if TYPE_CHECKING:  # named here, never needed: reading and scoring data sets loads no torch
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class FeatureSpec:
    """Channels and stride of a map; strides are declared, never guessed from a level's number."""

    channels: int
    stride: int


@dataclass
class Target:
    """Truth of one image, after the transforms.

    Attributes:
        boxes: (G, 4) float32, xyxy in input pixels.
        labels: (G,) int64 in 1..K.
        iscrowd: (G,) bool; crowd regions are never targets, and anchors or RoIs inside them are
            not background.
        masks: (G, H, W) bool in input pixels, or None where no part of the model asks for them.
    """

    boxes: Tensor
    labels: Tensor
    iscrowd: Tensor
    masks: Tensor | None = None

    def to(self, device: torch.device | str) -> Target:
        """Copy of this target on ``device``."""
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        boxes, labels, iscrowd = (
            t.to(device, non_blocking=True) for t in (self.boxes, self.labels, self.iscrowd)
        )
        return Target(boxes, labels, iscrowd, masks)


@dataclass
class Batch:
    """Images of one step, zero-padded at right and bottom to a common size.

    Attributes:
        images: (N, 3, H, W) float32, normalised.
        sizes: (N, 2) int64 on the CPU, (height, width) of each image before padding.
        targets: N targets; empty when only detecting.
        files: N file names, for messages.
        image_ids: N dataset image ids.
        original_sizes: (N, 2) int64 on the CPU, (height, width) of each file as shown (EXIF
            applied).
    """

    images: Tensor
    sizes: Tensor
    targets: list[Target] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    image_ids: list[int | str] = field(default_factory=list)
    original_sizes: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Copy of this batch with images and targets on ``device``; sizes stay on the CPU."""
        return Batch(
            self.images.to(device, non_blocking=True),
            self.sizes,
            [t.to(device) for t in self.targets],
            self.files,
            self.image_ids,
            self.original_sizes,
        )


@dataclass
class ClassificationBatch:
    """Images (N, 3, S, S) float32, normalised, labels (N,) int64 in 0..K-1, N file names."""

    images: Tensor
    labels: Tensor
    files: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> ClassificationBatch:
        """Copy of this batch on ``device``."""
        return ClassificationBatch(
            self.images.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.files,
        )


class Detections(TypedDict):
    """What ``detect`` returns per image, best score first.

    boxes (R, 4) xyxy in the pixels of the given input image, or of the output size asked for,
    labels (R,) int64 in 1..K, scores (R,) in 0..1,
    masks (R, H, W) bool where the detector has a mask head.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: NotRequired[Tensor]


class CategoryMap:
    """The only place where dataset category ids and labels 1..K meet.

    ``ids[k - 1]`` is the dataset's id of label k and ``names[k - 1]`` its name; ids may have gaps
    and any order.
    """

    def __init__(self, names: Iterable[str], ids: Iterable[int] | None = None) -> None:
        self.names = tuple(names)
        self.ids = tuple(ids) if ids is not None else tuple(range(1, len(self.names) + 1))
        if len(self.names) != len(self.ids) or not self.names:
            raise DataError(
                f"categories: must be as many names as ids, got {self.names} and {self.ids}"
            )
        if len(set(self.names)) != len(self.names) or len(set(self.ids)) != len(self.ids):
            raise DataError(
                f"categories: names and ids must be unique, got {self.names} with ids {self.ids}"
            )
        self._labels = {category_id: k for k, category_id in enumerate(self.ids, 1)}

    def __len__(self) -> int:
        return len(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CategoryMap) and (self.names, self.ids) == (other.names, other.ids)

    def __hash__(self) -> int:
        return hash((self.names, self.ids))

    def __repr__(self) -> str:
        return f"CategoryMap({dict(zip(self.ids, self.names, strict=True))})"

    def label(self, category_id: int) -> int:
        """Label 1..K of a dataset category id; raises KeyError for an unknown id."""
        return self._labels[category_id]

    def category_id(self, label: int) -> int:
        """Dataset category id of a label 1..K."""
        return self.ids[label - 1]

    def name(self, label: int) -> str:
        """Category name of a label 1..K."""
        return self.names[label - 1]

    def to_plain(self) -> dict[str, list[Any]]:
        """Plain types for a checkpoint."""
        return {"names": list(self.names), "ids": list(self.ids)}

    @classmethod
    def from_plain(cls, plain: dict[str, list[Any]]) -> CategoryMap:
        """The map that :meth:`to_plain` wrote."""
        return cls(plain["names"], plain["ids"])
