"""What every backbone is: images in, one map per stage out, stages that can be frozen."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

from torch import Tensor, nn

from detkit.errors import ConfigError
from detkit.types import FeatureSpec


class Backbone(nn.Module):
    """Base of all backbones. Stages carry the papers' numbers: 1 the stem, 2 gives ``c2``, ...

    Attributes:
        feature_specs: Channels and stride of each map, finest first.
        frozen_stages: Stages fixed by :meth:`freeze`.
    """

    feature_specs: dict[str, FeatureSpec]

    def __init__(self) -> None:
        super().__init__()
        self.feature_specs = {}
        self.frozen_stages = 0

    @abstractmethod
    def stage(self, number: int) -> list[nn.Module]:
        """Modules of a stage."""

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of ``images`` (N, 3, H, W), named and shaped as ``feature_specs`` says."""

    def classifier_layers(self, num_classes: int) -> tuple[nn.Module, nn.Linear]:
        """What a classifier puts on the last map before its global average, and after it."""
        last = list(self.feature_specs.values())[-1]
        return nn.Identity(), nn.Linear(last.channels, num_classes)

    @property
    def num_stages(self) -> int:
        """Stages with the stem."""
        return len(self.feature_specs) + 1

    def freeze(self, stages: int) -> Self:
        """Fix weights and norm statistics of the first ``stages`` stages for good.

        Raises:
            ValueError: There are not so many.
        """
        if not 0 <= stages <= self.num_stages:
            raise ValueError(f"freeze: stages must be in 0..{self.num_stages}, got {stages}")
        self.frozen_stages = stages
        for number in range(1, stages + 1):
            for module in self.stage(number):
                module.requires_grad_(False)
        return self.train(self.training)

    def take_stages_after(self, name: str) -> dict[str, nn.Module]:
        """Hand over the stages after the one that gives map ``name``, with which forward now ends.

        Returns:
            The stages' modules in order, by the names they had here.

        Raises:
            ConfigError: One of them is frozen, or there is no such map or no stage after it.
        """
        levels = list(self.feature_specs)
        if name not in levels[:-1]:
            raise ConfigError(
                f"model.backbone: must have stages after {name}, got one with {', '.join(levels)}"
            )
        kept = levels.index(name) + 2
        if self.frozen_stages > kept:
            raise ConfigError(
                f"model.frozen_stages: must be in 0..{kept} where the stages after {name} are the "
                f"head's, got {self.frozen_stages}"
            )
        after = [m for n in range(kept + 1, self.num_stages + 1) for m in self.stage(n)]
        taken = {child: module for child, module in self.named_children() if module in after}
        for child in taken:
            delattr(self, child)
        for level in levels[kept - 1 :]:
            del self.feature_specs[level]
        return taken

    def train(self, mode: bool = True) -> Self:
        """Switch mode; frozen stages stay in evaluation mode, or their norms would drift."""
        super().train(mode)
        for number in range(1, self.frozen_stages + 1):
            for module in self.stage(number):
                module.eval()
        return self
