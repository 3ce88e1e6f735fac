"""Detectors: every backbone trains and detects; edge cases; torchvision's numbers."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from detkit.config import Config, resolve
from detkit.errors import ConfigError, DataError
from detkit.models import BACKBONES, build_classifier, build_detector, count_detector
from detkit.models.detector import TwoStageDetector
from detkit.models.necks.fpn import FPN
from detkit.models.torchvision_keys import convert
from detkit.types import Batch, ClassificationBatch, FeatureSpec, Target

CLASSES = 3


def config(**tables: dict[str, Any]) -> Config:
    """A detector small enough for a test; ``tables`` change it."""
    small = {
        "model": {"backbone": "resnet50-tiny", "norm": "bn", "neck_channels": 16},
        "anchors": {"sizes": [8, 16, 32, 64, 128]},
        "rpn": {"drop_straddling": False, "post_nms_train": 50, "post_nms_test": 50},
        "box": {"channels": 32, "batch_per_image": 32},
    }
    return resolve([small, tables])


def target(boxes: list[list[float]], labels: list[int], crowd: list[bool] | None = None) -> Target:
    return Target(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(crowd or [False] * len(labels), dtype=torch.bool),
    )


def batch(*targets: Target, size: tuple[int, int] = (96, 128)) -> Batch:
    """Noise images with a padded border at right and bottom."""
    n = len(targets)
    images = torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(3))
    sizes = torch.tensor([[size[0] - 6, size[1] - 9]] * n)
    images[:, :, size[0] - 6 :] = 0
    images[:, :, :, size[1] - 9 :] = 0
    return Batch(images, sizes, list(targets), [f"image{i}.jpg" for i in range(n)])


def some() -> list[Target]:
    first = target([[5, 5, 40, 30], [50, 20, 110, 80], [3, 60, 12, 70]], [1, 3, 2])
    return [first, target([[20, 20, 60, 60]], [2])]


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


# --- every combination ----------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_trains_and_detects(backbone: str) -> None:
    frozen = "bn" if backbone.endswith("tiny") else "frozen_bn"
    model = build_detector(config(model={"backbone": backbone, "norm": frozen}), CLASSES)
    for norm in (m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.constant_(norm.weight, 0.5)  # random weights under frozen statistics would explode
    data = batch(target([[5, 5, 40, 30]], [1]), size=(64, 96))
    levels = model.features(data.images)
    specs = model.neck.feature_specs
    assert list(levels) == list(specs) == ["p2", "p3", "p4", "p5", "p6"]
    for name, spec in specs.items():
        assert levels[name].shape == (1, 16, -(-64 // spec.stride), -(-96 // spec.stride))
    losses = model(data)
    assert set(losses) == {"rpn_objectness", "rpn_box", "box_class", "box_regression"}
    assert all(v.ndim == 0 and v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    total(losses).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    model.eval()
    (found,) = model.detect(data.images, data.sizes)
    assert found["boxes"].shape == (len(found["scores"]), 4)


def test_detnet_pyramid_at_800x1344() -> None:
    with torch.device("meta"):
        model = build_detector(resolve([{"model": {"backbone": "detnet59"}}]), 80)
        levels = model.features(torch.empty(1, 3, 800, 1344))
    assert [s.stride for s in model.neck.feature_specs.values()] == [4, 8, 16, 16, 16]
    shapes = {"p2": (200, 336), "p3": (100, 168), "p4": (50, 84), "p5": (50, 84), "p6": (50, 84)}
    assert {name: tuple(x.shape[2:]) for name, x in levels.items()} == shapes


@pytest.mark.parametrize(
    ("backbone", "neck_params", "neck_gmacs", "rpn_gmacs"),
    [("resnet50", 3_344_384, 60.9, 53.1), ("detnet59", 3_934_720, 66.9, 57.3)],
)
def test_cost_of_a_whole_detector(
    backbone: str, neck_params: int, neck_gmacs: float, rpn_gmacs: float
) -> None:
    parts = count_detector(resolve([{"model": {"backbone": backbone}}]), 80, 800, 1344)
    assert parts["neck"].params == neck_params
    assert parts["rpn"].params == 593_935
    assert round(parts["neck"].macs / 1e9, 1) == neck_gmacs
    assert round(parts["rpn"].macs / 1e9, 1) == rpn_gmacs
    head = 256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 80)
    assert parts["head"].macs == 1000 * head
    assert parts["total"].macs == sum(p.macs for k, p in parts.items() if k != "total")
    assert parts["total"].params == sum(p.params for k, p in parts.items() if k != "total")


@pytest.mark.parametrize("norm", ["none", "bn", "sync_bn", "gn"])
@pytest.mark.parametrize("head", ["2fc", "4conv1fc"])
def test_head_norms(norm: str, head: str) -> None:
    model = build_detector(config(model={"head_norm": norm}, box={"head": head}), CLASSES)
    total(model(batch(*some()))).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert (model.neck.lateral.p3.conv.bias is None) == (norm != "none")
    model.eval()
    with torch.no_grad():  # a head without RoIs
        empty = model.head(model.features(batch(*some()).images), [torch.zeros(0, 4)] * 2)
    assert empty[0].shape == (0, CLASSES + 1)


def test_four_convolutions_then_one_layer() -> None:
    """Each convolution is normalised before its ReLU, the fully connected layer is not."""
    detector = build_detector(
        config(model={"head_norm": "bn"}, box={"head": "4conv1fc", "channels": 20}), CLASSES
    )
    predictor = detector.head.eval().predictor
    for norm in (m for m in predictor.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    x = pooled = torch.randn(5, 16, 7, 7)
    assert len(predictor.convs) == 4
    for conv in predictor.convs:
        assert conv.conv.kernel_size == (3, 3) and conv.conv.out_channels == 16
        x = torch.relu(conv.norm(torch.conv2d(x, conv.conv.weight, padding=1)))
    x = torch.relu(x.flatten(1) @ predictor.fc.weight.T + predictor.fc.bias)
    logits, deltas = predictor(pooled)
    torch.testing.assert_close(logits, predictor.classes(x))
    torch.testing.assert_close(deltas.flatten(1), predictor.boxes(x))
    assert x.shape == (5, 20) and deltas.shape == (5, CLASSES, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"box": {"class_agnostic": True}},
        {"box": {"roi_max_level": 6, "sampling_ratio": 0}},
        {"rpn": {"joint": True, "channels": 8}},
        {"rpn": {"drop_straddling": True, "min_size": 4}},
        {"rpn": {"post_nms_scope": "batch", "post_nms_train": 5}},
        {"box": {"head": "4conv1fc", "class_agnostic": True}},
    ],
    ids=str,
)
def test_options_train_and_detect(change: dict[str, Any]) -> None:
    model = build_detector(config(**change), CLASSES)
    losses = model(batch(*some()))
    total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert len(model.detect(batch(*some()).images, batch(*some()).sizes)) == 2


def test_classifier_learns_from_the_last_map() -> None:
    model = build_classifier(config(train={"label_smoothing": 0.1}), 5)
    data = ClassificationBatch(torch.randn(6, 3, 64, 64), torch.arange(6) % 5)
    assert model.classify(data.images).shape == (6, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    seen = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(data)["loss"]
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert seen[-1] < 0.7 * seen[0]


# --- names and settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"detector": "frcn-fpn"}}, "did you mean 'frcnn-fpn'"),
        ({"model": {"backbone": "detnet-59"}}, "did you mean 'detnet59'"),
        ({"anchors": {"sizes": [8, 16]}}, "anchors.sizes: must be one side for each of p2, p3"),
        ({"box": {"head": "4conv2fc"}}, "box.head: must be one of 2fc, 4conv1fc"),
        ({"box": {"head": "4conv1fc", "channels": 0}}, "box.channels: must be positive"),
        (
            {"model": {"detector": "light-head-fpn"}, "box": {"head": "4conv1fc"}},
            "box.head: must stay '2fc' for light-head-fpn, which does not use it",
        ),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_detector(config(**change), CLASSES)


def test_wrong_batches_are_refused_before_they_reach_a_loss() -> None:
    model = build_detector(config(), CLASSES)
    with pytest.raises(DataError, match=r"labels: must be in 1..3, got 1..4 in image0.jpg"):
        model(batch(target([[0, 0, 9, 9], [0, 0, 20, 20]], [1, 4])))
    with pytest.raises(ValueError, match=r"one target per image \(1\), got 0"):
        model(Batch(torch.zeros(1, 3, 64, 64), torch.tensor([[64, 64]])))


def test_strides_a_pyramid_cannot_join() -> None:
    specs = {"c2": FeatureSpec(8, 4), "c3": FeatureSpec(8, 16)}
    with pytest.raises(ValueError, match=r"equal the one before or double it, got \[4, 16\]"):
        FPN(specs)


# --- pyramid --------------------------------------------------------------------------------------


def _identity_laterals(neck: FPN) -> None:
    for lateral in neck.lateral.values():
        nn.init.zeros_(lateral.conv.weight)
        for i in range(lateral.conv.weight.shape[0]):
            lateral.conv.weight.data[i, i] = 1


def test_equal_strides_are_summed_without_resizing() -> None:
    strides = {"c2": 4, "c3": 8, "c4": 16, "c5": 16, "c6": 16}
    neck = FPN({name: FeatureSpec(4, s) for name, s in strides.items()}, 4)
    _identity_laterals(neck)
    maps = {name: torch.zeros(1, 4, 80 // s, 80 // s) for name, s in strides.items()}
    maps["c6"] = torch.randn(1, 4, 5, 5)
    merged = neck.merge(maps)
    assert torch.equal(merged["p4"], maps["c6"]) and torch.equal(merged["p5"], maps["c6"])
    assert torch.equal(merged["p3"], maps["c6"].repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert neck(maps)["p6"].shape == (1, 4, 5, 5)


def test_the_sum_before_the_output_convolution_goes_down() -> None:
    neck = FPN({"c2": FeatureSpec(4, 4), "c3": FeatureSpec(4, 8)}, 4)
    _identity_laterals(neck)
    nn.init.zeros_(neck.output.p3.conv.weight)
    maps = {"c2": torch.zeros(1, 4, 6, 6), "c3": torch.randn(1, 4, 3, 3)}
    out = neck(maps)
    assert not out["p3"].any() and out["p2"].any()


def test_p6_is_every_second_cell_of_p5_without_c6() -> None:
    neck = FPN({f"c{i}": FeatureSpec(4, 2**i) for i in range(2, 6)}, 4)
    out = neck({f"c{i}": torch.randn(1, 4, 80 >> i, 112 >> i) for i in range(2, 6)})
    assert torch.equal(out["p6"], out["p5"][:, :, ::2, ::2])
    assert neck.feature_specs["p6"] == FeatureSpec(4, 64)


def test_odd_maps_join() -> None:
    neck = FPN({f"c{i}": FeatureSpec(4, 2**i) for i in range(2, 6)}, 4)
    shapes = {"c2": (19, 13), "c3": (10, 7), "c4": (5, 4), "c5": (3, 2)}
    out = neck({name: torch.randn(1, 4, *shape) for name, shape in shapes.items()})
    assert [tuple(x.shape[2:]) for x in out.values()] == [*shapes.values(), (2, 1)]


# --- edge cases of truth --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [
        [target([], []), target([], [])],
        [target([[5, 5, 40, 30]], [1]), target([], [])],
        [target([[0, 0, 119, 90]], [1], [True]), target([], [])],
    ],
    ids=["no boxes", "one image without boxes", "only a crowd"],
)
def test_truth_may_be_missing_and_all_parameters_still_get_gradients(targets: list[Target]) -> None:
    model = build_detector(config(), CLASSES)
    losses = model(batch(*targets))
    assert all(v.isfinite() for v in losses.values())
    total(losses).backward()
    # every process of a data-parallel run must hold a gradient for every parameter
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_no_anchor_inside_the_image() -> None:
    model = build_detector(config(rpn={"drop_straddling": True}), CLASSES)
    data = batch(target([[0, 0, 3, 3]], [1]), size=(64, 64))
    data.sizes = torch.tensor([[3, 3]])
    losses = model(data)
    total(losses).backward()
    assert losses["rpn_objectness"] == 0 and losses["rpn_box"] == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def _rpn_gradients(model: TwoStageDetector, data: Batch, dtype: torch.dtype) -> list[Tensor]:
    """Losses of the proposals, and their gradients by the maps and by the head's parameters."""
    torch.manual_seed(5)
    sizes = [(24, 32), (12, 16), (6, 8), (3, 4), (1, 2)]
    maps = {f"p{i}": torch.randn(2, 16, *s, dtype=dtype) for i, s in enumerate(sizes, 2)}
    for x in maps.values():
        x.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        output = model.rpn(maps)
        losses = model.rpn.losses(output, data.targets, data.sizes)
    wanted = [*maps.values(), *model.rpn.parameters()]
    gradients = torch.autograd.grad(total(losses), wanted, materialize_grads=True)
    return [*losses.values(), *gradients]


