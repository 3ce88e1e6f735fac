"""Training: exact resuming, schedules, averaging, and every way a run can end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from toy_training import (
    CATEGORIES,
    Plain,
    Toy,
    batch_of,
    batches,
    new_run,
    split,
    toy_config,
    train,
)

from detkit.config import OptimConfig, TrainConfig
from detkit.engine import checkpoint
from detkit.engine.ema import Ema
from detkit.engine.optimizer import build_optimizer, set_factor
from detkit.engine.run import RunFolder
from detkit.engine.schedule import Length, factor, length
from detkit.engine.signals import StopSignals
from detkit.engine.train import StepInfo, fit, train_step
from detkit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    StorageError,
)
from detkit.types import ClassificationBatch

SCRIPT = Path(__file__).with_name("toy_training.py")


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equal to the last bit, elapsed time and speed apart."""
    assert type(left) is type(right), where
    if isinstance(left, Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            if key != "elapsed_seconds":
                assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert left == right, where


def noisy_score(model: nn.Module) -> dict[str, float]:
    """A metric of the weights that also draws from the global generator."""
    assert not model.training
    return {"top1": float(model.get_parameter("head.bias").sum() + 0 * torch.rand(1).sum())}


class StopError(Exception):
    pass


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they give on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- resuming


@pytest.mark.parametrize(("name", "at"), [("sgd", 1), ("sgd", 4), ("adamw", 3), ("adamw", 5)])
def test_resuming_gives_the_bits_of_an_uninterrupted_run(
    tmp_path: Path, name: str, at: int
) -> None:
    config = toy_config(
        train={"ema": 0.9, "save_every": at, "clip": 1.0},
        optim={"name": name, "schedule": "cosine"},
        eval={"every": 2, "patience": 10},
    )
    whole = train(new_run(tmp_path / "whole", config), config, evaluate=noisy_score)

    def stop(info: StepInfo) -> None:
        if info.step == at + 1:
            raise StopError

    run = new_run(tmp_path / "parts", config)
    with pytest.raises(StopError):
        train(run, config, evaluate=noisy_score, on_step=stop)
    saved = checkpoint.load(run.last)
    assert saved["progress"]["step"] == at
    resumed = train(run, config, evaluate=noisy_score, resume=saved)

    assert_same(dict(checkpoint.load(whole.last)), dict(checkpoint.load(resumed.last)))
    assert_same(dict(checkpoint.load(whole.best)), dict(checkpoint.load(resumed.best)))
    assert resumed.metrics == whole.metrics
    steps = [line["step"] for line in run.read_metrics() if line["kind"] == "eval"]
    assert steps == [2, 4, 6]
    seen = [line["step"] for line in run.read_metrics() if line["kind"] == "train"]
    assert seen == sorted(set(seen))


def test_resuming_leaves_the_given_checkpoint_alone(tmp_path: Path) -> None:
    config = toy_config(train={"save_every": 3})
    run = new_run(tmp_path, config)
    with pytest.raises(StopError):
        train(run, config, on_step=_stop_at(4))
    saved, again = checkpoint.load(run.last), checkpoint.load(run.last)
    train(run, config, resume=saved)
    assert_same(dict(saved), dict(again))


def _stop_at(step: int) -> Any:
    def stop(info: StepInfo) -> None:
        if info.step == step:
            raise StopError

    return stop


def test_resuming_a_finished_run_trains_and_evaluates_nothing(tmp_path: Path) -> None:
    config = toy_config()
    run = new_run(tmp_path, config)
    first = train(run, config, evaluate=noisy_score)
    before = run.last.read_bytes()

    def never(model: nn.Module) -> dict[str, float]:
        raise AssertionError("evaluated again")

    again = train(run, config, evaluate=never, resume=checkpoint.load(run.last))
    assert (again.metrics, again.steps, again.best) == (first.metrics, 6, first.best)
    assert run.last.read_bytes() == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda saved: saved.pop("optimizer"), "must hold 'optimizer'"),
        (lambda saved: saved.pop("ema"), "must hold 'ema'"),
        (lambda saved: saved["model"].pop("head.bias"), "1 missing .first: head.bias"),
        (lambda saved: saved["ema"].update(x=torch.zeros(1)), "1 left over .first: x"),
        (
            lambda saved: saved["model"].update({"head.bias": torch.zeros(1)}),
            r"head.bias \(1,\) for \(4,\)",
        ),
        (lambda saved: saved["optimizer"]["param_groups"].pop(), "training state must fit"),
        (lambda saved: saved["progress"].update(nonsense=1), "training state must fit"),
        (lambda saved: saved.update(kind="detector"), "kind 'backbone', got 'detector'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, spoil: Any, message: str
) -> None:
    config = toy_config(train={"steps": 1, "ema": 0.9})
    result = train(new_run(tmp_path / "a", config), config)
    saved = checkpoint.load(result.last)
    spoil(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        train(new_run(tmp_path / "b", config), config, resume=saved)
    assert caught.value.exit_code == 3


# -- one step


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_parts_of_any_size_equal_the_whole_batch(clip: float) -> None:
    batch = batch_of(0, 8)
    models = []
    for sizes in ([8], [2, 6], [1, 3, 4]):
        torch.manual_seed(0)
        model = Plain()
        optimizer = build_optimizer(model, OptimConfig(lr=1.0), 16)
        result = train_step(
            model,
            split(batch, sizes),
            optimizer,
            GradScaler("cpu", enabled=False),
            images=8,
            device=torch.device("cpu"),
            clip=clip,
        )
        models.append((model, result))
    for model, result in models[1:]:
        for name, weight in models[0][0].named_parameters():
            torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-5, atol=1e-7)
        for name, loss in models[0][1].losses.items():
            torch.testing.assert_close(result.losses[name], loss)
        torch.testing.assert_close(result.grad_norm, models[0][1].grad_norm)


