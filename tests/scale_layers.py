"""A layer to decompose, for the tests of detkit.scales."""

from __future__ import annotations

from detkit.scales.insert import ScaleLayer


def layer(
    outputs: int = 256, path: str = "body.conv", stride: int = 1, groups: int = 1
) -> ScaleLayer:
    return ScaleLayer(
        path=path,
        label="R31",
        part="backbone",
        channels=(outputs, outputs),
        kernel=(3, 3),
        stride=(stride, stride),
        dilation=(1, 1),
        groups=groups,
        map="elu1",
        scale_group="sample",
    )
