"""What commands say while they work: JSON lines, plain lines, a live screen, TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from detkit import ops
from detkit.cli.main import run

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--set", "data.short_side=96", "--set", "data.long_side=128", "--set", "data.multi_scale=[]"),
    *("--set", "data.workers=0", "--batch-size", "2", "--set", "train.log_every=1"),
]
TRAIN = ["finetune", "--data", "shapes", *SMALL, "--steps", "2"]


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set and a run of two steps that logged in JSON; what it said."""
    folder = tmp_path_factory.mktemp("formats")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["data", "synth", "shapes", "--train", "4", "--val", "2", "--size", "128"]) == 0
        command = [sys.executable, "-m", "detkit.cli", *TRAIN, "--out", "run", "--scales", "learn"]
        command += ["--set", "scales.log_every=1", "--log-format", "json"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        Path("said.jsonl").write_text(done.stderr)
    return folder


@pytest.fixture
def there(road: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(road)
    return road


def events(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def documented() -> dict[str, set[str]]:
    """Keys of each kind of event, as docs/training.md lists them."""
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|(.*)\|$", text.split("## Log formats")[1], re.M)
    return {kind: set(re.findall(r"`(\w+)`", keys)) | {"time", "kind"} for kind, keys in rows}


def test_json_lines_hold_what_is_documented(there: Path) -> None:
    """Nothing else is on stderr, and training lines are those of metrics.jsonl."""
    found = events(Path("said.jsonl").read_text())
    known = documented()
    assert {event["kind"] for event in found} == {"log", "train", "scales", "eval"}
    for event in found:
        assert event.keys() == known[event["kind"]], event["kind"]
    lines = events(Path("run/metrics.jsonl").read_text())
    kinds = ("train", "scales", "eval")
    told = [{k: v for k, v in e.items() if k != "time"} for e in found if e["kind"] in kinds]
    assert sorted(told, key=str) == sorted(lines, key=str) and len(told) == 5


def test_evaluation_and_errors_are_json_lines_too(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(["eval", "run/best.pth", "--log-format", "json"]) == 0
    found = events(capsys.readouterr().err)
    assert found[-1].items() >= {"kind": "images", "done": 2, "total": 2}.items()
    assert run(["eval", "run/best.pth", "--data", "nowhere", "--log-format=json"]) == 2
    (error,) = events(capsys.readouterr().err)
    assert error.keys() == documented()["error"] and error["exit_code"] == 2
    assert run(["eval", "--log-format", "jsn"]) == 2
    assert "json" in capsys.readouterr().err


def test_the_log_says_which_kernel_each_operator_runs(there: Path) -> None:
    """On the run's device."""
    text = Path("run/log.txt").read_text()
    kernels = ops.backend("cpu")
    (line,) = re.findall(r"operators on cpu: (.*)", text)
    parts = dict(part.split(": ") for part in line.split("; "))
    assert {op: kernel for kernel, names in parts.items() for op in names.split(", ")} == kernels


@pytest.mark.parametrize("log_format", [None, "plain"])
def test_a_terminal_has_a_live_screen(log_format: str | None, there: Path) -> None:
    """One screen with the bar, speed, losses and the metric; --log-format plain leaves it out."""
    leader, follower = pty.openpty()
    more = [] if log_format is None else ["--log-format", log_format]
    name = f"on-terminal-{log_format}"
    process = subprocess.Popen(
        [sys.executable, "-m", "detkit.cli", *TRAIN, "--out", name, "--json", *more],
        stdout=subprocess.PIPE,
        stderr=follower,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
    )
    os.close(follower)
    shown = b""
    while chunk := _read(leader):
        shown += chunk
    out, _ = process.communicate()
    assert process.returncode == 0 and json.loads(out)["run"] == name
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    live = ["step 2/2", "100%", "left", "images/s", "waiting for data", "rpn_objectness", "best "]
    if log_format is None:
        assert all(part in text for part in live)
        assert "img/s" not in text  # the lines of the log, which the screen replaces
    else:
        assert "img/s" in text and "images/s" not in text
    assert "AP 0." in text and f"run folder {name}" in text


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 4096)
    except OSError:  # Linux's end of a terminal whose other side is closed
        return b""


# -- TensorBoard


def test_tensorboard_reads_back_what_was_logged(there: Path) -> None:
    """Also those of a run that went on: what it forgets is forgotten there too."""
    pytest.importorskip("tensorboard", reason="the extra [tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run([*TRAIN, "--out", "board", "--tensorboard"]) == 0
    board = EventAccumulator("board/tensorboard").Reload()
    lines = events(Path("board/metrics.jsonl").read_text())
    for line in lines:
        if line["kind"] == "train":
            for name in ("loss", "lr", "images_per_second"):
                (value,) = [
                    e.value for e in board.Scalars(f"train/{name}") if e.step == line["step"]
                ]
                assert value == pytest.approx(line[name])
            assert {f"losses/{name}" for name in line["losses"]} <= set(board.Tags()["scalars"])
        else:
            (value,) = board.Scalars("eval/AP50")
            assert (value.step, value.value) == (2, pytest.approx(line["metrics"]["AP50"]))


def test_without_tensorboard_the_extra_is_named(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is trained."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name)
    )
    assert run([*TRAIN, "--out", "none", "--set", "train.tensorboard=true"]) == 2
    assert "pip install 'detkit[tensorboard]'" in capsys.readouterr().err
    assert not Path("none").exists()
