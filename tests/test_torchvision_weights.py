"""torchvision's weights as checkpoints: the same detections, what is kept, what is refused."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from detkit import api, foreign
from detkit.cli.main import run
from detkit.config import from_plain, resolve
from detkit.data import eval_batches, open_classification, open_detection, transforms
from detkit.data.dataset import DetectionDataset
from detkit.errors import CheckpointError, ConfigError
from detkit.models.torchvision_keys import convert
from detkit.models.weights import init_detector
from detkit.types import CategoryMap

BUILDERS = {
    "frcnn-fpn": "fasterrcnn_resnet50_fpn",
    "maskrcnn-fpn": "maskrcnn_resnet50_fpn",
    "retinanet": "retinanet_resnet50_fpn",
}
PICTURES = (("coco_mini", 2), ("bccd", 2), ("nuts_seg", 1))


def random_peer(
    tv: ModuleType, detector: str, images: list[Tensor], eps: float, **settings: Any
) -> nn.Module:
    """A torchvision detector with random weights that detects a lot, nothing of it for sure."""
    torch.manual_seed(0)
    build = getattr(tv.models.detection, BUILDERS[detector])
    peer = build(weights=None, weights_backbone=None, **settings).eval()
    for module in peer.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(0, 0.05)
            module.running_var.uniform_(0.8, 1.2)
            nn.init.constant_(module.weight, 0.4)
            module.eps = eps
    if detector == "retinanet":
        heads = [(peer.head.classification_head.cls_logits, -6.0, 1.0)]
        heads += [(peer.head.regression_head.bbox_reg, 0.0, 0.2)]
    else:
        heads = [(peer.rpn.head.cls_logits, 0.0, 1.0), (peer.rpn.head.bbox_pred, 0.0, 0.2)]
        box = peer.roi_heads.box_predictor
        heads += [(box.cls_score, 0.0, 1.2), (box.bbox_pred, 0.0, 1.0)]
    spread(heads, peer, images)
    if detector == "maskrcnn-fpn":  # its masks need boxes first
        spread([(peer.roi_heads.mask_predictor.mask_fcn_logits, 0.0, 2.0)], peer, images[:1])
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


SMALL, LARGE = (160, 266), (800, 1333)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("detector", "sizes", "published"),
    [
        ("frcnn-fpn", [*[SMALL] * 5, LARGE], True),
        ("maskrcnn-fpn", [SMALL] * 5, True),
        ("retinanet", [*[SMALL] * 5, LARGE], False),
    ],
)
def test_detections_equal_torchvisions(
    tv: ModuleType,
    pictures: Path,
    tmp_path: Path,
    detector: str,
    sizes: list[tuple[int, int]],
    published: bool,
) -> None:
    """From the file to boxes in its pixels; boxes to 1e-3 px, scores to 1e-5, in the same order."""
    dataset = open_detection(str(pictures), "val", resolve([]).data)
    images = [pixels(dataset, i) for i in range(min(5, len(sizes)))]
    eps = 0.0 if published else 1e-5
    peer = random_peer(tv, detector, images, eps, min_size=SMALL[0], max_size=SMALL[1])
    state = peer.state_dict()
    torch.save(old_names(state) if published else state, tmp_path / "peer.pth")
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
        if "masks" in theirs:  # pasted by another rule; unrelated ones would share a third
            masks = theirs["masks"][:, 0] >= 0.5
            assert (ours["masks"] & masks).sum() > 0.7 * (ours["masks"] | masks).sum() > 1000


# --- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(97, 61), (61, 97), (480, 640), (33, 400)], ids=str)
def test_images_are_resized_as_torchvision_does(tv: ModuleType, shape: tuple[int, int]) -> None:
    rgb = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.manual_seed(1))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    transform = tv.models.detection.transform.GeneralizedRCNNTransform(80, 133, mean, std).eval()
    wanted, _ = transform([rgb.permute(2, 0, 1).contiguous().float() / 255])
    size = transforms.resized(shape, 80, 133, "torchvision")
    assert size == wanted.image_sizes[0]
    out = torch.zeros_like(wanted.tensors[0])
    transforms.normalise_then_resize_into(out, Image.fromarray(rgb.numpy()), size, mean, std)
    assert torch.equal(out, wanted.tensors[0])


def test_sides_are_those_of_torchs_interpolation() -> None:
    """Rounded down from floats: sometimes 799 where 800 was asked for."""
    rng = np.random.default_rng(0)
    for height, width, short in rng.integers(40, 2000, (300, 3)).tolist():
        long = short + 200
        factor = min(short / min(height, width), long / max(height, width))
        meta = torch.empty(1, 1, height, width, device="meta")
        if factor * min(height, width) < 1:
            continue
        out = F.interpolate(meta, scale_factor=factor, recompute_scale_factor=True)
        size = transforms.resized((height, width), short, long, "torchvision")
        assert size == tuple(out.shape[2:])


def test_a_training_view_is_cut_and_mirrored_before_it_is_resized() -> None:
    image = Image.fromarray(np.arange(8 * 6 * 3, dtype=np.uint8).reshape(6, 8, 3))
    view = transforms.Geometry((6, 8), (1, 2, 5, 6), (8, 8), flip=True)
    assert np.array_equal(np.asarray(view.cut(image)), np.asarray(image)[2:6, 1:5][:, ::-1])


def test_classifiers_refuse_torchvisions_resize() -> None:
    config = resolve([{"data": {"resize": "torchvision", "workers": 0}}])
    with pytest.raises(ConfigError, match="data.resize: must be antialias for classifiers"):
        eval_batches(open_classification("synthetic", "val", config.data), config)


# --- names ----------------------------------------------------------------------------------------


def fake_state(tv: ModuleType, name: str, **settings: Any) -> dict[str, Tensor]:
    """A state dict of the right names and shapes; its numbers do not matter."""
    build = getattr(tv.models.detection, name, None) or getattr(tv.models, name)
    with torch.device("meta"):
        model = build(weights=None, **settings)
    return {
        k: torch.full(v.shape, 0.01) if v.is_floating_point() else torch.tensor(0)
        for k, v in model.state_dict().items()
    }


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as torchvision's published detector files have them, with frozen norms."""
    found = {}
    for key, value in state.items():
        new = re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0\.", r"\1.\2.", key)
        new = new.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        new = re.sub(r"mask_head\.(\d)\.0", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}", new)
        new = re.sub(r"_head\.conv\.(\d)\.0", lambda m: f"_head.conv.{2 * int(m[1])}", new)
        if "num_batches_tracked" not in new:
            found[new] = value
    return found


