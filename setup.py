"""The extension only: which sources, CPU or CUDA, and what to say when it cannot be built."""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent.resolve()

NO_TORCH = (
    "detkit: torch must be importable while the extension is built, got none; install torch >= "
    "2.11 and pybind11 first, then `pip install --no-build-isolation .` (an isolated build would "
    "fetch a second torch)"
)
BUILD_FAILED = (
    "detkit: the compiled operators did not build, the compiler's message stands above; mend it, "
    "or set DETKIT_SKIP_EXT=1 to install without them (the slower PyTorch reference then runs)"
)
# Contraction off: box and RoI geometry must round as the reference does on every instruction set.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fvisibility=hidden"]


def want_cuda(cuda_version, cuda_home, environ):
    """True if the CUDA kernels are to be built; exits where they are forced but cannot be."""
    wish = environ.get("DETKIT_CUDA", environ.get("FORCE_CUDA", "auto")).lower()
    if wish in ("0", "off", "false"):
        return False
    possible = (
        cuda_version is not None
        and cuda_home is not None
        and (Path(cuda_home) / "bin/nvcc").exists()
    )
    if wish in ("1", "on", "true") and not possible:
        raise SystemExit(
            "detkit: a CUDA build needs a CUDA torch and a toolkit with nvcc, "
            f"got torch.version.cuda={cuda_version} and CUDA_HOME={cuda_home}; "
            "unset DETKIT_CUDA or install both"
        )
    return possible


def sources(cuda):
    """The source files of the extension, relative to the root."""
    patterns = ["csrc/*.cpp", "csrc/cpu/*.cpp"]
    if cuda:
        patterns += ["csrc/cuda/*.cpp", "csrc/cuda/*.cu"]
    paths = [p for pattern in patterns for p in ROOT.glob(pattern)]
    return sorted(p.relative_to(ROOT).as_posix() for p in paths)


def extension():
    """The extension and its build command, with torch's own compiler settings."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        raise SystemExit(NO_TORCH) from None
    try:
        import pybind11

        include_dirs = [pybind11.get_include()]
    except ImportError:  # torch carries a copy of the same headers
        include_dirs = []

    class Build(cpp_extension.BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                raise SystemExit(f"{error}\n{BUILD_FAILED}") from error

    cuda = want_cuda(torch.version.cuda, cpp_extension.CUDA_HOME, os.environ)
    if cuda and "TORCH_CUDA_ARCH_LIST" not in os.environ and torch.cuda.device_count() == 0:
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0+PTX"
    which = "CPU and CUDA" if cuda else "CPU"
    print(f"detkit: building the {which} operators against torch {torch.__version__}")
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    module = kind(
        "detkit._C",
        sources(cuda),
        include_dirs=[str(ROOT / "csrc"), *include_dirs],
        define_macros=[("USE_CUDA", None), ("DETKIT_WITH_CUDA", None)] if cuda else [],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def main():
    os.chdir(ROOT)
    skip = os.environ.get("DETKIT_SKIP_EXT", "0") not in ("", "0") or "sdist" in sys.argv
    packages = find_packages(include=["detkit", "detkit.*"], exclude=["detkit.cli", "detkit.cli.*"])
    setup(
        # detkit/cli is a link to cli/, so that a checkout on the path works too
        packages=[*packages, "detkit.cli"],
        package_dir={"detkit.cli": "cli"},
        **({} if skip else extension()),
    )


if __name__ == "__main__":
    main()
