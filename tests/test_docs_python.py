"""The examples of docs/python.md, run one after the other as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import detkit
from detkit.data import synthetic

GUIDE = Path(__file__).parents[1] / "docs/python.md"


def test_the_guide_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    synthetic.write("shapes", images_train=8, images_val=4, size=128)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 8
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    assert Path("out.png").is_file()
    assert len(names["done"]["images"]) == 4
    assert names["scores"]["images"] == 4
    assert names["plain"].kind == "fd"


def test_every_public_function_is_in_the_guide() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    functions = set(detkit._API)
    named = set(re.findall(r"`detkit\.(\w+)\(", text))
    assert named <= functions
    assert {"load", "build", "train", "evaluate", "predict", "decompose", "compare"} <= named
    for name in functions:
        assert (getattr(detkit, name).__doc__ or "").strip(), f"{name} must have a docstring"
