"""Pooling of regions of interest: from one map, or from the level of a pyramid that suits each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from detkit.ops import boxes as box_ops
from detkit.ops.roi_align import roi_align
from detkit.types import FeatureSpec


class RoiPool(Protocol):
    """Features of RoIs on one map."""

    def __call__(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        """(R, D, side, side) of a map (N, C, H, W), rois (R, 5) and ``scale`` = 1 / stride."""

    def shape(self, channels: int) -> tuple[int, int, int]:
        """(D, side, side) that a map of so many channels gives."""


@dataclass(frozen=True)
class Align:
    """RoIAlign (He et al., 2017).

    Attributes:
        resolution: Bins per side.
        sampling_ratio: Samples per bin and axis; 0 adapts to the RoI's size.
        aligned: Half-pixel shift.
    """

    resolution: int
    sampling_ratio: int
    aligned: bool

    def __call__(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        """(R, C, resolution, resolution)."""
        return roi_align(
            features,
            rois,
            self.resolution,
            spatial_scale=scale,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
        )

    def shape(self, channels: int) -> tuple[int, int, int]:
        """(channels, resolution, resolution)."""
        return channels, self.resolution, self.resolution


class RoiPooler(nn.Module):
    """Pools each box from the level that its size alone picks, so levels may share a stride.

    Level k = floor(4 + log2(side / canonical_size)), side = sqrt(w * h), within the levels given.

    Args:
        specs: Maps ``p2``, ``p3``, ... by name, finest first; one alone serves every box.
        pool: Pooling on one map.
        canonical_size: Side in pixels of the boxes that go to level 4.
    """

    def __init__(
        self, specs: Mapping[str, FeatureSpec], pool: RoiPool, canonical_size: float = 224.0
    ) -> None:
        super().__init__()
        self.levels = {int(name[1:]): name for name in specs}
        self.scales = [1.0 / spec.stride for spec in specs.values()]
        self.pool = pool
        self.canonical_size = canonical_size
        self.out_shape = pool.shape(next(iter(specs.values())).channels)

    def assign(self, boxes: Tensor) -> Tensor:
        """Level number (R,) of each box (R, 4)."""
        side = box_ops.area(boxes).clamp(min=0).sqrt()
        # The addend keeps a side of canonical_size / 2 on its level if the logarithm rounds down.
        level = torch.floor(4 + torch.log2(side / self.canonical_size) + 1e-6)
        level = level.nan_to_num(nan=0.0)  # a NaN box pools NaN on whatever level
        return level.clamp(min(self.levels), max(self.levels)).to(torch.int64)

    def order(self, rois: Tensor) -> Tensor | None:
        """Indices (R,) that sort rois (R, 5) by level; None where one level serves them all."""
        if len(self.levels) == 1:
            return None
        return self.assign(rois[:, 1:]).argsort(stable=True)

    def forward(
        self, features: Mapping[str, Tensor], rois: Tensor, in_order: bool = False
    ) -> Tensor:
        """Pooled features (R, *out_shape) of rois (R, 5): image index, xyxy.

        Args:
            features: Maps by level.
            rois: Image index and xyxy in input pixels.
            in_order: The rois are sorted as :meth:`order` sorts them, so that the features, which
                are large, need not be put in order here and their gradients in the way back.
        """
        maps = [features[name] for name in self.levels.values()]
        if len(maps) == 1:
            return self.pool(maps[0], rois, self.scales[0])
        level = self.assign(rois[:, 1:])
        where = [(level == number).nonzero().flatten() for number in self.levels]
        parts = [
            self.pool(x, rois[index], scale)
            for x, index, scale in zip(maps, where, self.scales, strict=True)
        ]
        pooled = torch.cat(parts)
        return pooled if in_order else pooled.index_select(0, torch.cat(where).argsort())

    def blank(self, features: Mapping[str, Tensor], count: int) -> Tensor:
        """Uninitialised pooled features of ``count`` RoIs, to run what follows without boxes."""
        return features[next(iter(self.levels.values()))].new_empty(count, *self.out_shape)


def to_rois(boxes: Sequence[Tensor]) -> Tensor:
    """(R, 5) image index and xyxy of the boxes (R_i, 4) of each image."""
    rows = [torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(boxes)]
    return torch.cat(rows)
