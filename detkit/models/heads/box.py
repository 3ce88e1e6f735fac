"""Box head of Fast R-CNN: layers on pooled RoIs, classes and boxes, losses and detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from detkit.config import BoxConfig
from detkit.models import losses, targets
from detkit.models.heads.detections import best_detections
from detkit.models.heads.roi import RoiPooler, to_rois
from detkit.models.necks.fpn import ConvNorm
from detkit.models.norm import norm_named, normalise_rows, rows_norm
from detkit.models.targets import RoiSample
from detkit.models.weights import ClassRows
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
        self.class_rows = {"classes": ClassRows(1, 1)}
        if not class_agnostic:
            self.class_rows["boxes"] = ClassRows(0, 4)
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


class ConvBoxPredictor(nn.Module):
    """3x3 convolutions and a fully connected layer, then class logits and box deltas.

    Source: DetNAS (arXiv 1903.10979), the head of all its Faster R-CNNs; first in Wu and He, Group
    Normalization (2018), section 4.2.

    Args:
        shape: Channels, height and width of pooled features; the convolutions keep them.
        channels: Width of the fully connected layer.
        num_classes: Classes without background.
        class_agnostic: One box per RoI and not one per class.
        norm: Name of the norm after each convolution; the fully connected layer has none.
        convs: Convolutions.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: int,
        num_classes: int,
        class_agnostic: bool,
        norm: str = "none",
        convs: int = 4,
    ) -> None:
        super().__init__()
        make_norm = norm_named(norm)
        cin, height, width = shape
        self.class_rows = {"classes": ClassRows(1, 1)}
        if not class_agnostic:
            self.class_rows["boxes"] = ClassRows(0, 4)
        self.convs = nn.ModuleList(ConvNorm(cin, cin, 3, make_norm) for _ in range(convs))
        self.fc = nn.Linear(cin * height * width, channels)
        self.classes = nn.Linear(channels, num_classes + 1)
        self.boxes = nn.Linear(channels, 4 if class_agnostic else 4 * num_classes)
        nn.init.kaiming_uniform_(self.fc.weight, a=1)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.boxes.weight, std=0.001)
        for layer in (self.fc, self.classes, self.boxes):
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, K + 1), background first, and deltas (R, 1 or K, 4) of (R, C, h, w)."""
        x = pooled
        for conv in self.convs:
            x = torch.relu(conv(x))
        x = torch.relu(self.fc(x.flatten(1)))
        return self.classes(x), self.boxes(x).unflatten(1, (-1, 4))


class BoxHead(nn.Module):
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
        rois = to_rois(boxes)
        order = self.pooler.order(rois)
        if order is None:
            logits, deltas = self.predictor(self.pooler(features, rois))
            return logits, deltas
        logits, deltas = self.predictor(self.pooler(features, rois[order], in_order=True))
        place = order.argsort()
        return logits[place], deltas[place]

    @torch.no_grad()
    def sample(self, proposals: Tensor, truth: Target) -> RoiSample:
        """The RoIs of one image to learn from; truth boxes join the proposals (R, 4).

        With hard example mining all of them: the losses choose.
        """
        config = self.config
        boxes = torch.cat([proposals, truth.boxes[~truth.iscrowd]])
        matches = targets.match(boxes, truth, config.fg_iou, config.fg_iou)
        if config.ohem:
            positive = (matches.label == targets.POSITIVE).nonzero().flatten()
            negative = (matches.label == targets.NEGATIVE).nonzero().flatten()
        else:
            positive, negative = targets.sample(
                matches.label, config.batch_per_image, config.positive_fraction
            )
        index = matches.index[positive]
        return RoiSample(
            boxes=boxes[torch.cat([positive, negative])],
            labels=torch.cat([truth.labels[index], torch.zeros_like(negative)]),
            truth=index,
            deltas=box_ops.encode(truth.boxes[index], boxes[positive], config.weights),
        )

    def losses(
        self, features: Mapping[str, Tensor], samples: Sequence[RoiSample]
    ) -> dict[str, Tensor]:
        """Class and box losses over the samples of N images, of the hardest alone with mining.

        Args:
            features: Maps of N images by level.
            samples: What :meth:`sample` gave for each.
        """
        config = self.config
        logits, deltas = self(features, [s.boxes for s in samples])
        labels = torch.cat([s.labels for s in samples])
        positive = labels.nonzero().flatten()
        column = torch.zeros_like(positive) if deltas.shape[1] == 1 else labels[positive] - 1
        goal = torch.cat([s.deltas for s in samples])
        class_loss = losses.cross_entropy(logits, labels)  # (S,)
        box_loss = losses.smooth_l1(deltas[positive, column], goal, config.smooth_l1_beta)  # (P,)
        if config.ohem:
            each = class_loss.detach().index_add(0, positive, box_loss.detach())
            hard = hardest(each, [len(s.labels) for s in samples], config.ohem, config.ohem_scope)
            class_loss, box_loss = class_loss[hard], box_loss[hard[positive]]
        count = max(1, len(class_loss))
        return {
            "box_class": class_loss.sum() / count,
            "box_regression": config.regression_weight * box_loss.sum() / count,
        }

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
        return best_detections(boxes, label + 1, scores[roi, label], image, sizes, config)

    def run_layers(self, features: Mapping[str, Tensor], count: int) -> None:
        """Run the predictor once for ``count`` RoIs wherever they are, to count its cost.

        Works on the meta device, where boxes have no values.
        """
        self.predictor(self.pooler.blank(features, count))


def hardest(loss: Tensor, counts: Sequence[int], keep: int, scope: str) -> Tensor:
    """(S,) bool: the RoIs with the largest losses (online hard example mining).

    Args:
        loss: (S,) loss of each RoI, image after image.
        counts: RoIs of each image.
        keep: How many per image; all, where there are fewer.
        scope: ``image``, or ``batch`` to rank those of all images together.
    """
    groups = loss.split(list(counts)) if scope == "image" else (loss,)
    keep = keep if scope == "image" else keep * len(counts)
    start, chosen = 0, torch.zeros_like(loss, dtype=torch.bool)
    for group in groups:
        chosen[start + group.topk(min(keep, len(group))).indices] = True
        start += len(group)
    return chosen
