"""Completion, colour, narrow terminals, pipes, and what doctor says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from detkit.cli.main import COMMANDS, run
from detkit.cli.tables import amount, print_table, rows_table, slim_table

ROOT = Path(__file__).parents[1]
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
STYLE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def detkit(tmp_path: Path) -> dict[str, str]:
    """An environment in which ``detkit`` is a command."""
    shim = tmp_path / "bin/detkit"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m detkit.cli "$@"\n')
    shim.chmod(0o755)
    return os.environ | {"PATH": f"{shim.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def completed(line: str, env: dict[str, str]) -> list[str]:
    """Words that bash offers for the last one of ``line``, by the script of README."""
    words = line.split(" ")
    script = f"""
eval "$(_DETKIT_COMPLETE=bash_source detkit)"
COMP_WORDS=({line}) COMP_CWORD={len(words) - 1}
_detkit_completion detkit
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("detkit pre", ["pretrain", "predict"]),
        ("detkit data con", ["convert"]),
        ("detkit finetune --batch", ["--batch-size"]),
        ("detkit finetune --recipe tiny/frcnn-f", ["tiny/frcnn-fpn"]),
        ("detkit finetune --detector maskr", ["maskrcnn-fpn"]),
        ("detkit finetune --set train.acc", ["train.accumulate="]),
        ("detkit data convert a b --to y", ["yolo"]),
    ],
)
def test_bash_completes(line: str, words: list[str], detkit: dict[str, str]) -> None:
    assert completed(line, detkit) == words


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script_that_completes(shell: str, detkit: dict[str, str]) -> None:
    """The script, checked by the shell where it is installed, and the answer it asks for."""
    env = detkit | {"_DETKIT_COMPLETE": f"{shell}_source"}
    script = subprocess.run(["detkit"], env=env, capture_output=True, text=True, check=True).stdout
    assert "_DETKIT_COMPLETE" in script
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=script, text=True).returncode == 0
    words, cword = ("detkit dec", "dec" if shell == "fish" else "1")
    env |= {"_DETKIT_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": cword}
    answer = subprocess.run(["detkit"], env=env, capture_output=True, text=True, check=True).stdout
    assert "decompose" in answer
    assert "finetune" not in answer


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Output as on a terminal of 80 columns."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return monkeypatch


