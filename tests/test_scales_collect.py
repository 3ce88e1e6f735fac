"""Statistics of scales: against two-pass formulas, merged, per image; the hash of weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scale_nets import ThirdPartyNet, in_body
from torch import nn

from detkit.errors import CheckpointError, NonFiniteError
from detkit.scales import GlobalScaleConv2d, ScaleStatistics, insert, recording, weights_hash
from detkit.scales.collect import Running

numbers = st.floats(0.01, 20.0)
pairs = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30)


def running(values: list[tuple[float, float]]) -> Running:
    result = Running()
    for value in values:
        result.add(value)
    return result


@given(pairs, pairs)
def test_statistics_of_two_processes(first: list, second: list) -> None:
    """Welford and its merge equal the two-pass population statistics, whoever saw what."""
    merged = running(first)
    merged += running(second)
    everything = torch.tensor(first + second, dtype=torch.float64)
    for found in (merged, running(first + second)):
        assert found.count == len(everything)
        assert found.mean == pytest.approx(everything.mean(0).tolist(), rel=1e-12)
        std = everything.std(0, correction=0).tolist()
        assert found.std == pytest.approx(std, rel=1e-6, abs=1e-7)
        assert found.low == tuple(everything.amin(0).tolist())
        assert found.high == tuple(everything.amax(0).tolist())


def test_no_cancellation() -> None:
    """Sums of squares would lose a deviation of 1e-6 beside a mean of 1e4."""
    values = [(1e4 + 1e-6 * (i % 2), 1.0) for i in range(1000)]
    assert running(values).std == pytest.approx((5e-7, 0.0), rel=1e-3)


def test_an_empty_side_changes_nothing() -> None:
    seen = running([(1.0, 2.0), (3.0, 4.0)])
    before = seen.to_plain()
    seen.merge(Running())
    assert seen.to_plain() == before
    other = Running()
    other.merge(seen)
    assert other.to_plain() == before
    with pytest.raises(ValueError, match="seen"):
        Running().to_plain()


def test_rois_are_averaged_within_an_image_first() -> None:
    """Two images of 1 and 3 RoIs count once each, as float64."""
    stats = ScaleStatistics(["a", "b"])
    stats.add({"a": torch.tensor([[1.0, 2.0]]), "b": torch.zeros(0, 2)})
    stats.add({"a": torch.tensor([[2.0, 4.0], [3.0, 4.0], [4.0, 4.0]])})
    with pytest.raises(CheckpointError, match="none for b"):
        stats.to_plain()
    other = ScaleStatistics(["a", "b"])
    other.add({"b": torch.tensor([[0.1, 0.2]])})
    stats.merge(other)
    plain = stats.to_plain()
    assert plain["a"] == {
        "mean": [2.0, 3.0],
        "std": [1.0, 1.0],
        "min": [1.0, 2.0],
        "max": [3.0, 4.0],
        "count": 2,
    }
    assert plain["b"]["count"] == 1
    with pytest.raises(ValueError, match="learners must be"):
        stats.merge(ScaleStatistics(["a"]))
    with pytest.raises(NonFiniteError, match="a: scales"):
        stats.add({"a": torch.tensor([[math.nan, 1.0]])})


def test_scales_not_predictions_are_averaged() -> None:
    """The mean of exp(r) is not exp of the mean r."""
    model = nn.Sequential(GlobalScaleConv2d(nn.Conv2d(1, 1, 3, padding=1))).eval()
    nn.init.ones_(model[0].scale.weight)
    stats = ScaleStatistics(["0"])
    with recording(model) as recorder, torch.no_grad():
        for value in (-2.0, 1.0):
            model(torch.full((1, 1, 5, 5), value))
            stats.add(recorder.take())
    mean = (math.exp(-2) + 2) / 2
    assert stats.to_plain()["0"]["mean"] == pytest.approx([mean, mean])


def test_recording_keeps_every_call_of_an_image() -> None:
    """A layer used twice per image gives two rows; outside the block nothing is kept."""
    model = ThirdPartyNet().eval()
    insert(model, in_body)
    x = torch.randn(1, 3, 20, 20)
    with recording(model) as recorder, torch.no_grad():
        model(x)
        model(x)
        rows = recorder.take()
        assert recorder.take() == {}
        model(x)
    assert {path: len(r) for path, r in rows.items()} == {f"body.{i}.conv": 2 for i in range(5)}
    assert list(rows) == [f"body.{i}.conv" for i in range(5)]
    model(x)
    assert {len(r) for r in recorder.take().values()} == {1}, "the last call was outside"


def test_hash_of_weights() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.zeros(0)}
    expected = weights_hash(state)
    assert weights_hash(dict(reversed(state.items()))) == expected
    strided = state | {"a": state["a"].T.contiguous().T}
    assert weights_hash(strided) == expected
    for changed in (
        {"a": state["a"] + 1e-6},
        {"a": state["a"].reshape(3, 2)},
        {"a": state["a"].double()},
        {"b": torch.tensor(4)},
        {"d": torch.zeros(1)},
    ):
        assert weights_hash(state | changed) != expected
    assert weights_hash({"x": torch.ones(3, dtype=torch.bfloat16)}) != weights_hash(
        {"x": torch.ones(3, dtype=torch.float16)}
    )
