"""Detectors in fixed sizes, compiled and in CUDA graphs find what their own `detect` finds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detkit import api
from detkit import config as configs
from detkit.cli.main import run
from detkit.deploy import Form, fixed, graphs
from detkit.deploy.compiled import compiled
from detkit.deploy.fixed import FixedDetector, Found
from detkit.deploy.form import DeployedDetector
from detkit.errors import ConfigError
from detkit.models.zoo import DETECTORS
from detkit.ops._library import BUILD_INFO
from detkit.scales import insert
from detkit.types import Detections

SIZES = [[96, 128], [64, 90]]


def small(name: str, *layers: Mapping[str, Any]) -> nn.Module:
    """A detector of three classes whose scores and boxes are spread like those of a trained one."""
    recipe = configs.read_toml(configs.recipe_path(f"tiny/{name}"))
    torch.manual_seed(0)
    model = api.build(configs.resolve([recipe, *layers]), 3).eval()
    for path, layer in model.named_modules():
        last = {".objectness": 3.0, ".classes": 3.0, ".classes.out": 3.0, ".boxes": 1.0}
        for end, std in last.items():
            if path.endswith(end) and isinstance(layer, nn.Conv2d | nn.Linear):
                scaled_to(layer, model, std)
    return model


@torch.no_grad()
def scaled_to(layer: nn.Module, model: Any, std: float) -> None:
    """Scale a layer's weights so that its outputs deviate by ``std``."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, out: seen.append(out.std()))
    model.detect(*batch())
    hook.remove()
    layer.weight.mul_(std / seen[0])


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(seed))
    for image, (height, width) in zip(images, SIZES, strict=True):
        image[:, height:], image[:, :, width:] = 0, 0
    return images, torch.tensor(SIZES)


def rows(found: Found, image: int) -> Detections:
    k = int(found.counts[image])
    return Detections(
        boxes=found.boxes[image, :k], labels=found.labels[image, :k], scores=found.scores[image, :k]
    )


def assert_same(wanted: Detections, got: Detections) -> None:
    """The same labels in the same order; boxes and scores but for rounding, since padded batches
    of RoIs may be multiplied in other blocks.
    """
    torch.testing.assert_close(got["labels"], wanted["labels"])
    torch.testing.assert_close(got["boxes"], wanted["boxes"], rtol=0, atol=1e-3)
    torch.testing.assert_close(got["scores"], wanted["scores"], rtol=0, atol=1e-5)


@torch.no_grad()
def assert_equal_to_detect(model: Any) -> list[int]:
    """Compare fixed sizes with ``detect``; returns how many detections each image has."""
    images, sizes = batch(1)
    found = FixedDetector(model)(images, sizes)
    wanted, cells = model.detect(images, sizes), []
    if found.cells is not None:
        wanted, cells = model.detect_cells(images, sizes)
    assert found.complete.all()
    for i, one in enumerate(wanted):
        assert_same(one, rows(found, i))
        rest = slice(len(one["boxes"]), None)
        assert not found.boxes[i, rest].any() and not found.scores[i, rest].any()
        if found.cells is not None:
            torch.testing.assert_close(found.cells[i, : rest.start], cells[i])
    return found.counts.tolist()


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_fixed_sizes_give_what_detect_gives(name: str) -> None:
    """More candidates than detections wanted, so that limits cut."""
    counts = assert_equal_to_detect(small(name, {"box": {"max_detections": 20}}))
    assert counts == [20, 20]


@pytest.mark.parametrize("name", ["frcnn-fpn", "light-head", "maskrcnn-fpn", "retinanet"])
def test_fewer_candidates_than_rows(name: str) -> None:
    """Anchors, proposals and detections all end before their limits."""
    box = {"score_threshold": 0.3, "nms_iou": 0.3, "max_detections": 2000}
    rpn = {} if name == "retinanet" else {"rpn": {"pre_nms_test": 5000, "post_nms_test": 4000}}
    if name == "retinanet":
        box["score_threshold"] = 0.9
    counts = assert_equal_to_detect(small(name, {"box": box}, rpn))
    assert min(counts) > 0 and max(counts) < 2000


def test_no_detections_at_all() -> None:
    model = small("light-head", {"box": {"score_threshold": 1.0}})
    assert assert_equal_to_detect(model) == [0, 0]


def test_ties_go_to_the_same_boxes() -> None:
    """Scores in whole steps: equal ones are settled by the boxes' order in both forms."""
    model = small("light-head", {"box": {"max_detections": 20}})
    model.head.predictor.register_forward_hook(lambda _, __, out: (out[0].round(), out[1]))
    scores = model.detect(*batch(1))[0]["scores"]
    assert len(scores.unique()) < len(scores)
    assert_equal_to_detect(model)


