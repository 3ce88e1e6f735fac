"""State dicts of torchvision's ResNets and their FPN detectors under detkit's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from detkit.errors import CheckpointError

_WB = r"(weight|bias)"
# Earlier torchvision versions gave convolutions fewer wrappers, hence the optional ".0" and the two
# ways of counting the convolutions of a head. <a+b> and <a/b> stand for the number they come to.
_RULES: tuple[tuple[str, str], ...] = (
    (r"backbone\.body\.(.+)", r"backbone.\1"),
    (rf"backbone\.fpn\.inner_blocks\.(\d)\.(?:0\.)?{_WB}", r"neck.lateral.p<\1+FINEST>.conv.\2"),
    (rf"backbone\.fpn\.layer_blocks\.(\d)\.(?:0\.)?{_WB}", r"neck.output.p<\1+FINEST>.conv.\2"),
    (rf"backbone\.fpn\.extra_blocks\.(p[67])\.{_WB}", r"neck.extra.convs.\1.conv.\2"),
    (rf"rpn\.head\.conv\.(?:0\.0\.)?{_WB}", r"rpn.head.conv.\1"),
    (rf"rpn\.head\.cls_logits\.{_WB}", r"rpn.head.objectness.\1"),
    (rf"rpn\.head\.bbox_pred\.{_WB}", r"rpn.head.deltas.\1"),
    (rf"roi_heads\.box_head\.fc6\.{_WB}", r"head.predictor.fc1.\1"),
    (rf"roi_heads\.box_head\.fc7\.{_WB}", r"head.predictor.fc2.\1"),
    (rf"roi_heads\.box_predictor\.cls_score\.{_WB}", r"head.predictor.classes.\1"),
    (rf"roi_heads\.box_predictor\.bbox_pred\.{_WB}", r"head.predictor.boxes.\1"),
    (rf"roi_heads\.mask_head\.(\d)\.0\.{_WB}", r"mask_head.predictor.convs.\1.conv.\2"),
    (rf"roi_heads\.mask_head\.mask_fcn(\d)\.{_WB}", r"mask_head.predictor.convs.<\1-1>.conv.\2"),
    (rf"roi_heads\.mask_predictor\.conv5_mask\.{_WB}", r"mask_head.predictor.upsample.\1"),
    (rf"roi_heads\.mask_predictor\.mask_fcn_logits\.{_WB}", r"mask_head.predictor.masks.\1"),
    (rf"head\.classification_head\.conv\.(\d)\.0\.{_WB}", r"head.classes.convs.\1.conv.\2"),
    (rf"head\.classification_head\.conv\.(\d)\.{_WB}", r"head.classes.convs.<\1/2>.conv.\2"),
    (rf"head\.classification_head\.cls_logits\.{_WB}", r"head.classes.out.\1"),
    (rf"head\.regression_head\.conv\.(\d)\.0\.{_WB}", r"head.boxes.convs.\1.conv.\2"),
    (rf"head\.regression_head\.conv\.(\d)\.{_WB}", r"head.boxes.convs.<\1/2>.conv.\2"),
    (rf"head\.regression_head\.bbox_reg\.{_WB}", r"head.boxes.out.\1"),
    (r"(fc\.(?:weight|bias))", r"\1"),
    (r"((?:conv1|bn1|layer[1-4])\..+)", r"backbone.\1"),
)
_CLASS_LAYER = {
    "maskrcnn-fpn": "roi_heads.mask_predictor.mask_fcn_logits.weight",
    "frcnn-fpn": "roi_heads.box_predictor.cls_score.weight",
    "retinanet": "head.classification_head.cls_logits.weight",
    "": "fc.weight",
}
# rows that torchvision gives the background class, trains with nothing and never shows
_BACKGROUND_ROWS = {"head.predictor.boxes": 4, "mask_head.predictor.masks": 1}
_BACKBONES = {6: "resnet50", 23: "resnet101"}  # by the blocks of layer3
_BOX_NUMBERS = 4


@dataclass(frozen=True)
class TorchvisionModel:
    """What a torchvision state dict is of.

    Attributes:
        detector: detkit's name of the detector; empty for a classifier.
        backbone: detkit's name of the backbone.
        outputs: Numbers per box, anchor or image that are classes, a background among them where
            torchvision has one.
    """

    detector: str
    backbone: str
    outputs: int


def recognise(state: Mapping[str, Tensor]) -> TorchvisionModel | None:
    """The model that ``state`` is of; None where its keys are not torchvision's.

    Raises:
        CheckpointError: It is of a backbone other than ResNet-50 and ResNet-101.
    """
    body = "backbone.body." if "backbone.body.conv1.weight" in state else ""
    detector = next((name for name, layer in _CLASS_LAYER.items() if layer in state), None)
    if detector is None or f"{body}conv1.weight" not in state or bool(body) != bool(detector):
        return None
    blocks = {k.split(".")[-3] for k in state if re.match(rf"{body}layer3\.\d+\.conv3\.weight$", k)}
    if len(blocks) not in _BACKBONES:
        raise CheckpointError(
            "torchvision weights: must be of a ResNet-50 or ResNet-101, got "
            f"{len(blocks)} bottleneck blocks in layer3"
        )
    rows = len(state[_CLASS_LAYER[detector]])
    boxes = state.get("head.regression_head.bbox_reg.weight")
    if boxes is not None:
        rows //= max(1, len(boxes) // _BOX_NUMBERS)  # anchors per cell
    return TorchvisionModel(detector, _BACKBONES[len(blocks)], rows)


def rename(key: str, finest: int = 2) -> str | None:
    """The name detkit gives a torchvision entry; None without counterpart.

    Args:
        key: torchvision's name.
        finest: Level of the first map of the pyramid: 3 in RetinaNet.
    """
    for pattern, name in _RULES:
        found = re.fullmatch(pattern, key)
        if found:
            new = found.expand(name).replace("FINEST", str(finest))
            return re.sub(r"<(\d)([-+/])(\d)>", _number, new)
    return None


def _number(found: re.Match[str]) -> str:
    a, sign, b = int(found[1]), found[2], int(found[3])
    return str({"+": a + b, "-": a - b, "/": a // max(1, b)}[sign])


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a torchvision ResNet or FPN detector for the same detkit model.

    Rows of the background class, which torchvision never uses, are dropped; the batch counters that
    its frozen norms leave out are 0. An entry without counterpart keeps its name, so that whatever
    loads the result refuses it or lists it as left over.
    """
    finest = 3 if _CLASS_LAYER["retinanet"] in state else 2
    out = {rename(key, finest) or key: value for key, value in state.items()}
    for layer, rows in _BACKGROUND_ROWS.items():
        for key in (f"{layer}.weight", f"{layer}.bias"):
            if key in out:
                out[key] = out[key][rows:]
    for key in [key for key in out if key.endswith(".running_mean")]:
        counter = key.removesuffix("running_mean") + "num_batches_tracked"
        out.setdefault(counter, torch.tensor(0))
    return out
