"""Every command of README and the pages: run as written, only shorter, or listed with why not.

What a page needs beside what it makes itself (sets, trained detectors) is prepared once. Of a
command whose output is shown, the shown lines must be in what it prints, numbers aside.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from doc_pages import PAGES, ROOT, Command, blocks, commands

import detkit.api
from detkit.cli.main import COMMANDS, cli, run
from detkit.config import recipe_path
from detkit.data import synthetic

PARSED = {
    r"--gpus 8|--coco|search-300m": "needs COCO or ImageNet and 8 GPUs; test_recipes*.py plan them",
    r"resnet50\.pth|_fpn\.pth": "needs torchvision's files; test_torchvision_weights.py makes them",
}
"""Lines that are only checked: the options exist, and so do the recipes."""

PARSED_PAGES = {
    "training": "test_rehearsal.py and test_log_formats.py run dry runs and formats",
    "performance": "measurements take minutes; test_bench.py runs each with few rounds",
    "cli": "examples of the help texts; each command runs on another page",
    "export": "an export takes half a minute of CPU; quickstart.md has the same commands",
}

NOT_RUN = {
    r"make |source |pip ": "builds, installs or changes the shell; CI calls the Makefile itself",
    r"python benchmarks/": "takes minutes to hours, `make nightly` runs it",
    r"python tools/": "writes pages or pictures; test_docs.py compares with what it would write",
    r"mkdir |cp |cat ": "joins VOC 2007 and 2012, which are not here",
}

PLANNED_PAGES = {"troubleshooting": "one option each: all but the training itself is run"}
ONCE = {r"export .* --verify|onnx_detect\.py": "quickstart", r"detkit report\b": "report"}
"""What runs on one page and is only parsed elsewhere, for its cost."""

SMALL = ["data.workers=0", "data.short_side=64", "data.long_side=64", "data.multi_scale=[]"]


def why_not(page: Path, line: str) -> str:
    """Why a line is not run: a reason of the lists above, or nothing."""
    reasons = [why for pattern, why in NOT_RUN.items() if re.match(pattern, line)]
    reasons += [why for pattern, why in PARSED.items() if re.search(pattern, line)]
    reasons += [PARSED_PAGES[page.stem]] if page.stem in PARSED_PAGES else []
    reasons += [f"runs on {p}.md" for s, p in ONCE.items() if page.stem != p and re.search(s, line)]
    return reasons[0] if reasons else ""


RUN_PAGES = [
    page for page in PAGES if any(not why_not(page, command.line) for command in commands(page))
]


# --- reading --------------------------------------------------------------------------------------


def test_no_command_hides_outside_of_sh_and_console_blocks() -> None:
    """Indented lines and blocks without a language would not be found."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"^    (\$ )?(detkit|python|make) ", text, re.MULTILINE), page
        for language, content in blocks(text):
            if language not in ("sh", "console", "text"):
                assert not re.search(r"^(\$ )?detkit ", content, re.MULTILINE), page


def test_each_reason_is_still_needed() -> None:
    lines = [command.line for page in PAGES for command in commands(page)]
    for pattern in [*PARSED, *NOT_RUN, *ONCE]:
        assert any(re.search(pattern, line) for line in lines), pattern
    assert {*PARSED_PAGES, *PLANNED_PAGES} <= {page.stem for page in PAGES}


