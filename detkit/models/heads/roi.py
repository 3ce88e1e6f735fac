"""What heads on regions of interest share: their interface, and pooling from a pyramid."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from detkit.config import BoxConfig
from detkit.ops import boxes as box_ops
from detkit.ops.roi_align import roi_align
from detkit.types import Detections, FeatureSpec, Target


class RoiHead(nn.Module):
    """Base of the heads a two-stage detector puts on its proposals."""

    @abstractmethod
    def losses(
        self, features: Mapping[str, Tensor], proposals: Sequence[Tensor], truth: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Scalar losses by name.

        Args:
            features: Maps of N images by level.
            proposals: N tensors (R, 4).
            truth: N targets.
        """

    @abstractmethod
    def detect(
        self, features: Mapping[str, Tensor], proposals: Sequence[Tensor], sizes: Tensor
    ) -> list[Detections]:
        """Detections of each image, best first, clipped to it.

        Args:
            features: Maps of N images by level.
            proposals: N tensors (R, 4).
            sizes: (N, 2) height and width before padding.
        """

    @abstractmethod
    def run_layers(self, features: Mapping[str, Tensor], count: int) -> None:
        """Run every layer once for ``count`` RoIs wherever they are, so that costs can be counted.

        Works on the meta device, where boxes have no values.
        """


class RoiPooler(nn.Module):
    """RoIAlign that picks each box's level by its size alone, so levels may share a stride.

    Level k = floor(4 + log2(side / canonical_size)), side = sqrt(w * h), within the levels given.

    Args:
        specs: Feature maps ``p2``, ``p3``, ... by name, finest first.
        max_level: Coarsest level used.
        config: Resolution, sampling and canonical size.
    """

    def __init__(self, specs: Mapping[str, FeatureSpec], max_level: int, config: BoxConfig) -> None:
        super().__init__()
        self.levels = {int(name[1:]): name for name in specs if int(name[1:]) <= max_level}
        self.scales = [1.0 / specs[name].stride for name in self.levels.values()]
        self.config = config

    def assign(self, boxes: Tensor) -> Tensor:
        """Level number (R,) of each box (R, 4)."""
        side = box_ops.area(boxes).clamp(min=0).sqrt()
        # The addend keeps a side of canonical_size / 2 on its level if the logarithm rounds down.
        level = torch.floor(4 + torch.log2(side / self.config.canonical_size) + 1e-6)
        level = level.nan_to_num(nan=0.0)  # a NaN box pools NaN on whatever level
        return level.clamp(min(self.levels), max(self.levels)).to(torch.int64)

    def forward(self, features: Mapping[str, Tensor], rois: Tensor) -> Tensor:
        """Pooled features (R, C, resolution, resolution) of rois (R, 5): image index, xyxy."""
        level = self.assign(rois[:, 1:])
        where = [(level == number).nonzero().flatten() for number in self.levels]
        parts = [
            roi_align(
                features[name],
                rois[index],
                self.config.resolution,
                spatial_scale=scale,
                sampling_ratio=self.config.sampling_ratio,
                aligned=self.config.aligned,
            )
            for name, index, scale in zip(self.levels.values(), where, self.scales, strict=True)
        ]
        return torch.cat(parts)[torch.cat(where).argsort()]

    def blank(self, features: Mapping[str, Tensor], count: int) -> Tensor:
        """Uninitialised pooled features of ``count`` RoIs, to run what follows without boxes."""
        side = self.config.resolution
        any_map = features[next(iter(self.levels.values()))]
        return any_map.new_empty(count, any_map.shape[1], side, side)


def to_rois(boxes: Sequence[Tensor]) -> Tensor:
    """(R, 5) image index and xyxy of the boxes (R_i, 4) of each image."""
    rows = [torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(boxes)]
    return torch.cat(rows)