@pytest.mark.parametrize("detector", BUILDERS)
def test_old_and_new_names_come_to_the_same(tv: ModuleType, detector: str) -> None:
    state = fake_state(tv, BUILDERS[detector], weights_backbone=None)
    assert old_names(state).keys() != state.keys()
    assert convert(old_names(state)).keys() == convert(state).keys()


def test_categories_are_cocos_and_ids_torchvisions_labels(tv: ModuleType, tmp_path: Path) -> None:
    theirs = tv.models._meta._COCO_CATEGORIES
    for detector, first in (("frcnn-fpn", 1), ("retinanet", 0)):
        state = old_names(fake_state(tv, BUILDERS[detector], weights_backbone=None))
        torch.save({"model": state, "epoch": 3}, tmp_path / "x.pth")
        stored = foreign.load(tmp_path / "x.pth")
        categories = CategoryMap.from_plain(stored["categories"])
        assert categories.ids == tuple(range(first, 91))
        for number, name in zip(categories.ids, categories.names, strict=True):
            unused = theirs[number] in ("N/A", "__background__")
            assert name == (f"unused {number}" if unused else theirs[number])
        assert stored["config"]["model"]["norm_eps"] == 0  # frozen norms, as published
        assert stored["config"]["data"]["resize"] == "torchvision"


