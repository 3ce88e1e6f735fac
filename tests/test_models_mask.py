"""Mask R-CNN: what the mask head learns from, what it pastes, and the whole way to `segm`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from data_sets import box, image, write_coco
from torch import Tensor, nn
from torch.nn import functional as F

from detkit import api
from detkit.config import Config, resolve
from detkit.errors import ConfigError, DataError
from detkit.models import DETECTORS, build_detector, count_detector
from detkit.models.detector import Detector, in_output_pixels
from detkit.models.heads import mask as mask_head
from detkit.models.heads.mask import MaskPredictor, crop_masks, paste_masks
from detkit.models.weights import init_detector
from detkit.models.zoo import WITH_MASKS
from detkit.types import Batch, CategoryMap, Target

CLASSES = 3


def config(**tables: dict[str, Any]) -> Config:
    """A detector small enough for a test; ``tables`` change it."""
    small = {
        "model": {
            "detector": "maskrcnn-fpn",
            "backbone": "resnet50-tiny",
            "norm": "bn",
            "neck_channels": 16,
        },
        "anchors": {"sizes": [8, 16, 32, 64, 128]},
        "rpn": {"drop_straddling": False, "post_nms_train": 50, "post_nms_test": 50},
        "box": {"channels": 32, "batch_per_image": 32, "canonical_size": 56.0},
        "mask": {"channels": 16, "convs": 2},
    }
    return resolve([small, tables])


def ellipses(boxes: list[list[float]], labels: list[int], size: tuple[int, int]) -> Target:
    """Truth whose masks are the ellipses in the boxes."""
    table = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    y = torch.arange(size[0])[:, None] + 0.5
    x = torch.arange(size[1])[None] + 0.5
    masks = [
        ((x - (x1 + x2) / 2) / (x2 - x1)) ** 2 + ((y - (y1 + y2) / 2) / (y2 - y1)) ** 2 < 0.25
        for x1, y1, x2, y2 in table.tolist()
    ]
    stacked = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool)
    crowd = torch.zeros(len(labels), dtype=torch.bool)
    return Target(table, torch.tensor(labels, dtype=torch.int64), crowd, stacked)


def batch(*targets: Target, size: tuple[int, int] = (96, 128)) -> Batch:
    """Noise in which each object is a patch of its class's colour."""
    images = 0.3 * torch.randn(len(targets), 3, *size, generator=torch.Generator().manual_seed(3))
    for picture, truth in zip(images, targets, strict=True):
        if truth.masks is not None:
            for mask, label in zip(truth.masks, truth.labels.tolist(), strict=True):
                picture[label - 1][mask] += 3
    files = [f"image{i}.jpg" for i in range(len(targets))]
    return Batch(images, torch.tensor([list(size)] * len(targets)), list(targets), files)


def some() -> Batch:
    return batch(
        ellipses([[5, 5, 60, 50], [70, 20, 120, 80]], [1, 3], (96, 128)),
        ellipses([[20, 20, 90, 80]], [2], (96, 128)),
    )


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


# --- what the head learns -------------------------------------------------------------------------


def test_crop_of_whole_pixels_is_the_share_of_each_cell() -> None:
    masks = torch.rand(2, 40, 60) < 0.5
    boxes = torch.tensor([[4, 8, 32, 20], [0, 0, 56, 40], [8, 8, 12, 12]], dtype=torch.float32)
    index = torch.tensor([1, 0, 1])
    found = crop_masks(masks, index, boxes, 4)
    for crop, i, (x1, y1, x2, y2) in zip(found, index, boxes.int().tolist(), strict=True):
        inside = masks[i, y1:y2, x1:x2].float().reshape(4, (y2 - y1) // 4, 4, (x2 - x1) // 4)
        torch.testing.assert_close(crop, inside.mean((1, 3)))


def _bilinear(picture: np.ndarray, y: float, x: float) -> float:
    """Value at (x, y), pixel centres at .5, constant beyond the outermost centres."""
    y, x = (min(max(v - 0.5, 0), n - 1) for v, n in zip((y, x), picture.shape, strict=True))
    top, left = int(y), int(x)
    bottom, right = min(top + 1, picture.shape[0] - 1), min(left + 1, picture.shape[1] - 1)
    above = picture[top, left] * (left + 1 - x) + picture[top, right] * (x - left)
    below = picture[bottom, left] * (left + 1 - x) + picture[bottom, right] * (x - left)
    return float(above * (top + 1 - y) + below * (y - top))


def test_crop_of_any_box_is_the_mean_of_bilinear_samples() -> None:
    mask = torch.rand(30, 40) < 0.5
    x1, y1, x2, y2 = rectangle = (3.3, 2.7, 30.6, 17.2)
    side, points = 4, (math.ceil((y2 - y1) / 4), math.ceil((x2 - x1) / 4))
    at = [
        [low + (high - low) * (i + 0.5) / (side * n) for i in range(side * n)]
        for low, high, n in ((y1, y2, points[0]), (x1, x2, points[1]))
    ]
    values = [[_bilinear(mask.numpy().astype(float), y, x) for x in at[1]] for y in at[0]]
    expected = torch.tensor(values).reshape(side, points[0], side, points[1]).mean((1, 3))
    found = crop_masks(mask[None], torch.tensor([0]), torch.tensor([rectangle]), side)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)


