"""Feature pyramid over declared strides; levels of equal stride are summed unresized (DetNet)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detkit.models.norm import Norm, conv_norm, norm_named
from detkit.types import FeatureSpec


class ConvNorm(nn.Module):
    """Convolution with "same" padding, then a norm, or a bias where ``norm`` is the identity."""

    def __init__(self, cin: int, cout: int, kernel: int, norm: Norm, stride: int = 1) -> None:
        super().__init__()
        self.norm = norm(cout)
        bias = isinstance(self.norm, nn.Identity)
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, bias=bias)
        nn.init.kaiming_uniform_(self.conv.weight, a=1)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, cin, H, W) to (N, cout, ceil(H / stride), ceil(W / stride))."""
        return conv_norm(self.conv, self.norm, x)


class ExtraLevels(nn.Module):
    """Base of what adds levels above those that have a lateral.

    Args:
        feature_specs: Channels and stride of each level added, finest first.
    """

    def __init__(self, feature_specs: Mapping[str, FeatureSpec]) -> None:
        super().__init__()
        self.feature_specs = dict(feature_specs)

    @abstractmethod
    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The levels added, from the maps of the backbone and the levels below, by name."""


class PooledLevel(ExtraLevels):
    """One level more: every second cell of the last one, ``p6`` of ``p5`` (Lin et al., 2017).

    Args:
        source: Name of the last level.
        spec: Its channels and stride.
    """

    def __init__(self, source: str, spec: FeatureSpec) -> None:
        level = f"p{int(source[1:]) + 1}"
        super().__init__({level: FeatureSpec(spec.channels, 2 * spec.stride)})
        self.source = source

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"p6": (N, C, H / 2, W / 2)}`` from ``{"p5": (N, C, H, W), ...}``."""
        return {name: F.max_pool2d(maps[self.source], 1, 2) for name in self.feature_specs}


class ConvolvedLevels(ExtraLevels):
    """Levels up to P7, each a 3x3 convolution of stride 2 of the one below (Lin et al., RetinaNet).

    P6 takes its source as it is, P7 takes P6 after a ReLU.

    Args:
        source: Map that the first of them is convolved from: ``c5`` or ``p5``, or ``p6`` where the
            backbone has a stage 6.
        spec: Its channels and stride.
        channels: Channels of each level.
        norm: Name of the norm after each convolution, ``none`` for a bias.
    """

    def __init__(self, source: str, spec: FeatureSpec, channels: int, norm: str = "none") -> None:
        names = [f"p{level}" for level in range(int(source[1:]) + 1, 8)]
        super().__init__(
            {n: FeatureSpec(channels, spec.stride << i) for i, n in enumerate(names, 1)}
        )
        make_norm = norm_named(norm)
        self.source = source
        self.convs = nn.ModuleDict(
            {
                name: ConvNorm(spec.channels if i == 0 else channels, channels, 3, make_norm, 2)
                for i, name in enumerate(names)
            }
        )

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The levels ``p6`` (where it is one of them) and ``p7``."""
        levels: dict[str, Tensor] = {}
        x = maps[self.source]
        for name, conv in self.convs.items():
            below = x if name == "p6" else torch.relu(x)
            if self.training and below.shape[-1] == 1:
                # oneDNN's weight gradient in bf16 is arbitrary for a stride of 2 on one column
                # (torch 2.13); a column of zeros beside it, which padding gives anyway, is not.
                below = F.pad(below, (0, 1))
            levels[name] = x = conv(below)
        return levels


class FPN(nn.Module):
    """Laterals 1x1, top-down sums, outputs 3x3: ``{"c2": ...}`` to ``{"p2": ...}``; extra levels.

    Args:
        specs: Maps of the backbone, finest first; a stride equals the one before or doubles it.
        channels: Channels of every level.
        norm: Name of the norm after each convolution, ``none`` for a bias.
        extra: Levels on top; by default a :class:`PooledLevel`, and none where the backbone has
            ``c6``.

    Attributes:
        feature_specs: Channels and stride of each level.

    Raises:
        ValueError: Strides do something else.
    """

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        channels: int = 256,
        norm: str = "none",
        extra: ExtraLevels | None = None,
    ) -> None:
        super().__init__()
        make_norm = norm_named(norm)
        strides = [spec.stride for spec in specs.values()]
        if any(b not in (a, 2 * a) for a, b in zip(strides, strides[1:], strict=False)):
            raise ValueError(
                f"FPN: each stride must equal the one before or double it, got {strides}"
            )
        self.names = {name: "p" + name.removeprefix("c") for name in specs}
        self.strides = dict(zip(specs, strides, strict=True))
        self.lateral = nn.ModuleDict(
            {p: ConvNorm(specs[c].channels, channels, 1, make_norm) for c, p in self.names.items()}
        )
        self.output = nn.ModuleDict(
            {p: ConvNorm(channels, channels, 3, make_norm) for p in self.names.values()}
        )
        self.feature_specs = {
            p: FeatureSpec(channels, specs[c].stride) for c, p in self.names.items()
        }
        if extra is None and "c6" not in specs:
            extra = PooledLevel(*list(self.feature_specs.items())[-1])
        self.extra = extra
        if extra is not None:
            self.feature_specs |= extra.feature_specs

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Levels (N, channels, H / stride, W / stride), finest first."""
        merged = self.merge(maps)
        levels = {p: self.output[p](merged[p]) for p in self.names.values()}
        return levels if self.extra is None else levels | self.extra({**maps, **levels})

    def merge(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums of laterals before the output convolutions, by level."""
        merged: dict[str, Tensor] = {}
        above, stride = None, 0
        for name in reversed(self.names):
            level = self.lateral[self.names[name]](maps[name])
            if above is not None:
                same = self.strides[name] == stride
                level = level + (
                    above if same else F.interpolate(above, size=level.shape[-2:], mode="nearest")
                )
            merged[self.names[name]] = above = level
            stride = self.strides[name]
        return merged
