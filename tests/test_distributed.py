"""Two gloo processes: the same weights as one, the same decisions, and no hanging."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from toy_training import Plain, batch_of, new_run, split, toy_config, train

from detkit.engine import checkpoint, distributed
from detkit.engine.run import RunFolder
from detkit.types import ClassificationBatch

SCRIPT = str(Path(__file__).with_name("toy_training.py"))


def alone(start: int) -> Iterator[list[ClassificationBatch]]:
    for step in range(start, 100):
        yield [batch_of(step, 8)]


def holds_something(step: int, rank: int) -> bool:
    return any(
        bool((part.labels == 3).any()) for part in split(batch_of(step, 8), [4, 4])[rank : rank + 1]
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Folder and exit code of two processes that trained together, then met a bad image."""
    folder = tmp_path_factory.mktemp("together")
    return folder, distributed.launch(2, [sys.executable, SCRIPT, "together", str(folder)])


def test_two_processes_equal_one_on_the_same_images(
    together: tuple[Path, int], tmp_path: Path
) -> None:
    folder, _ = together
    config = toy_config(train={"batch_size": 8, "ema": 0.9})
    one = train(new_run(tmp_path, config), config, model=Plain, source=alone)
    # In some step one process has no image of label 3, and its `spare` takes no part in the loss.
    assert any(holds_something(step, 0) != holds_something(step, 1) for step in range(6))
    expected = checkpoint.load(one.last)
    found = checkpoint.load(folder / "equal" / "last.pth")
    for part in ("model", "ema"):
        for name, tensor in expected[part].items():
            torch.testing.assert_close(found[part][name], tensor, rtol=1e-4, atol=1e-6)
    assert found["progress"]["images_seen"] == 48
    assert len(found["rng"]["ranks"]) == 2
    mine = {line["step"]: line["losses"] for line in RunFolder(tmp_path).read_metrics()}
    theirs = {
        line["step"]: line["losses"]
        for line in RunFolder(folder / "equal").read_metrics()
        if line["kind"] == "train"
    }
    assert mine.keys() == theirs.keys()
    for step, losses in mine.items():
        assert theirs[step] == pytest.approx(losses, rel=1e-4)


def test_the_metric_of_the_first_process_counts(together: tuple[Path, int]) -> None:
    progress = checkpoint.load(together[0] / "equal" / "last.pth")["progress"]
    assert progress["metrics"] == {"top1": 0.0}


def test_a_bad_image_of_one_process_stops_both_and_is_named(together: tuple[Path, int]) -> None:
    folder, code = together
    assert code == 6
    first, second = (json.loads((folder / f"rank{i}.json").read_text()) for i in range(2))
    assert first == second and first["code"] == 6
    assert first["message"].startswith("training step 3: losses and gradients must be finite")
    # The second process's images; those of the first are not to blame.
    assert [f"step2-{i}.png" in first["message"] for i in range(8)] == [False] * 4 + [True] * 4
    assert not (folder / "spoilt" / "last.pth").exists()


def test_a_signal_to_one_process_stops_both(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    code = distributed.launch(2, [sys.executable, SCRIPT, "stopped-together", str(tmp_path)])
    assert code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoint.load(tmp_path / "last.pth")["progress"]["step"] == 4


def test_stopping_the_launcher_lets_both_save(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "launcher", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert checkpoint.load(tmp_path / "last.pth")["progress"]["step"] >= 3


def test_alone_every_question_has_one_answer() -> None:
    model = Plain()
    assert distributed.wrap(model, torch.device("cpu")) is model
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather("x") == ["x"] and distributed.broadcast("x") == "x"
    assert distributed.gather_numbers([1, 2]).tolist() == [[1.0, 2.0]]
    with distributed.process_group(torch.device("cpu")) as device:
        assert device == torch.device("cpu")


@pytest.mark.parametrize(("code", "status"), [("import sys; sys.exit(3)", 3), ("pass", 0)])
def test_the_exit_code_is_passed_on(code: str, status: int) -> None:
    assert distributed.launch(1, [sys.executable, "-c", code]) == status


@pytest.mark.parametrize(
    ("codes", "status"),
    [([-6, 6], 6), ([1, 3], 3), ([143, -6], 143), ([1, -9], 137), ([1, 1], 1)],
    ids=str,
)
def test_the_reason_of_one_process_counts_and_not_how_the_other_died(
    codes: list[int], status: int, tmp_path: Path
) -> None:
    failures = {
        rank: ProcessFailure(rank, 100 + rank, code, str(tmp_path / "none"))
        for rank, code in enumerate(codes)
    }
    assert distributed._exit_code(ChildFailedError("training", failures)) == status


def test_a_killed_process_is_told_by_its_signal() -> None:
    code = "import os; os.kill(os.getpid(), 9)"
    assert distributed.launch(1, [sys.executable, "-c", code]) == 137
