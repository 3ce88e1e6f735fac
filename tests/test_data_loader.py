"""Batches: pure in seed and step, shared by ranks and parts, equal for any number of workers."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import box, image, save, write_coco

from detkit.config import Config, DataConfig, from_plain
from detkit.data import (
    DetectionDataset,
    eval_batches,
    open_classification,
    open_detection,
    steps_per_epoch,
    train_batches,
)
from detkit.data.plan import TrainPlan
from detkit.errors import ConfigError, DataError
from detkit.types import Batch

IMAGES = 10
SQUARE = [[5, 5, 25, 5, 25, 15, 5, 15]]


def settings(**changes: dict[str, Any]) -> Config:
    plain: dict[str, dict[str, Any]] = {
        "data": {
            "short_side": 32,
            "long_side": 64,
            "multi_scale": [24, 32],
            "color_jitter": 0.3,
            "min_crop": 0.6,
            "workers": 0,
            "pad_multiple": 16,
        },
        "train": {"batch_size": 4, "seed": 3},
    }
    for section, values in changes.items():
        plain.setdefault(section, {}).update(values)
    return from_plain(plain)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set")
    images = [image(k) for k in range(1, IMAGES + 1)]
    annotations = [box(k, k, segmentation=SQUARE) for k in range(1, IMAGES + 1)]
    annotations += [box(100, 2, category_id=7, iscrowd=1, segmentation=SQUARE)]
    return write_coco(path, images, annotations)


@pytest.fixture
def dataset(folder: Path) -> DetectionDataset:
    return open_detection(str(folder), "train", DataConfig(), masks=True)


def take(dataset: Any, config: Config, steps: int, **options: int) -> list[list[Any]]:
    batches = train_batches(dataset, config, **options)
    return [next(batches) for _ in range(steps)]


def same(a: Batch, b: Batch) -> bool:
    targets = zip(a.targets, b.targets, strict=True)
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.sizes, b.sizes)
        and a.files == b.files
        and a.image_ids == b.image_ids
        and all(
            torch.equal(x.boxes, y.boxes)
            and torch.equal(x.labels, y.labels)
            and torch.equal(x.iscrowd, y.iscrowd)
            and (x.masks is None or torch.equal(x.masks, y.masks))
            for x, y in targets
        )
    )


def test_a_step_is_a_function_of_seed_and_number(dataset: DetectionDataset) -> None:
    config = settings()
    run = take(dataset, config, 7)
    for start in (1, 3, 6):
        resumed = take(dataset, config, 7 - start, start_step=start)
        assert all(same(a, b) for [a], [b] in zip(run[start:], resumed, strict=True))
    other = take(dataset, settings(train={"seed": 4}), 7)
    assert [b.files for [b] in run] != [b.files for [b] in other]


def test_workers_change_nothing(dataset: DetectionDataset) -> None:
    alone = take(dataset, settings(), 6)
    shared = take(dataset, settings(data={"workers": 2}), 6)
    assert all(same(a, b) for [a], [b] in zip(alone, shared, strict=True))


def test_the_global_random_state_is_left_alone(dataset: DetectionDataset) -> None:
    before = torch.get_rng_state()
    take(dataset, settings(data={"workers": 1}), 2)
    list(eval_batches(dataset, settings()))
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_share_a_batch(dataset: DetectionDataset) -> None:
    whole = take(dataset, settings(), 4)
    ranks = [take(dataset, settings(), 4, rank=r, world=2) for r in range(2)]
    for step, [batch] in enumerate(whole):
        shares = [ranks[r][step][0] for r in range(2)]
        assert [len(s.files) for s in shares] == [2, 2]
        assert [
            f for pair in zip(*(s.files for s in shares), strict=True) for f in pair
        ] == batch.files


def test_parts_split_a_batch(dataset: DetectionDataset) -> None:
    whole = take(dataset, settings(), 4)
    parts = take(dataset, settings(train={"accumulate": 2}), 4)
    for [batch], pieces in zip(whole, parts, strict=True):
        assert len(pieces) == 2
        assert sum((p.files for p in pieces), []) == batch.files
        height, width = pieces[0].images.shape[2:]
        assert torch.equal(pieces[0].images, batch.images[:2, :, :height, :width])


def test_batch_size_must_split_evenly(dataset: DetectionDataset) -> None:
    with pytest.raises(ConfigError, match=r"multiple of .* = 3x1, got 4"):
        train_batches(dataset, settings(), world=3)
    with pytest.raises(ConfigError, match="1x3"):
        train_batches(dataset, settings(train={"accumulate": 3}))


def test_every_pass_has_every_image_once(dataset: DetectionDataset) -> None:
    """10 images in batches of 4: passes run into each other, none loses or repeats an image."""
    files = [f for [b] in take(dataset, settings(), 10) for f in b.files]
    passes = [files[k : k + IMAGES] for k in range(0, 40, IMAGES)]
    assert all(len(set(p)) == IMAGES for p in passes)
    assert len({tuple(p) for p in passes}) == 4
    assert steps_per_epoch(dataset, settings()) == 2.5


def test_views_change_from_pass_to_pass(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [image(1)], [box(1)])
    data = open_detection(str(folder), "train", DataConfig())
    config = settings(data={"multi_scale": []}, train={"batch_size": 1})
    views = [b.targets[0].boxes for [b] in take(data, config, 6)]
    assert len({tuple(v.flatten().tolist()) for v in views}) == 6


def test_a_set_smaller_than_a_batch(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [image(1), image(2)], [box(1)])
    data = open_detection(str(folder), "train", DataConfig())
    [batch] = take(data, settings(train={"batch_size": 6}), 1)[0]
    assert Counter(batch.files) == {"1.jpg": 3, "2.jpg": 3}


def test_upright_and_lying_images_are_kept_apart(tmp_path: Path) -> None:
    images = [image(k, height=60, width=40) if k % 2 else image(k) for k in range(1, 13)]
    folder = write_coco(tmp_path, images, [], write_images=False)
    for k in range(1, 13):
        save(folder / f"images/train/{k}.jpg", *((60, 40) if k % 2 else (40, 60)))
    data = open_detection(str(folder), "train", DataConfig())
    plan = TrainPlan(data, settings())
    upright = [[k.index % 2 == 0 for k in plan.step(t)] for t in range(48)]
    mixed = sum(any(step) and not all(step) for step in upright)
    assert mixed <= 3  # one in each window of 16 steps
    counts = Counter(k.index for t in range(48) for k in plan.step(t))
    assert set(counts.values()) == {16}  # 48 steps of 4 are 16 passes of 12
    assert plan.step(20) == TrainPlan(data, settings()).step(20)
    first = [step[0] for step in upright[:16]]
    assert first != sorted(first)  # the two kinds take turns at random


def test_one_scale_a_step(dataset: DetectionDataset) -> None:
    plan = TrainPlan(dataset, settings())
    scales = [{k.short_side for k in plan.step(t)} for t in range(20)]
    assert all(len(s) == 1 for s in scales)
    assert set.union(*scales) == {24, 32}


def test_batches_are_padded_with_zeros(dataset: DetectionDataset) -> None:
    for [batch] in take(dataset, settings(), 5):
        assert batch.images.shape[2] % 16 == 0 and batch.images.shape[3] % 16 == 0
        assert batch.sizes.max(0).values.tolist() <= list(batch.images.shape[2:])
        for pixels, (height, width) in zip(batch.images, batch.sizes.tolist(), strict=True):
            assert pixels[:, :height, :width].abs().sum() > 0
            assert pixels[:, height:].abs().sum() == pixels[:, :, width:].abs().sum() == 0


def test_targets(dataset: DetectionDataset) -> None:
    config = settings(data={"min_crop": 1.0, "flip": 0.0, "multi_scale": [], "color_jitter": 0.0})
    seen = 0
    for [batch] in take(dataset, config, 3):
        for target, identity in zip(batch.targets, batch.image_ids, strict=True):
            count = 2 if identity == 2 else 1
            assert target.labels.tolist() == [1, 2][:count]  # dataset ids 3 and 7
            assert target.iscrowd.tolist() == [False, True][:count]
            scale = torch.tensor([48 / 60, 32 / 40] * 2)  # 60x40 at short side 32
            expected = torch.tensor([5.0, 5.0, 25.0, 15.0]) * scale
            torch.testing.assert_close(target.boxes, expected.expand(count, 4))
            assert target.boxes.dtype == torch.float32 and target.labels.dtype == torch.int64
            assert target.masks is not None and target.masks.shape == (count, 32, 48)
            assert target.masks[0].sum() == pytest.approx(16 * 8, rel=0.15)
            seen += count
    assert seen > 10
    assert batch.original_sizes is not None
    assert batch.original_sizes.tolist() == [[40, 60]] * 4


def test_images_without_objects(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [image(1)], [])
    data = open_detection(str(folder), "train", DataConfig(), masks=True)
    [batch] = take(data, settings(), 1)[0]
    assert all(t.boxes.shape == (0, 4) and len(t.labels) == 0 for t in batch.targets)
    first = batch.targets[0].masks
    assert first is not None and first.shape == (0, *batch.sizes[0].tolist())


def test_difficult_objects_are_ignored_in_training(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [image(1)], [box(1), box(2, difficult=1)])
    data = open_detection(str(folder), "train", DataConfig())
    [batch] = take(data, settings(data={"min_crop": 1.0}), 1)[0]
    assert batch.targets[0].iscrowd.tolist() == [False, True]
    assert [a["difficult"] for a in data.truth()["annotations"]] == [0, 1]


def test_what_a_cut_leaves_of_an_object_is_ignored(tmp_path: Path) -> None:
    annotations = [box(1, bbox=[28, 18, 4, 4]), box(2, bbox=[0, 0, 20, 40])]
    data = open_detection(str(write_coco(tmp_path, [image(1)], annotations)), "train", DataConfig())
    config = settings(data={"min_crop": 0.5, "multi_scale": []}, train={"batch_size": 8})
    targets = [t for [b] in take(data, config, 10) for t in b.targets]
    seen = {(len(t.labels), bool(t.iscrowd[-1])) for t in targets}
    assert seen == {(1, False), (2, False), (2, True)}  # cut away, kept, and a rest of it
    assert not any(t.iscrowd[0] for t in targets)


def test_evaluation_sees_every_image_once_in_order(dataset: DetectionDataset) -> None:
    for workers in (0, 2):
        config = settings(data={"workers": workers})
        batches = list(eval_batches(dataset, config, batch_size=3))
        assert [len(b.files) for b in batches] == [3, 3, 3, 1]
        assert [i for b in batches for i in b.image_ids] == list(range(1, IMAGES + 1))
        assert all(b.sizes.tolist() == [[32, 48]] * len(b.files) for b in batches)
        assert all(not b.targets for b in batches)
    again = list(eval_batches(dataset, config, batch_size=3))
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))


def test_ranks_share_evaluation(dataset: DetectionDataset) -> None:
    shares = [
        [
            i
            for b in eval_batches(dataset, settings(), batch_size=2, rank=r, world=3)
            for i in b.image_ids
        ]
        for r in range(3)
    ]
    assert shares == [[1, 4, 7, 10], [2, 5, 8], [3, 6, 9]]
    assert list(eval_batches(dataset, settings(), rank=10, world=11)) == []


def _damage(folder: Path, number: int) -> None:
    """Breaks the pixels but not the end, so that it only shows when decoding."""
    file = folder / f"images/train/{number}.png"
    content = bytearray(file.read_bytes())
    start = content.index(b"IDAT") + 4
    content[start : start + 30] = bytes(30)
    file.write_bytes(content)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    images = [image(k, f"{k}.png") for k in range(1, 4)]
    folder = write_coco(tmp_path, images, [box(k, k) for k in range(1, 4)])
    _damage(folder, 2)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_files_are_replaced_in_training(
    damaged: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = open_detection(str(damaged), "train", DataConfig())
    with caplog.at_level(logging.WARNING, "detkit.data"):
        batches = take(data, settings(data={"workers": workers}), 6)
    files = Counter(f for [b] in batches for f in b.files)
    assert files == {"1.png": 8, "3.png": 16}  # the next image stands in
    assert data.report.counts == {"image-unreadable": 1}
    assert "2.png" in str(data.report.skipped_files[0])
    assert sum("2.png" in r.message for r in caplog.records) == 1
    alone = take(data, settings(), 6)
    assert all(same(a, b) for [a], [b] in zip(batches, alone, strict=True))


def test_damaged_files_are_left_out_of_evaluation(damaged: Path) -> None:
    data = open_detection(str(damaged), "train", DataConfig())
    batches = list(eval_batches(data, settings()))
    assert [b.image_ids for b in batches] == [[1], [3]]
    truth = data.truth()
    assert [i["id"] for i in truth["images"]] == [1, 3]
    assert [a["image_id"] for a in truth["annotations"]] == [1, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_files_stop_where_asked(damaged: Path, workers: int) -> None:
    data = open_detection(str(damaged), "train", DataConfig(on_bad_image="fail"))
    config = settings(data={"workers": workers})
    for batches in (train_batches(data, config), eval_batches(data, config)):
        with pytest.raises(DataError, match=r"2\.png: .*got") as caught:
            for _ in range(5):
                next(batches)
        assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_an_error(damaged: Path, workers: int) -> None:
    data = open_detection(str(damaged), "train", DataConfig())
    _damage(damaged, 1)
    _damage(damaged, 3)
    with pytest.raises(DataError, match="at least one readable image"):
        take(data, settings(data={"workers": workers}), 1)


def test_a_file_that_changes_size_is_noticed(damaged: Path) -> None:
    data = open_detection(str(damaged), "train", DataConfig(on_bad_image="fail"))
    save(damaged / "images/train/1.png", 41, 60)
    with pytest.raises(DataError, match="image-size|60x41"):
        list(eval_batches(data, settings()))


def test_workers_end_with_the_iterator(dataset: DetectionDataset) -> None:
    before = set(multiprocessing.active_children())
    batches = train_batches(dataset, settings(data={"workers": 2}))
    next(batches), next(batches)  # one of each worker: both have started
    children = set(multiprocessing.active_children()) - before
    assert len(children) == 2
    # Ctrl-C goes to the process group of the terminal; workers must not be in it.
    assert all(os.getpgid(c.pid or 0) != os.getpgrp() for c in children)
    batches.close()  # type: ignore[attr-defined]
    assert not any(c.is_alive() for c in children)


def test_a_killed_worker_is_an_error_with_a_hint(dataset: DetectionDataset) -> None:
    before = set(multiprocessing.active_children())
    batches = train_batches(dataset, settings(data={"workers": 1}))
    next(batches)
    [worker] = set(multiprocessing.active_children()) - before
    worker.kill()
    worker.join()
    with pytest.raises(DataError, match="lower data.workers"):
        for _ in range(10):
            next(batches)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 5), ("val", 2)):
        for name in ("a", "b"):
            for k in range(count):
                save(path / split / name / f"{k}.jpg", 40 + 10 * k, 60)
    return path


def test_classification_batches(classes: Path) -> None:
    config = settings(data={"min_crop": 0.3})
    data = open_classification(str(classes), "train", config.data)
    run = take(data, config, 5)
    shared = take(data, settings(data={"min_crop": 0.3, "workers": 2}), 5)
    for [a], [b] in zip(run, shared, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert a.images.shape in ((4, 3, 24, 24), (4, 3, 32, 32))
        assert a.labels.tolist() == ["ab".index(f[0]) for f in a.files]
    assert len({f for [b] in run for f in b.files}) == 10


def test_lighting_shifts_whole_images_when_training(classes: Path) -> None:
    dataset = open_classification(str(classes), "train", settings().data)
    std = torch.tensor(settings().data.std).reshape(3, 1, 1)
    [[plain]] = take(dataset, settings(), 1)
    [[lit]] = take(dataset, settings(data={"lighting": 0.1}), 1)
    shift = (lit.images - plain.images) * std  # the same views: what is drawn last differs
    each = shift.mean((2, 3))
    assert (shift - each[:, :, None, None]).abs().max() < 1e-5
    assert each.abs().max(1).values.min() > 0 and len({tuple(s) for s in each.tolist()}) == 4
    assert each.abs().max() < 0.2
    seen = [next(eval_batches(dataset, settings(data={"lighting": x}))).images for x in (0.0, 0.1)]
    assert torch.equal(*seen)


def test_classification_evaluation(classes: Path) -> None:
    config = settings()
    data = open_classification(str(classes), "val", config.data)
    [batch] = eval_batches(data, config, batch_size=8)
    assert batch.images.shape == (4, 3, 32, 32)
    assert batch.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(batch.files, ["a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg"])


def test_real_sets_make_batches(real_data: Path) -> None:
    config = settings(data={"short_side": 320, "long_side": 640, "multi_scale": []})
    for name, masks in (("coco_mini", True), ("raccoon_voc", False)):
        data = open_detection(str(real_data / name), "train", config.data, masks=masks)
        for [batch] in take(data, config, 3):
            assert torch.isfinite(batch.images).all()
            for target, (height, width) in zip(batch.targets, batch.sizes.tolist(), strict=True):
                assert (target.boxes >= 0).all()
                assert (target.boxes <= torch.tensor([width, height, width, height])).all()
                assert (target.boxes[:, 2:] > target.boxes[:, :2]).all()
                assert (target.masks is not None) == masks


def test_real_masks_lie_in_their_boxes(real_data: Path) -> None:
    config = settings(data={"short_side": 200, "long_side": 300, "multi_scale": []})
    data = open_detection(str(real_data / "nuts_seg"), "train", config.data, masks=True)
    checked = 0
    for [batch] in take(data, config, 3):
        for target in batch.targets:
            assert target.masks is not None
            for region, mask in zip(target.boxes, target.masks, strict=True):
                if mask.sum() < 20:
                    continue
                rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
                low = torch.stack([columns.min(), rows.min()])
                high = torch.stack([columns.max(), rows.max()]) + 1
                assert (low >= region[:2] - 1.5).all() and (high <= region[2:] + 1.5).all()
                checked += 1
    assert checked > 30
