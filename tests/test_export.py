"""Exported detectors: ONNX Runtime and dense inference equal `detect`; what is refused.

Exporting a detector takes many seconds, so each is exported once for all tests of this file.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from detectors import ONE_STAGE
from PIL import Image
from scripts import script
from torch import Tensor, nn

from detkit import api
from detkit import config as configs
from detkit.cli.main import run
from detkit.data import transforms
from detkit.deploy.dense import DenseDetector, best, pool_level
from detkit.deploy.export import to_onnx
from detkit.deploy.metadata import describe
from detkit.deploy.onnx_ops import nms_mask, translations
from detkit.deploy.verify import (
    Agreement,
    compare,
    detections,
    mask_cells,
    normalised_pixels,
    raw_pixels,
)
from detkit.engine import checkpoint as checkpoints
from detkit.errors import CheckpointError, ConfigError, VerificationError
from detkit.models.heads.ps_roi import PsAlign, PsCells
from detkit.models.heads.roi import Align, RoiPool
from detkit.models.zoo import DETECTORS
from detkit.scales import SplitConv2d, apply, insert, plan
from detkit.types import Batch, CategoryMap, Detections

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[1]
EXPORTABLE = sorted(DETECTORS)
SCALES = [(0.46, 0.89), (1.37, 1.62), (2.81, 3.68), (0.8, 1.4), (1.7, 2.2)]
"""Of the layers of a fast-deployment net in turn: every case of POD's table 3 splits."""


def smaller(detector: str) -> dict[str, dict[str, Any]]:
    """Fewer candidates and detections."""
    one_stage = {"retina": {"pre_nms": 60}}
    two_stages = {"rpn": {"pre_nms_test": 100, "post_nms_test": 60}}
    candidates = one_stage if detector in ONE_STAGE else two_stages
    return {**candidates, "box": {"max_detections": 40}}


def small(name: str, *layers: Mapping[str, Any]) -> tuple[nn.Module, configs.Config]:
    """A detector of three classes, random but for a class head that is sure of itself."""
    recipe = configs.read_toml(configs.recipe_path(f"tiny/{name}"))
    config = configs.resolve([recipe, smaller(name), *layers])
    torch.manual_seed(0)
    return sure(api.build(config, 3).eval()), config


def sure(model: nn.Module) -> nn.Module:
    """``model`` with the weights of its last layers scaled so that scores are far apart."""
    x = torch.randn(1, 3, 128, 128)
    for path, layer in model.named_modules():
        last = (".objectness", ".classes", ".classes.out", "predictor.masks")
        if path.endswith(last) and hasattr(layer, "weight"):
            spread: list[Tensor] = []
            hook = layer.register_forward_hook(lambda _, __, out, to=spread: to.append(out.std()))
            model.detect(x, torch.tensor([[128, 128]]))
            hook.remove()
            layer.weight.data.mul_(1.5 / spread[0])
    return model


@functools.cache
def fast_net() -> tuple[nn.Module, configs.Config, list[dict[str, Any]]]:
    """A pyramid detector of which all 12 layers are split, and how."""
    model, config = small("frcnn-fpn")
    layers = insert(model)
    wanted = plan(layers, {e.path: SCALES[i % 5] for i, e in enumerate(layers)})
    sure(apply(model, wanted))
    assert len([m for m in model.modules() if isinstance(m, SplitConv2d)]) == len(layers) == 12
    config = replace(config, model=replace(config.model, scales="split"))
    return model, config, wanted.to_plain()["layers"]


@functools.cache
def exported(name: str) -> tuple[nn.Module, configs.Config, bytes]:
    """A small detector (of frcnn-fpn the fast-deployment net) and its ONNX file."""
    model, config = fast_net()[:2] if name == "frcnn-fpn" else small(name)
    return model, config, to_onnx(model, config.data, entries=describe(config, CATEGORIES))


CATEGORIES = CategoryMap(["RBC", "WBC", "Platelets"], [4, 7, 5])


