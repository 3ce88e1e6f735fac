"""Images and annotations of a split as flat arrays.

Loader processes share the parent's memory until they write to it, and reading a Python object
writes its reference count. Millions of small objects would therefore be copied into every process
bit by bit; a few arrays are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class PackedJson:
    """A read-only list of JSON values in two arrays: the bytes of all, and where each starts."""

    def __init__(self, values: Iterable[Any]) -> None:
        pieces = [json.dumps(v, separators=(",", ":")).encode() for v in values]
        lengths = np.array([len(p) for p in pieces], dtype=np.int64)
        self.data: NDArray[np.uint8] = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        self.starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return json.loads(self.data[self.starts[index] : self.starts[index + 1]].tobytes())

    def take(self, indices: Iterable[int]) -> PackedJson:
        """The values at ``indices``, in that order."""
        return PackedJson(self[int(i)] for i in indices)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True, eq=False)
class Records:
    """What the annotation files say about the I usable images and A usable objects of a split.

    Attributes:
        image_ids: I ids, integers or strings.
        files: I file names relative to their image folder.
        roots: (I,) int16, which image folder.
        sizes: (I, 2) int32, (height, width) in the pixel grid the boxes are in.
        as_stored: (I,) bool, True where the boxes are in the grid of the stored pixels, so that
            an EXIF orientation must not be applied.
        first: (I + 1,) int64; the annotations of image i are ``first[i]:first[i + 1]``.
        annotation_ids: (A,) int64, unique, not 0.
        bboxes: (A, 4) float64, x, y, width, height in pixels, as the file has them (not clipped).
        labels: (A,) int64 in 1..K.
        areas: (A,) float64, square pixels.
        iscrowd: (A,) bool.
        difficult: (A,) bool (VOC).
        segmentations: A values: polygons, RLE, or null.
    """

    image_ids: PackedJson
    files: PackedJson
    roots: NDArray[np.int16]
    sizes: NDArray[np.int32]
    as_stored: NDArray[np.bool_]
    first: NDArray[np.int64]
    annotation_ids: NDArray[np.int64]
    bboxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    iscrowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    segmentations: PackedJson

    def __len__(self) -> int:
        return len(self.image_ids)

    def take(self, indices: Sequence[int]) -> Records:
        """Images ``indices`` with their annotations, in that order."""
        chosen = np.array(indices, dtype=np.int64)
        counts = np.diff(self.first)[chosen]
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        spans = [np.arange(self.first[i], self.first[i + 1]) for i in chosen]
        rows = np.concatenate([*spans, np.empty(0, np.int64)]).astype(np.int64)
        return Records(
            image_ids=self.image_ids.take(chosen),
            files=self.files.take(chosen),
            roots=self.roots[chosen],
            sizes=self.sizes[chosen],
            as_stored=self.as_stored[chosen],
            first=first,
            annotation_ids=self.annotation_ids[rows],
            bboxes=self.bboxes[rows],
            labels=self.labels[rows],
            areas=self.areas[rows],
            iscrowd=self.iscrowd[rows],
            difficult=self.difficult[rows],
            segmentations=self.segmentations.take(rows),
        )

    def of_image(self, index: int) -> slice:
        """Where the annotations of image ``index`` lie in the flat arrays."""
        return slice(int(self.first[index]), int(self.first[index + 1]))

    def boxes(self, index: int) -> NDArray[np.float64]:
        """(G, 4) xyxy boxes of image ``index``, clipped to the image."""
        xywh = self.bboxes[self.of_image(index)]
        height, width = (int(v) for v in self.sizes[index])
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        clipped: NDArray[np.float64] = np.clip(xyxy, 0, [width, height, width, height])
        return clipped
