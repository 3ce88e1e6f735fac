"""Batches kept in memory: the loader's own numbers, whatever fits."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from data_sets import box, image, save, write_coco

from detkit.config import Config, from_plain
from detkit.data import eval_batches, open_detection, train_batches
from detkit.data.cache import CachedBatches, evaluation_keys, training_keys
from detkit.types import Batch

SQUARE = [[5, 5, 25, 5, 25, 15, 5, 15]]


def settings(**data: Any) -> Config:
    plain = {"short_side": 32, "long_side": 64, "multi_scale": [24, 32], "color_jitter": 0.3}
    plain |= {"lighting": 0.1, "workers": 0, "pad_multiple": 16}
    return from_plain({"data": plain | data, "train": {"batch_size": 3, "seed": 3}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set")
    shapes = [(40, 30), (30, 40), (40, 40), (41, 30), (40, 30), (30, 40)]
    images = [image(k, width=w, height=h) for k, (w, h) in enumerate(shapes, 1)]
    boxes = [box(k, k, segmentation=SQUARE) for k in range(1, len(images) + 1)]
    write_coco(path, images, boxes)
    for k, (w, h) in enumerate(shapes, 1):
        save(path / "images" / "train" / f"{k}.jpg", h, w)
    return path


def same(one: Batch, other: Batch) -> None:
    assert one.files == other.files and one.image_ids == other.image_ids
    assert torch.equal(one.images, other.images) and torch.equal(one.sizes, other.sizes)
    assert torch.equal(one.original_sizes, other.original_sizes)
    for a, b in zip(one.targets, other.targets, strict=True):
        assert torch.equal(a.boxes, b.boxes) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.iscrowd, b.iscrowd) and torch.equal(a.masks, b.masks)


@pytest.mark.parametrize("limit", [0, 20_000, 10**9])
@pytest.mark.parametrize("resize", ["antialias", "torchvision"])
def test_training_batches_are_the_loaders(
    folder: Path, limit: int, resize: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(resize=resize)
    dataset = open_detection(str(folder), "train", config.data, masks=True)
    expected = [part for (part,) in islice(train_batches(dataset, config), 4)]
    with caplog.at_level(logging.WARNING):
        kept = CachedBatches(
            dataset, config, training_keys(dataset, config, 4), training=True, limit=limit
        )
    assert kept.kept_bytes <= limit and (limit > 0) == (kept.kept_bytes > 0)
    assert ("will be read again" in caplog.text) == (limit < 10**9)
    for _ in range(2):  # the second pass gives what the first gave
        for one, other in zip(kept, expected, strict=True):
            same(one, other)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_images_scored_are_padded_as_alone(folder: Path, limit: int) -> None:
    config = settings()
    dataset = open_detection(str(folder), "train", config.data)
    alone = {batch.image_ids[0]: batch for batch in eval_batches(dataset, config)}
    keys = evaluation_keys(dataset, config, 4)
    assert sorted(map(len, keys)) == [1, 2, 3]
    kept = CachedBatches(dataset, config, keys, training=False, limit=limit)
    seen = []
    for batch in kept:
        seen += batch.image_ids
        for i, image_id in enumerate(batch.image_ids):
            assert torch.equal(batch.images[i], alone[image_id].images[0])
    assert sorted(seen) == sorted(alone)
    some = evaluation_keys(dataset, config, 4, [1, 3])
    assert sorted(key.index for batch in some for key in batch) == [1, 3]


@pytest.mark.parametrize("limit", [0, 10**9])
def test_a_damaged_file_is_known_before_anything_is_scored(folder: Path, limit: int) -> None:
    config = settings()
    dataset = open_detection(str(folder), "train", config.data)
    path = dataset.path(2)
    assert path is not None
    content = path.read_bytes()
    path.write_bytes(content[:60])
    try:
        keys = evaluation_keys(dataset, config, 4)
        kept = CachedBatches(dataset, config, keys, training=False, limit=limit)
        assert dataset.damaged == {2}
        assert len(dataset.truth()["images"]) == 5
        assert sum(len(batch.images) for batch in kept) == 5
    finally:
        path.write_bytes(content)