def pictures(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Blocks of random colour (N, 3, H, W) uint8, each image a little smaller than the one before,
    and their sizes.
    """
    blocks = torch.randint(0, 256, (count, 3, -(-height // 8), -(-width // 8)), dtype=torch.uint8)
    images = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :height, :width]
    sizes = torch.tensor([[height - 9 * i, width - 22 * i] for i in range(count)])
    return images.contiguous(), sizes


def padded(model: DenseDetector, images: Tensor, sizes: Tensor) -> Tensor:
    """Normalised images as a loader pads them, written without the model's own arithmetic."""
    multiple = model.multiple
    height, width = (-(-side // multiple) * multiple for side in images.shape[2:])
    out = torch.zeros(len(images), 3, height, width)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    for target, image, (h, w) in zip(out, images, sizes.tolist(), strict=True):
        target[:, :h, :w] = (image[:, :h, :w] / 255 - mean) / std
    return out


def assert_agree(wanted: list[Detections], got: list[Detections], least: int) -> None:
    """Same labels in the same order, boxes within 1e-3 pixels and scores within 1e-4."""
    for one, other in zip(wanted, got, strict=True):
        assert len(one["boxes"]) >= least
        assert len(one["scores"].unique()) == len(one["scores"]), "ties have no order"
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(other["boxes"], one["boxes"], atol=1e-3, rtol=0)
        torch.testing.assert_close(other["scores"], one["scores"], atol=1e-4, rtol=0)


# --- dense inference ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPORTABLE)
def test_dense_inference_is_that_of_the_detector(name: str) -> None:
    model, config = small(name)
    dense = DenseDetector(model, config.data)
    images, sizes = pictures(2, 150, 196)
    with torch.no_grad():
        wanted = model.detect(padded(dense, images, sizes), sizes)
        got = detections(list(dense(images, sizes)))
    assert_agree(wanted, got, 20)


def test_cells_of_masks_are_those_pasted_from() -> None:
    """A cell for a cell; the rows that fill up are zero."""
    model, config = small("maskrcnn-fpn", {"box": {"max_detections": 400}})
    dense = DenseDetector(model, config.data)
    images, sizes = pictures(2, 150, 196)
    with torch.no_grad():
        found, wanted = model.detect_cells(padded(dense, images, sizes), sizes)
        outputs = list(dense(images, sizes))
    for one, cells, got in zip(found, wanted, mask_cells(outputs), strict=True):
        assert 0 < len(one["scores"]) < 400
        assert cells.shape[1:] == (28, 28)
        assert float(cells.std()) > 0.1
        torch.testing.assert_close(got, cells, atol=1e-5, rtol=0)
    assert not outputs[4][0, int(outputs[3][0]) :].any()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("frcnn-fpn", {"rpn": {"joint": True, "min_size": 10.0}}),
        ("frcnn-fpn", {"box": {"class_agnostic": True, "min_size": 12.0}}),
        ("light-head-fpn", {"box": {"ps_pool": "avg", "sampling_ratio": 0}}),
        ("frcnn-fpn", {"model": {"head_norm": "bn"}, "box": {"head": "4conv1fc"}}),
        ("retinanet", {"box": {"keep_empty": True}, "anchors": {"measured_strides": True}}),
    ],
)
def test_dense_inference_follows_the_settings(name: str, layer: Mapping[str, Any]) -> None:
    model, config = small(name, layer)
    dense = DenseDetector(model, config.data)
    images, sizes = pictures(2, 150, 196)
    with torch.no_grad():
        wanted = model.detect(padded(dense, images, sizes), sizes)
        got = detections(list(dense(images, sizes)))
    assert_agree(wanted, got, 5)


def test_fillers_come_last_and_are_zero() -> None:
    """A detector that is sure of nothing fills every row."""
    model, config = small("frcnn-fpn", {"box": {"score_threshold": 1.0}})
    with torch.no_grad():
        boxes, labels, scores, count = DenseDetector(model, config.data)(*pictures(1, 64, 64))
    assert boxes.shape == (1, 40, 4)
    assert count.tolist() == [0]
    assert not boxes.any()
    assert not labels.any()
    assert not scores.any()
    values, index = best(torch.tensor([[0.25, -torch.inf, 0.5]]), 4)
    assert values.tolist() == [[0.5, 0.25, -torch.inf, -torch.inf]]
    assert index[0, :2].tolist() == [2, 0]
    assert int(index.max()) < 3


# --- operators ------------------------------------------------------------------------------------


class Pool(nn.Module):
    def __init__(self, pool: RoiPool) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        return pool_level(self.pool, features, rois, 0.25)


class Suppress(nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
        return nms_mask(boxes, scores, 0.4)


def through_onnx(module: nn.Module, free: tuple[dict[int, Any], ...], *inputs: Tensor) -> Any:
    """A function that runs ``module`` in ONNX Runtime; only standard operators are in it."""
    exported = torch.export.export(module, inputs, dynamic_shapes=free, strict=False)
    program = torch.onnx.export(
        exported, opset_version=18, custom_translation_table=translations(), verbose=False
    )
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def call(*values: Tensor) -> Tensor:
        arrays = (value.numpy() for value in values)
        return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])

    return call