@torch.no_grad()
def test_cut_candidates_are_told_and_detected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one candidate per detection suppression leaves too few: the fixed rows say so."""
    monkeypatch.setattr(fixed, "CANDIDATES", 1)
    model: Any = small("light-head", {"box": {"max_detections": 20}})
    images, sizes = batch()
    assert not FixedDetector(model)(images, sizes).complete.any()
    deployed = DeployedDetector(model, Form(fixed=True))
    for wanted, got in zip(
        model.detect(images, sizes), deployed.detect(images, sizes), strict=True
    ):
        assert_same(wanted, got)


class OnOneDevice(TorchDispatchMode):
    """Refuses every tensor that is not on the meta device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                raise AssertionError(f"{func}: a tensor on {leaf.device}")
        return out


@pytest.mark.skipif(not BUILD_INFO, reason="the references' sizes depend on the boxes")
@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_a_cuda_graph_can_hold_it(name: str) -> None:
    """On the meta device there are no values to depend on, and nothing may come from the host.

    The first call may: it is a warm-up, which places the anchors.
    """
    model = small(name).to("meta")
    images, sizes = (x.to("meta") for x in batch())
    with torch.no_grad():
        FixedDetector(model)(images, sizes)
        with OnOneDevice():
            found = FixedDetector(model)(images, sizes)
            with pytest.raises((NotImplementedError, AssertionError)):
                model.detect(images, sizes)  # type: ignore[operator]
    assert found.boxes.shape == (2, 100, 4)


@torch.no_grad()
def test_one_graph_of_the_compiler() -> None:
    """Traced whole for each shape of images; without the backend, which takes a minute."""
    model: Any = small("light-head")
    call = compiled(FixedDetector(model).forward, backend="eager")
    images, sizes = batch()
    for pixels in (images, images[:, :, :64]):
        rounded = sizes.clamp(max=pixels.shape[2])
        for wanted, got in zip(
            FixedDetector(model)(pixels, rounded), call(pixels, rounded), strict=True
        ):
            assert wanted is got is None or torch.equal(wanted, got)


def test_what_cannot_be_compiled_is_refused() -> None:
    def broken(images: Tensor, sizes: Tensor) -> Any:
        torch._dynamo.graph_break()
        return images

    with pytest.raises(ConfigError, match=r"--compile: must be able to compile \(2, 3, 96, 128\)"):
        compiled(broken, backend="eager")(*batch())


def test_shapes_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detkit.deploy.compiled.SIZES", 2)
    call = compiled(lambda images, sizes: images + 1, backend="eager")  # type: ignore[arg-type]
    images, sizes = batch()
    for width in (32, 64):
        call(images[..., :width], sizes)
    with pytest.raises(ConfigError, match="--compile: batches must be of at most 2 shapes"):
        call(images, sizes)


