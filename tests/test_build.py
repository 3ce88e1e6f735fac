"""What setup.py decides, what the build reports, and what happens where there is no extension."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from detkit import doctor, ops
from detkit.ops import _library

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def toolkit(tmp_path: Path) -> str:
    """A CUDA folder as far as the decision looks at it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch()
    return str(tmp_path)


def test_cuda_is_built_where_torch_and_the_toolkit_have_it(tmp_path: Path) -> None:
    want_cuda, home = SETUP["want_cuda"], toolkit(tmp_path)
    assert want_cuda("13.0", home, {})
    assert want_cuda("13.0", home, {"FORCE_CUDA": "1"})
    assert not want_cuda("13.0", home, {"DETKIT_CUDA": "0", "FORCE_CUDA": "1"})
    assert not want_cuda(None, home, {})  # nvcc beside a CPU torch
    assert not want_cuda("13.0", None, {})
    assert not want_cuda("13.0", str(tmp_path / "bin"), {})


def test_a_forced_cuda_build_that_cannot_be_says_why(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"torch.version.cuda=None and CUDA_HOME=.*unset"):
        SETUP["want_cuda"](None, toolkit(tmp_path), {"DETKIT_CUDA": "1"})


def test_every_source_is_built() -> None:
    listed = set(SETUP["sources"](cuda=True))
    there = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.c*")}
    headers = {p for p in there if p.endswith(".cuh")}
    assert listed == {p for p in there - headers if not p.startswith("csrc/tests/")}
    assert not [p for p in SETUP["sources"](cuda=False) if "cuda" in p]


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_without_torch_the_build_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError")
    missing = run_setup("--name", PYTHONPATH=str(tmp_path))
    assert missing.returncode != 0
    assert "torch must be importable" in missing.stderr
    assert "--no-build-isolation" in missing.stderr
    assert run_setup("--name", PYTHONPATH=str(tmp_path), DETKIT_SKIP_EXT="1").returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="sets CXX")
def test_a_failed_build_fails_with_a_sentence(tmp_path: Path) -> None:
    arguments = ("build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}")
    failed = run_setup("-q", *arguments, CXX="false", CC="false", DETKIT_CUDA="0")
    assert failed.returncode != 0
    assert "the compiled operators did not build" in failed.stderr
    assert "DETKIT_SKIP_EXT=1" in failed.stderr


def test_a_wheel_holds_the_commands_and_recipes(tmp_path: Path) -> None:
    egg, build = ("egg_info", f"--egg-base={tmp_path}"), ("build", f"--build-base={tmp_path}")
    made = run_setup("-q", *egg, *build, "bdist_wheel", f"-d{tmp_path}", DETKIT_SKIP_EXT="1")
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"detkit/cli/main.py", "detkit/py.typed", "detkit/ops/nms.py"}
    expected |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "detkit/recipes").rglob("*.toml")}
    assert expected <= names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"detkit"}


def test_the_build_is_reported_and_fits_this_torch() -> None:
    assert ops.boxes and _library.MODE != "reference", "the suite tests the built extension"
    assert set(_library.BUILD_INFO) == {"compiler", "torch", "cuda", "simd"}
    assert torch.__version__.startswith(str(_library.BUILD_INFO["torch"]))


@pytest.mark.parametrize("op", _library.OPS)
def test_every_operator_has_native_kernels(op: str) -> None:
    devices = {"cpu", "cuda"} if _library.BUILD_INFO["cuda"] else {"cpu"}
    assert devices <= _library.KERNELS[op]
    assert ops.backend()[op].startswith("native")


def test_reference_only_is_undone() -> None:
    boxes, scores = torch.rand(3, 4), torch.rand(3)
    with _library.reference_only():
        assert not _library.use_native("nms", boxes)
        assert set(ops.backend().values()) == {"reference"}
    assert _library.use_native("nms", boxes, scores)


# Stands in for an extension that was not built, or that does not load.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "detkit._C":
            raise {error}
sys.meta_path.insert(0, Block())
"""
NOT_BUILT = BLOCK.format(error='ModuleNotFoundError("no _C", name="detkit._C")')
BROKEN = BLOCK.format(error='ImportError("undefined symbol: x")')
CALLS = """
import json, warnings, torch
from detkit import ops
boxes = torch.tensor([[0., 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
scores = torch.tensor([.5, .9, .1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    kept = [ops.nms(boxes, scores, .5).tolist() for _ in range(2)]
    ops.batched_nms(boxes, scores, torch.zeros(3, dtype=torch.int64), .5)
print(json.dumps({"kept": kept, "warnings": [str(w.message) for w in caught],
                  "backend": sorted(set(ops.backend().values()))}))
"""


def run_python(code: str, mode: str = "auto") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DETKIT_OPS": mode}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_missing_extension_warns_once_with_the_build_command() -> None:
    done = run_python(NOT_BUILT + CALLS)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kept"] == [[1, 2], [1, 2]]
    assert result["backend"] == ["reference"]
    (warning,) = result["warnings"]
    assert _library.BUILD_COMMAND in warning


def test_the_reference_can_be_chosen_without_a_warning() -> None:
    result = json.loads(run_python(CALLS, mode="reference").stdout)
    assert result == {"kept": [[1, 2], [1, 2]], "warnings": [], "backend": ["reference"]}


def test_native_makes_a_missing_extension_an_error() -> None:
    done = run_python(NOT_BUILT + CALLS, mode="native")
    assert done.returncode != 0
    assert "ConfigError: DETKIT_OPS=native: nms must have a native cpu kernel" in done.stderr


def test_an_unknown_mode_is_an_error() -> None:
    assert "DETKIT_OPS: must be one of auto, native" in run_python(CALLS, mode="nativ").stderr


def test_a_broken_extension_stops_at_import() -> None:
    done = run_python(BROKEN + CALLS)
    assert "undefined symbol: x; build it again with" in done.stderr
    code = "import json; from detkit import doctor; print(json.dumps(doctor.report()))"
    report = json.loads(run_python(BROKEN + code).stdout)
    assert not report["extension"]["built"]
    assert any("undefined symbol" in line for line in report["advice"])


def test_the_doctor_reports_every_operator() -> None:
    report = json.loads(json.dumps(doctor.report()))
    assert set(report["ops"]) == set(_library.OPS)
    for facts in report["ops"].values():
        assert facts["backend"] in ("native-cuda", "native-cpu", "reference")
        assert facts["why"]
    assert report["torch"]["version"] == torch.__version__
    assert report["extension"]["built"]


def test_the_doctor_says_to_build_what_is_missing() -> None:
    code = "import json; from detkit import doctor; print(json.dumps(doctor.report()))"
    report = json.loads(run_python(NOT_BUILT + code).stdout)
    assert {f["why"] for f in report["ops"].values()} == {"the extension is not built"}
    assert any(_library.BUILD_COMMAND in line for line in report["advice"])