@pytest.mark.parametrize(
    "pool",
    [
        Align(3, 2, aligned=True),
        Align(3, 0, aligned=True),
        Align(3, 2, aligned=False),
        Align(3, 0, aligned=False),
        PsAlign(3, "max", 0.0),
        PsAlign(3, "max", 0.5, 3),
        PsAlign(3, "avg", 0.5),
        PsAlign(3, "avg", 0.0, 1),
        PsAlign(3, "avg", 0.5, 0),
        PsAlign(3, "avg", 0.0, 0),
        PsCells(3),
    ],
    ids=str,
)
def test_pooling_in_onnx_is_the_operator(pool: RoiPool) -> None:
    """RoIs inside, across and beyond the border, smaller than a cell, empty; other numbers of RoIs,
    none among them, and other maps than those traced with. Proposals are never inverted.
    """
    auto = torch.export.Dim.AUTO
    free = ({0: auto, 2: auto, 3: auto}, {0: auto})
    call = through_onnx(Pool(pool), free, torch.randn(2, 18, 9, 11), torch.rand(5, 5))
    for count, height, width in ((40, 12, 17), (7, 20, 8), (0, 9, 9)):
        features = torch.randn(3, 18, height, width)
        corners = torch.rand(count, 4) * torch.tensor([width, height] * 2) * 5 - 4
        corners[::3, 2:] = corners[::3, :2] + 3
        corners[::5, 2:] = corners[::5, :2]
        corners = torch.cat([corners[:, :2], corners[:, :2].maximum(corners[:, 2:])], 1)
        rois = torch.cat([torch.randint(0, 3, (count, 1)).float(), corners], 1)
        wanted = pool(features, rois, 0.25)
        torch.testing.assert_close(call(features, rois), wanted, atol=2e-5, rtol=0)


def test_suppression_in_onnx_is_the_operator() -> None:
    """Several rows on the same boxes, candidates left out, boxes that are empty."""
    auto = torch.export.Dim.AUTO
    free = ({0: auto, 1: auto}, {0: auto, 1: auto, 2: auto})
    call = through_onnx(Suppress(), free, torch.rand(2, 6, 4), torch.rand(2, 3, 6))
    for batch, rows, count in ((3, 4, 50), (1, 1, 40)):
        corner = torch.rand(batch, count, 2) * 15
        boxes = torch.cat([corner, corner + torch.rand(batch, count, 2) * 30], 2)
        boxes[:, ::7, 2] = boxes[:, ::7, 0]
        scores = torch.rand(batch, rows, count)
        scores[:, :, ::4] = -torch.inf
        kept = nms_mask(boxes, scores, 0.4)
        assert 0 < int(kept.sum()) < int((scores > 0).sum())
        assert torch.equal(call(boxes, scores), kept)


