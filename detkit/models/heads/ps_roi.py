"""Position-sensitive pooling for heads: PS-RoIAlign, or R-FCN's pooling over whole cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from detkit.config import BoxConfig
from detkit.errors import ConfigError
from detkit.models.heads.roi import RoiPool
from detkit.ops import ps_roi_align, ps_roi_pool


@dataclass(frozen=True)
class PsAlign:
    """PS-RoIAlign (Light-Head R-CNN, section 3.3; the reduction is that of its authors' code).

    Attributes:
        resolution: Bins per side.
        reduce: max or avg of a bin's samples.
        offset: Cells subtracted from the scaled box coordinates.
        sampling_ratio: Samples per bin and axis; 0 adapts to the RoI's size ("avg" alone).
    """

    resolution: int
    reduce: Literal["max", "avg"]
    offset: float
    sampling_ratio: int = 2

    def __call__(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        """(R, C / resolution^2, resolution, resolution)."""
        return ps_roi_align(
            features,
            rois,
            self.resolution,
            spatial_scale=scale,
            sampling_ratio=self.sampling_ratio,
            reduce=self.reduce,
            offset=self.offset,
        )

    def shape(self, channels: int) -> tuple[int, int, int]:
        """(channels / resolution^2, resolution, resolution)."""
        return channels // self.resolution**2, self.resolution, self.resolution


@dataclass(frozen=True)
class PsCells:
    """Mean over the whole cells of each bin (R-FCN's PS-RoI pooling).

    Attributes:
        resolution: Bins per side.
    """

    resolution: int

    def __call__(self, features: Tensor, rois: Tensor, scale: float) -> Tensor:
        """(R, C / resolution^2, resolution, resolution)."""
        return ps_roi_pool(features, rois, self.resolution, spatial_scale=scale)

    def shape(self, channels: int) -> tuple[int, int, int]:
        """(channels / resolution^2, resolution, resolution)."""
        return channels // self.resolution**2, self.resolution, self.resolution


def ps_pool(box: BoxConfig) -> RoiPool:
    """The pooling that ``box.ps_pool`` names.

    Raises:
        ConfigError: Another setting of the table does not go with it.
    """
    if box.ps_pool == "cells":
        if box.ps_offset:
            raise ConfigError(
                f"box.ps_offset: must be 0 with box.ps_pool cells, got {box.ps_offset}"
            )
        return PsCells(box.resolution)
    reduce: Literal["max", "avg"] = "max" if box.ps_pool == "max" else "avg"
    if reduce == "max" and box.sampling_ratio <= 0:
        raise ConfigError(
            "box.sampling_ratio: must be positive with box.ps_pool max, "
            f"got {box.sampling_ratio}; only avg adapts to the RoI's size"
        )
    return PsAlign(box.resolution, reduce, box.ps_offset, box.sampling_ratio)
