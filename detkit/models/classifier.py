"""Image classifier over a backbone: its own last layers, global average, one linear layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from detkit.models.backbones.base import Backbone
from detkit.types import ClassificationBatch


class Classifier(nn.Module):
    """Classes from the last map of a backbone.

    Args:
        backbone: Images (N, 3, S, S) to maps by name; the last map is used.
        num_classes: Classes, without a background.
        label_smoothing: Share of the target spread over all classes.
    """

    def __init__(self, backbone: Backbone, num_classes: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.last = list(backbone.feature_specs)[-1]
        self.tail, self.fc = backbone.classifier_layers(num_classes)
        self.label_smoothing = label_smoothing

    def classify(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, 3, S, S)."""
        last = self.tail(self.backbone(images)[self.last])
        logits: Tensor = self.fc(last.mean((2, 3)))
        return logits

    def forward(self, batch: ClassificationBatch) -> dict[str, Tensor]:
        """``{"loss": ...}``: mean cross entropy in fp32."""
        logits = self.classify(batch.images).float()
        return {"loss": F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)}