def test_few_masks_are_floats_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = torch.rand(5, 30, 30) < 0.5
    corner = torch.rand(12, 2) * 15
    boxes = torch.cat([corner, corner + 10], 1)
    index = torch.arange(12) % 5
    whole = crop_masks(masks, index, boxes, 7)
    seen: list[int] = []
    align = mask_head.roi_align
    monkeypatch.setattr(
        mask_head, "roi_align", lambda x, *a, **k: seen.append(len(x)) or align(x, *a, **k)
    )
    monkeypatch.setattr(mask_head, "_CROP_PIXELS", 2000)
    assert torch.equal(crop_masks(masks, index, boxes, 7), whole)
    assert seen == [2, 2, 1]


@pytest.mark.parametrize("norm", ["none", "bn", "gn"])
@pytest.mark.parametrize("backbone", ["resnet50-tiny", "detnet59-tiny"])
def test_a_step_gives_every_parameter_a_gradient(backbone: str, norm: str) -> None:
    model = build_detector(config(model={"backbone": backbone, "head_norm": norm}), CLASSES)
    losses = model(some())
    assert set(losses) == {"rpn_objectness", "rpn_box", "box_class", "box_regression", "mask"}
    assert losses["mask"].item() == pytest.approx(math.log(2), abs=0.1)  # undecided everywhere
    total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("norm", ["none", "bn", "gn"])