# --- whole detectors ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTABLE)
def test_onnx_runtime_agrees(name: str) -> None:
    """One file serves images of any size, one alone or several together."""
    model, config, content = exported(name)
    graph = onnx.load_from_string(content)
    assert [(use.domain, use.version) for use in graph.opset_import] == [("", 18)]
    assert {node.domain for node in graph.graph.node} == {""}
    assert not graph.functions
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    dense = DenseDetector(model, config.data)
    for count, height, width in ((1, 150, 196), (2, 203, 131), (3, 64, 96)):
        images, sizes = pictures(count, height, width)
        outputs = session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
        wanted = model.detect(padded(dense, images, sizes), sizes)
        assert_agree(wanted, detections(outputs), 5)
    tiny, sizes = pictures(1, 20, 30)  # a single cell on the coarsest maps
    got = session.run(None, {"images": tiny.numpy(), "sizes": sizes.numpy()})
    assert_agree(model.detect(padded(dense, tiny, sizes), sizes), detections(got), 1)


@pytest.mark.slow
def test_an_exported_file_says_what_it_is() -> None:
    """Inputs, outputs and metadata; nothing of the machine that made it."""
    _, config, content = exported("maskrcnn-fpn")
    model = onnx.load_from_string(content)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "images": ["batch", 3, "height", "width"],
        "sizes": ["batch", 2],
        "boxes": ["batch", 40, 4],
        "labels": ["batch", 40],
        "scores": ["batch", 40],
        "count": ["batch"],
        "masks": ["batch", 40, 28, 28],
    }
    entries = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert entries["format"] == "detkit-onnx/1"
    assert entries["categories"][1] == {"label": 2, "id": 7, "name": "WBC"}
    assert entries["mean"] == list(config.data.mean)
    assert (entries["short_side"], entries["long_side"]) == (320, 480)
    documented = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/export.md").read_text(), re.M)
    assert set(entries) <= set(documented)
    assert b".py" not in content, "a traced line of source code tells the path of its file"


@pytest.mark.slow
def test_a_fixed_size_and_a_wrong_file() -> None:
    """The comparison pads to the fixed size, and tells another detector from the one exported."""
    model, config = small("rfcn")
    content = to_onnx(model, config.data, size=(150, 200), opset=19)
    graph = onnx.load_from_string(content).graph
    shape = graph.input[0].type.tensor_type.shape.dim
    assert (shape[0].dim_param, shape[2].dim_value, shape[3].dim_value) == ("batch", 150, 200)
    images, sizes = pictures(1, 120, 196)
    batch = Batch(padded(DenseDetector(model, config.data), images, sizes), sizes)
    agreement = compare(content, model, config, [batch], (150, 200))
    agreement.check()
    assert (agreement.images, agreement.unmatched) == (1, 0)
    assert agreement.detections >= 20
    with pytest.raises(ConfigError, match="--size: must hold the images to verify with, 120x196"):
        compare(content, model, config, [batch], (100, 200))
    for parameter in model.neck.parameters():
        parameter.data.mul_(1.001)
    with pytest.raises(VerificationError, match="must agree with PyTorch within 0.001 pixels"):
        compare(content, model, config, [batch], (150, 200)).check()


def test_raw_pixels_are_those_normalised() -> None:
    model, config = small("rfcn")
    images, sizes = pictures(1, 64, 96)
    normalised = padded(DenseDetector(model, config.data), images, sizes)
    raw = raw_pixels(normalised, config.data)
    assert torch.equal(torch.from_numpy(raw), images)
    again = normalised_pixels(raw, sizes, config.data)
    torch.testing.assert_close(again, normalised, atol=1e-6, rtol=0)
    blue_first = replace(config.data, channels="bgr")
    flipped = DenseDetector(model, blue_first).normalised(images, sizes)
    torch.testing.assert_close(flipped, normalised.flip(1))
    assert torch.equal(torch.from_numpy(raw_pixels(flipped, blue_first)), images)
    again = normalised_pixels(images.numpy(), sizes, blue_first)
    torch.testing.assert_close(again, flipped, atol=1e-6, rtol=0)


