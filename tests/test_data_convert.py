"""Conversions both ways, cleaned copies, and what each layout cannot hold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import CATEGORIES, box, image, save, write_coco
from PIL import Image

from detkit.cli.main import run
from detkit.config import DataConfig
from detkit.data.check import check
from detkit.data.convert import LAYOUTS, convert, fix
from detkit.data.open import open_detection, splits
from detkit.errors import DataError, StorageError

Objects = dict[str, list[tuple[Any, ...]]]


def objects(path: Path | str, split: str) -> Objects:
    """File stem to its sorted (class, crowd or difficult, x, y, width, height)."""
    dataset = open_detection(str(path), split, DataConfig())
    found: Objects = {}
    for index, file in enumerate(dataset.files):
        rows = dataset.annotations(index)
        found[Path(file).stem] = [
            (
                dataset.categories.name(dataset.categories.label(row["category_id"])),
                bool(row["iscrowd"] or row["difficult"]),
                *row["bbox"],
            )
            for row in rows
        ]
        found[Path(file).stem].sort(key=lambda row: [*row[:2], *(round(v, 3) for v in row[2:])])
    return found


def assert_same(got: Objects, wanted: Objects) -> None:
    """Same images, classes and flags; boxes to a millionth of a pixel."""
    assert got.keys() == wanted.keys()
    for stem, rows in wanted.items():
        assert [row[:2] for row in got[stem]] == [row[:2] for row in rows]
        ours, theirs = ([row[2:] for row in side] for side in (got[stem], rows))
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=0, atol=1e-6)


def without_ignored(found: Objects) -> Objects:
    return {stem: [row for row in rows if not row[1]] for stem, rows in found.items()}


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("name", ["bccd", "raccoon_voc", "coco_mini", "nuts_seg"])
def test_real_sets_go_there_and_back(name: str, to: str, real_data: Path, tmp_path: Path) -> None:
    source = str(real_data / name)
    done = convert(source, tmp_path / "there", to, link=False)
    back = convert(str(tmp_path / "there"), tmp_path / "back", "coco", link=True)
    for split in ("train", "val"):
        wanted = objects(source, split)
        wanted = without_ignored(wanted) if to == "yolo" else wanted
        assert_same(objects(tmp_path / "there", split), wanted)
        assert_same(objects(tmp_path / "back", split), wanted)
        count = sum(map(len, wanted.values()))
        assert done.splits[split] == back.splits[split] == {"images": len(wanted), "boxes": count}
    assert not done.left_out
    files = [Path(f) for f in (tmp_path / "there").rglob("*.jp*g")]
    originals = {f.name: f for f in (real_data / name).rglob("*.jp*g")}
    assert all(f.read_bytes() == originals[f.name].read_bytes() for f in files)


def test_coco_comes_back_whole(real_data: Path, tmp_path: Path) -> None:
    """Ids, areas, crowds and masks of COCO json are those of the source, to the last bit."""
    source = str(real_data / "coco_mini")
    convert(source, tmp_path / "copy", "coco")
    for split in ("train", "val"):
        sets = [open_detection(str(p), split, DataConfig()) for p in (source, tmp_path / "copy")]
        assert sets[0].truth() == sets[1].truth()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """COCO json with everything that another layout cannot hold."""
    polygon = [[5.5, 5, 20, 5, 20, 15]]
    annotations = [
        box(11, 1, bbox=[5.25, 5, 14.5, 10], segmentation=polygon),
        box(12, 1, iscrowd=1, category_id=7),
        box(13, 2, bbox=[3, 4, 1, 9]),  # one pixel wide
        box(14, 2, segmentation={"size": [40, 60], "counts": [0, 2400]}, attributes={"wet": 1}),
    ]
    images = [image(1, "a/1.jpg"), image(2, "b/1.png"), image(5, "odd name"), image(6, "1.jpg")]
    folder = write_coco(
        tmp_path / "mixed",
        images,
        annotations,
        write_images=False,
        categories=[*CATEGORIES, {"id": 9, "name": 'it\'s \\ #1: a "fox"'}],
    )
    for entry in images:
        kind = "PNG" if entry["file_name"] == "b/1.png" else "JPEG"
        save(folder / "images/train" / entry["file_name"], format=kind)
    return folder


def test_what_voc_cannot_hold_is_counted(mixed: Path, tmp_path: Path) -> None:
    done = convert(str(mixed), tmp_path / "voc", "voc")
    assert done.not_held == {
        "boxes in parts of pixels, written as decimals": 1,
        "boxes of one pixel or less, left out": 1,
        "categories without objects": 1,
        "category ids": 3,
        "crowd regions, written as difficult": 1,
        "file names, changed to be unique or to fit": 3,
        "ids of images and annotations": 8,
        "masks": 2,
        "the key 'attributes'": 1,
    }
    assert done.splits == {"train": {"images": 4, "boxes": 3}}
    names = sorted(p.name for p in (tmp_path / "voc/JPEGImages").iterdir())
    assert names == ["1.jpg", "a_1.jpg", "b_1.png", "odd_name.jpg"]
    found = objects(tmp_path / "voc", "train")
    assert found["a_1"] == [("cat", False, 5.25, 5, 14.5, 10), ("dog", True, 5, 5, 20, 10)]
    assert found["odd_name"] == []


def test_what_yolo_cannot_hold_is_counted(mixed: Path, tmp_path: Path) -> None:
    done = convert(str(mixed), tmp_path / "yolo", "yolo", dry_run=True)
    assert not (tmp_path / "yolo").exists()
    assert done.not_held["masks"] == 2
    with pytest.raises(DataError, match="a line of yaml"):  # no quoting of yaml holds this name
        convert(str(mixed), tmp_path / "yolo", "yolo")
    assert not list(tmp_path.glob("*yolo*"))
    file = mixed / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["categories"][2]["name"] = 'a "fox": #1'
    file.write_text(json.dumps(content))
    done = convert(str(mixed), tmp_path / "yolo", "yolo", polygons=True)
    assert done.not_held == {
        "category ids": 3,
        "crowd regions, left out": 1,
        "file names, changed to be unique or to fit": 1,
        "ids of images and annotations": 8,
        "masks": 1,
        "the key 'attributes'": 1,
    }
    dataset = open_detection(str(tmp_path / "yolo"), "train", DataConfig())
    assert dataset.categories.names == ("cat", "dog", 'a "fox": #1')
    (row,) = dataset.annotations(dataset.files.index("a/1.jpg"))
    np.testing.assert_allclose(row["segmentation"][0], [5.5, 5, 20, 5, 20, 15], atol=1e-6)


def test_voc_flags_and_whole_corners_survive(real_data: Path, tmp_path: Path) -> None:
    """Whole pixels stay whole numbers, which is all that some readers of VOC take."""
    source = tmp_path / "voc"
    shutil.copytree(real_data / "raccoon_voc", source)
    sheet = source / "Annotations/raccoon-107.xml"
    sheet.write_text(sheet.read_text().replace("<difficult>0", "<difficult>1"))
    convert(str(source), tmp_path / "coco", "coco")
    convert(str(tmp_path / "coco"), tmp_path / "back", "voc")
    for split in splits(str(tmp_path / "back")):
        assert_same(objects(tmp_path / "back", split), objects(source, split))
    text = (tmp_path / "back/Annotations/raccoon-107.xml").read_text()
    assert "<difficult>1</difficult>" in text
    assert all("." not in line for line in text.splitlines() if "<x" in line or "<y" in line)
    done = convert(str(source), tmp_path / "yolo", "yolo")
    assert done.not_held == {"difficult flags": 1}
    assert done.notes == ["split trainval: not written, its images are all in other splits"]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_boxes_on_stored_pixels_are_turned(orientation: int, tmp_path: Path) -> None:
    """The pixels inside a box are the same before and after, and so is its mask."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    marked = np.zeros((40, 60, 3), dtype=np.uint8)
    marked[5:15, 5:25] = 255
    other = orientation if orientation >= 5 else 6  # tells what half turns of the set mean
    folder = write_coco(
        tmp_path / "set",
        [image(1, "1.png"), image(2, "2.png")],
        [
            box(1, 1, segmentation=[[5, 5, 25, 5, 25, 15, 5, 15]]),
            box(2, 2),
            box(3, 1, segmentation={"size": [40, 60], "counts": [205, 10, 2185]}),
        ],
        write_images=False,
    )
    for number, turn in ((1, orientation), (2, other)):
        exif[0x0112] = turn
        Image.fromarray(marked).save(folder / f"images/train/{number}.png", exif=exif)
    convert(str(folder), tmp_path / "turned", "coco")
    dataset = open_detection(str(tmp_path / "turned"), "train", DataConfig(), masks=False)
    assert not dataset.report.counts
    shown = np.asarray(dataset.image(0))
    rows = {row["id"]: row for row in dataset.annotations(0)}
    x, y, w, h = (round(v) for v in rows[1]["bbox"])
    inside = shown[y : y + h, x : x + w]
    assert inside.min() == 255 and shown.sum() == inside.sum()
    polygon = np.reshape(rows[1]["segmentation"][0], (-1, 2))
    assert polygon.min(axis=0).tolist() == [x, y]
    assert polygon.max(axis=0).tolist() == [x + w, y + h]
    assert rows[3]["segmentation"]["size"] == list(shown.shape[:2])


