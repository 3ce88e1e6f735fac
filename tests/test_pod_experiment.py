"""The experiment on learnt scales: end to end at a toy's size, and its arithmetic."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import ModuleType

import pytest

from detkit.errors import ConfigError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TOY = {"seeds": 2, "epochs": 1.0, "images": 4, "val": 2, "size": 64}
TOY |= {"scale_images": 2, "pretrain_steps": 1}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pod_experiment

    return pod_experiment


@pytest.mark.slow
def test_a_killed_experiment_loses_one_training(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.DETECTOR, "train", {"batch_size": 4})
    from detkit.data import synthetic

    monkeypatch.setattr(synthetic, "CROPS", {"train": 32, "val": 8})
    experiment = script.Experiment(**TOY)
    records = script.run(experiment, tmp_path)
    assert [(r["seed"], r["arm"]) for r in records] == [(s, a) for s in (0, 1) for a in script.ARMS]
    assert [r["steps"] for r in records[:6]] == [1, 2, 1, 1, 1, 1]
    learnt, transferred = records[2], records[4]
    assert list(learnt["scales"]) == [layer["label"] for layer in transferred["layers"]]
    # The arms differ in their weights alone, not in how their layers are split.
    assert records[3]["layers"] == transferred["layers"]

    file = tmp_path / "records.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote the last one
    trained = []
    train = script.api.train
    monkeypatch.setattr(
        script.api, "train", lambda *a, **k: trained.append(k["out"].name) or train(*a, **k)
    )
    again = script.run(experiment, tmp_path)
    assert trained == ["base-1+1-1"]
    timeless = [{k: v for k, v in r.items() if k != "seconds"} for r in (*records, *again)]
    assert timeless[: len(records)] == timeless[len(records) :]
    assert len(file.read_text().splitlines()) == len(records)

    found = script.summary(again)
    assert json.loads(json.dumps(found)) == found
    assert len(list(script.table(found))) == 1 + 6 + 6 + 12
    with pytest.raises(ConfigError, match="other epochs"):
        script.run(script.Experiment(**{**TOY, "epochs": 2.0}), tmp_path)


def test_differences_are_paired_by_seed(script: ModuleType) -> None:
    """Three seeds; the interval by the textbook: mean ± 4.303 s / sqrt(3)."""
    scores = {"base-1x": (0.2, 0.3, 0.4), "fd-1x": (0.21, 0.33, 0.42)}
    records = []
    for seed in range(3):
        for arm in script.ARMS:
            score = scores.get(arm, (0.1, 0.1, 0.1))[seed]
            metrics = dict.fromkeys(script.METRICS, score) | {"APl": None}
            scale = {"mean": [1.0 + seed, 2.0], "std": [0.1, 0.1], "std_over_mean": [0.1, 0.05]}
            record = {"arm": arm, "seed": seed, "metrics": metrics, "split": 3}
            records.append(record | {"scales": {"R31": scale}})
    found = script.summary(records)
    assert found["arms"]["base-1x"]["AP"] == pytest.approx({"mean": 0.3, "std": 0.1})
    assert found["arms"]["base-1x"]["APl"] is None
    paired = found["differences"]["fd-1x - base-1x"]["AP"]
    each = [0.01, 0.03, 0.02]
    half = 4.303 * statistics.stdev(each) / 3**0.5
    assert paired.pop("each") == pytest.approx(each)
    assert paired == pytest.approx(
        {"mean": 0.02, "std": 0.01, "low": 0.02 - half, "high": 0.02 + half}
    )
    assert found["scales"]["R31"]["mean"] == [2.0, 2.0]
    assert found["scales"]["R31"]["std_over_seeds"] == [1.0, 0.0]
    assert any("fd-1x - base-1x" in line and "+2.0 ± 1.0" in line for line in script.table(found))


def test_one_seed_is_no_experiment(script: ModuleType) -> None:
    with pytest.raises(ConfigError, match="in 2..10, got 1"):
        script.Experiment(seeds=1)
