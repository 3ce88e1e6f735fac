"""torchvision's weights as checkpoints: the same detections, what is kept, what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detkit import api, foreign
from detkit.config import resolve
from detkit.data import eval_batches, open_detection
from detkit.data.dataset import DetectionDataset
from detkit.errors import CheckpointError
from detkit.models.torchvision_keys import convert
from detkit.types import CategoryMap

BUILDERS = {
    "frcnn-fpn": "fasterrcnn_resnet50_fpn",
    "maskrcnn-fpn": "maskrcnn_resnet50_fpn",
    "retinanet": "retinanet_resnet50_fpn",
}
PICTURES = (("coco_mini", 2), ("bccd", 2), ("nuts_seg", 1))


def random_peer(tv: ModuleType, detector: str, images: list[Tensor], **settings: Any) -> nn.Module:
    """A torchvision detector with random weights that detects a lot, nothing of it for sure."""
    torch.manual_seed(0)
    build = getattr(tv.models.detection, BUILDERS[detector])
    peer = build(weights=None, weights_backbone=None, **settings).eval()
    for module in peer.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(0, 0.05)
            module.running_var.uniform_(0.8, 1.2)
            nn.init.constant_(module.weight, 0.4)
    if detector == "retinanet":
        heads = [(peer.head.classification_head.cls_logits, -6.0, 1.0)]
        heads += [(peer.head.regression_head.bbox_reg, 0.0, 0.2)]
    else:
        heads = [(peer.rpn.head.cls_logits, 0.0, 1.0), (peer.rpn.head.bbox_pred, 0.0, 0.2)]
        box = peer.roi_heads.box_predictor
        heads += [(box.cls_score, 0.0, 1.5), (box.bbox_pred, 0.0, 1.0)]
    spread(heads, peer, images)
    return peer


def spread(
    heads: list[tuple[nn.Module, float, float]], peer: nn.Module, images: list[Tensor]
) -> None:
    """Scale and shift last layers so that each of their channels varies as given on ``images``."""
    seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer, _, _ in heads}
    handles = [
        layer.register_forward_hook(lambda m, _, out: seen[m].append(out.movedim(1, -1)))
        for layer in seen
    ]
    with torch.no_grad():
        peer(images)
        for handle in handles:
            handle.remove()
        for layer, mean, deviation in heads:
            rows = torch.cat([x.flatten(0, -2) for x in seen[layer]])  # (R, channels)
            factor = deviation / rows.std(0)
            layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.ndim - 1)))
            layer.bias.copy_((layer.bias - rows.mean(0)) * factor + mean)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> Path:
    """Five real images of three sets as one COCO set."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images" / "val").mkdir(parents=True)
    images = []
    for name, count in PICTURES:
        found = sorted(
            p for p in (real_data / name / "images").rglob("*") if p.suffix in (".jpg", ".png")
        )
        for path in found[:count]:
            shutil.copy(path, folder / "images" / "val" / f"{name}-{path.name}")
            images.append({"id": len(images) + 1, "file_name": f"{name}-{path.name}"})
    assert len(images) == 5
    boxes = [
        {"id": i["id"], "image_id": i["id"], "category_id": 1, "bbox": [5, 5, 20, 20]}
        for i in images
    ]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "person"}]}
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return folder


def pixels(dataset: DetectionDataset, index: int) -> Tensor:
    """(3, H, W) in 0..1: an image as torchvision takes it."""
    rgb = torch.from_numpy(np.array(dataset.image(index)))
    return rgb.permute(2, 0, 1).contiguous().float() / 255


SMALL, LARGE = (200, 333), (800, 1333)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("detector", "sizes"),
    [
        ("frcnn-fpn", [*[SMALL] * 5, LARGE]),
        ("maskrcnn-fpn", [SMALL] * 5),
        ("retinanet", [*[SMALL] * 5, LARGE]),
    ],
)
def test_detections_equal_torchvisions(
    tv: ModuleType,
    pictures: Path,
    tmp_path: Path,
    detector: str,
    sizes: list[tuple[int, int]],
) -> None:
    """From the file to boxes in its pixels; boxes to 1e-3 px, scores to 1e-5, in the same order."""
    dataset = open_detection(str(pictures), "val", resolve([]).data)
    images = [pixels(dataset, i) for i in range(5)]
    peer = random_peer(tv, detector, images, min_size=SMALL[0], max_size=SMALL[1])
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    loaded = api.load(tmp_path / "peer.pth")
    for i, (short_side, long_side) in enumerate(sizes):
        size = {"data": {"short_side": short_side, "long_side": long_side, "workers": 0}}
        batches = eval_batches(dataset, resolve([size], loaded.config))
        batch = next(itertools.islice(batches, i % 5, None))
        (ours,) = loaded.model.detect(batch.images, batch.sizes, batch.original_sizes)
        peer.transform.min_size, peer.transform.max_size = (short_side,), long_side
        with torch.no_grad():
            (theirs,) = peer([images[i % 5]])
        scores = theirs["scores"]
        assert len(scores) >= 50 and scores.max() < 0.999 and len(scores.unique()) == len(scores)
        ids = [loaded.categories.category_id(int(k)) for k in ours["labels"]]
        assert ids == theirs["labels"].tolist()
        torch.testing.assert_close(ours["scores"], scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=0, atol=1e-3)
