"""Turns a raw CUDA kernel file into C++ for the emulation beside this file: launches become calls.

python translate.py INPUT.cu OUTPUT.cpp
"""

import re
import sys
from pathlib import Path

LAUNCH = re.compile(
    r"(?P<kernel>\w+(?:<[^<>;]*>)?)\s*<<<(?P<setup>.*?)>>>\s*\((?P<arguments>.*?)\);", re.DOTALL
)


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


def translate(source: str) -> str:
    """The source with every launch replaced; fails where there is none."""

    def call(match: re.Match[str]) -> str:
        grid, threads, *_ = top_level_arguments(match["setup"])
        body = f"{match['kernel']}({match['arguments']});"
        return f"emulated::launch({grid},{threads}, [&] {{ {body} }});"

    translated, count = LAUNCH.subn(call, source)
    if count == 0:
        sys.exit("no kernel launch found")
    return translated


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(translate(Path(sys.argv[1]).read_text()))