def test_without_objects_the_mask_loss_is_zero_and_still_has_a_graph(norm: str) -> None:
    model = build_detector(config(model={"head_norm": norm}), CLASSES)
    nothing = ellipses([], [], (96, 128))
    losses = model(batch(nothing, Target(nothing.boxes, nothing.labels, nothing.iscrowd)))
    assert losses["mask"].item() == 0
    losses["mask"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.mask_head.parameters())
    assert all(v.isfinite().all() for v in model.state_dict().values())


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(4)
    small = config(model={"norm": "sync_bn", "head_norm": "sync_bn"})
    model = nn.parallel.DistributedDataParallel(build_detector(small, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for _ in range(2):  # a parameter left out of one backward pass would stop the second forward
        optimizer.zero_grad()
        total(model(some() if rank == 0 else batch(ellipses([], [], (96, 128))))).backward()
        optimizer.step()
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_process_without_objects_keeps_step_with_the_others(tmp_path: Path) -> None:
    mp.spawn(_process, (str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(v, states[1][k]) and v.isfinite().all() for k, v in states[0].items())


def test_truth_without_masks_is_refused() -> None:
    data = some()
    data.targets[1].masks = None
    with pytest.raises(DataError, match="each of 1 truth boxes must have one .* got none"):
        build_detector(config(), CLASSES)(data)


def test_the_loss_is_that_of_the_true_class() -> None:
    """Logits of other classes do not matter, and crowds have no positives."""
    model = build_detector(config(), CLASSES)
    data = some()
    data.targets[0].iscrowd[:] = True
    samples = [model.head.sample(torch.zeros(0, 4), t) for t in data.targets]
    assert [len(s.truth) for s in samples] == [0, 1]
    bias = model.mask_head.predictor.masks.bias
    features = model.features(data.images)
    losses = []
    for raised in ((0, 2), (1,)):  # classes 1 and 3, then the true one, 2
        with torch.no_grad():
            bias[list(raised)] += 5
        losses.append(model.mask_head.losses(features, samples, data.targets)["mask"].item())
    inside = float(crop_masks(data.targets[1].masks, samples[1].truth, samples[1].boxes, 28).mean())
    assert losses[0] == pytest.approx(math.log(2), abs=0.05)
    assert losses[1] == pytest.approx(5 * (1 - inside), abs=0.1)


@pytest.mark.slow
def test_two_images_are_learnt_by_heart() -> None:
    model = build_detector(config(), CLASSES)
    data = some()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        total(model(data)).backward()
        optimizer.step()
    model.eval()
    for found, truth in zip(model.detect(data.images, data.sizes), data.targets, strict=True):
        for label, mask in zip(truth.labels, truth.masks, strict=True):
            mine = found["masks"][found["labels"] == label][:1]
            assert _iou(mine, mask[None]) > 0.8


def _iou(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


# --- what it pastes -------------------------------------------------------------------------------


def test_paste_samples_the_cells_at_pixel_centres() -> None:
    cells = torch.rand(2, 5, 5)
    boxes = [[2.3, 1.6, 17.9, 12.2], [-4.0, 5.5, 9.0, 40.0]]
    found = paste_masks(cells, torch.tensor(boxes), (20, 24), 0.5)
    expected = torch.zeros(2, 20, 24, dtype=torch.bool)
    for n, (x1, y1, x2, y2) in enumerate(boxes):
        for i in range(20):
            for j in range(24):
                u, v = (j + 0.5 - x1) / (x2 - x1), (i + 0.5 - y1) / (y2 - y1)
                if 0 <= u < 1 and 0 <= v < 1:
                    expected[n, i, j] = _bilinear(cells[n].numpy(), 5 * v, 5 * u) >= 0.5
    assert torch.equal(found, expected)
    assert 0.05 < found.float().mean() < 0.9


@pytest.mark.parametrize("factor", [1, 3])
def test_a_cropped_rectangle_comes_back(factor: int) -> None:
    """From and to any pixels: those of the given image, or of a file three times as large."""
    mask = torch.zeros(1, 120, 160, dtype=torch.bool)
    mask[:, 21:97, 34:141] = True
    boxes = torch.tensor([[27.4, 15.2, 150.3, 101.9]])
    cells = crop_masks(mask, torch.tensor([0]), boxes, 28)
    found = paste_masks(cells, boxes * factor, (120 * factor, 160 * factor), 0.5)
    large = mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    assert _iou(found, large) > 0.95


def test_boxes_that_hold_no_pixel_paste_nothing() -> None:
    boxes = [[3.6, 2, 4.4, 9], [30, 2, 40, 9], [math.nan, 2, 4, 9], [5, 5, 5, 5]]
    assert not paste_masks(torch.ones(4, 28, 28), torch.tensor(boxes), (20, 24), 0.5).any()
    assert paste_masks(torch.ones(0, 28, 28), torch.zeros(0, 4), (20, 24), 0.5).shape == (0, 20, 24)


def test_paste_agrees_with_torchvision(tv: ModuleType) -> None:
    """Which rounds boxes to whole pixels and pads masks with a ring of zeros."""
    coarse = torch.rand(12, 1, 5, 5)
    cells = F.interpolate(coarse, (28, 28), mode="bicubic").clamp(0, 1)
    corner = torch.rand(12, 2) * torch.tensor([400.0, 300.0])
    boxes = torch.cat([corner, corner + 60 + torch.rand(12, 2) * 100], 1)
    theirs = tv.models.detection.roi_heads.paste_masks_in_image(cells, boxes, (480, 640))[:, 0]
    ours = paste_masks(cells[:, 0], boxes, (480, 640), 0.5)
    assert ours.any((1, 2)).all()
    assert (ours == (theirs >= 0.5)).float().mean() >= 0.999


# --- detections -----------------------------------------------------------------------------------


def _detector(**tables: dict[str, Any]) -> Detector:
    """Untrained, in eval mode, and not shy."""
    return build_detector(config(box={"score_threshold": 0.0}, **tables), CLASSES).eval()


def test_masks_come_in_the_pixels_asked_for() -> None:
    model = _detector()
    data = some()
    data.sizes = torch.tensor([[90, 120], [96, 128]])
    sizes = torch.tensor([[45, 240], [96, 128]])
    plain = model.detect(data.images, data.sizes)
    scaled = model.detect(data.images, data.sizes, sizes)
    for small, large, (height, width) in zip(plain, scaled, sizes.tolist(), strict=True):
        count = len(small["boxes"])
        assert small["masks"].shape == (count, 96, 128) and small["masks"].dtype == torch.bool
        assert large["masks"].shape == (count, height, width)
        assert torch.equal(small["scores"], large["scores"])
    factor = torch.tensor([2, 0.5, 2, 0.5])
    torch.testing.assert_close(scaled[0]["boxes"], plain[0]["boxes"] * factor)


def test_boxes_in_output_pixels_scale_each_axis_and_end_at_the_border() -> None:
    """213 x 320 from 480 x 720: the sides were rounded apart, so x and y have their own factors."""
    boxes = torch.tensor([[10.0, 10.0, 320.0, 213.5], [-1.0, 5.0, 20.0, 30.0]])
    given = {"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": torch.rand(2)}
    sizes, output = torch.tensor([[213, 320]]), torch.tensor([[480, 720]])
    (found,) = in_output_pixels([given], sizes, output)
    fy, fx = 480 / 213, 720 / 320
    expected = [[10 * fx, 10 * fy, 720, 480], [0, 5 * fy, 20 * fx, 30 * fy]]
    torch.testing.assert_close(found["boxes"], torch.tensor(expected))
    assert in_output_pixels([given], sizes, None) == [given]


def test_no_detections_give_no_masks() -> None:
    model = build_detector(config(box={"score_threshold": 0.99}), CLASSES).eval()
    (found,) = model.detect(torch.randn(1, 3, 64, 96), torch.tensor([[64, 96]]))
    assert found["masks"].shape == (0, 64, 96)


# --- names, costs, weights ------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_with_masks_are_declared(name: str) -> None:
    with torch.device("meta"):
        model = build_detector(resolve([{"model": {"detector": name}}]), CLASSES)
    assert (getattr(model, "mask_head", None) is not None) == (name in WITH_MASKS)


def test_parameters_equal_torchvisions(tv: ModuleType) -> None:
    with torch.device("meta"):
        peer = tv.models.detection.maskrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=81
        )
    background = 4 * (1024 + 1) + (256 + 1)  # its boxes and masks of the background, never used
    parts = count_detector(resolve([{"model": {"detector": "maskrcnn-fpn"}}]), 80, 800, 1344)
    assert parts["total"].params == sum(p.numel() for p in peer.parameters()) - background
    each = 196 * (4 * 9 * 256 * 256 + 4 * 256 * 256) + 784 * 256 * 80
    assert parts["mask_head"].macs == 100 * each


def test_mask_rows_follow_their_category() -> None:
    theirs, ours = CategoryMap(["cat", "dog", "cow"]), CategoryMap(["hen", "cow", "cat"])
    source, model = build_detector(config(), CLASSES), build_detector(config(), CLASSES)
    fresh = model.mask_head.predictor.masks.weight.clone()
    init_detector(model, source.state_dict(), "x.pth", theirs=theirs, ours=ours)
    given = source.mask_head.predictor.masks.weight
    found = model.mask_head.predictor.masks.weight
    assert torch.equal(found, torch.stack([fresh[0], given[2], given[0]]))


def test_predictor_doubles_the_side_without_convolutions_too() -> None:
    assert MaskPredictor(6, 8, 1, 4)(torch.randn(2, 6, 7, 7)).shape == (2, 4, 14, 14)


# --- the whole way --------------------------------------------------------------------------------


def _settings(path: Path, **tables: dict[str, Any]) -> Config:
    data = {"path": str(path), "short_side": 128, "long_side": 192, "workers": 0}
    train = {"steps": 2, "batch_size": 2}
    layers = [{"data": {**data, "multi_scale": []}, "train": train}, tables]
    return api.resolve_config("finetune", layers, recipe="tiny/maskrcnn-fpn")


def test_masks_are_trained_and_scored(real_data: Path, tmp_path: Path) -> None:
    settings = _settings(
        real_data / "nuts_seg", eval={"metric": "segm_AP"}, box={"max_detections": 10}
    )
    result = api.train("finetune", settings, out=tmp_path / "run", device="cpu")
    assert {"AP", "segm_AP"} <= result["metrics"].keys()
    rows = tmp_path / "rows.json"
    scores = api.evaluate(result["checkpoint"], device="cpu", save_detections=rows)
    assert set(scores["segm"]) == set(scores["bbox"])
    sizes = {tuple(row["segmentation"]["size"]) for row in json.loads(rows.read_text())}
    assert sizes == {(600, 800)}
    json.dumps(scores)


def test_a_set_without_masks_is_refused_before_training(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_coco(tmp_path, [image(1)], [box(7), box(8)], split=split)
    message = r"instances_train.json: objects must have masks .* got 2 without .* 1.jpg, image 1, "
    with pytest.raises(DataError, match=message + "annotation 7"):
        api.train("finetune", _settings(tmp_path), out=tmp_path / "run", device="cpu")


def test_choosing_by_masks_needs_masks(tmp_path: Path) -> None:
    square = [[5, 5, 25, 5, 25, 15, 5, 15]]
    write_coco(tmp_path, [image(1)], [box(7, segmentation=square)])
    write_coco(tmp_path, [image(1)], [box(7)], split="val")
    by_masks = _settings(tmp_path, eval={"metric": "segm_AP"})
    with pytest.raises(DataError, match=r"for eval.metric = 'segm_AP', got none in split 'val'"):
        api.train("finetune", by_masks, out=tmp_path / "run", device="cpu")
    boxes = resolve([{"eval": {"metric": "segm_AP"}}])
    with pytest.raises(ConfigError, match="one of boxes for frcnn-fpn"):
        api.check_metric("finetune", boxes)