class Recorder:
    """As much of ``torch.cuda`` as a capture needs: a replay calls the function again."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.namespace = SimpleNamespace(
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            Stream=lambda _: SimpleNamespace(wait_stream=lambda _: None),
            current_stream=lambda _: SimpleNamespace(wait_stream=lambda _: None),
            stream=lambda _: self._within("warm-up"),
            graph=lambda _, pool: self._within(f"capture in {pool}"),
            device=lambda _: nullcontext(),
            graph_pool_handle=lambda: "pool",
        )

    @contextmanager
    def _within(self, what: str) -> Iterator[None]:
        self.log.append(what)
        yield


def test_graphs_are_captured_once_per_shape_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(torch, "cuda", recorder.namespace)
    seen: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    call = graphs.CudaGraphs(function, limit=2)
    captured = ["warm-up", "capture in pool", "replay"]
    small, large = torch.zeros(2), torch.zeros(3)
    read = call(small)
    assert recorder.log == captured and len(seen) == graphs.WARM_UP + 1
    assert call(torch.ones(2)) is read and read.tolist() == [1, 1] and small.tolist() == [0, 0]
    call(large)
    call(small)
    call(torch.zeros(4))  # `large` is the one longest not used
    call(small)
    assert recorder.log == [*captured, "replay", *captured, "replay", *captured, "replay"]
    call(large)
    assert recorder.log[-3:] == captured


@pytest.mark.gpu
@pytest.mark.parametrize("form", [Form(cuda_graph=True), Form(cuda_graph=True, bf16=True)])
@pytest.mark.parametrize("name", ["light-head", "frcnn-fpn", "maskrcnn-fpn", "retinanet"])
def test_cuda_graphs_detect_the_same(name: str, form: Form) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = small(name).cuda()
    plain, deployed = Form(fast=True, bf16=form.bf16).apply(model), form.apply(model)
    for seed in (1, 2):
        images, sizes = (x.cuda() for x in batch(seed))
        wanted, got = (m.detect(images, sizes) for m in (plain, deployed))  # type: ignore[operator]
        for one, other in zip(wanted, got, strict=True):
            assert abs(len(one["boxes"]) - len(other["boxes"])) <= 2
            if not form.bf16:
                assert_same(one, other)


FORMS: list[tuple[Form, str]] = [
    (Form(fast=True), "TwoStageDetector"),
    (Form(bf16=True), "DeployedDetector"),
    (Form(fast=True, bf16=True), "DeployedDetector"),
]


@pytest.mark.parametrize(("form", "kind"), FORMS)
def test_forms_detect_alike(form: Form, kind: str) -> None:
    model: Any = small("light-head", {"box": {"max_detections": 20}})
    before = copy.deepcopy(model.state_dict())
    made: Any = form.apply(model)
    assert type(made).__name__ == kind
    wanted, got = (
        m.detect(*batch(), torch.tensor([[192, 256], [128, 180]])) for m in (model, made)
    )
    assert [len(d["boxes"]) for d in got] == [20, 20]
    if not form.bf16:
        for one, other in zip(wanted, got, strict=True):
            assert_same(one, other)
    else:
        assert (wanted[0]["scores"] - got[0]["scores"]).abs().max() < 0.1
        assert not torch.equal(wanted[0]["scores"], got[0]["scores"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_masks_in_fixed_sizes_are_pasted() -> None:
    model: Any = small("maskrcnn-fpn", {"box": {"max_detections": 5}})
    deployed = DeployedDetector(model, Form(fixed=True))
    larger = torch.tensor([[192, 256], [128, 180]])
    wanted, got = (m.detect(*batch(), larger) for m in (model, deployed))
    for one, other in zip(wanted, got, strict=True):
        assert_same(one, other)
        assert torch.equal(one["masks"], other["masks"]) and one["masks"].any()


def test_exact_is_the_model_itself() -> None:
    model = small("light-head")
    assert Form().apply(model) is model


REFUSED: list[tuple[Callable[[], nn.Module], Form, str]] = [
    (lambda: small("light-head"), Form(cuda_graph=True), "--cuda-graph: must go with a model on"),
    (lambda: nn.Conv2d(1, 1, 1), Form(bf16=True), "must go with a detector, got Conv2d"),
    (lambda: nn.Conv2d(1, 1, 1), Form(compile=True), "must go with a detector, got Conv2d"),
]


@pytest.mark.parametrize(("make", "form", "message"), REFUSED)
def test_forms_that_do_not_go_are_refused(
    make: Callable[[], nn.Module], form: Form, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        form.apply(make())


def test_scale_learners_are_refused() -> None:
    model = small("light-head")
    insert(model)
    with pytest.raises(ConfigError, match="detkit decompose"):
        FixedDetector(model)


def test_flags_of_predict_and_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flags reach the model; what does not go ends with one sentence and exit code 2."""
    monkeypatch.chdir(tmp_path)
    recipe = ["--recipe", "tiny/light-head", "--steps", "1", "--out", "run"]
    assert run(["finetune", *recipe, "--set", "eval.every=1"]) == 0
    assert run(["data", "synth", "shapes"]) == 0
    picture = str(next(Path("shapes").rglob("*.png"), None) or next(Path("shapes").rglob("*.jpg")))
    capsys.readouterr()
    forms: list[Form] = []
    apply = Form.apply
    monkeypatch.setattr(Form, "apply", lambda s, m: forms.append(s) or apply(s, m))
    assert run(["predict", "run/best.pth", picture, "--fast", "--bf16", "--json"]) == 0
    assert run(["eval", "run/best.pth", "--data", "shapes", "--fast", "--json"]) == 0
    assert forms == [Form(fast=True, bf16=True), Form(fast=True)]
    capsys.readouterr()
    assert run(["predict", "run/best.pth", picture, "--cuda-graph", "--device", "cpu"]) == 2
    assert "--cuda-graph: must go with a model on a CUDA device" in capsys.readouterr().err
    assert run(["eval", "--detections", "x.json", "--data", "shapes", "--fast"]) == 2
    assert "must go with a checkpoint" in capsys.readouterr().err
