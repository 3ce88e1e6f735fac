"""R-CNN subnet of Light-Head R-CNN (arXiv 1711.07264, section 3.3): one layer on thin features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detkit.models.norm import normalise_rows, rows_norm
from detkit.models.weights import ClassRows


class LightPredictor(nn.Module):
    """One fully connected layer and ReLU, or none, then class logits and box deltas.

    Pooled features are flattened as (channel, row, column); the authors' code has the channel last.

    Args:
        cin: Numbers per RoI.
        channels: Width of the layer (2048); 0 leaves it out.
        num_classes: Classes without background.
        class_agnostic: One box per RoI and not one per class.
        norm: Name of the norm after the layer.
    """

    def __init__(
        self, cin: int, channels: int, num_classes: int, class_agnostic: bool, norm: str = "none"
    ) -> None:
        super().__init__()
        self.class_rows = {"classes": ClassRows(1, 1)}
        if not class_agnostic:
            self.class_rows["boxes"] = ClassRows(0, 4)
        self.fc = nn.Linear(cin, channels) if channels else None
        self.norm = rows_norm(norm)(channels) if channels else nn.Identity()
        width = channels or cin
        self.classes = nn.Linear(width, num_classes + 1)
        self.boxes = nn.Linear(width, 4 if class_agnostic else 4 * num_classes)
        for layer, std in ((self.fc, 0.01), (self.classes, 0.01), (self.boxes, 0.001)):
            if layer is not None:
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, K + 1), background first, and deltas (R, 1 or K, 4) of (R, C, h, w)."""
        x = pooled.flatten(1)
        if self.fc is not None:
            x = torch.relu(normalise_rows(self.norm, self.fc(x)))
        return self.classes(x), self.boxes(x).unflatten(1, (-1, 4))
