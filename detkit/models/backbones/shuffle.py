"""ShuffleNetV2-like networks of DetNAS (arXiv 1903.10979, section 3.3): one block per position.

Unlike torchvision's ShuffleNetV2, channels are shuffled at the start of blocks of stride 1, and
never in those of stride 2 or after a concatenation. Key names: ``stem``, then ``stage2`` (which
gives ``c2``) to ``stage5``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detkit.models.backbones.base import Backbone
from detkit.models.norm import Norm, norm_named
from detkit.models.search_space import OPS, Op, Position, SearchSpace, Shuffle
from detkit.types import FeatureSpec

DROPOUT = 0.2
"""Share of the maps that a classifier drops before its global average."""


def shuffle_split(x: Tensor, convention: Shuffle) -> tuple[Tensor, Tensor]:
    """The half of ``x`` (N, C, H, W) that a block passes on and the half that it works on.

    Args:
        x: An even number of channels.
        convention: 1 interleaves two groups of channels and halves the result; 2 takes the even
            and the odd channels.
    """
    n, c, h, w = x.shape
    if convention == 1:
        keep, main = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).chunk(2, 1)
        return keep, main
    return x[:, 0::2], x[:, 1::2]


def _pointwise(cin: int, cout: int, norm: Norm) -> list[nn.Module]:
    return [nn.Conv2d(cin, cout, 1, bias=False), norm(cout), nn.ReLU(inplace=True)]


def _depthwise(channels: int, kernel: int, stride: int, norm: Norm) -> list[nn.Module]:
    """No activation follows it: the ReLU is that of the pointwise layer after."""
    pad = kernel // 2
    conv = nn.Conv2d(channels, channels, kernel, stride, pad, groups=channels, bias=False)
    return [conv, norm(channels)]


def _main(op: Op, cin: int, mid: int, cout: int, stride: int, norm: Norm) -> nn.Sequential:
    if op.xception:
        layers = _depthwise(cin, op.kernel, stride, norm) + _pointwise(cin, mid, norm)
        layers += _depthwise(mid, op.kernel, 1, norm) + _pointwise(mid, mid, norm)
        layers += _depthwise(mid, op.kernel, 1, norm) + _pointwise(mid, cout, norm)
    else:
        layers = _pointwise(cin, mid, norm)
        layers += _depthwise(mid, op.kernel, stride, norm) + _pointwise(mid, cout, norm)
    return nn.Sequential(*layers)


class ShuffleBlock(nn.Module):
    """One block: half of the channels, or a projection of all, beside the main branch.

    Args:
        position: Channels and stride.
        op: Kind of the main branch.
        shuffle: Convention of the split in blocks of stride 1.
        norm: Maker of the norms.
    """

    def __init__(self, position: Position, op: Op, shuffle: Shuffle, norm: Norm) -> None:
        super().__init__()
        cin, cout, mid = position.cin, position.cout, position.cout // 2
        self.shuffle: Shuffle = shuffle
        self.project: nn.Sequential | None = None
        if position.stride == 2:
            layers = _depthwise(cin, op.kernel, 2, norm) + _pointwise(cin, cin, norm)
            self.project = nn.Sequential(*layers)
            self.main = _main(op, cin, mid, cout - cin, 2, norm)
        else:
            self.main = _main(op, cin // 2, mid, cout // 2, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, cin, H, W) to (N, cout, ceil(H / stride), ceil(W / stride))."""
        if self.project is not None:
            return torch.cat([self.project(x), self.main(x)], 1)
        keep, half = shuffle_split(x, self.shuffle)
        return torch.cat([keep, self.main(half)], 1)


def stem_layers(channels: int, norm: Norm) -> nn.Sequential:
    """What halves the image first."""
    conv = nn.Conv2d(3, channels, 3, 2, padding=1)
    return nn.Sequential(conv, norm(channels), nn.ReLU(inplace=True))


class ShuffleBackbone(Backbone):
    """Stem and stages of a search space, with the blocks it is given.

    Args:
        space: Channels, blocks per stage.
        blocks: One module per position, in order.
        norm: Name of the norms.
    """

    def __init__(self, space: SearchSpace, blocks: Sequence[nn.Module], norm: str) -> None:
        super().__init__()
        self.space = space
        self.norm = norm
        self.stem = stem_layers(space.stem, norm_named(norm))
        # Weights fit one convention, and nothing in their shapes tells which. So every state dict
        # says it in a name, and whoever loads the other one meets a missing key.
        self.register_buffer(f"shuffle{space.shuffle}", torch.tensor(space.shuffle))
        taken, stride = iter(blocks), 2
        for number, (count, cout) in enumerate(zip(space.blocks, space.channels, strict=True), 2):
            stride *= 2
            self.add_module(f"stage{number}", nn.Sequential(*(next(taken) for _ in range(count))))
            self.feature_specs[f"c{number}"] = FeatureSpec(cout, stride)
        init_weights(self)
        nn.init.normal_(self.stem[0].get_parameter("weight"), 0, 0.01)

    def stage(self, number: int) -> list[nn.Module]:
        """Modules of a stage."""
        return [self.stem] if number == 1 else [self.get_submodule(f"stage{number}")]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of ``images`` (N, 3, H, W), named and shaped as ``feature_specs`` says."""
        x = self.stem(images)
        maps = {}
        for number, name in enumerate(self.feature_specs, 2):
            x = self.get_submodule(f"stage{number}")(x)
            maps[name] = x
        return maps

    def classifier_layers(self, num_classes: int) -> tuple[nn.Module, nn.Linear]:
        """Last 1x1 convolution with dropout of whole maps, which detectors go without."""
        last = self.space.last
        conv = nn.Conv2d(self.space.channels[-1], last, 1)
        relu, drop = nn.ReLU(inplace=True), nn.Dropout2d(DROPOUT)
        tail = nn.Sequential(conv, norm_named(self.norm)(last), relu, drop)
        init_weights(tail)
        fc = nn.Linear(last, num_classes)
        nn.init.normal_(fc.weight, 0, 0.01)
        nn.init.zeros_(fc.bias)
        return tail, fc


def init_weights(module: nn.Module) -> None:
    """DetNAS's start: deviation 1 / (input channels of a filter), norms 1 and 1e-4."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0, 1 / layer.weight.shape[1])
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.ones_(layer.get_parameter("weight"))
            nn.init.constant_(layer.get_parameter("bias"), 1e-4)


def shuffle_net(space: SearchSpace, genes: Sequence[int], norm: str = "bn") -> ShuffleBackbone:
    """One network of a space.

    Raises:
        ConfigError: Genes that are not of the space.
    """
    make = norm_named(norm)
    blocks = [
        ShuffleBlock(position, OPS[space.ops[gene]], space.shuffle, make)
        for position, gene in zip(space.positions(), space.check(genes), strict=True)
    ]
    return ShuffleBackbone(space, blocks, norm)
