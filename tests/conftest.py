"""Fixtures of all tests: seeds, devices, real data, and the torchvision peer."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

# Without it torch's matrix products refuse CUDA tensors in deterministic mode; read on first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_report_header() -> str:
    from detkit.ops import backend

    return "detkit ops: " + ", ".join(f"{op} {where}" for op, where in backend().items())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_autotune() -> None:
    """Tests of an operator on a GPU test its own kernels, not what may be faster there."""
    from detkit.ops import autotune

    autotune("off")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn; cuda skips without a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets."""
    if not os.environ.get("DETKIT_TEST_DATA"):
        pytest.skip("DETKIT_TEST_DATA is not set: it names the folder of the real data sets")
    path = Path(os.environ["DETKIT_TEST_DATA"])
    assert path.is_dir(), f"DETKIT_TEST_DATA must be a folder, got {path}"
    return path


@pytest.fixture
def would_train(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], dict[str, Any]]:
    """The settings a command line would train with: it runs, but for the training itself.

    As one of the processes that --gpus starts, so that none are started.
    """
    from detkit.cli.main import run
    from detkit.config import Config, to_plain

    def ask(arguments: list[str]) -> dict[str, Any]:
        asked: list[Config] = []

        def train(command: str, config: Config, **options: Any) -> dict[str, Any]:
            asked.append(config)
            return {"run": "run", "checkpoint": "run/best.pth", "metrics": {}}

        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setattr("detkit.api.train", train)
        assert run([*arguments, "--json"]) == 0
        (config,) = asked
        return to_plain(config)

    return ask


@pytest.fixture(scope="session")
def tv() -> ModuleType:
    """The published torchvision with its compiled operators."""
    folder = os.environ.get("DETKIT_PEER")
    if not folder:
        pytest.skip("DETKIT_PEER is not set: `make peer` makes the folder it names")
    assert Path(folder).is_dir(), f"DETKIT_PEER must be a folder, got {folder}"
    sys.path.insert(0, folder)
    return importlib.import_module("torchvision_cpu").load()
