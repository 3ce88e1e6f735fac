"""Training of supernets end to end: paths, idle blocks, images held out, refusals, resuming."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_sets import box, image, write_coco
from supernet_keys import block_of
from torch import Tensor

from detkit import api, supernet
from detkit.config import Config, resolve
from detkit.engine import checkpoint
from detkit.engine.run import create_run
from detkit.engine.train import fit
from detkit.errors import CheckpointError, ConfigError, DataError
from detkit.models.backbones.shuffle_supernet import find_supernet
from detkit.models.search_space import SPACES
from detkit.models.zoo import build_classifier
from detkit.nas.paths import UniformPaths
from detkit.nas.split import SearchSplit
from detkit.types import CategoryMap, ClassificationBatch

TINY = SPACES["tiny"]
SMALL: dict[str, dict[str, Any]] = {
    "space": {
        "name": "own",
        "blocks": [1, 2, 1, 1],
        "stem": 4,
        "channels": [8, 12, 16, 24],
        "last": 16,
        "ops": ["shuffle3", "xception"],
    },
    "model": {"backbone": "detnas-supernet", "norm": "bn"},
    "data": {"workers": 0, "channels": "bgr", "mean": [0, 0, 0], "std": [1 / 255] * 3},
    "nas": {"eval_paths": 1, "eval_calibration": 1},
}
"""A space of its own, small enough to train in seconds."""


def small(**tables: dict[str, Any]) -> Config:
    base = {table: dict(values) for table, values in SMALL.items()}
    return resolve([base, tables])


# -- idle blocks, through the training loop itself


def batches(start: int) -> Iterator[list[ClassificationBatch]]:
    step = start
    while True:
        own = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 32, 32, generator=own)
        yield [ClassificationBatch(images, torch.arange(4), [f"{step}"] * 4)]
        step += 1


@pytest.mark.parametrize(
    ("optim", "train"),
    [
        ({"name": "sgd", "weight_decay": 0.1}, {"clip": 1.0, "ema": 0.9}),
        ({"name": "adamw", "weight_decay": 0.1}, {"amp": "bf16", "accumulate": 2}),
    ],
    ids=["sgd", "adamw"],
)
def test_training_moves_the_blocks_of_the_path_and_no_others(
    optim: dict[str, Any], train: dict[str, Any], tmp_path: Path
) -> None:
    """Step by step through ``fit``: momentum, decay, clipping and averages leave the rest alone."""
    config = small(
        optim=optim,
        train={"steps": 12, "batch_size": 4, **train},
        eval={"metric": "top1"},
    )
    torch.manual_seed(0)
    model = build_classifier(config, 4)
    space = find_supernet(model).space
    states: list[dict[str, Tensor]] = []
    follow = supernet.follow_paths(model, config)
    assert follow is not None

    def before_step(step: int) -> None:
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        follow(step)

    def parts(start: int) -> Iterator[list[ClassificationBatch]]:
        for (whole,) in batches(start):
            count = config.train.accumulate
            yield [
                replace(whole, images=i, labels=t, files=["x"] * len(t))
                for i, t in zip(whole.images.chunk(count), whole.labels.chunk(count), strict=True)
            ]

    run = create_run("pretrain", "own", config, out=tmp_path / "run")
    fit(
        model,
        parts,
        config,
        steps_per_epoch=4,
        run=run,
        kind="supernet",
        categories=CategoryMap(list("abcd")),
        device="cpu",
        before_step=before_step,
    )
    states.append(model.state_dict())
    places = [(p.stage, p.index) for p in space.positions()]
    sampler, seen = UniformPaths(space, config.train.seed), set()
    paths = [sampler(step) for step in range(12)]
    for step in range(12):
        genes = paths[step]
        active = {(*place, gene) for place, gene in zip(places, genes, strict=True)}
        seen |= active
        for key, before in states[step].items():
            after, place = states[step + 1][key], block_of(key)
            if place is not None and place not in active:
                assert torch.equal(before, after), f"step {step}: {key} moved"
            elif key.endswith((".weight", ".bias")) and before.ndim == 1 and place is not None:
                assert not torch.equal(before, after), f"step {step}: {key} stayed"
    assert len(seen) == 2 * len(space)  # every block was active once, and idle at other times
    rests = {
        (i, genes[i])
        for genes, then, last in zip(paths, paths[1:], paths[2:], strict=False)
        for i in range(len(space))
        if genes[i] not in (then[i], last[i])
    }
    assert len(rests) > 3  # blocks that carried momentum and were idle twice in a row
    if config.train.ema:
        average = checkpoint.load(run.last)["ema"]
        assert all(bool(torch.isfinite(v).all()) for v in average.values())


# -- the split


def test_a_split_is_whole_disjoint_and_a_function_of_seed_and_ids() -> None:
    ids = [*range(100, 160), *(f"a{i}" for i in range(40))]
    split = SearchSplit.draw(ids, 15, seed=3)
    assert len(split.search) == 15
    assert not set(split.search) & set(split.train)
    assert set(split.search) | set(split.train) == set(ids)
    assert SearchSplit.draw(list(reversed(ids)), 15, seed=3) == split
    assert SearchSplit.draw(ids, 15, seed=4).search != split.search
    assert len(SearchSplit.draw(ids, 5000, seed=3).search) == 20  # a fifth at most
    assert SearchSplit.from_plain(split.to_plain()) == split
    shuffled = list(reversed(ids))
    train, search = split.indices(shuffled)
    assert sorted([*train, *search]) == list(range(100))
    assert {shuffled[i] for i in search} == set(split.search)


def test_splits_that_do_not_fit_are_refused() -> None:
    split = SearchSplit.draw(range(10), 2, seed=0)
    with pytest.raises(CheckpointError, match="got 1 of them missing and 2 others"):
        split.indices([*range(9), 20, 21])
    with pytest.raises(DataError, match="must have at least 5 training images"):
        SearchSplit.draw(range(4), 2, seed=0)
    with pytest.raises(DataError, match="image ids must be unique"):
        SearchSplit.draw([1, 1, 2, 3, 4, 5], 1, seed=0)
    plain = split.to_plain()
    plain["train"].append(plain["search"][0])
    with pytest.raises(CheckpointError, match="got 2 with 1 in both parts"):
        SearchSplit.from_plain(plain)
    with pytest.raises(CheckpointError, match="must hold seed, train and search"):
        SearchSplit.from_plain({"seed": 0})


def test_seven_and_the_text_seven_are_two_images() -> None:
    split = SearchSplit.draw([7, "7", 1, 2, 3], 1, seed=0)
    assert len(split.train) == 4 and split.indices(["7", 7, 1, 2, 3])


@pytest.mark.parametrize("backbone", ["resnet50-tiny", "detnas-supernet-tiny"])
def test_images_without_objects_are_left_out_of_training_alone(
    backbone: str, tmp_path: Path
) -> None:
    images = [image(n) for n in range(1, 11)]
    for split in ("train", "val"):
        write_coco(tmp_path, images, [box(n, n) for n in range(3, 11)], split=split)
    tables = {"model": {"backbone": backbone, "norm": "bn"}, "data": {"path": str(tmp_path)}}
    found = []
    for skip in (False, True):
        config = resolve([tables, {"data": {"skip_empty": skip}, "train": {"steps": 1}}])
        ready = api.prepare("finetune", config, torch.device("cpu"))
        found.append((len(ready.train_set), len(ready.val_set)))
    (kept, evaluated), (left, then) = found
    assert evaluated == then == (10 if backbone == "resnet50-tiny" else 2)
    held = SearchSplit.draw(range(1, 11), 2, 0).search if evaluated == 2 else ()
    empty = {1, 2} - set(held)
    assert kept == 10 - len(held) and left == kept - len(empty) and empty


# -- settings


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"model": {"norm": "frozen_bn"}}, "model.norm: must be bn, sync_bn or gn for a supernet"),
        ({"model": {"frozen_stages": 2}}, "model.frozen_stages: must be 0 or 1 for a supernet"),
        ({"model": {"scales": "learn"}}, "model.scales: must be 'off' for a supernet"),
        ({"nas": {"sampling": "macs-bins"}}, "macs-bins must go with the small space"),
        ({"nas": {"eval_paths": 0}, "eval": {"every": 5}}, "eval.every: must be 0 where"),
    ],
)
def test_settings_that_a_supernet_cannot_have_are_refused(
    tables: dict[str, Any], message: str
) -> None:
    config = small(**tables)
    with pytest.raises(ConfigError, match=message):
        supernet.check_settings(config)
        with torch.device("meta"):
            build_classifier(config, 4)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"nas": {"eval_paths": 5}}, "nas.eval_paths: must stay as it is for resnet50"),
        ({"space": {"name": "own"}}, "space: must be left out for resnet50"),
        (
            {"model": {"backbone": "detnas-supernet20"}, "space": {"name": "own"}},
            "space: must be left out for detnas-supernet20",
        ),
    ],
)
def test_tables_without_a_reader_are_refused(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve([tables])


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"name": "tiny"}, "space.name: must be letters, digits, dots and dashes, and none of"),
        ({"name": "a:b"}, "space.name: must be letters"),
        ({"channels": [8, 12]}, "channels must be 4 numbers"),
        ({"ops": ["shuffle9"]}, "ops must be of shuffle3"),
        ({"shuffle": 3}, "shuffle must be 1 or 2"),
    ],
)
def test_spaces_that_make_no_network_are_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        build_classifier(small(space=space), 4)


def test_a_space_of_ones_own_has_a_supernet_and_networks() -> None:
    with torch.device("meta"):
        one_shot = build_classifier(small(), 4)
        named = small(model={"backbone": "detnas:own:10110:shuffle1"}, nas=vars(Config().nas))
        single = build_classifier(named, 4)
    assert find_supernet(one_shot).space.size == 2**5
    assert single.backbone.space.shuffle == 1
    with pytest.raises(ConfigError, match="where there is no table"):
        build_classifier(resolve([{"model": {"backbone": "detnas-supernet", "norm": "bn"}}]), 4)
