"""What ``--dry-run`` of trainings and searches tells and refuses, and that it writes nothing."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image

from detkit import config as configs
from detkit.cli.main import run
from detkit.config import OptimConfig
from detkit.engine.schedule import Length, factor, main_points

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--set", "data.short_side=96", "--set", "data.long_side=128", "--set", "data.multi_scale=[]"),
    *("--set", "data.workers=0", "--batch-size", "2"),
]

PRETRAIN = ["pretrain", "--data", "crops", "--set", "data.workers=0", "--batch-size", "4"]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    """Exit code and the one JSON object on stdout."""
    capsys.readouterr()
    code = run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all below a folder."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, the run of a backbone, and a detector's of five steps."""
    folder = tmp_path_factory.mktemp("rehearsal")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["data", "synth", "shapes", "--train", "8", "--val", "4", "--size", "128"]) == 0
        for number in range(16):
            file = folder / "crops" / ("train", "val")[number % 2] / "ab"[number // 8]
            file.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (number, 100, 50)).save(file / f"{number}.png")
        assert run([*PRETRAIN, "--steps", "1", "--out", "backbone"]) == 0
        assert run(["finetune", *SMALL, "--data", "shapes", "--steps", "5", "--out", "whole"]) == 0
    return folder


@pytest.fixture
def there(road: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(road)
    return road


# -- a training


def test_a_dry_run_tells_what_the_run_then_takes(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes, rates and losses against those of the run itself; nothing in the folder changes."""
    before = state(there)
    code, found = call(capsys, "finetune", *SMALL, "--data", "shapes", "--steps", "5", "--dry-run")
    assert code == 0 and state(there) == before
    assert found["splits"]["train"]["images"] == 8 and found["splits"]["val"]["images"] == 4
    annotations = json.loads(Path("shapes/annotations/instances_train.json").read_text())
    assert found["splits"]["train"]["boxes"] == len(annotations["annotations"])
    assert sum(found["splits"]["train"]["classes"].values()) == len(annotations["annotations"])
    stored = torch.load("whole/last.pth", weights_only=True)
    assert found["params"] == sum(
        value.numel()
        for key, value in stored["model"].items()
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )
    for name in ("last", "best"):
        taken = Path(f"whole/{name}.pth").stat().st_size
        assert found["disk"][name] == pytest.approx(taken, rel=0.05)
    lines = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    rates = found["learning_rate"]
    assert rates["used"] == rates["for_16_images"] * 2 / 16
    assert rates["points"][0]["lr"] == pytest.approx(lines[0]["lr"])
    assert found["losses"].keys() == lines[0]["losses"].keys()
    assert found["steps"]["total"] == 5 and found["steps"]["exact"]
    assert found["eta"]["evaluations"] == 1
    parts = found["eta"]["training_seconds"] + found["eta"]["evaluation_seconds"]
    assert found["eta"]["seconds"] == pytest.approx(parts)
    assert found["memory"]["process"] > found["params"] * 4
    assert found["config"] == tomllib.loads(Path("whole/config.toml").read_text())


def test_its_steps_are_those_of_the_run(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Same seed, same batches, same optimiser: the same losses."""
    line = ["finetune", *SMALL, "--data", "shapes", "--steps", "2", "--set", "train.log_every=1"]
    code, found = call(capsys, *line, "--dry-run")
    assert code == 0
    assert run([*line, "--out", "two"]) == 0
    lines = [json.loads(line) for line in Path("two/metrics.jsonl").read_text().splitlines()]
    steps = [line["losses"] for line in lines if line["kind"] == "train"]
    mean = {name: (steps[0][name] + steps[1][name]) / 2 for name in steps[0]}
    assert found["losses"] == pytest.approx(mean, rel=1e-6)


def test_a_classifier_and_its_resumption(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*PRETRAIN, "--out", "backbone"]
    before = state(there)
    code, found = call(capsys, *line, "--steps", "3", "--resume", "auto", "--dry-run")
    assert code == 0 and state(there) == before
    assert found["continues"] == "backbone" and found["steps"]["done_before"] == 1
    assert found["splits"]["train"]["boxes"] is None
    training = 2 * found["steps"]["seconds"]  # two of three steps are left
    assert found["eta"]["training_seconds"] == pytest.approx(training)


def test_a_dry_run_refuses_what_the_run_would(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that do not fit, another architecture, a folder with a run, a batch that is too
    small.
    """
    stored = torch.load("backbone/last.pth", weights_only=True)
    for part in {"model", "ema"} & stored.keys():
        del stored[part][next(key for key in stored[part] if key.endswith("weight"))]
    torch.save(stored, "holes.pth")
    base = ["finetune", *SMALL, "--data", "shapes", "--steps", "2", "--dry-run"]
    for more, code, what in [
        (["--init-from", "holes.pth"], 3, "missing"),
        (["--init-from", "backbone/last.pth", "--backbone", "detnet59-tiny"], 3, "model.backbone"),
        (["--out", "whole"], 2, "holds a trained run"),
        (["--set", "train.accumulate=3"], 2, "train.batch_size"),
    ]:
        before = state(there)
        found, answer = call(capsys, *base, *more)
        assert found == code and what in answer["error"], answer
        assert state(there) == before


# -- where settings come from


def test_each_setting_tells_its_origin(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.toml").write_text("[train]\nclip = 5.0\nema = 0.5\n[optim]\nlr = 0.1\n")
    line = ["finetune", *SMALL, "--data", "shapes", "--config", "own.toml", "--steps", "2"]
    line += ["--init-from", "backbone/best.pth", "--seed", "3", "--set", "train.ema=0.25"]
    code, found = call(capsys, *line, "--recipe", "tiny/frcnn-fpn", "--dry-run")
    assert code == 0
    origins = found["origins"]
    assert {k: v.keys() for k, v in origins.items()} == {
        k: v.keys() for k, v in found["config"].items()
    }
    for key, origin in {
        "train.clip": "config file own.toml",
        "train.ema": "--set",
        "train.steps": "--steps",
        "train.minutes": "--steps",
        "train.seed": "--seed",
        "train.batch_size": "--batch-size",
        "data.path": "--data",
        "data.workers": "--set",
        "model.backbone": "checkpoint backbone/best.pth",
        "model.norm": "recipe tiny/frcnn-fpn",
        "optim.momentum": "default",
    }.items():
        table, name = key.split(".")
        assert origins[table][name] == origin, key
    run_ = call(capsys, "finetune", "--resume", "whole", "--steps", "7", "--dry-run")[1]
    assert run_["origins"]["data"]["path"] == "run whole"
    assert run_["origins"]["train"]["steps"] == "--steps"


def test_set_goes_before_flags_and_says_so(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*PRETRAIN, "--seed", "3", "--set", "train.seed=4", "--set", "train.batch_size=2"]
    assert run([*line, "--steps", "2", "--dry-run"]) == 0
    shown = capsys.readouterr()
    printed = tomllib.loads(shown.out)  # with its comments it is a config file
    assert printed["train"]["seed"] == 4 and printed["train"]["batch_size"] == 2
    assert "--set train.seed=4 goes before --seed 3" in shown.err
    assert "--set train.batch_size=2 goes before --batch-size 4" in shown.err
    assert any(
        text.startswith("batch_size = 2 ") and text.endswith("# --set")
        for text in shown.out.splitlines()
    )


def test_a_detector_has_defaults_of_its_own() -> None:
    layers = [configs.Layer({"model": {"detector": "light-head"}}, "--detector")]
    found = configs.origins(layers)
    assert found["box"]["ohem"] == "default of light-head"
    assert found["box"]["aligned"] == "default"


# -- the schedule


@pytest.mark.parametrize("schedule", ["step", "cosine", "linear"])
def test_main_points_lie_on_the_schedule(schedule: str) -> None:
    optim = OptimConfig(schedule=schedule, warmup_steps=20)
    points = main_points(optim, Length(steps=900))
    for point in points:
        assert point.factor == factor(optim, point.step / 900, point.step)
    assert [p.step for p in points if p.what == "warm-up ends"] == [20]
    if schedule == "step":
        assert [p.factor for p in points[-3:]] == pytest.approx([0.1, 0.01, 0.01])
    timed = main_points(optim, Length(seconds=60))
    assert [p.what for p in timed] == [p.what for p in points]
    assert timed[1].share == 0.1 and timed[0].factor == pytest.approx(1 / 3)


# -- a search


def test_a_search_rehearses_two_networks(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*PRETRAIN, "--backbone", "detnas-supernet-tiny", "--steps", "1", "--out", "net"]
    assert run([*line, "--set", "nas.eval_paths=0"]) == 0
    before = state(there)
    line = ["search", "net/last.pth", "--fitness", "classification", "--max-macs", "25M"]
    line += ["--set", "search.calibration_steps=7", "--dry-run"]
    code, found = call(capsys, *line, "--population", "3", "--generations", "2")
    assert code == 0 and state(there) == before
    assert found["evaluations"] == 6 and found["metric"] == "top1" and found["classes"] == 2
    each = 7 * found["measured"]["seconds_per_calibration_batch"]
    each += found["search_images"] * found["measured"]["seconds_per_image"]
    assert found["eta"]["seconds"] == pytest.approx(6 * each)
    assert found["origins"]["search"]["max_macs"] == "--max-macs"
    assert found["origins"]["search"]["calibration_steps"] == "--set"
    assert found["origins"]["data"]["path"] == "supernet net/last.pth"


# -- the guide


def test_the_guide_names_every_key(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And its first command runs, on the small net."""
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("detkit finetune"))
    code, found = call(capsys, *shlex.split(line)[1:], *SMALL)
    assert code == 0
    rows = [row for row in text.splitlines() if row.startswith("| `")]
    named = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert found.keys() <= named
    for part in ("steps", "memory", "learning_rate", "eta", "disk"):
        assert found[part].keys() <= named, part
