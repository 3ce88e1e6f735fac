"""Necks that make position-sensitive maps, k*k channels per number a bin pools (k bins a side).

Channel (c * k + i) * k + j belongs to number c at bin (i, j), as the pooling operators read it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from detkit.models.necks.fpn import FPN
from detkit.models.necks.large_separable import LargeSeparableConv, init_small
from detkit.models.norm import norm_named
from detkit.models.weights import ClassRows
from detkit.types import FeatureSpec


class FirstConv(nn.Module):
    """1x1 convolution that learns faster, norm, ReLU: what R-FCN puts before its maps.

    Args:
        cin: Input channels.
        cout: Output channels (1024 in the paper).
        lr_factor: Factor of the convolution's and the norm's learning rate.
        norm: Name of the norm.
    """

    def __init__(self, cin: int, cout: int, lr_factor: float, norm: str = "none") -> None:
        super().__init__()
        self.lr_factor = lr_factor
        self.conv = nn.Conv2d(cin, cout, 1)
        self.norm = norm_named(norm)(cout)
        init_small(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, cin, H, W) to (N, cout, H, W)."""
        return torch.relu(self.norm(self.conv(x)))


class ScoreMaps(nn.Module):
    """Class and box maps of R-FCN (arXiv 1605.06409), side by side along the channels.

    Args:
        cin: Input channels.
        mid: Channels of the first convolution.
        bins: k.
        num_classes: Classes without background.
        class_agnostic: One box per RoI and not one per class.
        lr_factor: Factor of the first convolution's learning rate.
        norm: Name of the norm after the first convolution.

    Attributes:
        channels: Of the output: k * k times classes with background and box numbers.
    """

    def __init__(
        self,
        cin: int,
        mid: int,
        bins: int,
        num_classes: int,
        class_agnostic: bool,
        lr_factor: float,
        norm: str = "none",
    ) -> None:
        super().__init__()
        cells, boxes = bins**2, 4 if class_agnostic else 4 * num_classes
        self.channels = cells * (num_classes + 1 + boxes)
        self.class_rows = {"classes": ClassRows(cells, cells)}
        if not class_agnostic:
            self.class_rows["boxes"] = ClassRows(0, 4 * cells)
        self.first = FirstConv(cin, mid, lr_factor, norm)
        self.classes = nn.Conv2d(mid, cells * (num_classes + 1), 1)
        self.boxes = nn.Conv2d(mid, cells * boxes, 1)
        init_small(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, cin, H, W) to (N, channels, H, W)."""
        x = self.first(x)
        return torch.cat([self.classes(x), self.boxes(x)], 1)


class ThinMaps(nn.Module):
    """Thin maps by a large separable convolution and ReLU.

    Args:
        cin: Input channels.
        mid: Channels between the parts of the convolution.
        channels: Output channels.
        kernel: Length of the convolution.
        lr_factor: Factor of the convolution's learning rate.
        norm: Name of the norm before the ReLU (training from scratch).
    """

    def __init__(
        self, cin: int, mid: int, channels: int, kernel: int, lr_factor: float, norm: str = "none"
    ) -> None:
        super().__init__()
        self.channels = channels
        self.conv = LargeSeparableConv(cin, mid, channels, kernel, lr_factor)
        self.norm = norm_named(norm)(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, cin, H, W) to (N, channels, H, W)."""
        return torch.relu(self.norm(self.conv(x)))


class ThinScoreMaps(nn.Module):
    """Thin maps by R-FCN's two 1x1 convolutions, the second with fewer channels (figure 4).

    Inferred: section 3.2 gives the channels alone and says that the rest is R-FCN's; so the first
    convolution stays, and the maps have no activation.

    Args:
        cin: Input channels.
        mid: Channels of the first convolution.
        channels: Output channels.
        lr_factor: Factor of the first convolution's learning rate.
        norm: Name of the norm after each convolution.
    """

    def __init__(
        self, cin: int, mid: int, channels: int, lr_factor: float, norm: str = "none"
    ) -> None:
        super().__init__()
        self.channels = channels
        self.first = FirstConv(cin, mid, lr_factor, norm)
        self.conv = nn.Conv2d(mid, channels, 1)
        self.norm = norm_named(norm)(channels)
        init_small(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, cin, H, W) to (N, channels, H, W)."""
        out: Tensor = self.norm(self.conv(self.first(x)))
        return out


class OneLevelNeck(nn.Module):
    """Keeps the map of the proposals and makes position-sensitive maps of the last one.

    Args:
        specs: Maps of the backbone, finest first.
        maps: Makes the position-sensitive maps; has ``channels``.
        rpn_level: Map kept as it is.

    Attributes:
        source: Name of the map they are made of (``c5``, DetNet's ``c6``).
        level: Name of the position-sensitive maps (``s5``).
        feature_specs: Channels and stride of both.
    """

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        maps: ScoreMaps | ThinMaps | ThinScoreMaps,
        rpn_level: str = "c4",
    ) -> None:
        super().__init__()
        self.maps = maps
        self.rpn_level = rpn_level
        self.source = list(specs)[-1]
        self.level = f"s{self.source[1:]}"
        self.feature_specs = {
            rpn_level: specs[rpn_level],
            self.level: FeatureSpec(maps.channels, specs[self.source].stride),
        }

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"c4": ..., "s5": ...}`` of the backbone's maps."""
        return {self.rpn_level: maps[self.rpn_level], self.level: self.maps(maps[self.source])}


class ThinPyramid(nn.Module):
    """A feature pyramid, and position-sensitive maps of its levels by one shared convolution.

    Args:
        pyramid: Backbone's maps to levels ``p2``, ``p3``, ...
        maps: Makes the position-sensitive maps of a level.
        max_level: Number of the coarsest level that gets them.

    Attributes:
        feature_specs: Channels and stride of the pyramid's levels.
        thin_specs: The same of the maps ``s2``, ``s3``, ...
    """

    def __init__(self, pyramid: FPN, maps: ThinMaps | ThinScoreMaps, max_level: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.maps = maps
        self.feature_specs = pyramid.feature_specs
        self.thin_specs = {
            f"s{name[1:]}": FeatureSpec(maps.channels, spec.stride)
            for name, spec in pyramid.feature_specs.items()
            if int(name[1:]) <= max_level
        }

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"p2": ..., "p3": ..., "s2": ..., "s3": ...}`` of the backbone's maps."""
        levels: dict[str, Tensor] = self.pyramid(maps)
        thin = {name: self.maps(levels[f"p{name[1:]}"]) for name in self.thin_specs}
        return levels | thin