def test_other_categories_are_numbered_and_the_log_says_so(
    tv: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = BUILDERS["retinanet"]
    state = fake_state(tv, name, weights_backbone=None, num_classes=4)
    torch.save(state, tmp_path / "x.pth")
    with caplog.at_level("INFO"):
        loaded = api.load(tmp_path / "x.pth")
    assert loaded.categories.names == ("unused 0", "class1", "class2", "class3")
    assert "4 outputs (categories unknown, named class3 and so on)" in caplog.text
    assert {m.eps for m in loaded.model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tv: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tv_resnet50.pth"
    torch.save(fake_state(tv, "resnet50"), path)
    return path


def finetune(path: Path, data: Path, out: Path, *more: str) -> int:
    """Exit code of one step on tiny images, the model's other settings being the defaults."""
    small = ["data.short_side=96", "data.long_side=128", "data.multi_scale=[]", "data.workers=0"]
    small += [
        "model.norm=frozen_bn",
        "data.split=val",
        "train.batch_size=1",
        "box.score_threshold=0.9",
    ]
    sets = [word for text in small for word in ("--set", text)]
    line = ["finetune", "--init-from", path, "--data", data, "--out", out, "--steps", "1"]
    return run([*map(str, line), *sets, *more])


def test_finetune_starts_from_a_classifier(
    classifier: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    few = ["--set", "rpn.post_nms_train=20", "--set", "rpn.post_nms_test=20"]
    assert finetune(classifier, pictures, tmp_path / "run", "--backbone", "resnet50", *few) == 0
    told = capfd.readouterr().err
    assert "torchvision's classifier on resnet50, 1000 outputs" in told
    assert "265 weights loaded; unused: fc.weight, fc.bias" in told
    assert (tmp_path / "run" / "last.pth").is_file()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("layer2.0.conv1.weight"), "1 missing (backbone.layer2.0.conv1.weight)"),
        (lambda s: s.update({"layer5.x": torch.zeros(1)}), "1 left over (layer5.x)"),
        (
            lambda s: s.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}),
            "backbone.conv1.weight must have shape (64, 3, 7, 7), got (64, 3, 3, 3)",
        ),
        (lambda s: s.pop("conv1.weight"), "must be a detkit/1 file, got a dict without a format"),
        (lambda s: s.pop("layer3.0.conv3.weight"), "got 5 bottleneck blocks in layer3"),
    ],
    ids=["missing", "left over", "shape", "foreign", "depth"],
)
def test_a_mangled_file_is_refused_in_one_sentence(
    classifier: Path,
    pictures: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: Any,
    sentence: str,
) -> None:
    state = torch.load(classifier, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "mangled.pth")
    assert finetune(tmp_path / "mangled.pth", pictures, tmp_path / "run") == 3
    assert sentence in capfd.readouterr().err


def test_a_detector_keeps_the_rows_of_shared_categories(
    tv: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str], pictures: Path
) -> None:
    state = fake_state(tv, BUILDERS["retinanet"], weights_backbone=None)
    path, out = tmp_path / "x.pth", tmp_path / "run"
    torch.save(state, path)
    assert finetune(path, pictures, out) == 0
    told = capfd.readouterr().err
    assert "torchvision's retinanet on resnet50, 91 outputs (COCO's categories)" in told
    assert "classes kept: person" in told
    config = (out / "config.toml").read_text()
    assert 'p6_from = "p5"' in config and 'resize = "torchvision"' in config
    assert finetune(path, pictures, out, "--backbone", "resnet101") == 3
    assert "must agree with the checkpoint's 'resnet50'" in capfd.readouterr().err


def test_partial_detectors_load_only_when_allowed(
    tv: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str], pictures: Path
) -> None:
    state = fake_state(tv, BUILDERS["retinanet"], weights_backbone=None)
    del state["head.regression_head.bbox_reg.bias"]
    state["extra"] = torch.zeros(1)
    path = tmp_path / "x.pth"
    torch.save(state, path)
    assert finetune(path, pictures, tmp_path / "refused") == 3
    told = capfd.readouterr().err
    assert "got 1 missing (head.boxes.out.bias) and 1 left over (extra)" in told
    assert run(["eval", str(path), "--data", str(pictures)]) == 3
    assert finetune(path, pictures, tmp_path / "run", "--allow-partial") == 0
    assert "missing: head.boxes.out.bias; unused: extra" in capfd.readouterr().err


def test_class_layers_of_a_wrong_length_are_refused(tv: ModuleType, tmp_path: Path) -> None:
    state = fake_state(tv, BUILDERS["frcnn-fpn"], weights_backbone=None)
    state["roi_heads.box_predictor.bbox_pred.bias"] = torch.zeros(360)
    torch.save(state, tmp_path / "x.pth")
    stored = foreign.load(tmp_path / "x.pth")
    categories = CategoryMap(["person"])
    with torch.device("meta"):
        model = api.build(from_plain(stored["config"]), categories)
    with pytest.raises(CheckpointError, match=r"boxes.bias must have shape \(360,\) .* got \(356,"):
        init_detector(
            model,
            stored["model"],
            "x.pth",
            theirs=CategoryMap.from_plain(stored["categories"]),
            ours=categories,
        )