def test_labels_that_fit_only_the_other_grid_are_read_there(tmp_path: Path) -> None:
    """Tools show an image upright and note the size of the stored pixels, or the other way."""
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = image(1, "1.jpg", width=60, height=40)  # stored 60x40, shown 40x60
    stored = image(2, "2.jpg", width=40, height=60)
    plain = image(3, "3.jpg", width=60, height=40)
    folder = write_coco(
        tmp_path / "set",
        [shown, stored, plain],
        [
            box(1, 1, bbox=[5, 30, 20, 25]),
            box(2, 2, bbox=[30, 5, 25, 20]),
            box(3, 3, bbox=[0, 0, 9, 9]),
        ],
        write_images=False,
    )
    for number in (1, 2, 3):
        save(folder / f"images/train/{number}.jpg", exif=exif)
    report = check(str(folder)).splits["train"]
    told = {p.file: p.what for p in report.problems if p.rule == "image-orientation"}
    assert "fit the image as shown" in told["1.jpg"]
    assert "stored pixels" in told["2.jpg"]
    assert "stored pixels" in told["3.jpg"]  # the box fits both, so the size tells
    dataset = open_detection(str(folder), "train", DataConfig())
    assert [dataset.size(k) for k in range(3)] == [(60, 40), (40, 60), (40, 60)]
    assert [dataset.image(k).size for k in range(3)] == [(40, 60), (60, 40), (60, 40)]