# --- agreement ------------------------------------------------------------------------------------


def found(*rows: tuple[float, int, float]) -> Detections:
    """Boxes of side 10 at x, with label and score."""
    x = torch.tensor([row[0] for row in rows])
    boxes = torch.stack([x, x, x + 10, x + 10], 1) if rows else torch.zeros(0, 4)
    labels = torch.tensor([row[1] for row in rows], dtype=torch.int64)
    return Detections(boxes=boxes, labels=labels, scores=torch.tensor([row[2] for row in rows]))


def test_agreement_pairs_detections_whatever_their_order() -> None:
    agreement = Agreement()
    wanted = found((0, 1, 0.9), (50, 1, 0.50001), (50, 2, 0.5))
    agreement.add(wanted, found((0, 1, 0.9), (50, 2, 0.5), (50, 1, 0.50002)), cut=0.05)
    agreement.check()
    assert (agreement.images, agreement.detections, agreement.unmatched) == (1, 3, 0)
    assert 5e-6 < agreement.score < 2e-5


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (found((0, 1, 0.9)), "1 detections without"),
        (found((0, 1, 0.9), (50, 2, 0.5)), "2 detections without"),
        (found((0, 1, 0.9), (50, 1, 0.5), (80, 1, 0.3)), "1 detections without"),
        (found((0, 1, 0.9), (50.01, 1, 0.5)), "1.00e-02 pixels"),
        (found((0, 1, 0.9), (50, 1, 0.4998)), "2.00e-04 in scores"),
    ],
)
def test_agreement_sees_each_difference(got: Detections, message: str) -> None:
    agreement = Agreement()
    agreement.add(found((0, 1, 0.9), (50, 1, 0.5)), got, cut=0.05)
    with pytest.raises(VerificationError, match=re.escape(message)):
        agreement.check()


def test_agreement_lets_a_detection_at_the_cut_be_missing() -> None:
    agreement = Agreement()
    agreement.add(found((0, 1, 0.9), (50, 1, 0.05001)), found((0, 1, 0.9)), cut=0.05)
    agreement.add(found((0, 1, 0.9)), found((0, 1, 0.9), (50, 1, 0.05001)), cut=0.05)
    agreement.check()
    agreement.add(found((0, 1, 0.9), (50, 1, 0.0502)), found((0, 1, 0.9)), cut=0.05)
    with pytest.raises(VerificationError):
        agreement.check()


def test_agreement_compares_masks_of_the_same_detection() -> None:
    """Two detections in another order, each with its own mask."""
    wanted, got = found((0, 1, 0.9), (50, 1, 0.5)), found((50, 1, 0.5), (0, 1, 0.9))
    cells = torch.rand(2, 28, 28)
    agreement = Agreement()
    agreement.add(wanted, got, 0.05, (cells, cells.flip(0)))
    agreement.check()
    assert agreement.mask == 0
    other = cells.clone()
    other[1, 3, 4] += 0.002
    agreement.add(wanted, got, 0.05, (cells, other.flip(0)))
    with pytest.raises(VerificationError, match=re.escape("2.00e-03 in masks")):
        agreement.check()


def test_agreement_over_nothing_is_none() -> None:
    agreement = Agreement()
    agreement.add(found(), found(), cut=0.05)
    with pytest.raises(VerificationError, match="at least one detection, got none on 1 images"):
        agreement.check()


