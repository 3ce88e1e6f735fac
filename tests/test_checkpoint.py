"""Checkpoints: what is written, that it survives crashes, and that nothing foreign gets in."""

from __future__ import annotations

import io
import os
import pickle
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import new_run, toy_config, train

from detkit.config import Config, to_plain
from detkit.engine import checkpoint
from detkit.engine.checkpoint import Checkpoint
from detkit.engine.run import RunFolder
from detkit.errors import CheckpointError, ConfigError, NonFiniteError, StorageError
from detkit.types import CategoryMap

SCRIPT = Path(__file__).with_name("toy_training.py")


def payload(**extra: Any) -> Checkpoint:
    content: dict[str, Any] = {
        "format": "detkit/1",
        "kind": "detector",
        "config": to_plain(Config()),
        "categories": CategoryMap(["cat", "dog"], [17, 3]).to_plain(),
        "model": {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(4)},
        "provenance": {"detkit": "0"},
    }
    return content | extra  # type: ignore[return-value]


# -- writing


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    ema = {"weight": torch.full((2, 3), 0.5), "count": torch.tensor(4)}
    checkpoint.save(tmp_path / "a.pth", payload(ema=ema, progress={"step": 3, "best": None}))
    loaded = checkpoint.load(tmp_path / "a.pth")
    assert loaded["progress"] == {"step": 3, "best": None}
    assert torch.equal(loaded["model"]["weight"], torch.arange(6.0).view(2, 3))
    assert checkpoint.deployed(loaded) is loaded["ema"]
    assert checkpoint.deployed(payload())["count"] == 4
    assert checkpoint.config_of(loaded) == Config()
    assert checkpoint.categories_of(loaded) == CategoryMap(["cat", "dog"], [17, 3])
    assert os.stat(tmp_path / "a.pth").st_mode & 0o777 == 0o666 & ~_umask()
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_same_contents_give_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    for name in ("one.pth", "another name.pth"):
        checkpoint.save(tmp_path / name, payload())
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "another name.pth").read_bytes()


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    view = torch.zeros(1_000_000)[:2]
    checkpoint.save(tmp_path / "a.pth", payload(model={"weight": view}))
    assert (tmp_path / "a.pth").stat().st_size < 20_000


def test_only_plain_types_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"checkpoint.provenance.path: .* got PosixPath"):
        checkpoint.save(tmp_path / "a.pth", payload(provenance={"path": tmp_path}))


def test_a_linked_checkpoint_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.pth").symlink_to(tmp_path / "disk" / "a.pth")
    checkpoint.save(tmp_path / "a.pth", payload())
    assert (tmp_path / "a.pth").is_symlink() and (tmp_path / "disk" / "a.pth").is_file()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_numbers_that_are_not_finite_are_never_saved(
    tmp_path: Path, part: str, value: float
) -> None:
    path = tmp_path / "a.pth"
    checkpoint.save(path, payload())
    before = path.read_bytes()
    spoilt = {"weight": torch.tensor([1.0, value])}
    if part == "optimizer":
        spoilt = {"state": {0: spoilt}, "param_groups": []}  # type: ignore[dict-item]
    with pytest.raises(NonFiniteError, match=f"got NaN or infinity in {part}.*weight"):
        checkpoint.save(path, payload(**{part: spoilt}))
    assert path.read_bytes() == before


