"""The import directions of the package, read from the sources, and what a bare import loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Part of the package -> parts it may import. A part missing here fails the test until it is placed.
BASE = {"errors", "storage", "config", "garbage", "rle"}
MODELS = BASE | {"types", "ops", "models"}
METHODS = MODELS | {"scales", "nas"}
ENGINE = BASE | {"types", "engine"}
DATA = BASE | {"types", "data"}
ALLOWED = {
    "errors": set(),
    "storage": {"errors"},
    "garbage": set(),
    "rle": set(),
    "config": {"errors"},
    "types": BASE,
    "ops": BASE | {"types", "ops"},
    "doctor": BASE | {"ops"},
    "models": MODELS,
    "scales": METHODS,
    "nas": METHODS,
    "data": DATA,
    "engine": ENGINE,
    "deploy": METHODS | DATA | ENGINE | {"deploy"},
    "report": METHODS | DATA | ENGINE | {"deploy", "report"},
}
ALLOWED["foreign"] = MODELS | ENGINE | {"foreign"}
ALLOWED["catalogue"] = METHODS
ALLOWED["scoring"] = DATA | ENGINE
ALLOWED["prediction"] = METHODS | DATA | ENGINE | {"report", "prediction"}
ALLOWED["loading"] = METHODS | ENGINE | {"deploy", "foreign", "loading", "prediction"}
ALLOWED["settings"] = METHODS | ENGINE | {"foreign", "loading"}
ALLOWED["supernet"] = set(ALLOWED) | {"supernet"}
ALLOWED["pod"] = set(ALLOWED) | {"pod"}
ALLOWED["fitness"] = set(ALLOWED) | {"fitness"}
ALLOWED["detnas"] = set(ALLOWED) | {"detnas"}
ALLOWED["retrain"] = set(ALLOWED) | {"retrain"}
ALLOWED["api"] = set(ALLOWED) | {"api"}
ALLOWED["rehearsal"] = set(ALLOWED) | {"rehearsal"}
ALLOWED["comparison"] = set(ALLOWED) | {"comparison"}
ALLOWED["reporting"] = set(ALLOWED) | {"reporting"}
ALLOWED["bench"] = set(ALLOWED) | {"bench"}
ALLOWED["demo"] = set(ALLOWED) | {"demo"}
ALLOWED["cli"] = set(ALLOWED) | {"cli"}
FREE_OF_TORCH = (
    "detkit/__init__.py",
    "detkit/config/",
    "detkit/errors.py",
    "detkit/garbage.py",
    "detkit/storage.py",
    "cli",
)
HEAVY = ("torch", "detkit.types", "detkit.ops", "detkit.models", "detkit.data", "detkit.engine")


def sources() -> dict[str, Path]:
    """Module name to file of the whole package."""
    found = {}
    for folder, package in (("detkit", "detkit"), ("cli", "detkit.cli")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if folder == "detkit" and relative.parts[0] == "cli":  # the link to cli/
                continue
            parts = [package, *relative.with_suffix("").parts]
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


MODULES = sources()


def part(module: str) -> str:
    """``engine`` of ``detkit.engine.train``; empty for the root."""
    return (module.split(".") + [""])[1]


def imported(node: ast.AST, module: str) -> list[str]:
    """Full names that an import statement loads or may load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert isinstance(node, ast.ImportFrom)
    assert node.level == 0, f"{module}: relative import on line {node.lineno}"
    base = node.module or ""
    if base == "detkit":  # `from detkit import ops` loads detkit.ops
        return [f"detkit.{a.name}" for a in node.names if f"detkit.{a.name}" in MODULES] or [base]
    return [base]


def imports(module: str, *, run_on_import: bool = False) -> Iterator[str]:
    """Names that the module imports; with ``run_on_import`` those outside functions only."""
    pending: list[ast.AST] = [ast.parse(MODULES[module].read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node, module)
        if run_on_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)


def test_the_walk_sees_the_package() -> None:
    """Guards the other tests: an empty walk would pass them all."""
    assert {"detkit", "detkit.ops.nms", "detkit.engine.train", "detkit.cli.main"} <= set(MODULES)
    assert "detkit.ops._library" in set(imports("detkit.ops.nms"))


@pytest.mark.parametrize("module", [m for m in MODULES if part(m)])
def test_imports_go_one_way(module: str) -> None:
    assert part(module) in ALLOWED, f"{module}: place it in ALLOWED"
    own = {m for m in imports(module) if m == "detkit" or m.startswith("detkit.")}
    wrong = {m for m in own if part(m) not in ALLOWED[part(module)] | {part(module), ""}}
    assert not wrong, f"{module} must not import {sorted(wrong)}"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_knows_click_and_rich(module: str) -> None:
    roots = {m.split(".")[0] for m in imports(module)}
    assert "torchvision" not in roots, "torchvision is a peer, never a dependency"
    if part(module) != "cli":
        assert not roots & {"click", "rich"}


def test_light_files_import_no_torch() -> None:
    for module, path in MODULES.items():
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith(FREE_OF_TORCH):
            names = set(imports(module, run_on_import=True))
            heavy = {n for n in names if n.startswith(HEAVY)}
            assert not heavy, f"{relative} must not import {sorted(heavy)} when it is imported"


@pytest.mark.parametrize(
    "statement", ["import detkit", "import detkit.config", "import detkit.cli.main"]
)
def test_light_imports_load_no_torch(statement: str) -> None:
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_kernel_sources_keep_their_layers() -> None:
    """cpu/ and cuda/ do not include each other; raw kernels know of torch its half types alone."""
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert len(files) > 10
    other = {"cpu": ("cuda/",), "cuda": ("cpu/",), "common": ("cpu/", "cuda/")}
    for path in files:
        relative = path.relative_to(ROOT / "csrc").as_posix()
        included = re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"))
        assert not [i for i in included if i.startswith(other.get(relative.split("/")[0], "//"))]
        torch = {i for i in included if i.startswith(("torch", "ATen", "c10"))}
        torch -= {"torch/headeronly/util/Half.h", "torch/headeronly/util/BFloat16.h"}
        if relative.startswith("common/") or "_kernel." in relative and "tests" not in relative:
            assert not torch, f"{relative} must be free of torch"
        if relative not in ("torch_stable.h", "module.cpp"):
            assert torch <= {"torch_stable.h"}, f"{relative} must include torch_stable.h instead"
