"""One-stage head of RetinaNet (Lin et al., 2017): classes and boxes of every anchor, focal loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detkit.config import BoxConfig, RetinaConfig
from detkit.models import losses, targets
from detkit.models.anchors import AnchorGrid
from detkit.models.heads.detections import best_detections
from detkit.models.necks.fpn import ConvNorm
from detkit.models.norm import norm_named
from detkit.models.weights import ClassRows
from detkit.ops import boxes as box_ops
from detkit.types import Detections, Target


@dataclass
class RetinaOutput:
    """Predictions for the T anchors of all levels, finest level first.

    Attributes:
        logits: (N, T, K) before the sigmoid.
        deltas: (N, T, 4).
        anchors: (T, 4) xyxy in input pixels.
        counts: Anchors of each level; they sum to T.
    """

    logits: Tensor
    deltas: Tensor
    anchors: Tensor
    counts: list[int]


class RetinaBranch(nn.Module):
    """3x3 convolutions with ReLU, then ``numbers`` per anchor; one branch for all levels.

    Args:
        channels: Channels of the maps and of the convolutions.
        convs: Convolutions before the last one.
        anchors: Anchors per cell.
        numbers: What each anchor gets; the channels of the last convolution are anchor-major.
        norm: Name of the norm after each convolution but the last.
    """

    def __init__(
        self, channels: int, convs: int, anchors: int, numbers: int, norm: str = "none"
    ) -> None:
        super().__init__()
        make_norm = norm_named(norm)
        self.numbers = numbers
        self.convs = nn.ModuleList(ConvNorm(channels, channels, 3, make_norm) for _ in range(convs))
        self.out = nn.Conv2d(channels, anchors * numbers, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(self.out.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """(N, H * W * A, numbers) of a map (N, channels, H, W)."""
        for conv in self.convs:
            x = torch.relu(conv(x))
        out: Tensor = self.out(x).permute(0, 2, 3, 1)
        return out.reshape(x.shape[0], -1, self.numbers)


class ClassBranch(RetinaBranch):
    """Class logits of every anchor, which start at the score ``prior`` (section 4.1)."""

    def __init__(
        self, channels: int, convs: int, anchors: int, num_classes: int, norm: str, prior: float
    ) -> None:
        super().__init__(channels, convs, anchors, num_classes, norm)
        self.class_rows = {"out": ClassRows(0, 1, groups=anchors)}
        nn.init.constant_(self.out.get_parameter("bias"), math.log(prior / (1 - prior)))


class RetinaHead(nn.Module):
    """Classes and boxes of the anchors of the named levels: losses and detections.

    Args:
        classes: Class logits (N, H * W * A, K) of one level.
        boxes: Box deltas (N, H * W * A, 4) of one level.
        grid: Anchors, one entry per level.
        levels: Names of the feature maps used.
        config: Matching, losses and candidates.
        box: Regression targets and final detections.
    """

    def __init__(
        self,
        classes: nn.Module,
        boxes: nn.Module,
        grid: AnchorGrid,
        levels: Sequence[str],
        config: RetinaConfig,
        box: BoxConfig,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.boxes = boxes
        self.grid = grid
        self.levels = tuple(levels)
        self.config = config
        self.box = box

    def forward(self, features: Mapping[str, Tensor], image: tuple[int, int]) -> RetinaOutput:
        """Predictions on the maps {level: (N, C, H, W)} of images padded to ``image`` pixels."""
        maps = [features[name] for name in self.levels]
        anchors = self.grid([(x.shape[2], x.shape[3]) for x in maps], maps[0].device, image)
        return RetinaOutput(
            torch.cat([self.classes(x) for x in maps], 1),
            torch.cat([self.boxes(x) for x in maps], 1),
            torch.cat(anchors),
            [a.shape[0] for a in anchors],
        )

    def losses(self, output: RetinaOutput, truth: Sequence[Target]) -> dict[str, Tensor]:
        """Class and box losses of N images, divided by the positive anchors of them all.

        DetNAS divides the class loss by these and N (``config.divisor``).

        Args:
            output: Predictions.
            truth: N targets.
        """
        config = self.config
        with torch.no_grad():
            matches = [
                targets.match(output.anchors, t, config.fg_iou, config.bg_iou, keep_best=True)
                for t in truth
            ]
            state = torch.stack([m.label for m in matches])  # (N, T)
            positive = state == targets.POSITIVE
            wanted = torch.zeros_like(output.logits, dtype=torch.bool)
            goals = []
            for i, (match, t) in enumerate(zip(matches, truth, strict=True)):
                rows = positive[i].nonzero().flatten()
                index = match.index[rows]
                wanted[i, rows, t.labels[index] - 1] = True
                goals.append(box_ops.encode(t.boxes[index], output.anchors[rows], self.box.weights))
        positives = int(positive.sum())
        each = losses.focal(output.logits, wanted, config.alpha, config.gamma).sum(2)  # (N, T)
        box_loss = losses.smooth_l1(
            output.deltas[positive], torch.cat(goals), config.smooth_l1_beta
        )
        images = len(truth) if config.divisor == "positives+images" else 0
        return {
            "retina_class": each[state != targets.IGNORED].sum() / max(1, positives + images),
            "retina_box": self.box.regression_weight * box_loss.sum() / max(1, positives),
        }

    @torch.no_grad()
    def detect(self, output: RetinaOutput, sizes: Tensor) -> list[Detections]:
        """Detections of each image, best first, clipped to it.

        Args:
            output: Predictions.
            sizes: (N, 2) height and width before padding.
        """
        scores = output.logits.float().sigmoid()  # (N, T, K)
        found = [self._candidates(scores[i], output.counts) for i in range(len(scores))]
        rows, labels, score = (torch.cat(parts) for parts in zip(*found, strict=True))
        image = torch.cat([torch.full_like(part[0], i) for i, part in enumerate(found)])
        boxes = box_ops.decode(output.deltas[image, rows], output.anchors[rows], self.box.weights)
        return best_detections(boxes, labels, score, image, sizes, self.box)

    def _candidates(self, scores: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors, labels and scores of the best entries of each level of one image (T, K)."""
        rows, labels, best = [], [], []
        start, classes = 0, scores.shape[1]
        for part in scores.split(counts):
            entries = part.flatten()
            above = (entries > self.box.score_threshold).nonzero().flatten()
            top = entries[above].topk(min(self.config.pre_nms, len(above)))
            place = top.indices.sort().indices  # ties in the order of the anchors
            chosen = above[top.indices[place]]
            rows.append(start + chosen // classes)
            labels.append(chosen % classes + 1)
            best.append(top.values[place])
            start += len(part)
        return torch.cat(rows), torch.cat(labels), torch.cat(best)
