"""What tools/gpu.sh runs, with a stand-in for Python: one that fails must not lose the others."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "tools/gpu.sh"
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  *sys.executable*) echo "$0" ;;
  *cpu_count*) echo 2 ;;
  *{failing}*) exit 3 ;;
  *finetune*) mkdir -p build/gpu_run && echo '{{"step": 1}}' > build/gpu_run/metrics.jsonl ;;
esac
"""
STAGES = ["doctor", "tests", "ways", "ops", "detect", "train", "bench_train", "speed"]


def run(folder: Path, device: str, failing: str) -> tuple[int, list[str]]:
    """Exit code, and the lines with which the stages ended."""
    (folder / "tools").mkdir()
    shutil.copy(SCRIPT, folder / "tools/gpu.sh")
    python = folder / "python"
    python.write_text(STAND_IN.format(failing=failing))
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(folder / "out"), "DEVICE": device}
    done = subprocess.run(
        ["bash", str(folder / "tools/gpu.sh")], env=environment, capture_output=True, text=True
    )
    assert "unbound variable" not in done.stderr, done.stderr
    log = (folder / "out/log.txt").read_text().splitlines()
    return done.returncode, [line for line in log if ": exit " in line or "failed" in line]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_failing_stage_ends_alone(tmp_path: Path, device: str) -> None:
    code, lines = run(tmp_path, device, "cuda_ways.py")
    ended = {line.split()[1].rstrip(":"): line.split()[3] for line in lines if ": exit " in line}
    assert list(ended)[-len(STAGES) :] == STAGES
    assert [name for name in STAGES if ended[name] != "0"] == ["ways"]
    assert code == 1 and "ways" in lines[-1]
    assert (tmp_path / "out/train.jsonl").read_text() == '{"step": 1}\n'
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_nothing_runs_without_a_build(tmp_path: Path) -> None:
    code, lines = run(tmp_path, "cuda", "setup.py")
    assert code == 1
    assert [line.split()[1] for line in lines if ": exit " in line][-1] == "build:"
