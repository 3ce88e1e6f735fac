"""Recalibrated batch norms: right averages, no trace of other candidates, nothing changed after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from detkit.config import resolve
from detkit.errors import ConfigError, NonFiniteError
from detkit.models.backbones.shuffle import shuffle_net
from detkit.models.backbones.shuffle_supernet import ShuffleSupernet, extract, find_supernet
from detkit.models.classifier import Classifier
from detkit.models.search_space import SPACES
from detkit.models.zoo import build_backbone, build_detector
from detkit.nas.calibrate import Statistics, calibrate, statistics
from detkit.types import Batch, ClassificationBatch, Target

TINY = SPACES["tiny"]
A, B = TINY.parse("01-23-0123-30"), TINY.parse("10-30-2301-12")


def views(count: int = 3, size: int = 64) -> list[ClassificationBatch]:
    generator = torch.Generator().manual_seed(5)
    return [
        ClassificationBatch(
            torch.randn(4, 3, size, size, generator=generator) * (i + 1), torch.arange(4)
        )
        for i in range(count)
    ]


def scenes() -> list[Batch]:
    """Two images with more candidates for RoIs than a head samples, so that chance decides."""
    generator = torch.Generator().manual_seed(7)
    boxes = torch.tensor([[5.0, 5.0, 60.0, 50.0], [40.0, 20.0, 90.0, 60.0]])
    target = Target(boxes, torch.tensor([1, 2]), torch.tensor([False, False]))
    return [
        Batch(
            torch.randn(2, 3, 64, 96, generator=generator),
            torch.tensor([[64, 96]] * 2),
            [target, target],
            ["a.jpg", "b.jpg"],
        )
        for _ in range(2)
    ]


def supernet(norm: str = "bn") -> Classifier:
    model = Classifier(ShuffleSupernet(TINY, norm), 4)
    for layer in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        layer.running_mean.normal_()  # as a trained supernet: of no single path
        layer.running_var.uniform_(0.5, 2)
    model.backbone.set_path(A)
    return model


def detector(norm: str = "bn") -> nn.Module:
    model = {"backbone": "detnas-supernet-tiny", "norm": "bn", "head_norm": norm}
    settings = {
        "model": model | {"neck_channels": 16},
        "box": {"channels": 32, "batch_per_image": 16},
    }
    return build_detector(resolve([settings]), 3)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [key for key in one if not torch.equal(one[key], other[key])]


class OneNorm(nn.Module):
    """A norm that runs ``times`` per batch, as a head that its levels share."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.times = times

    def forward(self, batch: ClassificationBatch) -> None:
        for i in range(self.times):
            self.norm(batch.images + i)


@pytest.mark.parametrize("times", [1, 2])
def test_statistics_are_plain_means_over_calls(times: int) -> None:
    model = OneNorm(times)
    found = calibrate(model, views())
    inputs = [batch.images + i for batch in views() for i in range(times)]
    means = torch.stack([x.mean((0, 2, 3)) for x in inputs])
    variances = torch.stack([x.var((0, 2, 3)) for x in inputs])
    torch.testing.assert_close(found["norm.running_mean"], means.mean(0))
    torch.testing.assert_close(found["norm.running_var"], variances.mean(0))


def test_exponential_average_on_request() -> None:
    model = OneNorm()
    found = calibrate(model, views(), momentum=0.1)
    expected = torch.zeros(3)
    for batch in views():
        expected = 0.9 * expected + 0.1 * batch.images.mean((0, 2, 3))
    torch.testing.assert_close(found["norm.running_mean"], expected)


@pytest.mark.parametrize("norm", ["bn", "sync_bn"])
def test_order_of_candidates_leaves_no_trace(norm: str) -> None:
    model = supernet(norm)
    model.train()
    model.backbone.stage3.eval()
    before, modes = snapshot(model), [m.training for m in model.modules()]
    found: list[Statistics] = []
    scores = []
    images = views()[0].images
    for genes in (A, B, A):
        model.backbone.set_path(genes)
        found.append(calibrate(model, views()))
        with statistics(model, found[-1]), torch.no_grad():
            scores.append(model.classify(images))
        assert_equal(snapshot(model), before)
        assert [m.training for m in model.modules()] == modes
    assert_equal(found[0], found[2])
    assert torch.equal(scores[0], scores[2]) and not torch.equal(scores[0], scores[1])
    assert found[0].keys() != found[1].keys()


def test_momentum_and_random_state_are_given_back() -> None:
    model = supernet()
    norm = model.backbone.stem[1]
    norm.momentum = 0.01
    state = torch.get_rng_state()
    calibrate(model, views(1))
    assert norm.momentum == 0.01
    assert torch.equal(torch.get_rng_state(), state)
    assert not norm._forward_pre_hooks


