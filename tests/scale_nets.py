"""A residual network as somebody else would write it, for the tests of detkit.scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Residual block around one 3x3 convolution."""

    def __init__(self, cin: int, cout: int, stride: int = 1, groups: int = 1, dilation: int = 1):
        super().__init__()
        self.reduce = nn.Conv2d(cin, cout, 1, bias=False)
        self.conv = nn.Conv2d(
            cout, cout, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(cout)
        self.expand = nn.Conv2d(cout, cout, 1)
        self.short = nn.Conv2d(cin, cout, 1, stride) if stride > 1 or cin != cout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(torch.relu(self.reduce(x)))))
        return torch.relu(self.short(x) + self.expand(y))


class ThirdPartyNet(nn.Module):
    """Dense, strided, grouped, dilated and depthwise 3x3 convolutions, and one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.body = nn.ModuleList(
            [
                Block(8, 8),
                Block(8, 12, stride=2),
                Block(12, 12, groups=4),
                Block(12, 12, dilation=2),
                Block(12, 12, groups=12),
            ]
        )
        self.last = nn.Conv2d(12, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.body:
            x = block(x)
        return self.last(x)


def in_body(path: str, _: nn.Conv2d) -> bool:
    return path.startswith("body.")
