"""Run folders: where they lie, which is found again, and that nothing is overwritten."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path

import pytest

from detkit.config import Config, resolve
from detkit.engine.run import (
    RunFolder,
    create_run,
    newest_run,
    resumable_run,
    runs,
    same_run,
)
from detkit.errors import ConfigError, DataError, StorageError

NOON = datetime(2026, 5, 4, 12, 0, 0)
LATER = datetime(2026, 5, 4, 12, 0, 1)


def make(root: Path, now: datetime, *files: str, config: Config | None = None) -> RunFolder:
    run = create_run("finetune", "frcnn fpn/tiny", config or Config(), root=root, now=now)
    for name in files:
        (run.path / name).touch()
    return run


def test_a_run_is_named_by_command_time_and_name(tmp_path: Path) -> None:
    run = make(tmp_path, NOON)
    assert run.path == tmp_path / "finetune" / "20260504-120000-frcnn-fpn-tiny"
    assert run.config() == Config()
    second = make(tmp_path, NOON)
    assert second.path.name == "20260504-120000-frcnn-fpn-tiny-2"


def test_the_newest_run_with_a_checkpoint_is_found(tmp_path: Path) -> None:
    assert newest_run("finetune", root=tmp_path) is None
    new = make(tmp_path, LATER, "last.pth", "best.pth")
    old = make(tmp_path, NOON, "last.pth")
    unfinished = make(tmp_path, datetime(2027, 1, 1))
    (tmp_path / "finetune" / "notes").mkdir()
    (tmp_path / "finetune" / "20990101-000000-empty").mkdir()
    assert runs("finetune", root=tmp_path) == [unfinished, new, old]
    assert newest_run(["pretrain", "finetune"], root=tmp_path) == new
    assert newest_run("pretrain", root=tmp_path) is None
    assert new.checkpoint() == new.best and old.checkpoint() == old.last


def test_runs_of_one_second_keep_their_order(tmp_path: Path) -> None:
    made = [make(tmp_path, NOON, "last.pth") for _ in range(11)]
    for i, run in enumerate(made):
        stamp = 10**9 * (i + 1)
        import os

        os.utime(run.config_path, ns=(stamp, stamp))
    assert runs("finetune", root=tmp_path) == made[::-1]


def test_resuming_finds_the_run_of_the_same_config(tmp_path: Path) -> None:
    other = resolve([{"optim": {"lr": 0.123456789}}])
    first = make(tmp_path, NOON, "last.pth", config=other)
    make(tmp_path, LATER, "last.pth")
    make(tmp_path, datetime(2027, 1, 1), config=other)  # nothing saved yet
    broken = make(tmp_path, datetime(2028, 1, 1), "last.pth")
    broken.config_path.write_text("[optim]\nspeed = 1\n")
    assert same_run("finetune", other, root=tmp_path) == first
    assert resumable_run("finetune", other, root=tmp_path) == first
    changed = resolve([{"optim": {"lr": 0.12345678}}])
    assert same_run("finetune", changed, root=tmp_path) is None
    out = first.path
    assert resumable_run("finetune", Config(), out=out, root=tmp_path) == first
    assert resumable_run("finetune", other, out=tmp_path / "new", root=tmp_path) is None


def test_out_is_the_run_folder_itself(tmp_path: Path) -> None:
    run = create_run("pretrain", "x", Config(), out=tmp_path / "deep" / "out")
    assert run.path == tmp_path / "deep" / "out" and run.is_run
    run.log.write_text("died early")
    (run.path / ".last.pth.77.tmp").touch()
    again = create_run("pretrain", "x", Config(), out=run.path)
    assert again == run and not again.log.exists()


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["thesis.tex"], "new, empty or an unfinished run, got a folder with other files .thesis"),
        (["config.toml", "thesis.tex"], "folder with other files"),
        (["metrics.jsonl"], "folder with other files"),
        (["config.toml", "last.pth"], "holds a trained run; continue it with --resume auto"),
        (["config.toml", "best.pth"], "holds a trained run"),
    ],
)
def test_out_never_overwrites_what_is_there(tmp_path: Path, names: list[str], match: str) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=match) as caught:
        create_run("pretrain", "x", Config(), out=tmp_path)
    assert caught.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_out_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, match in (("file", "got a file"), ("link", "dangling link")):
        with pytest.raises(ConfigError, match=match):
            create_run("pretrain", "x", Config(), out=tmp_path / name)
    with pytest.raises(StorageError, match="file/out: must be writable, got Not a directory"):
        create_run("pretrain", "x", Config(), out=tmp_path / "file" / "out")


def test_going_back_to_a_checkpoint_forgets_what_came_after(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for kind, step in (("train", 2), ("eval", 2), ("train", 4), ("eval", 4), ("train", 5)):
        run.append_metrics({"kind": kind, "step": step})
    with run.metrics.open("a") as file:
        file.write('{"kind": "train", "st')  # cut off by a crash
    run.trim_metrics(step=4, evaluated_step=2)
    expected = [("train", 2), ("eval", 2), ("train", 4)]
    assert [(line["kind"], line["step"]) for line in run.read_metrics()] == expected
    run.append_metrics({"kind": "train", "step": 5})
    assert len(run.metrics.read_text().splitlines()) == 4


def test_a_spoilt_metrics_file_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_text(json.dumps({"kind": "train", "step": 1}) + "\n[]\n")
    with pytest.raises(DataError, match="metrics.jsonl: line 2 must be a JSON object"):
        run.read_metrics()


def test_the_log_ends_with_the_reason(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    logger = logging.getLogger("detkit")
    handlers, level = list(logger.handlers), logger.level
    with pytest.raises(ConfigError), run.logging():
        logger.info("under way")
        raise ConfigError("that was it")
    assert (logger.handlers, logger.level) == (handlers, level)
    lines = run.log.read_text().splitlines()
    assert lines[0].endswith("INFO under way")
    assert lines[-1].endswith("ERROR ConfigError: that was it")