def test_clipping_bounds_the_change() -> None:
    model = Plain()
    before = [p.detach().clone() for p in model.parameters()]
    optim = OptimConfig(lr=1.0, momentum=0.0, weight_decay=0.0)
    result = train_step(
        model,
        [batch_of(0)],
        build_optimizer(model, optim, 16),
        GradScaler("cpu", enabled=False),
        images=4,
        device=torch.device("cpu"),
        clip=1e-3,
    )
    change = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
    assert float(result.grad_norm) > 1e-3
    torch.testing.assert_close(
        torch.nn.utils.get_total_norm(change), torch.tensor(1e-3), rtol=1e-3, atol=0.0
    )


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_and_resumes(tmp_path: Path, amp: str) -> None:
    seen = []

    class Watching(Plain):
        def forward(self, batch: ClassificationBatch) -> dict[str, Tensor]:
            seen.append(self.head(torch.zeros(1, 8)).dtype)
            return super().forward(batch)

    config = toy_config(train={"amp": amp, "save_every": 3})
    whole = train(new_run(tmp_path / "whole", config), config, model=Watching)
    assert set(seen) == {torch.bfloat16 if amp == "bf16" else torch.float16}
    run = new_run(tmp_path / "parts", config)
    with pytest.raises(StopError):
        train(run, config, model=Plain, on_step=_stop_at(4))
    saved = checkpoint.load(run.last)
    assert ("scaler" in saved) == (amp == "fp16")
    resumed = train(run, config, model=Plain, resume=saved)
    assert_same(dict(checkpoint.load(whole.last)), dict(checkpoint.load(resumed.last)))


class Loud(Plain):
    """A loss so large that its fp16 gradients overflow under the first loss scale."""

    def __init__(self, loudness: float) -> None:
        super().__init__()
        self.loudness = loudness

    def forward(self, batch: ClassificationBatch) -> dict[str, Tensor]:
        return {"class": super().forward(batch)["class"] * self.loudness}


def test_fp16_overflow_skips_the_step_and_lowers_the_scale(tmp_path: Path) -> None:
    config = toy_config(train={"amp": "fp16", "steps": 1})
    model = Loud(100.0)
    before = model.head.weight.detach().clone()
    result = train(new_run(tmp_path, config), config, model=lambda: model)
    assert torch.equal(model.head.weight, before)
    assert checkpoint.load(result.last)["scaler"]["scale"] == 2.0**15


def test_fp16_that_overflows_at_every_scale_is_an_error(tmp_path: Path) -> None:
    config = toy_config(train={"amp": "fp16", "steps": 40})
    with pytest.raises(NonFiniteError, match="training step 17: .*gradient norm of (inf|nan)"):
        train(new_run(tmp_path, config), config, model=lambda: Loud(1e8))