def dirty_set(folder: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_coco(
        folder,
        [image(1), image(2), image(3), image(4, "turned.jpg")],
        [
            box(0, 1),
            box(2, 1, bbox=[50, 30, 30, 30], area=None),
            box(2, 1, bbox=[5, 5, 0, 10]),
            box(4, 1, category_id=99),
            box(5, 2, bbox=[1, 1, float("nan"), 3]),
            box(6, 9),
            box(7, 3),
            box(8, 4, bbox=[50, 30, 8, 6], iscrowd=None),
        ],
        write_images=False,
    )
    save(folder / "images/train/1.jpg")
    save(folder / "images/train/2.jpg")
    save(folder / "images/train/turned.jpg", exif=exif)
    cut = (folder / "images/train/1.jpg").read_bytes()
    (folder / "images/train/3.jpg").write_bytes(cut[: len(cut) // 2])
    return folder


def test_a_cleaned_copy_has_no_problems_and_lists_what_was_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dirty_set(tmp_path / "dirty")
    before = check(str(source))
    assert run(["data", "check", str(source), "--fix", str(tmp_path / "clean"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["problems"] == before.problems > 8
    assert check(str(tmp_path / "clean")).problems == 0
    changes = json.loads((tmp_path / "clean/changes.json").read_text())["changes"]
    assert changes["train"] == before.to_plain()["splits"]["train"]["problems"]
    dataset = open_detection(str(tmp_path / "clean"), "train", DataConfig())
    assert dataset.files == ["1.jpg", "2.jpg", "turned.jpg"]
    assert [row["bbox"] for row in dataset.annotations(0)] == [[5, 5, 20, 10], [50, 30, 10, 10]]
    assert dataset.annotations(2)[0]["bbox"] == [4, 50, 6, 8]  # upright: 40 - 36, 50
    assert dataset.size(2) == (60, 40)
    again, report = fix(str(tmp_path / "clean"), tmp_path / "again")
    assert report.problems == 0
    assert not again.repaired and not again.left_out


@pytest.mark.parametrize("name", ["raccoon_voc", "bccd"])
def test_cleaning_a_sound_set_changes_nothing(name: str, real_data: Path, tmp_path: Path) -> None:
    source = str(real_data / name)
    done, report = fix(source, tmp_path / "clean", link=False)
    assert done.to == done.layout == report.layout
    for split in splits(source):
        assert_same(objects(tmp_path / "clean", split), objects(source, split))


def test_one_annotation_file_keeps_its_split(mixed: Path, tmp_path: Path) -> None:
    file = mixed / "annotations/instances_train.json"
    val = tmp_path / "val2017.json"
    val.write_text(file.read_text())
    config = DataConfig(images=str(mixed / "images/train"))
    done = convert(str(val), tmp_path / "out" / "deep", "coco", config=config)
    assert list(done.splits) == ["val2017"]
    assert splits(str(tmp_path / "out/deep")) == ["val2017"]


def test_links_share_the_file(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(str(mixed), tmp_path / "linked", "coco", link=True)
    pair = [folder / "images/train/a/1.jpg" for folder in (mixed, tmp_path / "linked")]
    assert pair[0].samefile(pair[1])

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="leave --link out"):
        convert(str(mixed), tmp_path / "other", "coco", link=True)
    assert {p.name for p in tmp_path.iterdir()} == {"mixed", "linked"}


def test_a_kill_leaves_nothing_that_looks_whole(mixed: Path, tmp_path: Path) -> None:
    """Killed while writing, the target is not there; what is left is hidden and named a part."""
    code = """
import sys, time
from detkit.data import convert, write
put = write._put
def slow(*arguments):
    put(*arguments)
    print("writing", flush=True)
    time.sleep(60)
write._put = slow
convert.convert(sys.argv[1], sys.argv[2], "voc")
"""
    line = [sys.executable, "-c", code, str(mixed), str(tmp_path / "out")]
    process = subprocess.Popen(line, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.kill()
    process.wait()
    left = {p.name for p in tmp_path.iterdir()} - {"mixed"}
    assert len(left) == 1
    assert left.pop().startswith(".out.")


def test_an_error_leaves_nothing(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StorageError, match="No space left"):
        convert(str(mixed), tmp_path / "out", "coco")
    assert {p.name for p in tmp_path.iterdir()} == {"mixed"}


@pytest.mark.parametrize(
    ("line", "must"),
    [
        ("convert mixed full --to voc", "full: must be a new or empty folder"),
        ("convert mixed mixed/out --to voc", "must lie outside of"),
        ("convert mixed out --to vok", "voc"),
        ("convert mixed out --to voc --polygons", "--polygons: must go with --to yolo"),
        ("convert mixed out --to voc --split vall", "--split must be one of train, got 'vall'"),
        ("convert synthetic out --to voc", "data synth"),
        ("convert nowhere out --to voc", "nowhere"),
        ("check mixed --link", "--link: must go with --fix"),
        ("check mixed --fix out --split train", "--fix: must stand without --split"),
        ("check mixed --fix full", "full: must be a new or empty folder"),
        ("show mixed -o sheet.xyz", "sheet.xyz: must end as an image format does"),
        ("show mixed -o sheet.png --out there", "-o: must stand without --out"),
    ],
)
def test_wrong_use_writes_nothing(
    line: str,
    must: str,
    mixed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(mixed.parent)
    save(Path("full/keep.jpg"))
    assert run(["data", *line.split(), "--json"]) == 2
    assert must in json.loads(capsys.readouterr().out)["error"]
    assert {p.name for p in Path().iterdir()} == {"mixed", "full"}
    assert [p.name for p in Path("full").iterdir()] == ["keep.jpg"]


def test_show_counts_by_class_and_draws_every_class(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    line = ["data", "show", str(real_data / "bccd"), "-o", str(sheet), "--count", "5"]
    assert run([*line, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    counts = {name: row["boxes"] for name, row in shown["splits"]["val"]["per_class"].items()}
    assert counts == {"RBC": 967, "WBC": 87, "Platelets": 83}
    train = shown["splits"]["train"]
    assert (train["images"], train["boxes"], train["width"]) == (205, 2804, [640, 640, 640])
    for row in train["per_class"].values():
        assert row["small"] + row["medium"] + row["large"] == row["boxes"]
    width, height = Image.open(sheet).size
    assert (width, height) == (4 * 480 + 3 * 8, height)
    assert 2 * 360 < height < 2 * 420
    assert run(line) == 0
    assert "205 images of 640 x 480 pixels (coco)" in capsys.readouterr().out


def test_the_sheet_has_each_class_and_as_many_images_as_asked(tmp_path: Path) -> None:
    from detkit.report.sheet import choose

    images = [image(k) for k in range(1, 21)]
    annotations = [box(k, k) for k in range(1, 20)] + [box(30, 20, category_id=7)]
    folder = write_coco(tmp_path, images, annotations)
    dataset = open_detection(str(folder), "train", DataConfig())
    assert 19 in choose(dataset, 3, None)
    for count in (1, 3, 20, 50):
        chosen = choose(dataset, count, None)
        assert len(set(chosen)) == len(chosen) == min(count, 20)
    assert choose(dataset, 5, 1) == choose(dataset, 5, 1) != choose(dataset, 5, 2)


def test_show_takes_image_folders_and_the_built_in_set(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (str(real_data / "sign_digits_imagefolder"), "synthetic"):
        sheet = tmp_path / "sheet.png"
        assert run(["data", "show", name, "--split", "val", "-o", str(sheet), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)["splits"]["val"]
        assert shown["images"] == 100
        assert len(shown["per_class"]) in (8, 10)
        assert sheet.stat().st_size > 10_000
        sheet.unlink()
