"""Turns the CUDA sources into C++ for the emulation beside this file.

Launches become calls; the operators register for CPU tensors, in a library of another name.

Usage: python translate.py INPUT OUTPUT
"""

import re
import sys
from pathlib import Path

LAUNCH = re.compile(
    r"(?P<kernel>\w+(?:<[^<>;]*>)?)\s*<<<(?P<setup>.*?)>>>\s*\((?P<arguments>.*?)\);", re.DOTALL
)
GUARD = re.compile(r"const torch::stable::accelerator::DeviceGuard guard\(.*?\);")


def top_level_arguments(text: str) -> list[str]:
    """The arguments of a call, split at the commas outside brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def launch_as_call(match: re.Match[str]) -> str:
    grid, threads, *_ = top_level_arguments(match["setup"])
    body = f"{match['kernel']}({match['arguments']});"
    return f"emulated::launch({grid},{threads}, [&] {{ {body} }});"


def translate(source: str) -> str:
    source = LAUNCH.sub(launch_as_call, source)
    source = GUARD.sub("", source)
    source = source.replace("_IMPL(detkit, CUDA, m)", "_IMPL(detkit_emulated, CPU, m)")
    return source.replace("LIBRARY(detkit, m)", "LIBRARY(detkit_emulated, m)")


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(translate(Path(sys.argv[1]).read_text()))
