"""What the compiler makes of the CUDA kernels: registers, spills, shared memory, occupancy, SASS.

Needs nvcc; with cuobjdump and nvdisasm on the path (PyPI has both as nvidia-cuda-*) also counts
instructions. Prints a Markdown table; no GPU is needed, and nothing is run.

    python tools/kernel_table.py [--arch 80 --arch 90] [--only float,__half]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cuda_dry_build import ROOT, cuda_home

# As torch's build gives them, with setup.py's own flags.
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc")]
FLAGS += [f"-D__CUDA_NO_{what}__" for what in ("HALF_OPERATORS", "HALF_CONVERSIONS")]
FLAGS += ["-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__"]
THREADS = {"settle_kernel": 512}
"""Threads of a block where they are not 256; of the fused kernels twice the tile."""
SHARED_KIB = {80: 164, 90: 228}
"""Of a multiprocessor (CUDA programming guide, compute capabilities)."""
KINDS = ("registers", "spilled", "shared")
"""Per thread; bytes of spills per thread; bytes of shared memory per block."""


def demangled(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True).stdout


def short_name(name: str) -> str:
    """``settle_kernel<float>`` of a demangled signature."""
    name = name.removeprefix("void ").replace("detkit::cuda::", "").replace("detkit::", "")
    name = name.replace("(anonymous namespace)::", "").replace("__nv_bfloat16", "bf16")
    return name.split("(")[0].replace("__half", "half").replace("(int)", "").replace("(bool)", "")


def threads_of(name: str) -> int:
    fused = re.match(r"fused_kernel<\w+, (\d+)", name)
    return 2 * int(fused[1]) if fused else THREADS.get(name.split("<")[0], 256)


def occupancy(arch: int, threads: int, registers: int, shared: int) -> int:
    """Percent of a multiprocessor's 64 warps: registers come in units of 256 a warp, each block
    takes a KiB of shared memory of its own.
    """
    warps = threads // 32
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_shared = SHARED_KIB[arch] * 1024 // (shared + 1024)
    return 100 * min(2048 // threads, by_registers, by_shared, 32) * warps // 64


def compiled(source: Path, arch: int, folder: Path) -> tuple[str, Path]:
    """The assembler's remarks, and the object."""
    target = folder / f"{source.stem}_{arch}.cubin"
    command = [f"{cuda_home()}/bin/nvcc", *FLAGS, "-Xptxas", "-v", "-cubin", f"-arch=sm_{arch}"]
    done = subprocess.run(
        [*command, str(source), "-o", str(target)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"kernel table: {source.name} does not compile\n{done.stderr}")
    return demangled(done.stderr), target


def remarks(text: str) -> dict[str, dict[str, int]]:
    """Numbers of each kernel."""
    pattern = (
        r"Function properties for (?P<name>.+)\n\s+\d+ bytes stack frame, (?P<spill>\d+) bytes "
        r"spill stores.*\n.*Used (?P<registers>\d+) registers(?P<rest>.*)"
    )
    kernels = {}
    for match in re.finditer(pattern, text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels[short_name(match["name"])] = {
            "registers": int(match["registers"]),
            "spilled": int(match["spill"]),
            "shared": int(shared[1]) if shared else 0,
        }
    return kernels


def instructions(cubin: Path) -> dict[str, dict[str, int]]:
    """How often each kernel's SASS names a few instructions; empty without cuobjdump."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        return {}
    sass = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True).stdout
    counts = {}
    for part in sass.split("Function : ")[1:]:
        name = short_name(demangled(part.split("\n")[0]).strip())
        counts[name] = {
            what: len(re.findall(rf"\b{re.escape(what)}[ .]", part))
            for what in ("HMMA.16816", "HMMA.1688", "LDSM.16", "LDGSTS.E.BYPASS")
        }
        counts[name]["LDG.128"] = len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128", part))
        counts[name]["REDG"] = len(re.findall(r"\b(?:REDG?|ATOMG?)\.E", part))  # atomics
    return counts


def row(file: str, name: str, archs: list[int], found: list[dict[str, int]], sass: str) -> str:
    """One kernel; numbers of several architectures are joined by a stroke."""
    columns: list[list[object]] = [[k[what] for k in found] for what in KINDS]
    columns.append(
        [
            f"{occupancy(arch, threads_of(name), k['registers'], k['shared'])}%"
            for arch, k in zip(archs, found, strict=True)
        ]
    )
    cells = [" / ".join(map(str, column)) for column in columns]
    return "| " + " | ".join([file, f"`{name}`", *cells, sass or "-"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_KIB))
    parser.add_argument("--only", default="", help="kernels that name one of these types")
    parser.add_argument("--sources", nargs="*", default=[], help="such as nms_kernel")
    options = parser.parse_args()
    archs = options.arch or sorted(SHARED_KIB)
    print(f"| file | kernel | {' | '.join(KINDS)} | occupancy | SASS of sm_{archs[-1]} |")
    print("|" + "---|" * 7)
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            if options.sources and source.stem not in options.sources:
                continue
            built = [compiled(source, arch, Path(folder)) for arch in archs]
            found = [remarks(text) for text, _ in built]
            sass = instructions(built[-1][1])
            for name in sorted(found[-1]):
                if options.only and not set(options.only.split(",")) & set(
                    re.findall(r"\w+", name)
                ):
                    continue
                said = ", ".join(f"{n} {what}" for what, n in sass.get(name, {}).items() if n)
                file = source.stem.removesuffix("_kernel")
                print(row(file, name, archs, [kernels[name] for kernels in found], said))


if __name__ == "__main__":
    main()
