"""Every rule about data sets on a small set that breaks it, and what training makes of the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import box, image, save, write_coco
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detkit.config import DataConfig
from detkit.data import open_classification, open_detection
from detkit.data.check import check
from detkit.data.clean import clean
from detkit.data.masks import decode
from detkit.data.problems import RULES, Problem
from detkit.data.raw import CleanOptions, RawSet
from detkit.errors import DataError
from detkit.types import CategoryMap

SQUARE = [[5, 5, 25, 5, 25, 15, 5, 15]]


def findings(folder: Path, split: str = "train") -> list[Problem]:
    return check(str(folder), split).splits[split].problems


def rules(folder: Path, split: str = "train") -> list[str]:
    return sorted(p.rule for p in findings(folder, split))


def test_a_sound_set_has_no_problems(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [image(1)], [box(1), box(2, segmentation=SQUARE)])
    report = check(str(folder))
    assert report.layout == "coco"
    assert report.problems == 0
    train = report.splits["train"]
    assert (train.images, train.annotations) == (1, 2)
    assert train.per_category == {"cat": 2, "dog": 0}


# Each case: rule, the faulty annotation beside a sound one, action, and the annotation id named.
ANNOTATION_CASES: list[tuple[str, Any, str, int | None]] = [
    ("annotation-record", "not an object", "skip", None),
    ("annotation-record", box(2, bbox=None), "skip", 2),
    ("annotation-record", box(2, bbox=[1, 2, 3]), "skip", 2),
    ("annotation-record", box(2, bbox=[1, 2, "3", 4]), "skip", 2),
    ("annotation-record", box(2, image_id=True), "skip", None),
    ("annotation-image", box(2, image_id=99), "skip", 2),
    ("annotation-category", box(2, category_id=4), "skip", 2),
    ("annotation-category", box(2, category_id=[3]), "skip", 2),
    ("annotation-id-missing", box(None), "fix", None),
    ("annotation-id-zero", box(0), "fix", 0),
    ("annotation-id-duplicate", box(1), "fix", 1),
    ("box-missing", box(2, bbox=None, segmentation=SQUARE), "fix", 2),
    ("box-nonfinite", box(2, bbox=[1, 2, float("nan"), 4]), "skip", 2),
    ("box-nonfinite", box(2, bbox=[1, 2, float("inf"), 4]), "skip", 2),
    ("box-nonfinite", box(2, bbox=[1, 2, 10**400, 4]), "skip", 2),
    ("box-empty", box(2, bbox=[1, 2, 0, 4]), "skip", 2),
    ("box-empty", box(2, bbox=[1, 2, 5, -4]), "skip", 2),
    ("box-outside", box(2, bbox=[60, 2, 5, 4]), "skip", 2),
    ("box-outside", box(2, bbox=[-10, 2, 5, 4]), "skip", 2),
    ("box-outside", box(2, bbox=[5, 40, 5, 4]), "skip", 2),
    ("box-outside", box(2, bbox=[5, -9, 5, 4]), "skip", 2),
    ("box-clipped", box(2, bbox=[50, 2, 15, 4]), "fix", 2),
    ("area-missing", box(2, area=None), "fix", 2),
    ("area-missing", box(2, area=float("nan")), "fix", 2),
    ("area-missing", box(2, area=10**400), "fix", 2),
    ("iscrowd-missing", box(2, iscrowd=None), "fix", 2),
    ("iscrowd-missing", box(2, iscrowd=5), "fix", 2),
    ("segmentation-invalid", box(2, segmentation=[[1, 2, 3, 4]]), "fix", 2),
    ("segmentation-invalid", box(2, segmentation=[[1, 2, 3, 4, 5, None]]), "fix", 2),
    ("segmentation-invalid", box(2, segmentation={"size": [40, 60], "counts": [5]}), "fix", 2),
    ("segmentation-invalid", box(2, segmentation={"size": [9, 9], "counts": [81]}), "fix", 2),
    ("segmentation-invalid", box(2, segmentation={"size": [40, 60], "counts": "o"}), "fix", 2),
]


@pytest.mark.parametrize(
    ("rule", "annotation", "action", "named"),
    ANNOTATION_CASES,
    ids=[f"{k}-{case[0]}" for k, case in enumerate(ANNOTATION_CASES)],
)
def test_annotation_rule(
    tmp_path: Path, rule: str, annotation: Any, action: str, named: int | None
) -> None:
    folder = write_coco(tmp_path, [image(1)], [box(1), annotation])
    problems = findings(folder)
    assert [p.rule for p in problems] == [rule]
    assert problems[0].action == action
    assert problems[0].annotation_id == named
    dataset = open_detection(str(folder), "train", DataConfig())
    assert dataset.report.counts == {rule: 1}  # training applies the same rules
    assert dataset.report.annotations == (1 if action == "skip" else 2)
    truth = dataset.truth()["annotations"]
    ids = [a["id"] for a in truth]
    assert 0 not in ids and len(set(ids)) == len(ids) == dataset.report.annotations
    assert all(a["area"] > 0 and a["iscrowd"] in (0, 1) for a in truth)


def test_repairs_have_the_right_values(tmp_path: Path) -> None:
    annotations = [
        box(1, bbox=None, segmentation=SQUARE, area=None, iscrowd=None),
        box(1, area=None),
        box(0, bbox=[50, 2, 15, 4]),
    ]
    folder = write_coco(tmp_path, [image(1)], annotations)
    dataset = open_detection(str(folder), "train", DataConfig())
    first, second, third = dataset.truth()["annotations"]
    assert first["bbox"] == [5, 5, 20, 10]
    assert first["area"] == 200  # the pixels of the polygon
    assert first["iscrowd"] == 0
    assert second["area"] == 200  # width x height
    assert [first["id"], second["id"], third["id"]] == [1, 2, 3]
    # The truth keeps the box of the file, so that scores equal pycocotools'; training clips it.
    assert third["bbox"] == [50, 2, 15, 4]
    assert dataset.records.boxes(0)[2].tolist() == [50, 2, 60, 6]


def test_rounding_at_the_border_is_no_problem(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [image(1)], [box(1, bbox=[-0.4, 30, 60.9, 10.2])])
    assert rules(folder) == []


def test_masks_need_a_segmentation(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [image(1)], [box(1), box(2, segmentation=SQUARE)])
    dataset = open_detection(str(folder), "train", DataConfig(), masks=True)
    assert dataset.report.counts == {"segmentation-missing": 1}
    assert [a["id"] for a in dataset.truth()["annotations"]] == [2]


# Each case: rule, the entry, and whether its file is written.
IMAGE_CASES: list[tuple[str, Any, bool]] = [
    ("image-record", "not an object", False),
    ("image-record", {"id": 2}, False),
    ("image-record", image(2, file_name=5), False),
    ("image-record", {"file_name": "2.jpg"}, False),
    ("image-id-duplicate", image(1, "2.jpg"), True),
    ("image-path", image(2, "../../annotations/instances_train.json"), False),
    ("image-path", image(2, "a/../../2.jpg"), False),
    ("image-path", image(2, "/etc/passwd"), False),
    ("image-path", image(2, "C:\\2.jpg"), False),
    ("image-path", image(2, "..\\2.jpg"), False),
    ("image-path", image(2, "2\0.jpg"), False),
    ("image-path", image(2, "\ud800.jpg"), False),
    ("image-missing", image(2), False),
    ("image-size", image(2, width=61), True),
]


@pytest.mark.parametrize(
    ("rule", "entry", "exists"),
    IMAGE_CASES,
    ids=[f"{k}-{case[0]}" for k, case in enumerate(IMAGE_CASES)],
)
def test_image_rule(tmp_path: Path, rule: str, entry: Any, exists: bool) -> None:
    folder = write_coco(tmp_path, [image(1), entry], [box(1)], write_images=False)
    save(folder / "images/train/1.jpg")
    if exists:
        save(folder / "images/train/2.jpg")
    problems = findings(folder)
    assert [(p.rule, p.action) for p in problems] == [(rule, "skip")]
    dataset = open_detection(str(folder), "train", DataConfig())
    assert dataset.files == ["1.jpg"]
    assert len(dataset.truth()["images"]) == 1
    with pytest.raises(DataError, match=rule):
        open_detection(str(folder), "train", DataConfig(on_bad_image="fail"))


def test_a_link_out_of_the_image_folder_is_refused(tmp_path: Path) -> None:
    outside = save(tmp_path / "outside.jpg")
    folder = write_coco(tmp_path / "set", [image(1), image(2)], [box(1)], write_images=False)
    save(folder / "images/train/1.jpg")
    (folder / "images/train/2.jpg").symlink_to(outside)
    assert rules(folder) == ["image-path"]


def test_a_link_inside_the_image_folder_is_fine(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [image(1), image(2)], [box(1)], write_images=False)
    file = save(folder / "images/train/1.jpg")
    (folder / "images/train/2.jpg").symlink_to(file)
    assert rules(folder) == []


def test_an_image_folder_that_is_a_link_is_fine(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "set", [image(1)], [box(1)], write_images=False)
    save(tmp_path / "elsewhere/1.jpg")
    (folder / "images/train").rmdir()
    (folder / "images/train").symlink_to(tmp_path / "elsewhere")
    assert rules(folder) == []


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_files_are_found_when_opening(tmp_path: Path, suffix: str) -> None:
    names = [f"{k}.{suffix}" for k in (1, 2)]
    folder = write_coco(tmp_path, [image(k + 1, n) for k, n in enumerate(names)], [box(1)])
    file = folder / "images/train" / names[1]
    file.write_bytes(file.read_bytes()[:-40])
    assert rules(folder) == ["image-truncated"]
    dataset = open_detection(str(folder), "train", DataConfig())
    assert dataset.files == names[:1]
    assert dataset.report.counts == {"image-truncated": 1}


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\xff\xd8\xff\xe0 broken \xff\xd9"])
def test_unreadable_files(tmp_path: Path, content: bytes) -> None:
    folder = write_coco(tmp_path, [image(1), image(2)], [box(1)])
    (folder / "images/train/2.jpg").write_bytes(content)
    assert rules(folder) == ["image-unreadable"]


def test_the_check_decodes_what_opening_only_looks_at(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [image(1, "1.png"), image(2, "2.png")], [box(1)])
    file = folder / "images/train/2.png"
    content = bytearray(file.read_bytes())
    start = content.index(b"IDAT") + 4
    content[start : start + 30] = bytes(30)  # the end is sound, the pixels are not
    file.write_bytes(content)
    assert rules(folder) == ["image-unreadable"]
    assert len(open_detection(str(folder), "train", DataConfig())) == 2


def test_pixel_limit(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [image(1), image(2, height=80)], [box(1)], write_images=False)
    save(folder / "images/train/1.jpg")
    save(folder / "images/train/2.jpg", 80, 60)
    dataset = open_detection(str(folder), "train", DataConfig(max_pixels=40 * 60))
    assert dataset.report.counts == {"image-too-large": 1}
    assert "80" in dataset.report.problems[0].what


def test_missing_size_comes_from_the_file(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [image(1, width=None)], [box(1)])
    assert rules(folder) == ["image-size-missing"]
    dataset = open_detection(str(folder), "train", DataConfig())
    assert dataset.size(0) == (40, 60)


def _turned(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(path, 40, 60, exif=exif)


def test_boxes_on_stored_pixels_keep_a_turned_image_as_stored(tmp_path: Path) -> None:
    images = [image(1), image(2, height=60, width=40), image(3)]
    folder = write_coco(tmp_path, images, [box(1)], write_images=False)
    _turned(folder / "images/train/1.jpg", 6)  # annotated 40x60 as stored
    _turned(folder / "images/train/2.jpg", 6)  # annotated 60x40 as shown
    _turned(folder / "images/train/3.jpg", 1)
    assert rules(folder) == ["image-orientation"]
    dataset = open_detection(str(folder), "train", DataConfig())
    assert [dataset.image(k).size for k in range(3)] == [(60, 40), (40, 60), (60, 40)]


@pytest.mark.parametrize(("stored", "expected"), [(True, ["image-orientation"] * 2), (False, [])])
def test_half_turns_follow_the_other_turned_images(
    tmp_path: Path, stored: bool, expected: list[str]
) -> None:
    sides = {"height": 40, "width": 60} if stored else {"height": 60, "width": 40}
    folder = write_coco(tmp_path, [image(1, **sides), image(2)], [box(1)], write_images=False)
    _turned(folder / "images/train/1.jpg", 8)
    _turned(folder / "images/train/2.jpg", 3)
    assert rules(folder) == expected


def test_no_usable_image_is_an_error_with_counts(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [image(1), image(2)], [], write_images=False)
    save(folder / "images/train/1.jpg", 50, 50)
    with pytest.raises(DataError, match="1 image-missing, 1 image-size"):
        open_detection(str(folder), "train", DataConfig())


def test_findings_are_all_counted_and_listed_up_to_the_limit(tmp_path: Path) -> None:
    images = [image(k) for k in range(1, 31)]
    annotations = [box(k, area=None) for k in range(1, 51)]
    folder = write_coco(tmp_path, images, annotations, write_images=False)
    save(folder / "images/train/1.jpg")
    report = open_detection(str(folder), "train", DataConfig()).report
    assert report.counts == {"image-missing": 29, "area-missing": 50}
    assert len(report.skipped_files) == 29  # every file that is left out is named
    assert sum(p.rule == "area-missing" for p in report.problems) == 20
    assert len(findings(folder)) == 79  # the check names all


def test_report_is_plain(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [image(1)], [box(0), box(2, bbox=[1, 1, 0, 1])])
    plain = json.loads(json.dumps(check(str(folder)).to_plain()))
    assert plain["problems"] == 2
    assert plain["splits"]["train"]["counts"] == {"annotation-id-zero": 1, "box-empty": 1}
    assert plain["splits"]["train"]["problems"][0] == {
        "rule": "annotation-id-zero",
        "file": "1.jpg",
        "image_id": 1,
        "annotation_id": 0,
        "what": "id 0; renumbered",
        "action": "fix",
    }
    assert plain["rules"] == {r: RULES[r] for r in ("annotation-id-zero", "box-empty")}


def test_image_folder_rules(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save(tmp_path / split / "cat" / "1.jpg")
        save(tmp_path / split / "dog" / "2.png")
    save(tmp_path / "val" / "cow" / "3.jpg")
    (tmp_path / "train" / "dog" / "4.jpg").write_bytes(b"no image")
    (tmp_path / "train" / "dog" / "notes.txt").write_text("not looked at")
    report = check(str(tmp_path))
    assert report.layout == "folder"
    assert report.splits["train"].counts == {"image-unreadable": 1}
    assert report.splits["val"].counts == {"class-unknown": 1}
    dataset = open_classification(str(tmp_path), "val", DataConfig())
    assert dataset.files == ["cat/1.jpg", "dog/2.png"]
    assert dataset.labels.tolist() == [0, 1]
    with pytest.raises(DataError, match="class-unknown"):
        open_classification(str(tmp_path), "val", DataConfig(on_bad_image="fail"))


def _write_voc(folder: Path, sheets: dict[str, str]) -> Path:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text("\n".join([*sheets, "gone"]) + "\n")
    for stem, text in sheets.items():
        (folder / "Annotations" / f"{stem}.xml").write_text(text)
        save(folder / "JPEGImages" / f"{stem}.jpg")
    return folder


def _sheet(name: str = "cat", corners: tuple[Any, ...] = (6, 6, 25, 15), width: int = 60) -> str:
    x0, y0, x1, y1 = corners
    return (
        f"<annotation><filename>../other.jpg</filename><path>/not/used</path>"
        f"<size><width>{width}</width><height>40</height></size>"
        f"<object><name>{name}</name><difficult>1</difficult><bndbox><xmin>{x0}</xmin>"
        f"<ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object></annotation>"
    )


def test_voc_rules(tmp_path: Path) -> None:
    sheets = {
        "good": _sheet(),
        "broken": "<annotation>",
        "empty": _sheet(corners=(9, 9, 9, 9)),
        "nameless": _sheet(name=""),
        "wordy": _sheet(corners=("a", 6, 25, 15)),
        "wide": _sheet(width=61),
    }
    folder = _write_voc(tmp_path, sheets)
    problems = {(Path(p.file).stem, p.rule) for p in findings(folder)}
    assert problems == {
        ("broken", "label-file"),
        ("gone", "label-file"),
        ("empty", "box-empty"),
        ("nameless", "annotation-category"),
        ("wordy", "annotation-record"),
        ("wide", "image-size"),
    }
    dataset = open_detection(str(folder), "train", DataConfig())
    first = dataset.truth()["annotations"][0]
    assert first["bbox"] == [5, 5, 20, 10]
    assert first["difficult"] == 1
    assert dataset.files == ["good.jpg", "empty.jpg", "nameless.jpg", "wordy.jpg"]


def test_yolo_rules(tmp_path: Path) -> None:
    for k in range(1, 5):
        save(tmp_path / f"images/train/{k}.jpg")
    labels = tmp_path / "labels/train"
    labels.mkdir(parents=True)
    (labels / "1.txt").write_text("0 0.5 0.5 0.5 0.5\n\n1 0 0 1 0 1 1\nx 1 2 3 4\n0 0.5 0.5\n")
    (labels / "2.txt").write_text("2 .5 .5 .1 .1\n0.5 .5 .5 .1 .1\n0 .5 .5 0 .1\n0 1 .5 .5 .1\n")
    (labels / "3.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [cat, dog]\n")
    problems = [(p.file, p.rule) for p in findings(tmp_path)]
    assert sorted(problems) == [
        ("1.jpg", "label-line"),
        ("1.jpg", "label-line"),
        ("2.jpg", "annotation-category"),
        ("2.jpg", "box-clipped"),
        ("2.jpg", "box-empty"),
        ("2.jpg", "label-line"),
        ("3.jpg", "label-file"),
    ]
    dataset = open_detection(str(tmp_path), "train", DataConfig())
    assert dataset.files == ["1.jpg", "2.jpg", "4.jpg"]
    assert [a["bbox"] for a in dataset.truth()["annotations"]][:2] == [
        [15, 10, 30, 20],
        [0, 0, 60, 40],
    ]


odd_values = st.sampled_from(
    [None, 0, 1, 2, -3, 1.5, float("nan"), float("inf"), 10**400, 2**63, "1", "", [], [1], {}, True]
)
odd_segmentations = odd_values | st.sampled_from(
    [
        SQUARE,
        [[-1e30, 0, 1e30, 0, 5, 1e30]],
        [[0, 0, 1, 1]],
        [["a"] * 6],
        {"size": [40, 60], "counts": [2000, 400]},
        {"size": [40, 60], "counts": [-1, 2401]},
        {"size": [40, 60], "counts": "T\u00e9"},
        {"size": [40, 60], "counts": "`Rn0"},
        {"size": [40, 60], "counts": ["2400"]},
        {"size": "40", "counts": [2400]},
    ]
)
odd_annotations = odd_values | st.fixed_dictionaries(
    {},
    optional={
        "id": odd_values,
        "image_id": odd_values,
        "category_id": odd_values | st.just(3),
        "bbox": st.lists(odd_values, min_size=3, max_size=5) | st.just([5, 5, 20, 10]) | odd_values,
        "area": odd_values,
        "iscrowd": odd_values,
        "segmentation": odd_segmentations,
        "difficult": odd_values,
    },
)
odd_images = odd_values | st.fixed_dictionaries(
    {}, optional={k: odd_values for k in ("id", "file_name", "height", "width")}
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(odd_images, max_size=3), st.lists(odd_annotations, max_size=5), st.booleans())
def test_any_json_is_cleaned_or_reported(images: Any, annotations: Any, masks: bool) -> None:
    """Whatever the entries hold, what remains is sound and what goes is counted."""
    raw = RawSet(CategoryMap(["cat", "dog"], [3, 7]), [image(1), *images], annotations, [], "x")
    records, report = clean(raw, CleanOptions(read_images=False, masks=masks, limit=None))
    assert len(records) == report.images >= 1
    assert sum(report.counts.values()) == len(report.problems)
    ids = records.annotation_ids.tolist()
    assert 0 not in ids and len(set(ids)) == len(ids) == report.annotations
    assert np.isfinite(records.bboxes).all() and (records.bboxes[:, 2:] > 0).all()
    assert np.isfinite(records.areas).all() and (records.areas >= 0).all()
    assert not masks or all(s is not None for s in records.segmentations)
    for segmentation in records.segmentations:
        if segmentation is not None:
            assert decode(segmentation, 40, 60).shape == (40, 60)


def test_every_rule_is_broken_by_a_test_here() -> None:
    """A rule that no set can break is no rule."""
    source = Path(__file__).read_text()
    assert [r for r in RULES if f'"{r}"' not in source] == []
