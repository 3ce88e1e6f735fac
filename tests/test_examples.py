"""Each example runs as its first lines say, with a few steps."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import script
from torch import nn

import detkit
from detkit.data import synthetic
from detkit.engine import checkpoint as checkpoints
from detkit.models import DETECTORS
from detkit.scales import GlobalScaleConv2d

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_own_backbone_learns_under_one_head() -> None:
    losses = script("examples/own_backbone.py").main("retinanet", 6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("detector", sorted(DETECTORS.keys() - {"retinanet"}))
def test_own_backbone_runs_under_every_head(detector: str) -> None:
    (loss,) = script("examples/own_backbone.py").main(detector, 1)
    assert 0 < loss < 100


def test_scales_grow_across_and_leave_plain_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    plain = script("examples/scales_in_any_model.py").main(60)
    first = capsys.readouterr().out.splitlines()[0]
    down, across = (float(v) for v in first.split("scale ")[1].split(" becomes")[0].split(" x "))
    assert across > 1.3 > down
    assert not any(isinstance(m, GlobalScaleConv2d) for m in plain.modules())
    kinds = {type(m).__module__.split(".")[0] for m in plain.modules() if not list(m.children())}
    assert kinds == {"torch"}
    assert plain(torch.zeros(1, 1, 32, 32)).shape == (1, 1, 32, 32)
    assert isinstance(plain, nn.Module)


def test_own_dataset_trains_a_detector_that_predicts() -> None:
    module = script("examples/own_dataset.py")
    best = module.main(3, "run")
    model = detkit.load(best)
    assert model.categories.names == ("upright", "lying")
    image, boxes, _ = module.Bars()[7]
    inside = image[boxes[0][1] : boxes[0][3], boxes[0][0] : boxes[0][2]]
    assert inside.min() >= 150 > image.mean()
    assert model.predict(image, score=0.0).size == image.shape[:2]


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_the_launch_script_trains_in_processes(nodes: str) -> None:
    """On CPU processes: two of one machine, or one each of two "machines", which meet by name."""
    synthetic.write("shapes", images_train=2, images_val=2, size=64)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"NODES": nodes, "PORT": port, "PROCESSES": "2" if nodes == "1" else "1"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env["PYTHONPATH"] = str(EXAMPLES.parent)
    settings = ["data.workers=0", "data.short_side=64", "data.long_side=64", "data.multi_scale=[]"]
    line = [str(EXAMPLES / "multi_gpu.sh"), "--data", "shapes", "--recipe", "tiny/frcnn-fpn"]
    line += ["--steps", "1", "--batch-size", "2", "--device", "cpu", "--out", "run"]
    line += [word for setting in settings for word in ("--set", setting)]
    processes = [
        subprocess.Popen(line, env=env | {"NODE": str(node)}) for node in range(int(nodes))
    ]
    assert [process.wait() for process in processes] == [0] * len(processes)
    assert Path("run/last.pth").is_file()
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) >= 1


@pytest.mark.slow
def test_all_steps_of_detnas_end_in_a_scored_detector() -> None:
    few = {"PRETRAIN": "2", "FINETUNE": "2", "POPULATION": "2", "GENERATIONS": "2"}
    done = subprocess.run(
        [str(EXAMPLES / "detnas_tiny.sh"), "out"],
        env={**os.environ, **few, "CALIBRATION": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(Path("out/search/search.json").read_text())
    assert found["evaluations"] == 4
    stored = checkpoints.load("out/best-detector/best.pth", kinds=("detector",))
    assert stored["config"]["model"]["backbone"] == found["best"]["backbone"]
    assert "AP50" in done.stdout.split("== 5.")[1]


def test_every_example_is_run_by_a_test() -> None:
    names = {path.stem for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert {name for name in names if name not in tests} == set()