def test_every_command_is_run_on_some_page() -> None:
    lines = [
        command.line
        for page in RUN_PAGES
        for command in commands(page)
        if not why_not(page, command.line)
    ]
    named = {line.split()[1] for line in lines if line.startswith("detkit ")}
    assert named >= set(COMMANDS) - {"demo", "bench"}  # of test_cli.py and test_bench.py
    assert {line.split()[2] for line in lines if line.startswith("detkit data ")} == {
        *("check", "convert", "show", "synth")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_that_are_not_run_are_those_of_the_program(page: Path) -> None:
    """Every option is one of its command, every recipe and script exists."""
    root = click.Context(cli)
    for command in commands(page):
        words = shlex.split(command.line)
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words[0] == "python":
            assert (ROOT / words[1]).is_file(), command.line
        if words[0] != "detkit" or "..." in command.line:
            continue
        context, name, rest = root, words[1], words[2:]
        found = cli.get_command(root, name)
        if isinstance(found, click.Group):
            context, name, rest = click.Context(found, parent=root), rest[0], rest[1:]
            found = found.get_command(context, name)
        assert found is not None, command.line
        found.make_context(name, rest, parent=context)  # refuses unknown options
        if "--recipe" in rest:
            recipe = rest[rest.index("--recipe") + 1]
            assert recipe.endswith(".toml") or recipe_path(recipe).is_file(), command.line


# --- running --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets, trained detectors of one step and a photo, under the names the pages use."""
    folder = tmp_path_factory.mktemp("prepared")
    synthetic.write(folder / "my_set", images_train=6, images_val=2, size=64)
    shutil.copytree(folder / "my_set", folder / "shapes")
    shutil.copytree(folder / "my_set/images/val", folder / "photos")
    for split in ("train", "val"):
        for n, name in enumerate(("upright", "lying")):
            target = folder / "crops" / split / name / "1.png"
            target.parent.mkdir(parents=True)
            shutil.copy(sorted((folder / "photos").iterdir())[n], target)
    line = ["finetune", "--data", str(folder / "my_set"), "--recipe", "tiny/frcnn-fpn"]
    assert run(shortened([*line, "--out", str(folder / "run")])) == 0
    assert run(shortened([*line, "--scales", "learn", "--out", str(folder / "gsl")])) == 0
    for name in ("demo", "other", "plain", "learn", "cells", "runs/finetune/20260101-000000-run"):
        shutil.copytree(folder / "run", folder / name)
    shutil.copy(folder / "run/best.pth", folder / "best.pth")
    shutil.copy(folder / "photos/000001.png", folder / "photo.jpg")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def few_of(source: Path, target: Path) -> None:
    """Some images of each split of a COCO set, and their annotations."""
    (target / "annotations").mkdir(parents=True)
    for split, count in (("train", 24), ("val", 6)):
        name = f"annotations/instances_{split}.json"
        content = json.loads((source / name).read_text(encoding="utf-8"))
        content["images"] = content["images"][:count]
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        (target / name).write_text(json.dumps(content), encoding="utf-8")
    (target / "images").symlink_to(source / "images")


def shortened(arguments: list[str]) -> list[str]:
    """The same command with one step, small images and sets, and little to calibrate."""
    name, words = arguments[0], list(arguments)
    own = {"--data", "--collect-scales", "--compare"} & {*words}
    if not own and name in ("pretrain", "finetune") and "--resume" not in words:
        words += ["--data", "crops" if name == "pretrain" else "shapes"]  # not 400 synthetic images
    for flag in ("--minutes", "--epochs", "--steps"):
        if flag in words:
            at = words.index(flag)
            del words[at : at + 2]
    if name in ("pretrain", "finetune") and "--collect-scales" not in words:
        words += ["--steps", "1", "--batch-size", "2"]
        extra = [*SMALL, "nas.eval_calibration=1", "nas.eval_paths=1", "nas.search_images=2"]
        supernet = any(
            "supernet" in word or word.startswith(("cls", "classifier")) for word in words
        )
        return words + [f"--set={s}" for s in (extra if supernet else SMALL)]
    if name == "search" and "--export" not in words:
        short = ("population=2", "generations=1", "calibration_steps=1")
        words += [f"--set=search.{setting}" for setting in short]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.stem)
def test_commands_run_as_written(
    page: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    todo = [c for c in commands(page) if not why_not(page, c.line)]
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True, symlinks=True)
    if any(re.search(r"\bbccd\b", command.line) for command in todo):
        few_of(request.getfixturevalue("real_data") / "bccd", tmp_path / "bccd")
    made = re.findall(r"--out (\S+)|data synth (\S+)", "\n".join(c.line for c in todo))
    for name in filter(None, (name for pair in made for name in pair)):
        shutil.rmtree(tmp_path / name, ignore_errors=True)  # the page makes it itself
    monkeypatch.chdir(tmp_path)
    if page.stem in PLANNED_PAGES:
        nothing = {"run": "", "checkpoint": "", "metrics": {"AP": None}}
        monkeypatch.setattr(detkit.api, "train", lambda *_, **__: nothing)
    for command in todo:
        capsys.readouterr()
        printed = output_of(command, capsys)
        for line in filter(None, map(str.strip, command.shown)):
            if line != "..." and not re.search(r"\.png: |^[a-z]+ +0\.", line):
                assert plain(line) in plain(printed), f"{command.line}: {line}"
    if page.stem == "README":
        for _, code in filter(lambda block: block[0] == "python", blocks(page.read_text("utf-8"))):
            exec(compile(code, str(page), "exec"), {})
        assert (tmp_path / "found.png").is_file()


def output_of(command: Command, capsys: pytest.CaptureFixture[str]) -> str:
    """What a line prints on stdout; fails where it fails."""
    words = shlex.split(command.line)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] == "python":
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert words[0] == "detkit", command.line
    assert run(shortened(words[1:])) == 0, (command.line, capsys.readouterr().err)
    return capsys.readouterr().out


def plain(text: str) -> str:
    """Without the frames of tables, with any number as #."""
    text = re.sub(r"\d[\d,]*(\.\d+)?(e[-+]\d+)?", "#", re.sub(r"[┏┳┓┡╇┩┃━│└┴┘─]", " ", text))
    return " ".join(text.split())