# -- learning rate and length


def test_the_factor_follows_the_published_schedule() -> None:
    optim = OptimConfig(warmup_steps=500)  # 180k steps, a tenth at 120k and at 160k
    total = Length(steps=180_000)
    values = {
        step: factor(optim, total.progress(step, 0.0), step)
        for step in (0, 250, 500, 119_999, 120_000, 159_999, 160_000)
    }
    expected = {0: 1 / 3, 250: 2 / 3, 500: 1.0, 119_999: 1.0, 120_000: 0.1, 159_999: 0.1}
    assert values == pytest.approx({**expected, 160_000: 0.01})


def test_linear_falls_to_zero_by_the_same_amount_each_step() -> None:
    optim = OptimConfig(schedule="linear", warmup_steps=0)
    found = [factor(optim, step / 8, step) for step in range(9)]
    assert found == [1 - step / 8 for step in range(9)]


def test_cosine_ends_at_zero() -> None:
    optim = OptimConfig(schedule="cosine", warmup_steps=0)
    values = [factor(optim, progress, 1) for progress in (0.0, 0.25, 0.5, 1.0, 1.1)]
    assert values == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.0, 0.0])


def test_warm_up_takes_a_tenth_of_a_short_schedule_at_most() -> None:
    optim = OptimConfig(warmup_steps=500, warmup_factor=0.2, schedule="cosine")
    by_steps, by_time = Length(steps=100), Length(seconds=1000.0)
    flat = OptimConfig(warmup_steps=0, schedule="cosine")
    for step, share in ((0, 0.2), (5, 0.6), (10, 1.0), (50, 1.0)):
        for progress in (by_steps.progress(step, 0.0), by_time.progress(step, 10.0 * step)):
            expected = share * factor(flat, progress, step)
            assert factor(optim, progress, step) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"steps": 7}, Length(steps=7)),
        ({"epochs": 2.5}, Length(steps=9)),
        ({"epochs": 0.01}, Length(steps=1)),
        ({"minutes": 1.5}, Length(seconds=90.0)),
    ],
)
def test_the_length_is_what_is_given(given: dict[str, Any], expected: Length) -> None:
    assert length(TrainConfig(**given), 3.6) == expected


def test_a_run_without_a_length_is_refused(tmp_path: Path) -> None:
    config = toy_config(train={"steps": 0})
    with pytest.raises(ConfigError, match="one of steps, epochs and minutes must be set"):
        train(new_run(tmp_path, config), config)


def test_the_rate_is_stated_per_sixteen_images_and_logged(tmp_path: Path) -> None:
    config = toy_config(optim={"lr": 0.8, "warmup_steps": 0, "warmup_factor": 1.0})
    run = new_run(tmp_path, config)
    train(run, config)
    rates = {line["step"]: line["lr"] for line in run.read_metrics()}
    # 4 of 16 images; step 5 starts at 4/6, the first milestone, step 6 before the second
    assert rates == pytest.approx({1: 0.2, 2: 0.2, 4: 0.2, 6: 0.02})


