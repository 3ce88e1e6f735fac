"""Writes the tables of docs/performance.md anew from benchmarks/results/.

python tools/performance_page.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
TARGETS = ROOT / "benchmarks" / "targets.toml"

Row = dict[str, Any]
VERDICTS = ("goal met", "floor met", "missed")


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def targets() -> list[Row]:
    """One entry per size."""
    with TARGETS.open("rb") as file:
        given: list[Row] = tomllib.load(file)["target"]
    usual = {"pass": "forward", "dtype": "fp32", "at_most": False}
    return [{**usual, **entry, "size": size} for entry in given for size in entry["sizes"]]


def judged(result: Row) -> list[Row]:
    """Every target at every measured number of threads, with what was measured."""
    found = []
    for target in targets():
        for row in result["rows"]:
            if any(row[k] != target[k] for k in ("op", "size", "pass", "dtype")):
                continue
            timing = row["others"].get(target["against"], {})
            if "ratio" not in timing:
                continue
            place = 0 if row["threads"] == 1 else 1
            ratio = 1 / timing["ratio"] if target["at_most"] else timing["ratio"]
            limits = {"floor": target["floor"][place], "goal": target["goal"][place]}
            fact = {"threads": row["threads"], "ratio": ratio, **limits}
            found.append({**target, **fact, "verdict": verdict(ratio, target["at_most"], limits)})
    return found


def verdict(ratio: float, at_most: bool, limits: dict[str, float]) -> str:
    """Which of goal and floor the ratio keeps."""
    sign = -1 if at_most else 1
    for name in ("goal", "floor"):
        if sign * ratio >= sign * limits[name]:
            return f"{name} met"
    return "missed"


def target_table(result: Row) -> list[str]:
    """Counts, and each target with its floor and goal."""
    rows = judged(result)
    counts = [f"{name} {sum(r['verdict'] == name for r in rows)}" for name in VERDICTS]
    lines = [f"Of {len(rows)}: {', '.join(counts)}.", ""]
    columns = ["op", "size", "pass", "threads", "against", "measured", "floor", "goal", ""]
    cells = []
    for row in rows:
        sign = "≤ " if row["at_most"] else ""
        marks = [f"{row['ratio']:.3g}", f"{sign}{row['floor']:g}", f"{sign}{row['goal']:g}"]
        name = [row["op"], row["size"], pass_of(row), str(row["threads"]), row["against"]]
        cells.append([*name, *marks, row["verdict"]])
    return lines + table(columns, cells)


def pass_of(row: Row) -> str:
    """``forward``, ``forward, bf16``."""
    return f"{row['pass']}" + ("" if row["dtype"] == "fp32" else f", {row['dtype']}")


def ops_tables(result: Row) -> list[str]:
    """A table per operator: every size, pass and number of threads."""
    lines: list[str] = []
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["op"] == op]
        names = list(dict.fromkeys(name for row in own for name in row["others"]))
        columns = ["size", "pass", "threads", "ms", "of limit", "MiB", *names]
        cells = [[*_own_cells(row), *(_ratio(row, name) for name in names)] for row in own]
        lines += [f"### {op}", "", *table(columns, cells), ""]
    return [*lines, *conditions(result)]


def _own_cells(row: Row) -> list[str]:
    memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    fraction = f"{row['of_limit']:.2g} of {row['limit']}"
    return [row["size"], pass_of(row), str(row["threads"]), f"{row['ms']:.3g}", fraction, memory]


def _ratio(row: Row, name: str) -> str:
    timing = row["others"].get(name)
    if timing is None:
        return ""
    return "failed" if "failed" in timing else f"{timing['ratio']:.3g}×"


def conditions(result: Row) -> list[str]:
    """What the numbers hold for."""
    facts = result["hardware"]
    peers = ", ".join(f"{name} {version}" for name, version in result.get("peers", {}).items())
    lines = [
        f"Machine: {facts['device']}, {facts['cores']} cores, {facts['instructions']}, torch "
        f"{facts['torch']}; load {facts['load_before']:.1f} before and {facts['load_after']:.1f} "
        f"after. Peers: {peers}."
    ]
    for threads, reached in result.get("limits", {}).items():
        lines.append(
            f"Limits with {threads} thread{'s' if threads != '1' else ''}: "
            f"{reached['fp32']:.0f} GFLOP/s in fp32, {reached['bf16']:.0f} in bf16, "
            f"copy {reached['copy']:.0f} GB/s."
        )
    return lines


def evaluation_table(result: Row) -> list[str]:
    """Contestants of benchmarks/evaluation.py."""
    columns = ["", "seconds", "CPU seconds", "× as fast", "× in CPU", "GiB", "largest difference"]
    rows = [
        [
            name,
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['times_faster']:.1f}",
            f"{result['rows']['pycocotools']['cpu_seconds'] / row['cpu_seconds']:.1f}",
            f"{row['peak_gib']:.2f}",
            f"{row['largest_difference']:.0e}",
        ]
        for name, row in result["rows"].items()
    ]
    facts = result["hardware"]
    load = f"Load {facts['load_before']:.1f} before and {facts['load_after']:.1f} after."
    return [*table(columns, rows), "", load]


def detection_table(result: Row) -> list[str]:
    """Contestants of benchmarks/detect_speed.py."""
    columns = ["`detect`", "ms", "rounds", "× torchvision's speed"]
    rows = [
        [row["contestant"], f"{row['ms']:.0f}", str(row["rounds"]), f"{row['over_peer']:.3g}"]
        for row in result["rows"]
    ]
    facts = result["hardware"]
    load = (
        f"Threads: {facts['threads']}. Torch {facts['torch']}, torchvision {facts['torchvision']}; "
        f"load {facts['load_before']:.1f} before and {facts['load_after']:.1f} after."
    )
    return [*table(columns, rows), "", load]


def step_table(result: Row) -> list[str]:
    """Contestants of benchmarks/whole_models.py."""
    columns = ["", "ms", "× torchvision's speed", "rounds"]
    rows = [
        [r["contestant"], f"{r['ms']:,.0f}", f"{r['over_peer']:.2f}", str(r["rounds"])]
        for r in result["rows"]
    ]
    facts = result["hardware"]
    threads = f"{facts['threads']} thread{'' if facts['threads'] == 1 else 's'}"
    where = f"Batch {result['batch']}, {threads}. {_where(facts)}"
    return [*table(columns, rows), "", f"{where} torchvision {facts['torchvision']}."]


def wait_table(result: Row) -> list[str]:
    """Data sets and recipes of benchmarks/data_wait.py."""
    columns = ["data", "recipe", "batch", "images/s", "waits for data", "CPU ms of an image"]
    rows = [
        [
            r["data"],
            r["model"],
            str(r["batch"]),
            f"{r['images_per_second']:.2f}",
            f"{r['data_wait']:.1%}",
            f"{r['image_ms']:.1f}",
        ]
        for r in result["rows"]
    ]
    return [*table(columns, rows), "", _where(result["hardware"])]


def _where(facts: Row) -> str:
    return (
        f"Machine: {facts['device']}, {facts['cores']} cores, torch {facts['torch']}; load "
        f"{facts['load_before']:.1f} before and {facts['load_after']:.1f} after."
    )


SECTIONS: dict[str, tuple[str, Callable[[Row], list[str]]]] = {
    "targets": ("ops_cpu.json", target_table),
    "ops": ("ops_cpu.json", ops_tables),
    "evaluation": ("evaluation_cpu.json", evaluation_table),
    "detection": ("detect_speed_cpu.json", detection_table),
    "step": ("whole_models_cpu.json", step_table),
    "wait": ("data_wait_cpu.json", wait_table),
}


def render(text: str) -> str:
    """The page with its tables made anew; each stands between two marks."""
    for name, (file, make) in SECTIONS.items():
        path = RESULTS / file
        lines = [f"`benchmarks/results/{file}` is not there: not measured yet."]
        if path.exists():
            lines = make(json.loads(path.read_text(encoding="utf-8")))
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        if not between.search(text):
            raise SystemExit(f"{PAGE.name}: must have the mark <!-- {name} -->, got none")
        block = "\n".join(lines)
        text = between.sub(lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    new = render(text)
    if "--check" in sys.argv[1:]:
        raise SystemExit(0 if new == text else f"{PAGE.name}: must be made anew, got old tables")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
