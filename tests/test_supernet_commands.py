"""Supernets from the command line: what their runs keep, take over, refuse and repeat."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_sets import picture

from detkit import loading, supernet
from detkit.cli.main import run
from detkit.config import parse_override
from detkit.data import eval_batches, open_detection, train_batches
from detkit.engine import checkpoint as checkpoints
from detkit.engine import distributed
from detkit.engine.train import Fitting
from detkit.errors import CheckpointError
from detkit.models.backbones.shuffle_supernet import extract, find_supernet
from detkit.models.search_space import SearchSpace
from detkit.nas.calibrate import calibrate, statistics
from detkit.nas.paths import UniformPaths
from detkit.nas.split import SearchSplit
from detkit.types import Batch

OWN = """
[space]
name = "own"
blocks = [1, 2, 1, 1]
stem = 4
channels = [8, 12, 16, 24]
last = 16
ops = ["shuffle3", "xception"]
shuffle = 1

[model]
backbone = "detnas-supernet"
norm = "bn"

[nas]
search_images = 3
eval_paths = 2
eval_calibration = 1

[data]
short_side = 64
long_side = 64
multi_scale = []
workers = 0
channels = "bgr"
mean = [0, 0, 0]
std = [0.00392156862745098, 0.00392156862745098, 0.00392156862745098]