def test_minutes_are_wall_time_and_survive_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(
        "detkit.engine.train.time", SimpleNamespace(monotonic=lambda: float(next(clock)))
    )
    config = toy_config(train={"minutes": 1.0, "save_every": 1, "log_every": 1})
    infos: list[StepInfo] = []
    run = new_run(tmp_path, config)
    result = train(run, config, on_step=infos.append)
    saved = checkpoint.load(result.last)
    progress = [info.progress for info in infos]
    assert progress == sorted(progress) and progress[-1] == 1.0 > progress[-2]
    assert saved["progress"]["elapsed_seconds"] >= 60
    assert infos[0].total is None and 0 < infos[0].eta_seconds < 60 and infos[-1].eta_seconds == 0
    rates = [info.lr for info in infos[len(infos) // 5 :]]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.02 * rates[0]

    half = checkpoint.load(result.last)
    half["progress"]["elapsed_seconds"] = 57.0
    again = train(new_run(tmp_path / "b", config), config, resume=half)
    assert saved["progress"]["step"] < again.steps < saved["progress"]["step"] + 4


# -- optimiser and average


def _groups(model: nn.Module, **optim: Any) -> dict[str, tuple[float, float]]:
    optimizer = build_optimizer(model, OptimConfig(lr=1.6, **optim), 4)
    set_factor(optimizer, 0.4, 0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_norms_and_biases_have_their_own_decay_and_rate() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1))
    model[2].weight.requires_grad_(False)
    found = _groups(model, weight_decay=0.1, norm_decay=False, bias_lr_factor=2.0)
    assert found == {
        "0.weight": (0.2, 0.1),
        "0.bias": (0.4, 0.0),
        "1.weight": (0.2, 0.0),
        "1.bias": (0.2, 0.0),
        "2.bias": (0.4, 0.0),
    }
    assert set(_groups(model, weight_decay=0.1).values()) == {(0.2, 0.1)}


def test_decay_of_weights_and_norms_but_not_of_biases() -> None:
    """DetNAS's fine-tuning: the scales of norms decay, their shifts and all biases do not."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    found = _groups(model, weight_decay=0.1, bias_decay=False, bias_lr_factor=2.0)
    assert found == {
        "0.weight": (0.2, 0.1),
        "0.bias": (0.4, 0.0),
        "1.weight": (0.2, 0.1),
        "1.bias": (0.2, 0.0),
    }


def test_a_shared_weight_is_trained_once_and_a_frozen_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert len(_groups(model)) == 3
    with pytest.raises(ConfigError, match="at least one parameter must be trainable"):
        build_optimizer(model.requires_grad_(False), OptimConfig(), 4)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimiser_is_the_one_named(name: str) -> None:
    optimizer = build_optimizer(Plain(), OptimConfig(name=name, momentum=0.8), 16)
    assert type(optimizer).__name__.lower() == name
    group = optimizer.param_groups[0]
    assert group["betas" if name == "adamw" else "momentum"] == (
        (0.8, 0.999) if name == "adamw" else 0.8
    )


def test_the_average_is_the_recursion_over_weights_and_buffers() -> None:
    model = Toy()
    ema = Ema(model, 0.5)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step, decay in enumerate([0.1, 2 / 11, 0.25, 4 / 13]):
        assert ema.decay_at(step) == pytest.approx(decay)
        model(batch_of(step))  # moves the batch-norm statistics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        ema.update(model, step)
        for name, tensor in model.state_dict().items():
            moved = decay * expected[name] + (1 - decay) * tensor
            expected[name] = moved if tensor.is_floating_point() else tensor.clone()
    assert ema.decay_at(1000) == 0.5
    assert expected["norm.num_batches_tracked"] == 4
    for name, tensor in expected.items():
        torch.testing.assert_close(ema.state[name], tensor)


def test_applying_the_average_gives_the_own_weights_back() -> None:
    model = Toy()
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model.conv.weight.mul_(3)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StopError), ema.applied(model):
        assert_same(dict(model.state_dict()), ema.state)
        raise StopError
    assert_same(dict(model.state_dict()), own)
    assert not torch.equal(ema.state["conv.weight"], own["conv.weight"])


# -- evaluation, best and early stop


def scores(*values: float | None) -> Any:
    left = iter(values)
    return lambda model: {"top1": next(left), "other": 1.0}


def test_best_is_kept_and_patience_stops(tmp_path: Path) -> None:
    config = toy_config(train={"steps": 50}, eval={"every": 2, "patience": 2})
    run = new_run(tmp_path, config)
    values = (0.1, 0.5, 0.5, float("nan"), 0.9)
    result = train(run, config, evaluate=scores(*values))
    assert result.steps == 8 and result.stopped_early
    assert result.metrics == {"top1": 0.5, "other": 1.0}
    assert result.last_metrics == {"top1": None, "other": 1.0}
    assert result.best == run.best and checkpoint.load(run.best)["progress"]["best_step"] == 4
    progress = checkpoint.load(run.last)["progress"]
    assert (progress["step"], progress["evaluations_without_gain"]) == (8, 2)
    assert progress["images_seen"] == 32
    evaluated = [line for line in run.read_metrics() if line["kind"] == "eval"]
    assert [(line["step"], line["best"]) for line in evaluated] == [
        (2, True),
        (4, True),
        (6, False),
        (8, False),
    ]


def test_without_a_defined_metric_last_is_the_best_there_is(tmp_path: Path) -> None:
    config = toy_config()
    run = new_run(tmp_path, config)
    result = train(run, config, evaluate=scores(None))
    assert result.best == run.last and not run.best.exists()
    assert not result.stopped_early


def test_an_unknown_metric_names_the_known_ones_and_loses_nothing(tmp_path: Path) -> None:
    config = toy_config(eval={"metric": "AP"})
    run = new_run(tmp_path, config)
    with pytest.raises(ConfigError, match="one of top1, other, got 'AP'"):
        train(run, config, evaluate=scores(0.5))
    assert checkpoint.load(run.last)["progress"]["step"] == 6


def test_evaluation_sees_the_deployed_weights_and_disturbs_nothing(tmp_path: Path) -> None:
    config = toy_config(train={"ema": 0.99}, eval={"every": 2})
    plain = train(new_run(tmp_path / "plain", config), config)
    seen: list[dict[str, Tensor]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"top1": float(len(seen))}

    result = train(new_run(tmp_path / "looked", config), config, evaluate=evaluate)
    assert_same(checkpoint.load(plain.last)["model"], checkpoint.load(result.last)["model"])
    best = checkpoint.load(result.best)
    assert_same(seen[-1], checkpoint.deployed(best))
    assert not torch.equal(best["model"]["head.weight"], best["ema"]["head.weight"])
    assert "optimizer" not in best and "rng" not in best


# -- what a run leaves


def test_the_log_tells_what_happened(tmp_path: Path) -> None:
    config = toy_config()
    run = new_run(tmp_path, config)
    infos: list[StepInfo] = []
    train(run, config, evaluate=noisy_score, on_step=infos.append)
    assert [(info.step, info.total) for info in infos] == [(i, 6) for i in range(1, 7)]
    lines = run.read_metrics()
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 4, 6]
    assert lines[-2]["losses"] == infos[-1].losses
    assert lines[-2]["loss"] == pytest.approx(sum(infos[-1].losses.values()))
    text = run.log.read_text()
    assert "step 6/6: loss" in text and "step 6: top1" in text


def test_logged_losses_are_means_over_the_steps_between(tmp_path: Path) -> None:
    every = toy_config(train={"log_every": 1})
    one = new_run(tmp_path / "one", every)
    train(one, every, model=Plain)
    loss = {line["step"]: line["losses"]["class"] for line in one.read_metrics()}
    config = toy_config(train={"log_every": 3})
    three = new_run(tmp_path / "three", config)
    train(three, config, model=Plain)
    means = {line["step"]: line["losses"]["class"] for line in three.read_metrics()}
    expected = {1: loss[1], 3: (loss[2] + loss[3]) / 2, 6: (loss[4] + loss[5] + loss[6]) / 3}
    assert means == pytest.approx(expected)


def test_same_seed_same_run_and_another_seed_another(tmp_path: Path) -> None:
    weights = []
    for i, seed in enumerate([1, 1, 2]):
        config = toy_config(train={"seed": seed})
        result = train(new_run(tmp_path / str(i), config), config)
        weights.append(checkpoint.load(result.last)["model"]["head.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# -- ways to fail


def spoilt(step: int, where: str) -> Any:
    def source(start: int) -> Iterator[list[ClassificationBatch]]:
        for i, parts in enumerate(batches(start), start):
            if i == step and where == "image":
                parts[0].images[1, 0, 0, 0] = float("nan")
            yield parts

    return source


class BadGradient(Plain):
    """Zero loss with an infinite slope from the fourth step on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, batch: ClassificationBatch) -> dict[str, Tensor]:
        losses = super().forward(batch)
        self.calls += 1
        if self.calls == 4:
            losses["root"] = (self.head.weight * 0).abs().sqrt().sum()
        return losses


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_and_spoils_nothing(
    tmp_path: Path, fault: str
) -> None:
    config = toy_config(train={"save_every": 2, "ema": 0.9})
    run = new_run(tmp_path, config)
    saved: list[bytes] = []

    def on_step(info: StepInfo) -> None:
        if info.step == 3:
            saved.append(run.last.read_bytes())

    model = BadGradient() if fault == "gradient" else Plain()
    source = spoilt(3, "image") if fault == "loss" else batches
    with pytest.raises(NonFiniteError) as caught:
        train(run, config, model=lambda: model, source=source, on_step=on_step)
    assert caught.value.exit_code == 6
    message = str(caught.value)
    assert message.startswith("training step 4: losses and gradients must be finite, got ")
    assert ("class=nan" if fault == "loss" else "gradient norm of nan") in message
    assert all(f"step3-{i}.png" in message for i in range(4)) and "step2" not in message
    assert run.last.read_bytes() == saved[0]
    assert checkpoint.load(run.last)["progress"]["step"] == 2
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert message in run.log.read_text()


