"""Residual networks from a table of stages: ResNet-50/101, the dilated one, a small one for CPUs.

Module and state-dict names are torchvision's (``conv1, bn1, layer1 ... layer4``): its weights fit.
Stages carry the papers' numbers: 1 the stem, 2 conv2_x = ``layer1``, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from detkit.models.backbones.base import Backbone
from detkit.models.norm import ConvThenNorm, Norm, conv_norm, conv_norm_relu, norm_named
from detkit.types import FeatureSpec


@dataclass(frozen=True)
class Stage:
    """One row of the layer table.

    Attributes:
        blocks: Residual blocks.
        width: Channels of the 3x3 convolutions.
        channels: Channels the stage gives out.
        stride: Stride of the first block.
        dilation: Dilation of every 3x3 convolution of the stage.
        project: Put a convolution on the first shortcut even where shapes agree (DetNet's block B).
    """

    blocks: int
    width: int
    channels: int
    stride: int
    dilation: int = 1
    project: bool = False


def _conv3x3(cin: int, cout: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 3, stride, padding=dilation, dilation=dilation, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with norms; ReLU after the first two and after adding the shortcut.

    Args:
        cin: Input channels.
        width: Channels of the 3x3 convolution.
        cout: Output channels.
        stride: Stride of the block.
        dilation: Dilation of the 3x3 convolution.
        project: Convolve the shortcut.
        norm: Maker of the norms.
        stride_in_1x1: Stride in the first 1x1 (MSRA, DetNet) and not in the 3x3 (torchvision).
    """

    def __init__(
        self,
        cin: int,
        width: int,
        cout: int,
        stride: int,
        dilation: int,
        project: bool,
        norm: Norm,
        stride_in_1x1: bool,
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(cin, width, 1, first, bias=False)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width, second, dilation)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, cout, 1, bias=False)
        self.bn3 = norm(cout)
        self.downsample = _shortcut(cin, cout, stride, norm) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, cin, H, W) to (N, cout, ceil(H / stride), ceil(W / stride))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = conv_norm_relu(self.conv1, self.bn1, x)
        out = conv_norm_relu(self.conv2, self.bn2, out)
        out = conv_norm(self.conv3, self.bn3, out).add_(shortcut)
        return F.relu_(out)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with norms; dense 3x3 convolutions are what CPUs do best.

    Arguments as for :class:`Bottleneck`; ``width`` must equal ``cout``, and there is no 1x1 for
    ``stride_in_1x1`` to move the stride to.
    """

    def __init__(
        self,
        cin: int,
        width: int,
        cout: int,
        stride: int,
        dilation: int,
        project: bool,
        norm: Norm,
        stride_in_1x1: bool,
    ) -> None:
        super().__init__()
        if width != cout:
            raise ValueError(f"BasicBlock: width must equal cout={cout}, got {width}")
        self.conv1 = _conv3x3(cin, cout, stride, dilation)
        self.bn1 = norm(cout)
        self.conv2 = _conv3x3(cout, cout, 1, dilation)
        self.bn2 = norm(cout)
        self.downsample = _shortcut(cin, cout, stride, norm) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, cin, H, W) to (N, cout, ceil(H / stride), ceil(W / stride))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = conv_norm_relu(self.conv1, self.bn1, x)
        out = conv_norm(self.conv2, self.bn2, out).add_(shortcut)
        return F.relu_(out)


def _shortcut(cin: int, cout: int, stride: int, norm: Norm) -> nn.Sequential:
    return ConvThenNorm(nn.Conv2d(cin, cout, 1, stride, bias=False), norm(cout))


class ResNet(Backbone):
    """Stem of stride 4, then residual stages; gives ``{"c2": ..., "c3": ...}``, one map per stage.

    Args:
        stages: Layer table, from stage 2 on.
        stem: Channels of the 7x7 stem.
        block: Bottleneck or BasicBlock.
        norm: Name of the norms.
        stride_in_1x1: Where bottlenecks put their stride.
        zero_init: Start every block as its shortcut (last norm's scale 0): easier from scratch.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        stem: int = 64,
        block: type[Bottleneck] | type[BasicBlock] = Bottleneck,
        norm: str = "frozen_bn",
        stride_in_1x1: bool = False,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        make_norm = norm_named(norm)
        self.conv1 = nn.Conv2d(3, stem, 7, 2, padding=3, bias=False)
        self.bn1 = make_norm(stem)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels, stride = stem, 4
        for number, stage in enumerate(stages, 1):
            layers = []
            for i in range(stage.blocks):
                step = stage.stride if i == 0 else 1
                project = i == 0 and (stage.project or step != 1 or channels != stage.channels)
                layers.append(
                    block(
                        channels,
                        stage.width,
                        stage.channels,
                        step,
                        stage.dilation,
                        project,
                        make_norm,
                        stride_in_1x1,
                    )
                )
                channels = stage.channels
            stride *= stage.stride
            self.add_module(f"layer{number}", nn.Sequential(*layers))
            self.feature_specs[f"c{number + 1}"] = FeatureSpec(channels, stride)
        self._init_weights(zero_init and norm != "frozen_bn")

    def _init_weights(self, zero_init: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if zero_init and isinstance(module, Bottleneck | BasicBlock):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.get_parameter("weight"))

    def stage(self, number: int) -> list[nn.Module]:
        """Modules of a stage."""
        return [self.conv1, self.bn1] if number == 1 else [self.get_submodule(f"layer{number - 1}")]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of ``images`` (N, 3, H, W), named and shaped as ``feature_specs`` says."""
        x = self.maxpool(conv_norm_relu(self.conv1, self.bn1, images))
        maps = {}
        for number, name in enumerate(self.feature_specs, 1):
            x = self.get_submodule(f"layer{number}")(x)
            maps[name] = x
        return maps


def resnet(
    blocks: Sequence[int],
    norm: str = "frozen_bn",
    *,
    stride_in_1x1: bool = False,
    dilated: bool = False,
) -> ResNet:
    """ResNet of four bottleneck stages.

    Args:
        blocks: Blocks per stage, (3, 4, 6, 3) for ResNet-50.
        norm: Name of the norms.
        stride_in_1x1: Stride in the first 1x1 (MSRA) and not in the 3x3 (torchvision).
        dilated: Stage 5 keeps stride 16 and dilates its 3x3 convolutions by 2.
    """
    stages = [Stage(n, 64 << i, 256 << i, 1 if i == 0 else 2) for i, n in enumerate(blocks)]
    if dilated:
        stages[3] = Stage(blocks[3], 512, 2048, 1, dilation=2)
    return ResNet(stages, norm=norm, stride_in_1x1=stride_in_1x1)


def resnet_tiny(norm: str = "bn") -> ResNet:
    """Small residual network for training on CPUs: basic blocks, 32 to 256 channels, stride 32."""
    stages = [Stage(2, 32 << i, 32 << i, 1 if i == 0 else 2) for i in range(4)]
    return ResNet(stages, stem=32, block=BasicBlock, norm=norm, zero_init=True)
