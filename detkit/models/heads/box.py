"""Box head of Fast R-CNN: two fully connected layers, classes and boxes of pooled RoIs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from detkit.config import BoxConfig
from detkit.models import losses, targets
from detkit.models.heads.roi import RoiHead, RoiPooler, to_rois
from detkit.models.norm import normalise_rows, rows_norm
from detkit.ops import batched_nms
from detkit.ops import boxes as box_ops
from detkit.types import Detections, Target


class BoxPredictor(nn.Module):
    """Two fully connected layers, then class logits and box deltas.

    Args:
        cin: Numbers per RoI.
        channels: Width of the two layers.
        num_classes: Classes without background.
        class_agnostic: One box per RoI and not one per class.
        norm: Name of the norm after each of the two.
    """

    def __init__(
        self, cin: int, channels: int, num_classes: int, class_agnostic: bool, norm: str = "none"
    ) -> None:
        super().__init__()
        make_norm = rows_norm(norm)
        # layers shaped by the classes: rows before the first class, rows per class
        self.class_rows = {"classes": (1, 1)} | ({} if class_agnostic else {"boxes": (0, 4)})
        self.fc1 = nn.Linear(cin, channels)
        self.norm1 = make_norm(channels)
        self.fc2 = nn.Linear(channels, channels)
        self.norm2 = make_norm(channels)
        self.classes = nn.Linear(channels, num_classes + 1)
        self.boxes = nn.Linear(channels, 4 if class_agnostic else 4 * num_classes)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.boxes.weight, std=0.001)
        for layer in (self.fc1, self.fc2, self.classes, self.boxes):
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, K + 1), background first, and deltas (R, 1 or K, 4) of (R, C, h, w)."""
        x = pooled.flatten(1)
        for layer, norm in ((self.fc1, self.norm1), (self.fc2, self.norm2)):
            x = torch.relu(normalise_rows(norm, layer(x)))
        return self.classes(x), self.boxes(x).unflatten(1, (-1, 4))


class BoxHead(RoiHead):
    """Classes and boxes of proposals: their losses, and the final detections.

    Args:
        pooler: Features of RoIs.
        predictor: (logits, deltas) of pooled features.
        config: Sampling, loss and detection settings.
    """

    def __init__(self, pooler: RoiPooler, predictor: nn.Module, config: BoxConfig) -> None:
        super().__init__()
        self.pooler = pooler
        self.predictor = predictor
        self.config = config

    def forward(
        self, features: Mapping[str, Tensor], boxes: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits and deltas of the boxes (R_i, 4) of each image, one image after the other."""
        logits, deltas = self.predictor(self.pooler(features, to_rois(boxes)))
        return logits, deltas

    def losses(
        self, features: Mapping[str, Tensor], proposals: Sequence[Tensor], truth: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Class and box losses over the sampled proposals; truth boxes join the proposals.

        Args:
            features: Maps of N images by level.
            proposals: N tensors (R, 4).
            truth: N targets.
        """
        with torch.no_grad():
            drawn = [self._sample(p, t) for p, t in zip(proposals, truth, strict=True)]
        logits, deltas = self(features, [boxes for boxes, _, _ in drawn])
        labels = torch.cat([labels for _, labels, _ in drawn])
        goal = torch.cat([goal for _, _, goal in drawn])
        positive = labels.nonzero().flatten()
        column = torch.zeros_like(positive) if deltas.shape[1] == 1 else labels[positive] - 1
        box_loss = losses.smooth_l1(deltas[positive, column], goal, self.config.smooth_l1_beta)
        count = max(1, len(labels))
        return {
            "box_class": losses.cross_entropy(logits, labels) / count,
            "box_regression": box_loss / count,
        }

    def _sample(self, proposals: Tensor, truth: Target) -> tuple[Tensor, Tensor, Tensor]:
        """Drawn boxes (S, 4), positives first, their labels (S,), the positives' targets (P, 4)."""
        config = self.config
        boxes = torch.cat([proposals, truth.boxes[~truth.iscrowd]])
        matches = targets.match(boxes, truth, config.fg_iou, config.fg_iou)
        positive, negative = targets.sample(
            matches.label, config.batch_per_image, config.positive_fraction
        )
        index = matches.index[positive]
        labels = torch.cat([truth.labels[index], torch.zeros_like(negative)])
        goal = box_ops.encode(truth.boxes[index], boxes[positive], config.weights)
        return boxes[torch.cat([positive, negative])], labels, goal

    @torch.no_grad()
    def detect(
        self, features: Mapping[str, Tensor], proposals: Sequence[Tensor], sizes: Tensor
    ) -> list[Detections]:
        """Detections of each image, best first, clipped to it.

        Args:
            features: Maps of N images by level.
            proposals: N tensors (R, 4).
            sizes: (N, 2) height and width before padding.
        """
        config = self.config
        rois = to_rois(proposals)
        logits, deltas = self(features, proposals)
        scores = logits.float().softmax(1)[:, 1:]  # (R, K)
        roi, label = (scores > config.score_threshold).nonzero(as_tuple=True)
        column = torch.zeros_like(label) if deltas.shape[1] == 1 else label
        boxes = box_ops.decode(deltas[roi, column], rois[roi, 1:], config.weights)
        image = rois[roi, 0].to(torch.int64)
        boxes = torch.minimum(boxes.clamp(min=0), sizes.to(boxes)[image][:, [1, 0, 1, 0]])
        kept = ((boxes[:, 2:] - boxes[:, :2]).amin(1) > 0).nonzero().flatten()
        group = image * scores.shape[1] + label
        score = scores[roi, label]
        kept = kept[batched_nms(boxes[kept], score[kept], group[kept], config.nms_iou)]
        each = [kept[image[kept] == i][: config.max_detections] for i in range(len(proposals))]
        return [Detections(boxes=boxes[i], labels=label[i] + 1, scores=score[i]) for i in each]

    def run_layers(self, features: Mapping[str, Tensor], count: int) -> None:
        """Run the predictor once for ``count`` RoIs, to count its cost."""
        self.predictor(self.pooler.blank(features, count))
