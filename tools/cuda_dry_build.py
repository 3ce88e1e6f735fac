"""Builds the CUDA extension through the real setup.py, links and imports it, without a GPU.

A CPU torch is told that it has CUDA while it builds, and two stub libraries stand in for torch's
CUDA libraries. At the end every operator must have a CUDA kernel. Needs nvcc.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda_dry"
STUBS = {
    "c10_cuda": "",
    "torch_cuda": """
        int aoti_torch_get_current_cuda_stream(int device, void **stream) { return 1; }
        int torch_c10_cuda_check_msg(int code, const char *file, const char *function,
                                     unsigned line, _Bool check, char **message) { return 1; }
        void torch_c10_cuda_free_error_msg(char *message) {}
    """,
}
CHECK = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
ops = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("detkit::"))
missing = [n for n in ops if not torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")]
if not ops or not module.build_info()["cuda"]:
    sys.exit("the extension has no operators or no CUDA part")
if missing:
    sys.exit("without a CUDA kernel: " + ", ".join(missing))
print(f"{len(ops)} operators, each with a CUDA kernel")
"""


def cuda_home() -> str | None:
    """The toolkit's folder, also where nvcc on the path is a wrapper."""
    if os.environ.get("CUDA_HOME"):
        return os.environ["CUDA_HOME"]
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    plan = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", plan)
    return str(Path(top.group(1)).resolve()) if top else None


def toolkit_version(home: str) -> str:
    """Such as 13.0."""
    text = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    if match is None:
        sys.exit(f"CUDA dry build: nvcc --version must name its release, got {text!r}")
    return match.group(1)


def build_stubs(folder: Path) -> None:
    """Libraries with the symbols that the CUDA part links to; none is called on import."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in STUBS.items():
        target = str(folder / f"lib{name}.so")
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,lib{name}.so", "-xc", "-", "-o", target]
        subprocess.run(command, input=source, text=True, check=True)


def build_extension(home: str, version: str) -> None:
    """Runs setup.py in this process, with a torch that claims to be a CUDA build."""
    import torch

    torch.version.cuda = version
    torch.cuda._is_compiled = lambda: True
    torch.cuda.is_available = lambda: False
    torch.cuda.device_count = lambda: 0
    os.environ.update(CUDA_HOME=home, DETKIT_CUDA="1")
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    os.environ["LIBRARY_PATH"] = f"{BUILD / 'stubs'}:{os.environ.get('LIBRARY_PATH', '')}"
    os.chdir(ROOT)
    sys.argv = ["setup.py", "-q", "build_ext", f"--build-lib={BUILD / 'lib'}"]
    sys.argv.append(f"--build-temp={BUILD / 'temp'}")
    runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")


def check_extension(home: str) -> None:
    """Imports the extension in a fresh interpreter and looks for each operator's CUDA kernel."""
    extension = next((BUILD / "lib").glob("detkit/_C*.so"))
    folders = [str(BUILD / "stubs"), *(f"{home}/{lib}" for lib in ("lib64", "lib"))]
    paths = ":".join([*folders, os.environ.get("LD_LIBRARY_PATH", "")])
    environment = {**os.environ, "LD_LIBRARY_PATH": paths}
    command = [sys.executable, "-c", CHECK, str(extension)]
    if subprocess.run(command, env=environment, cwd=BUILD).returncode != 0:
        sys.exit("CUDA dry build: failed, the reason stands above")


def main() -> None:
    """Builds and checks; exits non-zero with the reason otherwise."""
    home = cuda_home()
    if home is None:
        message = "CUDA dry build: needs nvcc, got none on the path and no CUDA_HOME"
        if os.environ.get("CI") == "true":
            sys.exit(message)
        print(f"{message}; nothing was checked")
        return
    version = toolkit_version(home)
    shutil.rmtree(BUILD / "lib", ignore_errors=True)
    build_stubs(BUILD / "stubs")
    build_extension(home, version)
    check_extension(home)
    print(f"CUDA dry build: passed (nvcc {version})")


if __name__ == "__main__":
    main()
