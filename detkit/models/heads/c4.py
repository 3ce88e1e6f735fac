"""Box head of Faster R-CNN on C4: the backbone's last stages run on each RoI."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from detkit.models.weights import ClassRows


class TailPredictor(nn.Module):
    """Last stages of a backbone, global average, then class logits and box deltas.

    Args:
        tail: The stages in order, by the names they have in their backbone.
        channels: Channels that the last of them gives.
        num_classes: Classes without background.
        class_agnostic: One box per RoI and not one per class.

    Attributes:
        backbone_layers: Names of the stages. A backbone's checkpoint fills these layers too.
    """

    def __init__(
        self, tail: Mapping[str, nn.Module], channels: int, num_classes: int, class_agnostic: bool
    ) -> None:
        super().__init__()
        self.class_rows = {"classes": ClassRows(1, 1)}
        if not class_agnostic:
            self.class_rows["boxes"] = ClassRows(0, 4)
        self.backbone_layers = tuple(tail)
        for name, stage in tail.items():
            self.add_module(name, stage)
        self.classes = nn.Linear(channels, num_classes + 1)
        self.boxes = nn.Linear(channels, 4 if class_agnostic else 4 * num_classes)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.boxes.weight, std=0.001)
        for layer in (self.classes, self.boxes):
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, K + 1), background first, and deltas (R, 1 or K, 4) of (R, C, h, w)."""
        x = pooled
        for name in self.backbone_layers:
            x = self.get_submodule(name)(x)
        x = x.mean((2, 3))
        return self.classes(x), self.boxes(x).unflatten(1, (-1, 4))