def test_the_model_is_given_back_after_a_failure() -> None:
    model = supernet().eval()
    before = snapshot(model)
    wrong = ClassificationBatch(torch.zeros(4, 1, 64, 64), torch.arange(4))
    with pytest.raises(RuntimeError, match="channels"):
        calibrate(model, [*views(1), wrong])
    assert_equal(snapshot(model), before)
    assert not model.training and model.backbone.stem[1].momentum == 0.1
    assert not model.backbone.stem[1]._forward_pre_hooks


def test_norms_off_the_path_do_not_count() -> None:
    model = supernet()
    plain = calibrate(model, views())
    images = views()[0].images
    with statistics(model, plain), torch.no_grad():
        expected = model.classify(images)
    model.backbone.set_path(B)
    off = set(calibrate(model, views(1))) - set(plain)
    assert off
    for key in off:
        model.get_buffer(key).fill_(float("nan"))
    model.backbone.set_path(A)
    found = calibrate(model, views())
    assert_equal(found, plain)
    with statistics(model, found), torch.no_grad():
        assert torch.equal(model.classify(images), expected)


def test_a_path_is_calibrated_as_its_network() -> None:
    model = supernet()
    single = Classifier(shuffle_net(TINY, A), 4)
    single.load_state_dict(extract(model.state_dict(), TINY, A))
    found, expected = calibrate(model, views()), calibrate(single, views())
    assert_equal(extract(found, TINY, A), expected)


def test_heads_of_detectors_are_calibrated_on_the_same_samples() -> None:
    model = detector()
    find_supernet(model).set_path(A)
    first = calibrate(model, scenes())
    torch.rand(3)  # another state of the generator outside
    assert_equal(calibrate(model, scenes()), first)
    assert any(key.startswith("head.") for key in first)
    assert any(key.startswith("neck.") for key in first)
    other = calibrate(model, scenes(), seed=1)
    assert any(not torch.equal(other[k], first[k]) for k in first if k.startswith("head."))


@pytest.mark.parametrize("head_norm", ["bn", "none"])
@pytest.mark.parametrize("name", ["frcnn-fpn", "maskrcnn-fpn", "light-head-fpn", "retinanet"])
def test_norms_see_what_training_shows_them(name: str, head_norm: str) -> None:
    """Without losses, and with all RoIs sampled, so that chance has no say."""
    settings = {
        "model": {"backbone": "detnas-supernet-tiny", "norm": "bn", "head_norm": head_norm}
        | {"detector": name, "neck_channels": 16},
        "box": {} if name == "retinanet" else {"channels": 16, "batch_per_image": 10_000},
    }
    whole = build_detector(resolve([settings]), 3).train()
    find_supernet(whole).set_path(A)
    short, (scene, _) = copy.deepcopy(whole), scenes()
    masks = torch.ones(2, 64, 96, dtype=torch.bool)
    scene = replace(scene, targets=[replace(target, masks=masks) for target in scene.targets])
    before = snapshot(short)
    whole(scene)
    short.run_norms(scene)
    found = short.state_dict()
    torch.testing.assert_close(dict(found), dict(whole.state_dict()))
    moved = {key.split(".")[0] for key in found if not torch.equal(found[key], before[key])}
    assert ("head" in moved) == (head_norm == "bn")


def test_frozen_stages_keep_their_statistics() -> None:
    backbone = build_backbone("detnas-supernet-tiny", "bn", frozen_stages=1)
    model = Classifier(backbone, 4)
    backbone.stem[1].running_mean.fill_(0.25)
    backbone.set_path(A)
    found = calibrate(model, views(1))
    assert not any("stem" in key for key in found)
    assert (backbone.stem[1].running_mean == 0.25).all()


def test_group_norms_have_nothing_to_calibrate() -> None:
    model = Classifier(shuffle_net(TINY, A, "gn"), 4)
    assert calibrate(model, views(1)) == {}


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: calibrate(supernet(), []), ConfigError, "at least one batch, got none"),
        (lambda: calibrate(supernet(), views(1), momentum=0.0), ConfigError, "momentum: must be"),
        (
            lambda: calibrate(
                OneNorm(),
                [ClassificationBatch(torch.full((2, 3, 2, 2), 1e38) * 10, torch.zeros(2))],
            ),
            NonFiniteError,
            "statistics must be finite, got norm.running_mean",
        ),
        (lambda: statistics(supernet(), {"x": torch.zeros(1)}).__enter__(), ValueError, "got x"),
    ],
)
def test_refusals(run: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run()