def test_models_can_be_read_at_80_columns(
    terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["models"]) == 0
    lines = STYLE.sub("", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    assert run(["models", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    text = " ".join(" ".join(lines).split())
    for kind in ("backbones", "supernets", "detectors", "recipes"):
        for row in table[kind]:
            assert row["name"] in text
    for row in table["backbones"]:
        (line,) = [line for line in lines if line.startswith(row["name"] + " ")]
        assert line.rstrip().endswith(f"/{row['stages'][-1]['stride']}")


def test_no_color_means_none(
    terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    colour = re.compile(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|9[0-7])[0-9;]*m")
    table = slim_table("t", ["name", "value"], [["[red]x[/red]", 1]])
    print_table(table)
    assert colour.search(capsys.readouterr().out)
    terminal.setenv("NO_COLOR", "1")
    print_table(table)
    assert not colour.search(capsys.readouterr().out)


def test_a_narrow_terminal_loses_no_words(
    terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.setenv("COLUMNS", "40")
    summary = "a summary of several words that cannot stand in one line of forty columns"
    print_table(slim_table("", ["name", "what"], [["tiny/frcnn-fpn", summary]]))
    lines = STYLE.sub("", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 40
    words = " ".join(lines).split()
    assert [w for w in words if w in summary.split()] == summary.split()


def test_amounts_have_a_unit() -> None:
    assert [amount(n) for n in (25_557_032, 4_089_184_256, 699_904, 12)] == [
        "25.6 M",
        "4.09 G",
        "700 k",
        "12",
    ]


def test_a_reader_that_has_enough_is_no_error(detkit: dict[str, str]) -> None:
    """``detkit models | head -1``: no traceback, and plain text without style."""
    line = "detkit models | head -1; echo ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", line], env=detkit, capture_output=True, text=True)
    first, code = done.stdout.splitlines()
    assert (first.rstrip(), code) == ("backbones, as classifiers at 224x224", "0")
    assert done.stderr == ""
    assert not STYLE.search(done.stdout)


@pytest.mark.parametrize(
    "line",
    [
        "detkit --help | head -1",
        "detkit finetune --help | head -1",
        "detkit models --json | head -c 9",
        "detkit pretrain --data crops --set data.workers=1 --steps 1 --dry-run | head -1",
        "detkit pretrain --data crops --set data.workers=1 --steps 1 --dry-run 2>&1 | head -1",
        "detkit data show crops --json 2>&1 | head -c 9",
    ],
)
def test_no_command_minds_a_closed_pipe(line: str, detkit: dict[str, str], tmp_path: Path) -> None:
    """Neither its own nor its loader processes' output holds a traceback; code 0."""
    for number in range(8):
        file = tmp_path / "crops" / ("train", "val")[number % 2] / "ab"[number // 4]
        file.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (number, 100, 50)).save(file / f"{number}.png")
    script = f"{line}; code=${{PIPESTATUS[0]}}; echo; echo $code"
    done = subprocess.run(
        ["bash", "-c", script], env=detkit, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "0", done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "BrokenPipe" not in done.stdout + done.stderr


def test_a_file_that_is_not_there_gets_the_nearest_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    (tmp_path / "best.pth").write_bytes(b"")
    for line, hint in [
        (["finetune", "--data", "shape", "--steps", "1"], "'shapes'"),
        (["predict", "bst.pth", "x.jpg"], "'best.pth'"),
    ]:
        assert run(line) == 2
        assert f"did you mean {hint}?" in capsys.readouterr().err


def test_commands_load_only_what_they_need() -> None:
    """Help loads no torch; doctor, which must, nothing else that is slow."""
    slow = ("torch", "numpy", "matplotlib", "PIL", "pycocotools", "tensorboard", "onnx")
    for line, allowed in [
        (["--help"], ()),
        (["finetune", "--help"], ()),
        (["doctor"], ("torch", "numpy")),
    ]:
        code = (
            f"import sys, detkit.cli.main as m; m.run({line}); "
            f"sys.exit(','.join(n for n in {slow} if n in sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        loaded = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
        assert set(filter(None, loaded.split(","))) <= set(allowed), line


def test_doctor_begins_with_problems_and_their_fix(
    capsys: pytest.CaptureFixture[str], detkit: dict[str, str]
) -> None:
    assert run(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "no problems found"
    code = (
        "import sys; sys.modules['detkit._C'] = None; import warnings; warnings.simplefilter("
        "'ignore'); import detkit.cli.main as m; sys.exit(m.run(['doctor']))"
    )
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env=detkit | {"DETKIT_OPS": "auto"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    problems = [row for row in done.stdout.splitlines() if row.startswith("problem: ")]
    assert problems and "; " in problems[0]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("name", [*COMMANDS, "data check", "data convert", "data show"])
def test_help_shows_each_example_on_a_line_of_its_own(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "\\b" not in text
    _, examples = re.split(r"\n  Examples?:\n", text)
    lines = examples.split("\n\n")[0].splitlines()
    assert all(line.startswith(f"    detkit {name.split()[0]}") for line in lines)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_wide_table_comes_in_parts_that_fit(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve metrics of each class, in a pipe for which COLUMNS is set: nothing is cut."""
    monkeypatch.setenv("COLUMNS", str(width))
    columns = [f"AP{i}" for i in range(12)]
    rows = [["triangle", *(i / 1000 for i in range(12))], ["disc", *([None] * 12)]]
    print_table(rows_table("per class", ["class", *columns], rows))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    assert [w for w in words if w.startswith("AP")] == columns
    assert [w for w in words if w.startswith("0.")] == [f"{i / 1000:.3f}" for i in range(12)]
    assert words.count("disc") == words.count("triangle") > 1


@pytest.mark.parametrize("name", ["", "class"])
def test_twelve_metrics_come_as_six_and_six(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On 80 columns a part of nine and one of three would tear AR apart."""
    monkeypatch.setenv("COLUMNS", "80")
    values = [0.5] * 12
    table = {"": (METRICS, [values]), "class": (["class", *METRICS], [["a", *values]] * 2)}
    print_table(rows_table("bbox", *table[name]))
    heads = [line for line in capsys.readouterr().out.splitlines() if "AR" in line or "AP" in line]
    found = [[word for word in re.findall(r"\w+", line) if word != name] for line in heads]
    assert found == [METRICS[:6], METRICS[6:]]


def test_a_table_of_one_column_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Two paths of a supernet that were scored by nothing: no columns beside their names."""
    print_table(rows_table("paths", ["path"], [["1-2"], ["0-3"]]))
    assert {"1-2", "0-3"} <= set(capsys.readouterr().out.split())


def test_problems_of_a_set_are_lines_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "synth", str(tmp_path / "s"), "--train=2", "--val=1", "--size=64"]) == 0
    (tmp_path / "s/images/train/000001.png").unlink()
    capsys.readouterr()
    assert run(["data", "check", str(tmp_path / "s")]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"train: \d+\.png, image 1 \(skip\): image-missing, no such file", first)