# --- refusals -------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused_by_name() -> None:
    model, config = small("rfcn")
    with pytest.raises(ConfigError, match=r"--opset: must be in 18\.\.23, got 11"):
        to_onnx(model, config.data, opset=11)
    insert(model)
    with pytest.raises(CheckpointError, match="scale learner; decompose the model first"):
        to_onnx(model, config.data)


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name)
    )
    assert run(["export", "any.pth", "--json"]) == 2
    message = json.loads(capsys.readouterr().out)["error"]
    assert message == (
        "export: onnxruntime must be installed, got none; run `pip install detkit[onnx]`"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "800"], "--size: must read HEIGHTxWIDTH"),
        (["--device", "cuda"], "--device: must be cpu to export"),
        (["-o", "a.onnx", "--out", "b"], "-o: must stand without --out"),
        (["-o", "nowhere/a.onnx"], "nowhere/a.onnx: must be a file in a folder that exists"),
        (["--recipe", "tiny/rfcn"], "--recipe: must stand with a training"),
    ],
)
def test_wrong_use_exits_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", "any.pth", "--json", *arguments]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]


# --- the command ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """A run folder whose detector was exported and verified on real images."""

    folder: Path
    checkpoint: Path
    onnx: Path
    images: list[Path]
    result: dict[str, Any]


def export_run(folder: Path, data: Path, split: str, name: str) -> Exported:
    """Export the detector of ``exported(name)`` from a checkpoint, without tracing it again."""
    model, config, content = exported(name)
    config = replace(config, data=replace(config.data, path=str(data), workers=0))
    run = folder / "runs/finetune/20260101-120000-one"
    run.mkdir(parents=True)
    (run / "config.toml").touch()  # makes it a run
    payload = {
        "format": checkpoints.FORMAT,
        "kind": "fd" if name == "frcnn-fpn" else "detector",
        "config": configs.to_plain(config),
        "categories": CATEGORIES.to_plain(),
        "model": model.state_dict(),
        "provenance": {},
    }
    if name == "frcnn-fpn":
        payload["scales"] = {"layers": fast_net()[2]}
    checkpoints.save(run / "best.pth", payload)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detkit.deploy.export.to_onnx", lambda *_, **__: content)
        result = api.export(run / "best.pth", folder / "detector.onnx", verify=True, split=split)
    images = sorted((data / "images" / split).iterdir())
    return Exported(folder, run / "best.pth", folder / "detector.onnx", images, result)