def test_batches_that_end_are_an_error(tmp_path: Path) -> None:
    config = toy_config()
    with pytest.raises(DataError, match="must not end, got none for step 2"):
        train(
            new_run(tmp_path, config),
            config,
            source=lambda start: iter([[batch_of(0)], [batch_of(1)]]),
        )


def test_a_batch_smaller_than_its_parts_is_refused(tmp_path: Path) -> None:
    config = toy_config(train={"accumulate": 5})
    with pytest.raises(ConfigError, match=r"train.accumulate \* processes = 5 \* 1, got 4"):
        train(new_run(tmp_path, config), config)


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    config = toy_config()
    run = new_run(tmp_path, config)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="last.pth: must be writable, got No space left"):
        train(run, config)
    assert not list(tmp_path.glob("*.pth")) and not list(tmp_path.glob(".*"))


# -- ending from outside, each in a process of its own


def start(scenario: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), scenario, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(process: subprocess.Popen[str], *numbers: int) -> tuple[int, str]:
    """Send signals once the process says it is running; its exit code and last words."""
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n", process.communicate()[1]
    for number in numbers:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_saves_and_resumes_to_the_same_end(
    tmp_path: Path, number: int, code: int
) -> None:
    returned, errors = stop(start("slow", tmp_path / "run"), number)
    assert returned == code, errors
    assert f"stopped by {signal.Signals(number).name} after step" in errors
    run = RunFolder(tmp_path / "run")
    saved = checkpoint.load(run.last)
    assert 3 <= saved["progress"]["step"] < 40
    config = run.config()
    resumed = train(run, config, resume=saved)
    whole = train(new_run(tmp_path / "whole", config), config)
    assert_same(dict(checkpoint.load(whole.last)), dict(checkpoint.load(resumed.last)))


