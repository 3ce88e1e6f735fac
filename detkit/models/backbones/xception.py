"""The small Xception-like network of Light-Head R-CNN's setting S (arXiv 1711.07264, table 7).

The paper gives channels and repeats and says of the blocks that they are bottlenecks with
channel-wise 3x3 convolutions. Units that concatenate where they halve the map are inferred: they
alone reproduce the published 145 million multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detkit.models.backbones.base import Backbone
from detkit.models.norm import Norm, conv_norm, conv_norm_relu, norm_named
from detkit.types import FeatureSpec


class Unit(nn.Module):
    """1x1, depthwise 3x3, 1x1 with norms, a ReLU after the first and at the end.

    With stride 1 the input is added. With stride 2 it is averaged over 3x3 and concatenated, so
    that the last 1x1 makes the new channels only.

    Args:
        cin: Input channels.
        cout: Output channels; those of the input where the stride is 1.
        width: Channels of the depthwise convolution.
        stride: 1 or 2.
        norm: Maker of the norms.
    """

    def __init__(self, cin: int, cout: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        if stride == 1 and cin != cout:
            raise ValueError(f"Unit: cout must equal cin={cin} with stride 1, got {cout}")
        made = cout - cin if stride == 2 else cout
        self.stride = stride
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, made, 1, bias=False)
        self.bn3 = norm(made)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, cin, H, W) to (N, cout, ceil(H / stride), ceil(W / stride))."""
        out = conv_norm_relu(self.conv1, self.bn1, x)
        out = conv_norm(self.conv2, self.bn2, out)
        out = conv_norm(self.conv3, self.bn3, out)
        if self.stride == 1:
            return F.relu(x + out)
        return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, padding=1), out], 1))


class Xception(Backbone):
    """Stem and max pooling of stride 4, then stages of :class:`Unit` that each halve the map.

    Stages are numbered by their maps, as ResNet's: 1 is the stem, 2 the pooling that gives ``c2``,
    and 3 to 5 are the paper's Stage2 to Stage4.

    Args:
        units: Units of each stage after the pooling.
        channels: Channels of the stem and of each of these stages.
        norm: Name of the norms.
    """

    def __init__(self, units: Sequence[int], channels: Sequence[int], norm: str) -> None:
        super().__init__()
        make_norm = norm_named(norm)
        self.conv1 = nn.Conv2d(3, channels[0], 3, 2, padding=1, bias=False)
        self.bn1 = make_norm(channels[0])
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.feature_specs["c2"] = FeatureSpec(channels[0], 4)
        for i, (count, cin, cout) in enumerate(zip(units, channels, channels[1:], strict=False)):
            first = Unit(cin, cout, cout // 4, 2, make_norm)
            others = [Unit(cout, cout, cout // 4, 1, make_norm) for _ in range(count - 1)]
            self.add_module(f"stage{i + 3}", nn.Sequential(first, *others))
            self.feature_specs[f"c{i + 3}"] = FeatureSpec(cout, 8 << i)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                # of a depthwise convolution torch would count the fan-out over all its channels
                nn.init.kaiming_normal_(
                    layer.weight,
                    mode="fan_out" if layer.groups == 1 else "fan_in",
                    nonlinearity="relu",
                )

    def stage(self, number: int) -> list[nn.Module]:
        """Modules of a stage."""
        if number == 1:
            return [self.conv1, self.bn1]
        return [self.maxpool] if number == 2 else [self.get_submodule(f"stage{number}")]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of ``images`` (N, 3, H, W), named and shaped as ``feature_specs`` says."""
        x = self.maxpool(conv_norm_relu(self.conv1, self.bn1, images))
        maps = {"c2": x}
        for number in range(3, self.num_stages + 1):
            maps[f"c{number}"] = x = self.get_submodule(f"stage{number}")(x)
        return maps


def xception145(norm: str = "frozen_bn") -> Xception:
    """The backbone of 145 million multiply-adds at 224x224, norms counted."""
    return Xception((4, 8, 4), (24, 144, 288, 576), norm)