@pytest.fixture(scope="module")
def cells(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A fast-deployment net of 12 split layers on 20 images of blood cells."""
    return export_run(tmp_path_factory.mktemp("fd"), real_data / "bccd", "val", "frcnn-fpn")


@pytest.fixture(scope="module")
def nuts(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A detector with masks on 13 images of nuts."""
    folder = tmp_path_factory.mktemp("masks")
    return export_run(folder, real_data / "nuts_seg", "train", "maskrcnn-fpn")


@pytest.mark.slow
@pytest.mark.parametrize(("which", "images"), [("cells", 20), ("nuts", 13)])
def test_exported_detectors_are_verified_on_real_images(
    which: str, images: int, request: pytest.FixtureRequest
) -> None:
    made: Exported = request.getfixturevalue(which)
    assert made.result["bytes"] == made.onnx.stat().st_size
    verified = made.result["verified"]
    assert verified["images"] == images
    assert verified["detections"] >= 20 * images
    assert verified["unmatched"] == 0
    assert 0 < verified["box"] <= 1e-3
    assert 0 < verified["score"] <= 1e-4
    assert (verified["mask"] > 0) == (which == "nuts")


@pytest.mark.slow
def test_a_difference_writes_nothing(
    cells: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest run is exported where none is named; the file of an earlier export stays."""
    monkeypatch.chdir(cells.folder)
    before = cells.onnx.read_bytes()
    monkeypatch.setattr("detkit.deploy.export.to_onnx", lambda *_, **__: before)
    monkeypatch.setattr("detkit.api.VERIFY_IMAGES", 1)
    line = ["export", "-o", "detector.onnx", "--verify", "--json"]
    assert run(line) == 0
    assert json.loads(capsys.readouterr().out)["verified"]["images"] == 1
    assert run(["export", "--set", "box.score_threshold=0.5"]) == 2
    monkeypatch.setattr("detkit.deploy.verify.SCORE_TOLERANCE", 1e-12)
    assert run(line) == 4
    assert cells.onnx.read_bytes() == before
    assert [path.name for path in cells.folder.iterdir() if "onnx" in path.name] == [
        "detector.onnx"
    ]


@pytest.mark.slow
def test_the_docs_example_runs(cells: Exported) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.S)
    example = example.replace("cells.jpg", str(cells.images[0]))
    values: dict[str, Any] = {}
    exec(example.replace("detector.onnx", str(cells.onnx)), values)
    assert values["boxes"].shape[1] == 4
    assert len(values["boxes"]) == len(values["labels"]) == len(values["scores"]) > 0


# --- without detkit -------------------------------------------------------------------------------

EXAMPLE = ROOT / "examples/onnx_detect.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return script("examples/onnx_detect.py")


def test_the_example_needs_neither_detkit_nor_pytorch() -> None:
    tree = ast.walk(ast.parse(EXAMPLE.read_text()))
    names = {
        name.split(".")[0]
        for node in tree
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        )
    }
    assert names - sys.stdlib_module_names == {"numpy", "onnxruntime", "PIL"}


@pytest.mark.slow
def test_the_example_prints_what_detkit_predicts(cells: Exported) -> None:
    """It reads size and names from the file; boxes come in pixels of the image."""
    some = cells.images[:3]
    line = [sys.executable, str(EXAMPLE), str(cells.onnx), *map(str, some), "--score", "0.5"]
    line += ["--json", "--draw", str(cells.folder / "drawn")]
    output = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
    predictions = api.load(cells.checkpoint).predict([str(path) for path in some], score=0.5)
    for text, wanted, path in zip(output.splitlines(), predictions, some, strict=True):
        rows = json.loads(text)
        assert rows["file"] == str(path)
        got = rows["detections"]
        assert len(got) == len(wanted) > 0
        assert [row["name"] for row in got] == wanted.names
        np.testing.assert_allclose([r["score"] for r in got], wanted.scores, atol=1e-4)
        np.testing.assert_allclose([r["box"] for r in got], wanted.boxes, atol=5e-3)
        drawn = np.asarray(Image.open(cells.folder / "drawn" / f"{path.stem}.png"))
        assert (drawn != np.asarray(Image.open(path).convert("RGB"))).any()


@pytest.mark.slow
def test_the_example_pastes_masks_as_detkit_does(nuts: Exported, example: ModuleType) -> None:
    image = Image.open(nuts.images[0]).convert("RGB")
    image = image.resize((640, 640 * image.height // image.width))
    found = example.Detector(nuts.onnx)(image)
    wanted = api.load(nuts.checkpoint).predict(image, score=0.0)
    assert wanted.masks is not None
    assert found["masks"].shape == wanted.masks.shape
    np.testing.assert_array_equal(found["labels"], wanted.labels)
    pixels = wanted.masks.numpy()
    assert pixels.sum() > 1000
    assert (found["masks"] != pixels).sum() < 1e-3 * pixels.sum()


@pytest.mark.parametrize("size", [(640, 480), (301, 97), (33, 50)])
@pytest.mark.parametrize("resize", ["antialias", "torchvision"])
def test_the_example_resizes_as_detkit_does(
    example: ModuleType, size: tuple[int, int], resize: str, tmp_path: Path
) -> None:
    """The same pixels; halves may be rounded otherwise where detkit normalises first."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(pixels)
    data = configs.DataConfig(short_side=80, long_side=200, resize=resize, workers=0)
    meta = {"short_side": 80, "long_side": 200, "resize": resize}
    got = example.prepared(image, meta)
    geometry = transforms.whole((size[1], size[0]), 80, 200, resize)
    assert got.shape[:2] == geometry.size
    out = torch.zeros(3, *geometry.size)
    if resize == "antialias":
        transforms.normalise_into(out, geometry.image(image), data.mean, data.std)
    else:
        transforms.normalise_then_resize_into(out, image, geometry.size, data.mean, data.std)
    wanted = raw_pixels(out[None], data)[0].transpose(1, 2, 0)
    assert np.abs(got.astype(int) - wanted).max() <= (resize == "torchvision")
