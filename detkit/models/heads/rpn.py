"""Region proposal network (Ren et al., 2015): scores and shifts anchors, proposes the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from detkit.config import RpnConfig
from detkit.models import losses, targets
from detkit.models.anchors import AnchorGrid
from detkit.models.patches import anchor_patches
from detkit.ops import batched_nms
from detkit.ops import boxes as box_ops
from detkit.types import Target


@dataclass
class RpnOutput:
    """Predictions for the T anchors of all levels, finest level first.

    Attributes:
        logits: (N, T) objectness before the sigmoid.
        deltas: (N, T, 4).
        anchors: (T, 4) xyxy in input pixels.
        counts: Anchors of each level; they sum to T.
        maps: The maps (N, C, H, W) where the predictions are without gradients and the losses
            compute those of their few anchors anew.
    """

    logits: Tensor
    deltas: Tensor
    anchors: Tensor
    counts: list[int]
    maps: list[Tensor] | None = None


class RpnHead(nn.Module):
    """3x3 convolution, then objectness and four deltas per anchor; one head for all levels.

    Args:
        cin: Channels of the maps.
        channels: Channels of the 3x3 convolution.
        anchors: Anchors per cell.
        softmax: Two logits per anchor, background and object. Their softmax is the sigmoid of the
            difference, so that is what comes out, and the losses are the same.
    """

    def __init__(self, cin: int, channels: int, anchors: int, softmax: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, 2 * anchors if softmax else anchors, 1)
        self.softmax = softmax
        self.deltas = nn.Conv2d(channels, 4 * anchors, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.get_parameter("bias"))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, H * W * A) and deltas (N, H * W * A, 4) of a map (N, cin, H, W)."""
        x = torch.relu(self.conv(x))
        logits = self._logits(self.objectness(x).permute(0, 2, 3, 1).flatten(1))
        deltas = self.deltas(x).permute(0, 2, 3, 1)
        return logits, deltas.reshape(x.shape[0], -1, 4)

    def at(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (S, A) and deltas (S, A, 4) of chosen cells, from (S, 9, cin) around each.

        What :meth:`forward` gives there, up to rounding.
        """
        kernel = self.conv.weight.permute(0, 2, 3, 1).flatten(1)  # (channels, 9 * cin)
        x = torch.relu(F.linear(patches.flatten(1), kernel, self.conv.bias))
        logits, deltas = (
            F.linear(x, layer.weight.flatten(1), layer.bias)
            for layer in (self.objectness, self.deltas)
        )
        return self._logits(logits), deltas.unflatten(1, (-1, 4))

    def _logits(self, x: Tensor) -> Tensor:
        """One number (N, ...) per anchor of one or two."""
        if not self.softmax:
            return x
        pair = x.unflatten(1, (-1, 2))  # background, object
        difference: Tensor = pair[:, :, 1] - pair[:, :, 0]
        return difference

    def is_plain(self) -> bool:
        """Whether :meth:`at` holds: its layers are the convolutions made here, with no hooks."""
        layers = (self, self.conv, self.objectness, self.deltas)
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in layers)
        return not hooked and all(type(layer) is nn.Conv2d for layer in layers[1:])


class RPN(nn.Module):
    """Anchors of the named levels, a head over them, their losses and proposals.

    Args:
        head: Gives (logits, deltas) of one level.
        grid: Anchors, one entry per level.
        levels: Names of the feature maps used.
        config: Sampling, loss and proposal settings.
    """

    def __init__(
        self, head: nn.Module, grid: AnchorGrid, levels: Sequence[str], config: RpnConfig
    ) -> None:
        super().__init__()
        self.head = head
        self.grid = grid
        self.levels = tuple(levels)
        self.config = config

    def forward(
        self, features: Mapping[str, Tensor], image: tuple[int, int] | None = None
    ) -> RpnOutput:
        """Predictions on the maps {level: (N, C, H, W)}.

        Args:
            features: Maps by level.
            image: (height, width) of the padded images, which measured anchor strides need.
        """
        maps = [features[name] for name in self.levels]
        lazily = self._learns_at_samples()
        predict = self._without_gradients if lazily else self.head
        logits, deltas = zip(*(predict(x) for x in maps), strict=True)
        anchors = self.grid([(x.shape[2], x.shape[3]) for x in maps], maps[0].device, image)
        return RpnOutput(
            torch.cat(logits, 1),
            torch.cat(deltas, 1),
            torch.cat(anchors),
            [a.shape[0] for a in anchors],
            maps if lazily else None,
        )

    def _learns_at_samples(self) -> bool:
        """Whether the head's predictions are for the proposals alone, which need no gradients.

        The losses see a few hundred anchors of an image, so most of the backward pass through the
        head's convolution, twice the work of the forward pass, would multiply zeros.
        """
        head, compiling = self.head, torch.compiler.is_compiling()
        plain = isinstance(head, RpnHead) and head.is_plain()
        return plain and torch.is_grad_enabled() and not compiling

    def _without_gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the head says of a map.

        Not under ``no_grad``: autocast would keep the weights it cast there, and those have none.
        """
        fixed = {name: parameter.detach() for name, parameter in self.head.named_parameters()}
        logits, deltas = functional_call(self.head, fixed, x.detach())
        return logits, deltas

    def losses(
        self, output: RpnOutput, truth: Sequence[Target], sizes: Tensor
    ) -> dict[str, Tensor]:
        """Objectness and box losses over the sampled anchors of N images.

        Args:
            output: Predictions.
            truth: N targets.
            sizes: (N, 2) height and width before padding.
        """
        with torch.no_grad():
            drawn = [
                self._sample(output.anchors, t, *s)
                for t, s in zip(truth, sizes.tolist(), strict=True)
            ]
        total = len(output.anchors)
        positive = torch.cat([pos + i * total for i, (pos, _, _) in enumerate(drawn)])
        negative = torch.cat([neg + i * total for i, (_, neg, _) in enumerate(drawn)])
        goal = torch.cat([goal for _, _, goal in drawn])
        count = max(1, len(positive) + len(negative))
        logits, deltas = self._predictions(output, torch.cat([positive, negative]))
        box = losses.smooth_l1(deltas[: len(positive)], goal, self.config.smooth_l1_beta)
        return {
            "rpn_objectness": losses.objectness(logits, len(positive)) / count,
            "rpn_box": box.sum() / count,
        }

    def _predictions(self, output: RpnOutput, index: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (S,) and deltas (S, 4) with gradients of anchors (S,): image * T + anchor."""
        if output.maps is None or not isinstance(self.head, RpnHead):
            return output.logits.flatten()[index], output.deltas.flatten(0, 1)[index]
        found, order = anchor_patches(output.maps, output.counts, index)
        logits, deltas = self.head.at(found)  # (S, A), (S, A, 4)
        row = torch.empty_like(order)
        row[order] = torch.arange(len(order), device=order.device)
        # Every level has as many anchors in a cell, so the rest tells which of its cell's it is.
        which = index % sum(output.counts) % logits.shape[1]
        return logits[row, which], deltas[row, which]

    def _sample(
        self, anchors: Tensor, truth: Target, height: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Drawn positives (P,), negatives (M,) and the positives' regression targets (P, 4)."""
        config = self.config
        usable = torch.arange(len(anchors), device=anchors.device)
        if config.drop_straddling:
            usable = usable[targets.inside_image(anchors, height, width)]
        matches = targets.match(
            anchors[usable], truth, config.fg_iou, config.bg_iou, keep_best=True
        )
        positive, negative = targets.sample(
            matches.label, config.batch_per_image, config.positive_fraction
        )
        goal = box_ops.encode(truth.boxes[matches.index[positive]], anchors[usable[positive]])
        return usable[positive], usable[negative], goal

    @torch.no_grad()
    def proposals(
        self,
        output: RpnOutput,
        sizes: Tensor,
        before_nms: int,
        after_nms: int,
        scope: str = "image",
    ) -> list[Tensor]:
        """Best boxes (R, 4) of each image, clipped to it, best first.

        Args:
            output: Predictions.
            sizes: (N, 2) height and width before padding.
            before_nms: Boxes kept before suppression, per level (of the pool, if ``config.joint``).
            after_nms: Boxes kept per image, or of all images where ``scope`` says so.
            scope: ``image``, or ``batch`` to keep the best of all images together.
        """
        boxes, scores, level = self.candidates(output, sizes, before_nms)
        n, k = scores.shape
        boxes, scores = boxes.flatten(0, 1), scores.flatten()
        image = torch.arange(n, device=boxes.device).repeat_interleave(k)
        group = image * len(output.counts) + level.repeat(n)
        kept = (scores != -torch.inf).nonzero().flatten()
        kept = kept[batched_nms(boxes[kept], scores[kept], group[kept], self.config.nms_iou)]
        if scope == "batch":
            kept = kept[:after_nms]  # suppression gives the best of all images first
        return [boxes[kept[image[kept] == i][:after_nms]] for i in range(n)]

    @torch.no_grad()
    def candidates(
        self, output: RpnOutput, sizes: Tensor, limit: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`proposals` suppresses; no shape depends on values.

        Args:
            output: Predictions.
            sizes: (N, 2) height and width before padding.
            limit: Boxes per level (of the pool, if ``config.joint``).

        Returns:
            boxes (N, K, 4) clipped to their images; scores (N, K), -inf for boxes that are empty or
            too small; and the number of the level (K,): only boxes of one level suppress another.
        """
        logits = output.logits.detach().float()
        picked, level = self._best(logits, output.counts, limit)  # (N, K), (K,)
        n, k = picked.shape
        deltas = output.deltas.detach().gather(1, picked[..., None].expand(n, k, 4))
        boxes = box_ops.decode(deltas.flatten(0, 1), output.anchors[picked.flatten()]).view(n, k, 4)
        boxes = torch.minimum(boxes.clamp(min=0), box_ops.limits(sizes, boxes)[:, None])
        sides = (boxes[..., 2:] - boxes[..., :2]).amin(-1)
        large = (sides > 0) & (sides >= self.config.min_size)
        return boxes, torch.where(large, logits.gather(1, picked), -torch.inf), level

    def _best(self, logits: Tensor, counts: list[int], limit: int) -> tuple[Tensor, Tensor]:
        """Anchors (N, K) with the best scores of each level, or of all, and their pool (K,)."""
        if self.config.joint:
            picked = logits.topk(min(limit, logits.shape[1]), dim=1).indices
            return picked, torch.zeros_like(picked[0])
        starts = [sum(counts[:i]) for i in range(len(counts))]
        parts = [
            part.topk(min(limit, part.shape[1]), dim=1).indices + start
            for part, start in zip(logits.split(counts, 1), starts, strict=True)
        ]
        level = [torch.full_like(part[0], i) for i, part in enumerate(parts)]
        return torch.cat(parts, 1), torch.cat(level)