@pytest.mark.parametrize("softmax", [False, True], ids=["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "bf16"])
def test_proposals_learn_at_their_samples_what_they_would_on_whole_maps(
    dtype: torch.dtype, softmax: bool
) -> None:
    """The head runs on the sampled cells alone; whoever listens to it sees it run on the maps."""
    tables = {"softmax": softmax, "drop_straddling": False, "batch_per_image": 2500}
    model = build_detector(config(rpn=tables), CLASSES).to(dtype)
    for parameter in model.rpn.parameters():
        nn.init.normal_(parameter, std=0.3)
    data = batch(*some())
    sampled = _rpn_gradients(model, data, dtype)
    model.rpn.head.conv.register_forward_hook(lambda *_: None)
    whole = _rpn_gradients(model, data, dtype)
    assert len(sampled) == 2 + 5 + 6
    for got, expected in zip(sampled, whole, strict=True):
        assert expected.abs().max() > 0
        near = 1e-12 if dtype == torch.float64 else 0.03  # bf16 has 8 bits
        assert (got - expected).abs().max() <= near * expected.abs().max()


def test_no_background_is_drawn_from_inside_a_crowd() -> None:
    model = build_detector(config(), CLASSES)
    crowd = target([[0, 0, 119, 45], [10, 50, 50, 90]], [1, 2], [True, False])
    data = batch(crowd)
    output = model.rpn(model.features(data.images))
    _, negative, _ = model.rpn._sample(output.anchors, crowd, 90, 119)
    rois = model.head.sample(output.anchors[::50].clamp(min=0), crowd)
    for background in (output.anchors[negative], rois.boxes[rois.labels == 0]):
        assert len(background) > 10
        height = (background[:, 3].clamp(max=45) - background[:, 1].clamp(min=0)).clamp(min=0)
        width = (background[:, 2].clamp(max=119) - background[:, 0].clamp(min=0)).clamp(min=0)
        area = (background[:, 2:] - background[:, :2]).prod(1)
        assert (height * width / area < 0.7).all()
    assert not (rois.labels == 1).any()  # the crowd is nobody's truth


# --- training and detection -----------------------------------------------------------------------


def _train(steps: int, **tables: dict[str, Any]) -> TwoStageDetector:
    torch.manual_seed(12)
    model = build_detector(config(**tables), CLASSES).train()
    data = batch(*some())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        total(model(data)).backward()
        optimizer.step()
    return model


def test_steps_repeat_bit_for_bit() -> None:
    first, second = _train(3).state_dict(), _train(3).state_dict()
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_overfits_two_images_and_finds_their_objects() -> None:
    model = _train(200)
    model.eval()
    data = batch(*some())
    for found, truth in zip(model.detect(data.images, data.sizes), data.targets, strict=True):
        for box, label in zip(truth.boxes, truth.labels, strict=True):
            near = (found["boxes"] - box).abs().amax(1) < 0.2 * (box[2:] - box[:2]).max() + 2
            assert (near & (found["labels"] == label) & (found["scores"] > 0.5)).any()


def test_detections_are_thresholded_suppressed_per_class_limited_and_clipped() -> None:
    model = build_detector(
        config(box={"max_detections": 3, "score_threshold": 0.2}), CLASSES
    ).eval()
    boxes = [[10, 10, 30, 30], [11, 10, 31, 30], [60, 60, 500, 500], [5, 5, 9, 9], [70, 5, 80, 9]]
    scores = [[0.0, 0.6, 0, 0.35], [0, 0.5, 0, 0], [0, 0, 0.9, 0], [0, 0.19, 0, 0], [0, 0.25, 0, 0]]
    p = torch.tensor(scores)
    p[:, 0] = 1 - p.sum(1)
    outputs = p.log(), torch.zeros(5, CLASSES, 4)
    model.head.forward = lambda features, boxes: outputs  # whatever the maps say
    data = batch(*some())
    features = model.features(data.images)
    proposals = [
        torch.tensor(boxes[:4], dtype=torch.float32),
        torch.tensor(boxes[4:], dtype=torch.float32),
    ]
    first, second = model.head.detect(features, proposals, data.sizes)
    # best first; the second box is suppressed by the first in class 1 but not in class 3
    assert first["labels"].tolist() == [2, 1, 3]
    torch.testing.assert_close(first["scores"], torch.tensor([0.9, 0.6, 0.35]))
    expected = [[60, 60, 119, 90], [10, 10, 30, 30], [10, 10, 30, 30]]
    torch.testing.assert_close(first["boxes"], torch.tensor(expected, dtype=torch.float32))
    assert second["labels"].tolist() == [1] and second["boxes"].tolist() == [[70, 5, 80, 9]]


def test_proposals_are_clipped_kept_apart_by_level_and_limited() -> None:
    model = build_detector(config(), CLASSES).eval()
    data = batch(*some())
    output = model.rpn(model.features(data.images))
    output.logits = torch.randn_like(output.logits)
    output.deltas = torch.randn_like(output.deltas)
    proposals = model.rpn.proposals(output, data.sizes, 20, 50)
    for boxes in proposals:
        assert 5 < len(boxes) <= 50
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
        assert boxes[:, [1, 3]].max() <= 90 and boxes[:, [0, 2]].max() <= 119
    only = model.rpn.proposals(output, data.sizes, 1, 50)
    assert all(len(boxes) <= 5 for boxes in only)  # one of each level


def test_proposals_of_a_batch_are_the_best_of_all_its_images() -> None:
    model = build_detector(config(), CLASSES).eval()
    data = batch(*some())
    output = model.rpn(model.features(data.images))
    output.logits = torch.randn_like(output.logits)
    output.logits[1] -= 2  # the second image has fewer of the best
    output.deltas = torch.zeros_like(output.deltas)
    each = model.rpn.proposals(output, data.sizes, 20, 1000)
    assert min(map(len, each)) > 10
    joined = model.rpn.proposals(output, data.sizes, 20, 30, "batch")
    counts = [len(boxes) for boxes in joined]
    assert sum(counts) == 30 and counts[0] > counts[1]
    for boxes, best in zip(joined, each, strict=True):
        assert torch.equal(boxes, best[: len(boxes)])


def test_the_padded_border_of_a_batch_gives_no_boxes_outside_an_image() -> None:
    model = _train(2)
    model.eval()
    data = batch(*some())
    data.sizes = torch.tensor([[40, 60], [90, 119]])
    for found, (height, width) in zip(
        model.detect(data.images, data.sizes), data.sizes.tolist(), strict=True
    ):
        assert len(found["boxes"]) > 0
        assert (
            found["boxes"][:, [1, 3]].max() <= height and found["boxes"][:, [0, 2]].max() <= width
        )


def test_autocast_and_channels_last_train_the_same_model() -> None:
    losses = []
    for amp, layout in (
        (False, torch.contiguous_format),
        (False, torch.channels_last),
        (True, torch.channels_last),
    ):
        torch.manual_seed(5)
        model = build_detector(config(), CLASSES).to(memory_format=layout)
        data = batch(*some())
        data.images = data.images.to(memory_format=layout)
        torch.manual_seed(6)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            found = model(data)
        total(found).backward()
        assert all(v.dtype == torch.float32 for v in found.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        losses.append(torch.stack(list(found.values())).detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
    # in bf16 other proposals may be drawn, so only the RPN's own losses are comparable
    torch.testing.assert_close(losses[2][:2], losses[0][:2], rtol=0.02, atol=1e-2)


def _ddp_worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(4)
    small = config(model={"norm": "sync_bn", "head_norm": "sync_bn"})
    model = nn.parallel.DistributedDataParallel(build_detector(small, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for _ in range(2):  # a parameter left out of one backward pass would stop the second forward
        optimizer.zero_grad()
        total(model(batch(*(some() if rank == 0 else [target([], []), target([], [])])))).backward()
        optimizer.step()
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_process_without_boxes_keeps_step_with_the_others(tmp_path: Path) -> None:
    mp.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(v, states[1][k]) and v.isfinite().all() for k, v in states[0].items())


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.gpu
def test_cuda_trains_and_detects_as_the_cpu_does(amp: torch.dtype | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    every = {"batch_per_image": 100_000}  # nothing is drawn, so both devices see the same samples
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(5)
        model = build_detector(config(rpn=every), CLASSES).to(device)
        data = batch(*some()).to(device)
        with torch.autocast("cuda", amp, enabled=amp is not None and device == "cuda"):
            losses[device] = model(data)
        total(losses[device]).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        model.eval()
        with torch.autocast("cuda", amp, enabled=amp is not None and device == "cuda"):
            assert len(model.detect(data.images, data.sizes)) == 2
    for name in ("rpn_objectness", "rpn_box"):
        torch.testing.assert_close(
            losses["cuda"][name].cpu(), losses["cpu"][name], rtol=0.02, atol=0.01 if amp else 1e-3
        )


# --- torchvision ----------------------------------------------------------------------------------


def _peer(tv: ModuleType) -> nn.Module:
    """torchvision's Faster R-CNN ResNet-50 FPN with random weights of sensible scale."""
    peer = tv.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1, min_size=96, max_size=128,
        image_mean=[0.0] * 3, image_std=[1.0] * 3, trainable_backbone_layers=5,
        rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_test=60,
    )  # fmt: skip
    for module in peer.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(0, 0.05)
            nn.init.constant_(module.weight, 0.4)
    nn.init.normal_(peer.rpn.head.cls_logits.weight, std=0.3)
    nn.init.normal_(peer.roi_heads.box_predictor.cls_score.weight, std=0.3)
    nn.init.normal_(peer.roi_heads.box_predictor.bbox_pred.weight, std=0.05)
    return peer.eval()


def test_detections_equal_torchvisions(tv: ModuleType) -> None:
    peer = _peer(tv)
    tables = {
        "model": {"backbone": "resnet50", "norm": "frozen_bn", "neck_channels": 256},
        "anchors": {"sizes": [32, 64, 128, 256, 512]},
        "rpn": {"pre_nms_test": 200, "post_nms_test": 60},
        "box": {"channels": 1024, "aligned": False},
    }
    model = build_detector(config(**tables), CLASSES).eval()
    model.load_state_dict(convert(peer.state_dict()), strict=True)
    images = torch.rand(2, 3, 96, 128)
    with torch.no_grad():
        expected = peer(list(images))
    found = model.detect(images, torch.tensor([[96, 128]] * 2))
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs["boxes"]) > 20
        assert torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-4, atol=1e-2)


def test_unknown_torchvision_weights_keep_their_names() -> None:
    """So that whatever loads them refuses them as left over."""
    given = {"roi_heads.box_head.0.0.weight": torch.zeros(1), "conv1.weight": torch.zeros(1)}
    assert set(convert(given)) == {"roi_heads.box_head.0.0.weight", "backbone.conv1.weight"}