def test_a_process_killed_while_saving_leaves_the_old_file(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, str(SCRIPT), "killed", str(tmp_path)], timeout=60)
    assert run.returncode == -signal.SIGKILL
    assert checkpoint.load(tmp_path / "last.pth")["progress"]["step"] == 6
    leftover = [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    assert len(leftover) == 1
    saved = checkpoint.load(tmp_path / "last.pth")
    train(RunFolder(tmp_path), toy_config(), resume=saved)
    assert not leftover[0].exists()


def test_a_file_too_large_for_the_disk_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    checkpoint.save(path, payload())
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StorageError, match="a.pth: must be writable, got File too large") as e:
            checkpoint.save(path, payload(model={"weight": torch.zeros(10_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert e.value.exit_code == 5
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no/a.pth: must be writable, got No such file"):
        checkpoint.save(tmp_path / "no" / "a.pth", payload())


# -- reading


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        checkpoint.load(path)
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.pth"
    checkpoint.save(path, payload())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(
        path,
        "must be a complete .pth file .*, got a truncated, damaged or foreign one",
    )


def test_one_flipped_bit_in_a_weight_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    checkpoint.save(path, payload())
    content = bytearray(path.read_bytes())
    at = content.find(torch.arange(6.0).numpy().tobytes())
    content[at + 6] ^= 1
    path.write_bytes(content)
    refused(path, "got a wrong checksum in its record .*data/0")


def test_damage_anywhere_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    checkpoint.save(path, payload())
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    failures = 0
    for _ in range(60):
        spoilt = bytearray(content)
        for at in torch.randint(0, len(content), (4,), generator=generator).tolist():
            spoilt[at] ^= 0xFF
        path.write_bytes(spoilt)
        try:
            loaded = checkpoint.load(path)  # padding between the records may change unnoticed
            assert torch.equal(loaded["model"]["weight"], payload()["model"]["weight"])
        except CheckpointError as error:
            assert "\n" not in str(error)
            failures += 1
    assert failures > 20


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("container", ["torch", "legacy", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(
    tmp_path: Path, container: str
) -> None:
    content = payload(provenance=Malicious(tmp_path / "owned"))
    path = tmp_path / "a.pth"
    if container == "pickle":
        path.write_bytes(pickle.dumps(content))
        refused(path, "must be a complete .pth file of tensors and plain types")
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "torch")
        refused(path, r"got a pickled (posix|nt).system \(not loaded\)")
    assert not (tmp_path / "owned").exists()
    if container != "pickle":  # the trap works: a reader that trusts the file springs it
        torch.load(path, weights_only=False)
        assert (tmp_path / "owned").exists()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"conv1.weight": torch.zeros(1), "bn1.weight": torch.zeros(1)}, path)
    refused(path, r"a dict without a format \(its keys: conv1.weight, bn1.weight\)")
    torch.save([torch.zeros(1)], path)
    refused(path, "must be a detkit/1 file, got a list")
    for content in (b"", b"{}", b"\x89PNG\r\n", "Übung".encode() * 1000):
        path.write_bytes(content)
        refused(path, "must be a complete .pth file")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "a zip, but no checkpoint")
    refused(path, "must be a complete .pth file")


def test_files_that_are_not_there_are_wrong_usage(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "no.pth", "nothing there"), (tmp_path, "a folder")):
        with pytest.raises(ConfigError, match=f"must be an existing file, got {what}$"):
            checkpoint.load(path)


def test_a_run_folder_is_answered_with_its_checkpoint(tmp_path: Path) -> None:
    for name in ("last.pth", "best.pth"):  # the best is preferred where both are
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ConfigError, match=f"got a folder; give {tmp_path / name}$"):
            checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "detkit/2"}, "format must be 'detkit/1', got 'detkit/2'; a newer detkit"),
        ({"kind": "segmenter"}, "kind must be one of backbone, .*, got 'segmenter'"),
        ({"kind": ["detector"]}, "must have 'kind' as a str, got list"),
        ({"model": None}, "must have 'model' as a dict, got NoneType"),
        ({"model": {"weight": 3}}, "model must hold tensors, got int in weight"),
        ({"ema": {"weight": "x"}}, "ema must hold tensors, got str in weight"),
        ({"categories": None}, "must have 'categories' as a dict"),
    ],
)
def test_contents_that_are_no_checkpoint_are_refused(
    tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    path = tmp_path / "a.pth"
    torch.save({**payload(), **change}, path)
    refused(path, match)


def test_another_kind_is_refused_where_it_does_not_do(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.pth", payload())
    with pytest.raises(CheckpointError, match="must be of kind gsl, got 'detector'"):
        checkpoint.load(tmp_path / "a.pth", kinds=["gsl"])


def test_a_config_or_categories_of_another_version_are_unusable() -> None:
    with pytest.raises(CheckpointError, match="unknown key optim.speed"):
        checkpoint.config_of(payload(config={"optim": {"speed": 1}}))
    for categories in ({"names": ["a"]}, {"names": ["a", "a"], "ids": [1, 2]}, {"names": 1}):
        with pytest.raises(CheckpointError, match="categories: must be names with ids"):
            checkpoint.categories_of(payload(categories=categories))


def test_reading_takes_torch_files_of_plain_tensors(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"conv1.weight": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pth").write_bytes(buffer.getvalue())
    assert torch.equal(checkpoint.read(tmp_path / "old.pth")["conv1.weight"], torch.ones(2))


def test_training_writes_what_loads(tmp_path: Path) -> None:
    config = toy_config(train={"ema": 0.9})
    result = train(new_run(tmp_path, config), config, provenance={"init_from": "x.pth"})
    saved = checkpoint.load(result.last, kinds=["backbone"])
    assert checkpoint.config_of(saved) == config
    assert saved["provenance"]["init_from"] == "x.pth" and saved["provenance"]["torch"]
    assert saved["categories"]["names"] == ["a", "b", "c", "d"]