[train]
batch_size = 4
save_every = 2
"""
"""A space of its own and the paper's input: blue first, 0..255."""


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the one JSON object on stdout."""
    capsys.readouterr()
    code = run([*arguments, "--json", "--device", "cpu"])
    return code, json.loads(capsys.readouterr().out)


FINETUNE = ["finetune", "--data", "shapes", "--init-from", "classifier/last.pth", "--batch-size"]
FINETUNE += ["4", "--set", "nas.search_images=3", "--set", "data.workers=0", "--set"]
FINETUNE += ["data.multi_scale=[]", "--set", "nas.eval_paths=1", "--set", "nas.eval_calibration=1"]
FINETUNE += ["--set", "data.short_side=64", "--set", "data.long_side=64"]


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data, and the runs ``classifier`` and ``detector`` of one supernet."""
    folder = tmp_path_factory.mktemp("supernet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for split, count in (("train", 8), ("val", 2)):
            for name in ("cat", "dog"):
                target = folder / "crops" / split / name
                target.mkdir(parents=True)
                for i in range(count):
                    picture(64, 64, seed=i).save(target / f"{i}.png")
        assert run(["data", "synth", "shapes", "--train", "16", "--val", "2", "--size", "64"]) == 0
        shutil.rmtree("shapes/images/val")  # a supernet's training never looks there
        Path("own.toml").write_text(OWN)
        line = ["pretrain", "--data", "crops", "--config", "own.toml", "--steps", "3"]
        assert run([*line, "--out", "classifier", "--device", "cpu"]) == 0
        assert run([*FINETUNE, "--steps", "3", "--out", "detector", "--device", "cpu"]) == 0
        yield folder


@pytest.fixture
def there(road: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(road)
    return road


def test_checkpoints_say_what_the_supernet_is(there: Path) -> None:
    for stage, folder in (("pretrain", "classifier"), ("finetune", "detector")):
        for name in ("best", "last"):
            stored = checkpoints.load(f"{folder}/{name}.pth")
            assert (stored["kind"], stored["stage"]) == ("supernet", stage)
            space = SearchSpace.from_plain(stored["space"])
            assert (space.ops, space.shuffle) == (("shuffle3", "xception"), 1)
            assert ("search_split" in stored) == (stage == "finetune")
    loaded = loading.load("detector/best.pth")
    assert (loaded.kind, loaded.stage, loaded.space) == ("supernet", "finetune", space)
    data = loaded.config.data  # taken over from the classifier, and nobody said so twice
    assert (data.channels, data.mean, data.std) == ("bgr", (0, 0, 0), (1 / 255,) * 3)
    assert find_supernet(loaded.model).space == space


def test_the_images_for_the_search_are_kept_apart_and_written_down(there: Path) -> None:
    loaded = loading.load("detector/last.pth")
    split = loaded.search_split
    assert split is not None
    dataset = open_detection("shapes", "train", loaded.config.data)
    assert split == SearchSplit.draw(dataset.image_ids, 3, loaded.config.train.seed)
    assert len(split.search) == 3 and len(split.train) == 13
    written = json.loads(Path("detector/search_split.json").read_text())
    assert SearchSplit.from_plain(written) == split
    stored = checkpoints.load("detector/last.pth")
    config = replace(loaded.config, train=replace(loaded.config.train, seed=9))
    assert SearchSplit.draw(dataset.image_ids, 3, 9) != split
    assert supernet.hold_out(dataset, config, source=stored)[2] == split  # started from it
    fewer = dataset.take(range(10))
    drawn = supernet.hold_out(fewer, config, source=stored)[2]
    assert drawn == SearchSplit.draw(fewer.image_ids, 3, 9)
    part = dataset.take(split.indices(dataset.image_ids)[1])
    assert set(part.image_ids) == set(split.search)
    whole = {a["id"]: a for a in dataset.truth()["annotations"]}
    found = part.truth()["annotations"]
    assert found and all(whole[a["id"]] == a for a in found)


def test_only_neck_and_head_are_new_and_a_missing_weight_is_refused(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = checkpoints.load("classifier/last.pth")
    key = "backbone.stage3.1.1.main.0.weight"
    del stored["model"][key]
    checkpoints.save("lacking.pth", stored)
    line = [word.replace("classifier/last.pth", "lacking.pth") for word in FINETUNE]
    code, answer = call(capsys, *line, "--steps", "1")
    assert code == 3 and f"1 missing ({key}) and 0 left over" in answer["error"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.backbone=detnas-supernet:shuffle1", "model.backbone must agree"),
        ("model.backbone=detnas-supernet-tiny", "space: must be left out for"),
        ("space.shuffle=2", "the search space must be the supernet's own 'own', got shuffle 2"),
        ("space.ops=['xception', 'shuffle3']", "got ops ['xception', 'shuffle3'] for"),
        ("space.channels=[8, 12, 16, 32]", "got channels [8, 12, 16, 32] for"),
        ("data.channels=rgb", "data.channels must be as the supernet was trained, 'bgr', got"),
        ("data.std=[1, 1, 1]", "data.std must be as the supernet was trained"),
    ],
)
def test_using_a_supernet_otherwise_than_it_was_trained_is_refused(
    change: str, message: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer = call(capsys, *FINETUNE, "--steps", "1", "--set", change)
    assert message in answer["error"]
    assert code == (2 if "left out" in message else 3)
    if change.startswith(("space.", "data.")):
        layer = parse_override(change)
        with pytest.raises(CheckpointError, match="as the supernet was trained|supernet's own"):
            loading.load("detector/last.pth", overrides=[layer])


def test_a_supernet_alone_is_not_evaluated(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = call(capsys, "eval", "detector/last.pth", "--data", "shapes")
    assert code == 3 and "detkit search" in answer["error"]


@pytest.mark.parametrize("detector", ["retinanet", "light-head", "maskrcnn-fpn"])
def test_other_detectors_have_recipes_of_their_own(
    detector: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step of each; without paths to evaluate there is no best checkpoint."""
    line = ["--detector", detector, "--steps", "1", "--out", detector, "--set", "nas.eval_paths=0"]
    capsys.readouterr()
    assert run([*FINETUNE, *line, "--json", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert f"recipe tiny/supernet-{detector}" in said.err
    answer = json.loads(said.out)
    assert answer["checkpoint"].endswith("last.pth") and not answer["metrics"]
    assert sorted(path.name for path in Path(detector).glob("*.pth")) == ["last.pth"]
    assert loading.load(answer["checkpoint"]).config.model.detector == detector


def test_a_dry_run_tells_the_images_and_opens_no_validation_split(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, plan = call(capsys, *FINETUNE, "--steps", "1", "--dry-run", "--detector", "retinanet")
    assert code == 0
    train, held = plan["splits"]["train"], plan["splits"]["val"]
    assert (train["images"], held["images"]) == (13, 3)
    assert held["name"] == "held out of train"
    assert plan["config"]["model"]["backbone"] == "detnas-supernet"


def test_stopped_and_resumed_it_ends_with_the_same_bits(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths, split, sampling of RoIs and optimiser go on as if nothing had happened."""
    line = [*FINETUNE, "--set", "train.save_every=1", "--steps", "4"]
    assert call(capsys, *line, "--out", "whole")[0] == 0
    before = Fitting._report

    def stop(self: Fitting, *arguments: Any) -> None:
        before(self, *arguments)
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Fitting, "_report", stop)
        assert call(capsys, *line, "--out", "parts")[0] == 143
    assert 2 <= checkpoints.load("parts/last.pth")["progress"]["step"] < 4
    assert call(capsys, *line, "--out", "parts", "--resume", "auto")[0] == 0
    whole, parts = (checkpoints.load(f"{name}/last.pth") for name in ("whole", "parts"))
    assert whole["search_split"] == parts["search_split"]
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][k], v) for k, v in parts[part].items())
    momenta = [stored["optimizer"]["state"] for stored in (whole, parts)]
    assert momenta[0].keys() == momenta[1].keys()


def test_resuming_with_other_images_is_refused(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("detector", "foreign")
    stored = checkpoints.load("foreign/last.pth")
    stored["search_split"]["train"][0] = 4711
    checkpoints.save("foreign/last.pth", stored)
    code, answer = call(capsys, "finetune", "--resume", "foreign", "--steps", "5")
    assert code == 3 and "got 1 of them missing and 1 others" in answer["error"]


def test_a_path_of_a_file_is_a_plain_detector(there: Path) -> None:
    """With norms of its own it finds what the supernet finds on that path."""
    loaded = loading.load("detector/best.pth")
    genes = (1, 0, 1, 1, 0)
    find_supernet(loaded.model).set_path(genes)
    dataset = open_detection("shapes", "train", loaded.config.data)
    batch: Batch = next(train_batches(dataset, loaded.config))[0]
    norms = calibrate(loaded.model, [batch])
    image = next(eval_batches(dataset, loaded.config))
    with statistics(loaded.model, norms), torch.no_grad():
        (expected,) = loaded.model.detect(image.images, image.sizes)
    stored = loading.path_checkpoint(checkpoints.load("detector/best.pth"), genes, norms)
    checkpoints.save("path.pth", stored)
    single = loading.load("path.pth")
    assert single.kind == "detector"
    assert single.config.model.backbone == "detnas:own:1-01-1-0:shuffle1"
    with torch.no_grad():
        (found,) = single.model.detect(image.images, image.sizes)
    torch.testing.assert_close(found["boxes"], expected["boxes"])
    torch.testing.assert_close(found["scores"], expected["scores"])
    plain = loading.path_checkpoint(checkpoints.load("classifier/best.pth"), genes)
    assert plain["kind"] == "backbone"
    state = checkpoints.load("classifier/best.pth")["model"]
    same = extract(state, find_supernet(loaded.model).space, genes)
    assert all(torch.equal(plain["model"][k], v) for k, v in same.items())
    with pytest.raises(CheckpointError, match="must be of kind 'supernet', got 'detector'"):
        loading.path_checkpoint(stored, genes)


PROCESS = """
import json, sys
from detkit import supernet
from detkit.cli.main import run
from detkit.engine import distributed
from detkit.models.backbones.shuffle_supernet import find_supernet

paths, kept = [], supernet.follow_paths

def follow(model, config):
    inner, net = kept(model, config), find_supernet(model)
    def before_step(step):
        if paths:
            idle = [p.grad is None for choice in net._choices()
                    for gene, block in enumerate(choice) if gene != choice.gene
                    for p in block.parameters()]
            assert len(idle) > 20 and all(idle), "an idle block has a gradient"
        inner(step)
        paths.append(net.path)
        with open(f"paths{distributed.rank()}.json", "w") as file:
            json.dump(paths, file)
    return before_step

supernet.follow_paths = follow
distributed.leave(run(sys.argv[1:]))
"""


def test_two_processes_train_the_same_paths_and_agree_on_their_score(there: Path) -> None:
    """Norms over both, idle blocks without gradients, a different path at each step."""
    script = there / "process.py"
    script.write_text(PROCESS)
    line = ["pretrain", "--data", "crops", "--config", "own.toml", "--set", "model.norm=sync_bn"]
    line += ["--set", "train.log_every=1", "--steps", "5", "--out", "together", "--device", "cpu"]
    assert distributed.launch(2, [sys.executable, str(script), *line]) == 0
    first, second = (json.loads((there / f"paths{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first) == 5
    space = loading.load("together/last.pth").space
    assert space is not None
    sampler = UniformPaths(space, 0)
    assert [tuple(genes) for genes in first] == [sampler(step) for step in range(5)]
    metrics = [json.loads(row) for row in Path("together/metrics.jsonl").read_text().splitlines()]
    (evaluated,) = [row for row in metrics if row["kind"] == "eval"]
    assert 0 <= evaluated["metrics"]["top1"] <= 1
