"""DetNet (arXiv 1804.06215): two dilated stages that hold stride 16 where ResNet goes to 32."""

from __future__ import annotations

from collections.abc import Sequence

from detkit.models.backbones.resnet import BasicBlock, ResNet, Stage


def detnet(
    blocks: Sequence[int] = (3, 4, 6, 3, 3),
    norm: str = "frozen_bn",
    *,
    project_last: bool = True,
    stride_in_1x1: bool = True,
) -> ResNet:
    """DetNet of five bottleneck stages; stages 2 to 4 are ResNet's, weights included.

    Stages 5 and 6 keep 256-wide bottlenecks, 1024 channels, stride 16 and dilation 2. Both open
    with a convolved shortcut although shapes agree (block B of the paper).

    Args:
        blocks: Blocks per stage, (3, 4, 6, 3, 3) for DetNet-59.
        norm: Name of the norms.
        project_last: False gives the NoProj variant: stage 6 opens with an identity shortcut.
        stride_in_1x1: The published cost (4.8 G) needs the stride in the first 1x1.
    """
    stages = [Stage(n, 64 << i, 256 << i, 1 if i == 0 else 2) for i, n in enumerate(blocks[:3])]
    stages.append(Stage(blocks[3], 256, 1024, 1, dilation=2, project=True))
    stages.append(Stage(blocks[4], 256, 1024, 1, dilation=2, project=project_last))
    return ResNet(stages, norm=norm, stride_in_1x1=stride_in_1x1)


def detnet_tiny(norm: str = "bn") -> ResNet:
    """Small DetNet for CPUs: basic blocks, 32 to 128 channels, stages 5 and 6 at stride 16."""
    stages = [Stage(2, 32 << i, 32 << i, 1 if i == 0 else 2) for i in range(3)]
    stages += [Stage(1, 128, 128, 1, dilation=2, project=True) for _ in range(2)]
    return ResNet(stages, stem=32, block=BasicBlock, norm=norm, zero_init=True)
