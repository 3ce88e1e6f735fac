"""The built-in set: the same bytes everywhere, sound, and as the description says."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from detkit.config import DataConfig
from detkit.data import open_classification, open_detection, synthetic
from detkit.data.check import check
from detkit.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    synthetic.write(folder, images_train=6, images_val=3)
    return folder


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(file.relative_to(folder).as_posix().encode())
        total.update(file.read_bytes())
    return total.hexdigest()


def test_the_same_bytes_everywhere(written: Path, tmp_path: Path) -> None:
    assert digest(written) == "0564ce76456803ebf0b40835dd9039ece86e105f1325534083e106fc9ebe2a7b"
    crops = b"".join(synthetic.crop("train", k)[0].tobytes() for k in range(16))
    expected = "f9a2dd1b9bbada7bb179be24b72f6eaab77969c352e572547ae1e8eceaef3d24"
    assert hashlib.sha256(crops).hexdigest() == expected
    synthetic.write(tmp_path / "other", images_train=6, images_val=3, seed=1)
    assert digest(tmp_path / "other") != digest(written)


def test_more_images_keep_the_first_ones(written: Path, tmp_path: Path) -> None:
    synthetic.write(tmp_path / "set", images_train=7, images_val=0)
    for name in ("000001.png", "000006.png"):
        file = Path("images/train") / name
        assert (tmp_path / "set" / file).read_bytes() == (written / file).read_bytes()


def test_written_set_is_sound(written: Path) -> None:
    report = check(str(written))
    assert report.problems == 0
    assert [r.images for r in report.splits.values()] == [6, 3]


def test_pycocotools_reads_the_masks(written: Path) -> None:
    coco = COCO(str(written / "annotations/instances_train.json"))
    assert len(coco.anns) >= 6
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.sum() == annotation["area"]
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y, w, h = annotation["bbox"]
        assert [x, y, x + w - 1, y + h - 1] == [columns[0], rows[0], columns[-1], rows[-1]]


def test_in_memory_set_is_the_written_one(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "IMAGES", {"train": 6, "val": 3})
    for split in ("train", "val"):
        memory = open_detection("synthetic", split, DataConfig(), masks=True)
        disk = open_detection(str(written), split, DataConfig(), masks=True)
        assert memory.truth() == disk.truth()
        assert memory.categories == disk.categories
        for k in range(len(disk)):
            assert np.array_equal(memory.image(k), disk.image(k))


def test_scenes_vary_in_size_and_overlap() -> None:
    scenes = [synthetic.scene("train", k) for k in range(60)]
    sides = np.array([max(w, h) for s in scenes for _, _, w, h in s.boxes])
    assert 6 <= sides.min() < 16 and 170 < sides.max() <= 200
    assert np.mean(sides < 20) < 0.15  # few so small that their outline is guesswork
    assert {k for s in scenes for k in s.labels} == set(range(1, 9))
    assert max(len(s.labels) for s in scenes) > 4
    assert all(s.image.shape == (256, 256, 3) and s.image.dtype == np.uint8 for s in scenes)
    joined = [sum(m.astype(int) for m in s.masks) for s in scenes]
    assert all(j.max() == 1 for j in joined)  # masks hold what is in sight
    overlapping = sum(
        a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
        for s in scenes
        for i, a in enumerate(s.boxes)
        for b in s.boxes[i + 1 :]
    )
    assert overlapping > 30


def test_sides_are_log_uniform_and_fill_the_image() -> None:
    """Each octave from 8 to 128 as often as the next; hardly an object is left out."""
    scenes = [synthetic.scene("train", k, size=128, sides=(8, 128)) for k in range(150)]
    sides = np.array([max(w, h) for s in scenes for _, _, w, h in s.boxes])
    assert sides.min() < 10 and 120 < sides.max() <= 128  # in sight: later ones hide a part
    shares = np.histogram(np.log2(sides), [0, 4, 5, 6, 8])[0] / len(sides)
    assert shares == pytest.approx([0.25] * 4, abs=0.06)
    assert 3.2 < len(sides) / len(scenes) < 3.8  # 3.5 are drawn
    assert synthetic.scene("train", 0, sides=(9, 10)).boxes[0][3] <= 10


def test_splits_differ() -> None:
    train, val = synthetic.scene("train", 0), synthetic.scene("val", 0)
    assert not np.array_equal(train.image, val.image)


@pytest.mark.parametrize("name", synthetic.CLASSES)
def test_outlines_fill_their_box(name: str) -> None:
    """Each class reaches all four sides of its box, the moon all but the one it is hollow on."""
    n = 41
    s = n * n
    u = ((2 * np.arange(n) + 1 - n) * n)[None, :]
    mask = synthetic._inside(name, u, u.T, s)
    touched = [mask[:, 0].any(), mask[:, -1].any(), mask[0].any(), mask[-1].any()]
    if name == "moon":
        assert not mask[n // 2, n // 2 + 1] and mask[n // 2, 0]
    else:
        assert all(touched)
        assert np.array_equal(mask, mask[:, ::-1])


def test_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "CROPS", {"train": 24, "val": 8})
    data = open_classification("synthetic", "train", DataConfig())
    assert np.bincount(data.labels).tolist() == [3] * 8
    assert data.categories.names == synthetic.CLASSES
    assert data.image(0).size == (64, 64)
    assert len(open_classification("synthetic", "val", DataConfig())) == 8


def test_png_round_trip() -> None:
    """Large enough for several blocks of 65535 bytes, and one that ends at a block's border."""
    rng = np.random.default_rng(0)
    for shape in ((200, 180, 3), (1, 1, 3), (255, 85, 3), (257, 84, 3)):
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        data = synthetic.png(pixels)
        assert np.array_equal(Image.open(io.BytesIO(data)), pixels)


def test_json_is_plain(written: Path) -> None:
    content = json.loads((written / "annotations/instances_val.json").read_text())
    assert set(content) == {"images", "annotations", "categories"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 63}, "at least 64"),
        ({"images_train": -1}, "zero or more"),
        ({"seed": -1}, "zero or more"),
        ({"size": 64, "sides": (7, 64)}, "in 8..64, got 7 and 64"),
        ({"size": 64, "sides": (8, 65)}, "in 8..64, got 8 and 65"),
        ({"size": 64, "sides": (20, 20)}, "two rising numbers"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        synthetic.write(tmp_path / "set", **arguments)


def test_existing_files_are_not_overwritten(written: Path) -> None:
    with pytest.raises(ConfigError, match="new or empty folder"):
        synthetic.write(written, images_train=1, images_val=1)


def test_unknown_split() -> None:
    with pytest.raises((ConfigError, DataError), match="one of train, val, got 'test'"):
        open_detection("synthetic", "test", DataConfig())
    with pytest.raises(DataError, match="one of train, val, got 'test'"):
        open_classification("synthetic", "test", DataConfig())
