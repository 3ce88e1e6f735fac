"""Feature pyramid over declared strides; levels of equal stride are summed unresized (DetNet)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from detkit.models.norm import Norm, norm_named
from detkit.types import FeatureSpec


class ConvNorm(nn.Module):
    """Convolution with "same" padding, then a norm, or a bias where ``norm`` is the identity."""

    def __init__(self, cin: int, cout: int, kernel: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(cout)
        self.conv = nn.Conv2d(
            cin, cout, kernel, padding=kernel // 2, bias=isinstance(self.norm, nn.Identity)
        )
        nn.init.kaiming_uniform_(self.conv.weight, a=1)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, cin, H, W) to (N, cout, H, W)."""
        out: Tensor = self.norm(self.conv(x))
        return out


class FPN(nn.Module):
    """Laterals 1x1, top-down sums, outputs 3x3: ``{"c2": ...}`` to ``{"p2": ...}``.

    Where the backbone has no ``c6``, one level more is added: every second cell of the last one,
    ``p6`` of ``p5`` (Lin et al., 2017).

    Args:
        specs: Maps of the backbone, finest first; a stride equals the one before or doubles it.
        channels: Channels of every level.
        norm: Name of the norm after each convolution, ``none`` for a bias.

    Attributes:
        feature_specs: Channels and stride of each level.

    Raises:
        ValueError: Strides do something else.
    """

    def __init__(
        self, specs: Mapping[str, FeatureSpec], channels: int = 256, norm: str = "none"
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
        self.extra = ""
        if "c6" not in specs:
            self.extra = f"p{int(list(specs)[-1][1:]) + 1}"
            self.feature_specs[self.extra] = FeatureSpec(channels, 2 * strides[-1])

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Levels (N, channels, H / stride, W / stride), finest first."""
        merged = self.merge(maps)
        levels = {p: self.output[p](merged[p]) for p in self.names.values()}
        if self.extra:
            levels[self.extra] = F.max_pool2d(levels[next(reversed(levels))], 1, 2)
        return levels

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