def test_a_signal_breaks_off_an_evaluation(tmp_path: Path) -> None:
    returned, errors = stop(start("evaluating", tmp_path), signal.SIGTERM)
    assert returned == 143, errors
    progress = checkpoint.load(tmp_path / "last.pth")["progress"]
    assert (progress["step"], progress["evaluated_step"]) == (2, 0)  # it is due again on resuming


def test_a_second_interrupt_aborts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back(tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    config = toy_config()
    train(new_run(tmp_path, config), config)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_run_without_steps_ends_with_code_7(tmp_path: Path) -> None:
    process = start("stalled", tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 7, errors
    assert "train.stall_seconds=1, got none since step" in errors
    assert not (tmp_path / "last.pth").exists()


def test_a_hang_that_no_signal_reaches_ends_with_code_7_too(tmp_path: Path) -> None:
    process = start("deadlocked", tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 7, errors
    assert "train.stall_seconds=0.3" in errors


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_on_a_gpu_learns_and_stops_on_nan(tmp_path: Path, amp: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config = toy_config(train={"amp": amp, "steps": 30, "ema": 0.9, "save_every": 2})
    shared: dict[str, Any] = {
        "steps_per_epoch": 4,
        "kind": "backbone",
        "device": "cuda",
        "categories": CATEGORIES,
    }
    run = new_run(tmp_path / "good", config)
    fit(Plain(), lambda start: iter([[batch_of(0)]] * 30), config, run=run, **shared)
    losses = [line["loss"] for line in run.read_metrics()]
    assert losses[-1] < losses[0]
    bad = new_run(tmp_path / "bad", config)
    with pytest.raises(NonFiniteError, match="training step 4: .*step3-0.png"):
        fit(Plain(), spoilt(3, "image"), config, run=bad, **shared)
    assert checkpoint.load(bad.last)["progress"]["step"] == 2
