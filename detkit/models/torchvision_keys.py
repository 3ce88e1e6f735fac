"""State dicts of torchvision's ResNets and Faster R-CNN FPN under detkit's names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from detkit.errors import CheckpointError

# Later torchvision versions wrap the pyramid's and the RPN's convolutions, hence the optional ".0".
_RULES: tuple[tuple[str, str], ...] = (
    (r"backbone\.body\.(.+)", r"backbone.\1"),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.(?:0\.)?(weight|bias)", r"neck.lateral.p<\1>.conv.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.(?:0\.)?(weight|bias)", r"neck.output.p<\1>.conv.\2"),
    (r"rpn\.head\.conv\.(?:0\.0\.)?(weight|bias)", r"rpn.head.conv.\1"),
    (r"rpn\.head\.cls_logits\.(weight|bias)", r"rpn.head.objectness.\1"),
    (r"rpn\.head\.bbox_pred\.(weight|bias)", r"rpn.head.deltas.\1"),
    (r"roi_heads\.box_head\.fc6\.(weight|bias)", r"head.predictor.fc1.\1"),
    (r"roi_heads\.box_head\.fc7\.(weight|bias)", r"head.predictor.fc2.\1"),
    (r"roi_heads\.box_predictor\.cls_score\.(weight|bias)", r"head.predictor.classes.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(weight|bias)", r"head.predictor.boxes.\1"),
    (r"(fc\.(?:weight|bias))", r"\1"),
    (r"((?:conv1|bn1|layer[1-4])\..+)", r"backbone.\1"),
)


def rename(key: str) -> str | None:
    """The name detkit gives a torchvision entry; None without counterpart."""
    for pattern, name in _RULES:
        found = re.fullmatch(pattern, key)
        if found:
            new = found.expand(name)
            return re.sub(r"<(\d)>", lambda level: str(int(level[1]) + 2), new)
    return None


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A torchvision ResNet classifier's or Faster R-CNN FPN's weights for the same detkit model.

    The boxes of the background class, which torchvision predicts and never uses, are dropped; the
    batch counters that its frozen norms leave out are 0.

    Raises:
        CheckpointError: An entry has no counterpart; nothing is left out silently.
    """
    names = {key: rename(key) for key in state}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise CheckpointError(
            "torchvision weights: must be of a ResNet or a Faster R-CNN FPN, "
            f"got {len(unknown)} unknown entries such as {unknown[0]!r}"
        )
    out = {name: state[key] for key, name in names.items() if name is not None}
    for kind in ("weight", "bias"):
        boxes = f"head.predictor.boxes.{kind}"
        if boxes in out:
            out[boxes] = out[boxes][4:]
    for key in [key for key in out if key.endswith(".running_mean")]:
        counter = key.removesuffix("running_mean") + "num_batches_tracked"
        out.setdefault(counter, torch.tensor(0))
    return out
