"""Exported detectors: ONNX Runtime and dense inference equal `detect`; what is refused."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detkit import api
from detkit import config as configs
from detkit.cli.main import run
from detkit.deploy.dense import DenseDetector, best, pool_level
from detkit.deploy.export import to_onnx
from detkit.deploy.onnx_ops import nms_mask, translations
from detkit.deploy.verify import Agreement, compare, detections, raw_pixels
from detkit.errors import CheckpointError, ConfigError, VerificationError
from detkit.models.heads.ps_roi import PsAlign, PsCells
from detkit.models.heads.roi import Align, RoiPool
from detkit.models.zoo import DETECTORS, WITH_MASKS
from detkit.scales import insert
from detkit.types import Batch, Detections

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[1]
EXPORTABLE = sorted(DETECTORS.keys() - WITH_MASKS)


def smaller(detector: str) -> dict[str, dict[str, Any]]:
    """Fewer candidates and detections."""
    one_stage = {"retina": {"pre_nms": 60}}
    two_stages = {"rpn": {"pre_nms_test": 100, "post_nms_test": 60}}
    candidates = one_stage if detector == "retinanet" else two_stages
    return {**candidates, "box": {"max_detections": 40}}


def small(name: str, *layers: Mapping[str, Any]) -> tuple[nn.Module, configs.Config]:
    """A detector of three classes, random but for a class head that is sure of itself."""
    recipe = configs.read_toml(configs.recipe_path(f"tiny/{name}"))
    config = configs.resolve([recipe, smaller(name), *layers])
    torch.manual_seed(0)
    model = api.build(config, 3).eval()
    x = torch.randn(1, 3, 128, 128)
    for path, layer in model.named_modules():
        if path.endswith((".objectness", ".classes", ".classes.out")) and hasattr(layer, "weight"):
            spread: list[Tensor] = []
            hook = layer.register_forward_hook(lambda _, __, out, to=spread: to.append(out.std()))
            model.detect(x, torch.tensor([[128, 128]]))
            hook.remove()
            layer.weight.data.mul_(1.5 / spread[0])
    return model, config


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


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("frcnn-fpn", {"rpn": {"joint": True, "min_size": 10.0}}),
        ("frcnn-fpn", {"box": {"class_agnostic": True, "min_size": 12.0}}),
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
    """One file serves images of any size, one alone or two together."""
    model, config = small(name)
    content = to_onnx(model, config.data)
    graph = onnx.load_from_string(content)
    assert [(use.domain, use.version) for use in graph.opset_import] == [("", 18)]
    assert {node.domain for node in graph.graph.node} == {""}
    assert not graph.functions
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    dense = DenseDetector(model, config.data)
    for count, height, width in ((1, 150, 196), (2, 203, 131)):
        images, sizes = pictures(count, height, width)
        outputs = session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
        wanted = model.detect(padded(dense, images, sizes), sizes)
        assert_agree(wanted, detections(outputs), 20)
    tiny, sizes = pictures(1, 20, 30)  # a single cell on the coarsest maps
    got = session.run(None, {"images": tiny.numpy(), "sizes": sizes.numpy()})
    assert_agree(model.detect(padded(dense, tiny, sizes), sizes), detections(got), 1)


@pytest.mark.slow
def test_a_fixed_size_and_a_wrong_file() -> None:
    """The comparison pads to the fixed size, and tells another detector from the one exported."""
    model, config = small("frcnn-fpn")
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
    for parameter in model.head.parameters():
        parameter.data.mul_(1.001)
    with pytest.raises(VerificationError, match="must agree with PyTorch within 0.001 pixels"):
        compare(content, model, config, [batch], (150, 200)).check()


def test_raw_pixels_are_those_normalised() -> None:
    model, config = small("rfcn")
    images, sizes = pictures(1, 64, 96)
    normalised = padded(DenseDetector(model, config.data), images, sizes)
    assert torch.equal(torch.from_numpy(raw_pixels(normalised, config.data)), images)
    blue_first = replace(config.data, channels="bgr")
    flipped = DenseDetector(model, blue_first).normalised(images, sizes)
    torch.testing.assert_close(flipped, normalised.flip(1))
    assert torch.equal(torch.from_numpy(raw_pixels(flipped, blue_first)), images)


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


def test_agreement_over_nothing_is_none() -> None:
    agreement = Agreement()
    agreement.add(found(), found(), cut=0.05)
    with pytest.raises(VerificationError, match="at least one detection, got none on 1 images"):
        agreement.check()


# --- refusals -------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused_by_name() -> None:
    model, config = small("maskrcnn-fpn")
    with pytest.raises(ConfigError, match="maskrcnn-fpn"):
        to_onnx(model, config.data)
    model, config = small("light-head", {"box": {"ps_pool": "avg", "sampling_ratio": 0}})
    with pytest.raises(ConfigError, match=r"box\.sampling_ratio: must be positive to export"):
        to_onnx(model, config.data)
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


@pytest.mark.slow
def test_export_verifies_on_real_images_and_the_docs_example_runs(
    real_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = str(real_data / "bccd")
    smaller = ["--set", "data.multi_scale=[]", "--set", "data.short_side=160", "--steps", "12"]
    train = ["finetune", "--data", data, "--recipe", "tiny/frcnn-fpn", "--batch-size", "2"]
    assert run([*train, *smaller, "--set", "data.workers=0"]) == 0
    capsys.readouterr()
    assert run(["export", "-o", "detector.onnx", "--verify", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] == Path("detector.onnx").stat().st_size
    verified = result["verified"]
    assert verified["images"] == 20
    assert verified["detections"] >= 20
    assert verified["unmatched"] == 0
    assert run(["export", "--set", "box.score_threshold=0.5"]) == 2

    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.S)
    picture = next((real_data / "bccd").rglob("*.jpg"))
    values: dict[str, Any] = {}
    exec(example.replace("cells.jpg", str(picture)), values)
    assert values["boxes"].shape[1] == 4
    assert len(values["boxes"]) == len(values["labels"]) == len(values["scores"])

    before = Path("detector.onnx").read_bytes()
    monkeypatch.setattr("detkit.deploy.verify.BOX_TOLERANCE", 1e-12)
    assert run(["export", "-o", "detector.onnx", "--verify"]) == 4
    assert Path("detector.onnx").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if "onnx" in path.name] == ["detector.onnx"]
