"""Your own backbone under any head, trained for a few steps on the built-in shapes.

    python examples/own_backbone.py retinanet 20

A backbone declares the channels and the stride of each map it gives; heads are built from that.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from detkit import config as configs
from detkit.data import open_detection, train_batches
from detkit.models import DETECTORS
from detkit.models.backbones.base import Backbone
from detkit.types import FeatureSpec


class FourStages(Backbone):
    """Maps c2 to c5 at strides 4 to 32, one convolution each."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        for number, (cin, cout) in enumerate(zip((32, *widths), widths, strict=False), 2):
            layers = nn.Conv2d(cin, cout, 3, 2, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()
            self.add_module(f"stage{number}", nn.Sequential(*layers))
            self.feature_specs[f"c{number}"] = FeatureSpec(cout, 2**number)

    def stage(self, number: int) -> list[nn.Module]:
        """Modules of stage 1 (the stem) to 5, for freezing."""
        return [self.stem if number == 1 else getattr(self, f"stage{number}")]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """One map per entry of ``feature_specs``."""
        x, maps = self.stem(images), {}
        for name in self.feature_specs:
            x = maps[name] = self.stage(int(name[1:]))[0](x)
        return maps


def main(detector: str = "frcnn-fpn", steps: int = 20) -> list[float]:
    recipe = configs.read_toml(configs.recipe_path(f"tiny/{detector}"))
    small = {"short_side": 128, "long_side": 128, "multi_scale": [], "workers": 0}
    config = configs.resolve([recipe, {"train": {"batch_size": 2}, "data": small}])
    data = open_detection("synthetic", "train", config.data, masks=detector == "maskrcnn-fpn")
    model = DETECTORS[detector](config, FourStages(), len(data.categories))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _, (batch,) in zip(range(steps), train_batches(data, config), strict=False):
        total = torch.stack(list(model(batch).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    print(f"{detector} on a backbone of {len(model.backbone.feature_specs)} maps: losses", totals)
    return totals


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
