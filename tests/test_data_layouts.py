"""Layouts: what is found where, on real sets and on small written ones."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import CATEGORIES, box, image, save, write_coco
from PIL import Image
from pycocotools.coco import COCO

from detkit.config import DataConfig
from detkit.data import open_classification, open_detection
from detkit.data.check import check
from detkit.data.convert import convert
from detkit.data.open import layout, splits, unions
from detkit.data.yaml import read_yaml
from detkit.errors import ConfigError, DataError, DetkitError

# images, objects, crowds, classes with objects, as the sets' own descriptions count them
REAL_COCO = {
    ("bccd", "train"): (205, 2804, 0, {"RBC": 2381, "WBC": 214, "Platelets": 209}),
    ("bccd", "val"): (87, 1137, 0, {"RBC": 967, "WBC": 87, "Platelets": 83}),
    ("nuts_seg", "train"): (13, 127, 0, {"date": 59, "fig": 30, "hazelnut": 38}),
    ("nuts_seg", "val"): (5, 38, 0, {"date": 12, "fig": 11, "hazelnut": 15}),
    ("coco_mini", "train"): (13, 74, 1, 20),
    ("coco_mini", "val"): (20, 110, 1, 25),
}


@pytest.mark.parametrize(("name", "split"), REAL_COCO)
def test_real_coco(real_data: Path, name: str, split: str) -> None:
    images, objects, crowds, classes = REAL_COCO[name, split]
    dataset = open_detection(str(real_data / name), split, DataConfig())
    assert dataset.report.counts == {}
    assert len(dataset) == images
    truth = dataset.truth()
    assert len(truth["annotations"]) == objects
    assert sum(a["iscrowd"] for a in truth["annotations"]) == crowds
    found = {k: n for k, n in dataset.report.per_category.items() if n}
    assert found == classes if isinstance(classes, dict) else len(found) == classes
    size = dataset.image(0).size
    assert size == dataset.size(0)[::-1]


@pytest.mark.parametrize("name", ["nuts_seg", "coco_mini"])
def test_real_truth_is_the_files_truth(real_data: Path, name: str) -> None:
    """Ids, categories, boxes, areas and masks come through as pycocotools reads them."""
    path = real_data / name
    reference = COCO(str(path / "annotations/instances_val.json"))
    dataset = open_detection(str(path), "val", DataConfig(), masks=True)
    truth = dataset.truth()
    assert dataset.categories.ids == tuple(sorted(reference.getCatIds()))
    assert [i["id"] for i in truth["images"]] == list(reference.imgs)
    for annotation in truth["annotations"]:
        expected = reference.anns[annotation["id"]]
        for key in ("image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"):
            assert annotation[key] == expected[key]
    assert len(truth["annotations"]) == len(reference.anns)


def test_real_voc(real_data: Path) -> None:
    path = str(real_data / "raccoon_voc")
    assert layout(path) == "voc"
    assert splits(path) == ["train", "trainval", "val"]
    assert unions(path) == ["trainval"]
    for split, images, objects in (("train", 160, 173), ("val", 40, 44)):
        dataset = open_detection(path, split, DataConfig())
        assert (len(dataset), dataset.report.annotations) == (images, objects)
        assert dataset.report.counts == {}
        assert dataset.categories.names == ("raccoon",)


def test_real_voc_and_coco_say_the_same(real_data: Path, tmp_path: Path) -> None:
    """BCCD comes both ways; the XML has one object more a split, whose corners coincide."""
    source = real_data / "bccd"
    for name in ("JPEGImages", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copytree(source / "voc_annotations", tmp_path / "Annotations")
    for split in ("train", "val"):
        files = sorted((source / "images" / split).iterdir())
        for file in files:
            shutil.copy(file, tmp_path / "JPEGImages")
        listing = tmp_path / "ImageSets/Main" / f"{split}.txt"
        listing.write_text("\n".join(f.stem for f in files))
    for split in ("train", "val"):
        coco = open_detection(str(source), split, DataConfig())
        voc = open_detection(str(tmp_path), split, DataConfig())
        assert voc.report.counts == {"box-empty": 1}
        assert _objects(voc) == _objects(coco)


def _objects(dataset: Any) -> set[Any]:
    files = {i["id"]: i["file_name"] for i in dataset.truth()["images"]}
    names = dict(zip(dataset.categories.ids, dataset.categories.names, strict=True))
    return {
        (files[a["image_id"]], names[a["category_id"]], *a["bbox"], a["area"])
        for a in dataset.truth()["annotations"]
    }


def test_real_image_folder(real_data: Path) -> None:
    path = str(real_data / "sign_digits_imagefolder")
    assert layout(path) == "folder"
    for split, images in (("train", 350), ("val", 100)):
        dataset = open_classification(path, split, DataConfig())
        assert dataset.report.counts == {}
        assert dataset.categories.names == tuple("0123456789")
        assert np.bincount(dataset.labels).tolist() == [images // 10] * 10
        assert all(
            f.split("/")[0] == str(k) for f, k in zip(dataset.files, dataset.labels, strict=True)
        )


def test_check_agrees_on_every_real_set(real_data: Path) -> None:
    """All pixels decode and no rule is broken, as the sets' descriptions say."""
    for name in ("bccd", "coco_mini", "nuts_seg", "raccoon_voc", "sign_digits_imagefolder"):
        assert check(str(real_data / name)).problems == 0


def test_annotations_are_arrays_not_objects(real_data: Path) -> None:
    """What workers share holds no Python object per image or per box."""
    dataset = open_detection(str(real_data / "bccd"), "train", DataConfig())
    records = dataset.records
    for value in vars(records).values():
        parts = vars(value).values() if hasattr(value, "starts") else [value]
        for part in parts:
            assert isinstance(part, np.ndarray)
            assert part.dtype != object
    assert not records.bboxes.dtype.hasobject
    assert len(pickle.dumps(dataset)) < 100 * (len(records) + len(records.labels)) + 20_000


def test_2017_layout(tmp_path: Path) -> None:
    for split in ("train2017", "val2017"):
        write_coco(tmp_path, [image(1)], [box(1)], split=split, write_images=False)
        save(tmp_path / split / "1.jpg")
        (tmp_path / "images" / split).rmdir()
    (tmp_path / "images").rmdir()
    folders = {"train": "train2017", "val2017": "val2017", "val": "val2017", "minival": "val2017"}
    for split, folder in folders.items():
        assert open_detection(str(tmp_path), split, DataConfig()).roots[0].name == folder
    assert splits(str(tmp_path)) == ["train2017", "val2017"]


def _write_2014(folder: Path) -> Path:
    parts = {
        "train2014": [1, 2],
        "val2014": [3, 4, 5],
        "valminusminival2014": [3, 4],
        "minival2014": [5],
    }
    for name, numbers in parts.items():
        images = [image(n, f"COCO_{n}.jpg") for n in numbers]
        write_coco(folder, images, [box(n, n) for n in numbers], split=name, write_images=False)
        (folder / "images" / name).rmdir()
    for n in range(1, 6):
        save(folder / ("train2014" if n <= 2 else "val2014") / f"COCO_{n}.jpg")
    (folder / "images").rmdir()
    return folder


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        ("trainval35k", [1, 2, 3, 4]),
        ("minival", [5]),
        ("train", [1, 2]),
        ("val", [5]),
        ("val2014", [3, 4, 5]),
        ("valminusminival", [3, 4]),
        ("train2014+val2014", [1, 2, 3, 4, 5]),
    ],
)
def test_2014_layout(tmp_path: Path, split: str, ids: list[int]) -> None:
    dataset = open_detection(str(_write_2014(tmp_path)), split, DataConfig())
    assert dataset.image_ids == ids
    assert dataset.report.counts == {}
    assert [dataset.image(k).size for k in range(len(ids))] == [(60, 40)] * len(ids)


def test_parts_must_declare_the_same_categories(tmp_path: Path) -> None:
    write_coco(tmp_path, [image(1)], [], split="a")
    write_coco(tmp_path, [image(2)], [], split="b", categories=CATEGORIES[:1])
    with pytest.raises(DataError, match="must declare the categories of instances_a"):
        open_detection(str(tmp_path), "a+b", DataConfig())


def test_one_annotation_file_with_an_image_folder(tmp_path: Path) -> None:
    write_coco(tmp_path / "set", [image(1)], [box(1)], write_images=False)
    file = tmp_path / "my labels.json"
    (tmp_path / "set/annotations/instances_train.json").rename(file)
    save(tmp_path / "photos" / "1.jpg")
    config = DataConfig(images=str(tmp_path / "photos"))
    for split in ("train", "val"):
        assert len(open_detection(str(file), split, config)) == 1
    with pytest.raises(DataError, match=r"(?s)--images.*1\.jpg|1\.jpg.*--images"):
        open_detection(str(file), "train", DataConfig())


def test_truth_without_images(tmp_path: Path) -> None:
    """Scoring a results file needs the annotations alone."""
    folder = write_coco(tmp_path, [image(1), image(2)], [box(0)], write_images=False)
    dataset = open_detection(str(folder), "train", DataConfig(), need_images=False)
    truth = dataset.truth()
    assert [i["id"] for i in truth["images"]] == [1, 2]
    assert [a["id"] for a in truth["annotations"]] == [1]


def test_roboflow_layout(tmp_path: Path) -> None:
    write_coco(tmp_path / "x", [image(1)], [box(1)], write_images=False)
    for split in ("train", "valid"):
        save(tmp_path / "set" / split / "1.jpg")
        source = tmp_path / "x/annotations/instances_train.json"
        shutil.copy(source, tmp_path / "set" / split / "_annotations.coco.json")
    for split in ("train", "val", "valid"):
        assert len(open_detection(str(tmp_path / "set"), split, DataConfig())) == 1


def test_string_image_ids(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [image(1, id="a"), image(2, id="b")], [box(1, "b")])
    dataset = open_detection(str(folder), "train", DataConfig())
    assert dataset.image_ids == ["a", "b"]
    assert dataset.truth()["annotations"][0]["image_id"] == "b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "lists images, annotations, categories, got list"),
        ('{"images": [], "annotations": []}', "lists images, annotations, categories"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": "1", "name": "a"}]}',
            "integer id",
        ),
        (
            '{"images": [], "annotations": [], "categories": '
            '[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            "unique",
        ),
        ('{"images": [], "annotations": [], "categories": []}', "categor"),
    ],
)
def test_broken_annotation_files(tmp_path: Path, content: str, message: str) -> None:
    folder = write_coco(tmp_path, [image(1)], [])
    (folder / "annotations/instances_train.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        open_detection(str(folder), "train", DataConfig())
    assert "instances_train.json" in str(caught.value)


def test_messages_show_the_tree_and_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got nothing"):
        open_detection(str(tmp_path / "gone"), "train", DataConfig())
    with pytest.raises(DataError, match=r"(?s)an empty folder.*COCO.*VOC.*YOLO.*ImageFolder"):
        open_detection(str(tmp_path), "train", DataConfig())
    write_coco(tmp_path, [image(1)], [box(1)])
    with pytest.raises(DataError, match=r"(?s)split 'test'.*got train; expected.*annotations/"):
        open_detection(str(tmp_path), "test", DataConfig())
    with pytest.raises(DataError, match="ImageFolder to train a classifier"):
        open_classification(str(tmp_path), "train", DataConfig())


def test_image_folder_messages(tmp_path: Path) -> None:
    save(tmp_path / "train/cat/1.jpg")
    with pytest.raises(DataError, match="must hold boxes"):
        open_detection(str(tmp_path), "train", DataConfig())
    with pytest.raises(DataError, match="split 'val' must exist, got train"):
        open_classification(str(tmp_path), "val", DataConfig())


def test_an_image_folder_is_for_coco_alone(tmp_path: Path) -> None:
    for name in ("Annotations", "JPEGImages"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match="must be empty for a voc set"):
        open_detection(str(tmp_path), "train", DataConfig(images="photos"))


def test_voc_messages(tmp_path: Path) -> None:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("train", "cat_train"):
        (tmp_path / "ImageSets/Main" / f"{name}.txt").touch()
    assert splits(str(tmp_path)) == ["train"]
    with pytest.raises(DataError, match=r"val\.txt must exist, got train"):
        open_detection(str(tmp_path), "val", DataConfig())
    with pytest.raises(DataError, match="must hold objects, got none in 0 files"):
        open_detection(str(tmp_path), "train", DataConfig())


YAMLS = {
    "list": "path: .\ntrain: images/train\nval: images/val\nnames: [cat, 'big dog']\nnc: 2\n",
    "dash": 'train: images/train\nval: images/val\nnames:\n- cat\n- "big dog"  # a dog\n',
    "map": (
        "# a comment\n---\ntrain: [images/train]\nval: images/val\ntest:\n\nnames:\n"
        "  0: cat\n  1: big dog\n\ndownload: |\n  print('x: [')\n  # text\nunread: {a: &b}\n"
    ),
    "flow": "train: ../images/train\nval: images/val\nnames: {0: cat,\n  1: 'big dog'}\nnc: 2\n",
}


@pytest.mark.parametrize("form", YAMLS)
def test_yolo_yaml(tmp_path: Path, form: str) -> None:
    (tmp_path / "data.yaml").write_text(YAMLS[form])
    for split in ("train", "val"):
        save(tmp_path / f"images/{split}/a/1.jpg")
        (tmp_path / f"labels/{split}/a").mkdir(parents=True)
        (tmp_path / f"labels/{split}/a/1.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    for path in (tmp_path, tmp_path / "data.yaml"):
        assert layout(str(path)) == "yolo"
        assert splits(str(path)) == ["train", "val"]
        dataset = open_detection(str(path), "val", DataConfig())
        assert dataset.categories.names == ("cat", "big dog")
        assert dataset.files == ["a/1.jpg"]
        [annotation] = dataset.truth()["annotations"]
        assert (annotation["bbox"], annotation["category_id"]) == ([15, 10, 30, 20], 1)


def test_yolo_list_file(tmp_path: Path) -> None:
    save(tmp_path / "images/1.jpg")
    save(tmp_path / "images/2.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/2.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "train.txt").write_text("./images/2.jpg\n../secret.jpg\n")
    (tmp_path / "data.yaml").write_text("train: train.txt\nnames: [cat]\n")
    dataset = open_detection(str(tmp_path), "train", DataConfig())
    assert dataset.files == ["images/2.jpg"]
    assert dataset.report.counts == {"image-path": 1}
    assert dataset.report.annotations == 1


def test_yolo_without_yaml(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save(tmp_path / f"images/{split}/1.jpg")
        (tmp_path / f"labels/{split}").mkdir(parents=True)
    (tmp_path / "labels/train/1.txt").write_text("2 0.5 0.5 0.5 0.5\n")
    assert open_detection(str(tmp_path), "val", DataConfig()).categories.names == ("0", "1", "2")
    (tmp_path / "classes.txt").write_text("cat\ndog\ncow\n")
    dataset = open_detection(str(tmp_path), "train", DataConfig())
    assert dataset.categories.names == ("cat", "dog", "cow")
    assert dataset.truth()["annotations"][0]["category_id"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a\n", "line 1"),
        ("names: *other\n", "line 1"),
        ("names:\n  - a: b\n", "line 2"),
        ("names:\n  a:\n    - b\n", "line"),
        ("names: a\n  b\n", "line 2"),
        ("names: [a, [b]]\n", "line 1"),
        ("names: 'a\n", "line 1"),
        ("just words\n", "line 1"),
        ("  names: a\n", "line 1"),
    ],
)
def test_yaml_that_is_not_understood_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_yaml(path, ["names"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images\n", "names must list the classes"),
        ("train: images\nnames: {1: a}\n", "numbered from 0"),
        ("train: images\nnames: [a]\nnc: 2\n", "nc must be the number of names, 1, got 2"),
        ("train: nowhere\nnames: [a]\n", "nowhere must be a folder"),
        ("names: [a]\n", "split 'train' must exist"),
    ],
)
def test_yaml_that_says_too_little(tmp_path: Path, text: str, message: str) -> None:
    save(tmp_path / "images/1.jpg")
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        open_detection(str(tmp_path), "train", DataConfig())


def test_a_slip_in_a_class_number_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    for folder in ("images/train", "labels/train"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images/train/a.png")
    (tmp_path / "labels/train/a.txt").write_text("99999999999 .5 .5 .1 .1\n")
    with pytest.raises(DataError, match=r"a\.txt: class numbers .* got 99999999999"):
        open_detection(str(tmp_path), "train", DataConfig())


def test_an_overlong_file_name_and_endless_json_are_problems(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations/instances_train.json"
    file.write_text("[" * 100_000)
    with pytest.raises(DataError, match="must be JSON"):
        open_detection(str(tmp_path), "train", DataConfig())
    images = [
        {"id": i, "file_name": name, "width": 8, "height": 8}
        for i, name in enumerate(("a" * 5000 + ".png", "b.png"), 1)
    ]
    categories = [{"id": 1, "name": "x"}]
    file.write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    (tmp_path / "images/train").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images/train/b.png")
    dataset = open_detection(str(tmp_path), "train", DataConfig())
    assert (len(dataset), dict(dataset.report.counts)) == (1, {"image-path": 1})


def test_part_of_a_set(tmp_path: Path) -> None:
    """Images by index, each with its own annotations; what was found while reading stays known."""
    images = [image(n) for n in (7, 8, 9, 10)]
    annotations = [box(1, 8), box(2, 8), box(3, 10), box(4, 9, iscrowd=1), box(5, 99)]
    folder = write_coco(tmp_path, images, annotations)
    whole = open_detection(str(folder), "train", DataConfig())
    part = whole.take([3, 1])
    assert part.image_ids == [10, 8] and len(part) == 2
    assert [a["id"] for a in part.truth()["annotations"]] == [3, 1, 2]
    assert [a["image_id"] for a in part.truth()["annotations"]] == [10, 8, 8]
    assert part.path(0) == whole.path(3) and part.image(1).size == (60, 40)
    assert part.report is whole.report and whole.report.counts
    assert not whole.take([]).image_ids
    filled = whole.with_objects()
    assert filled.image_ids == [8, 10]  # 7 has nothing and 9 but a crowd
    part.damaged.add(0)
    assert not whole.damaged
    synthetic = open_detection("synthetic", "val", DataConfig())
    one = synthetic.take([5])
    assert one.image(0).tobytes() == synthetic.image(5).tobytes()


@pytest.mark.parametrize(
    "name", ["bccd", "raccoon_voc", "as_yolo", "sign_digits_imagefolder", "synthetic"]
)
def test_an_unknown_split_brings_the_nearest(name: str, real_data: Path, tmp_path: Path) -> None:
    """In every layout; COCO, VOC, YOLO, ImageFolder and the built-in set look for splits apart."""
    path = str(real_data / name)
    if name == "as_yolo":
        path = str(tmp_path / name)
        convert(str(real_data / "bccd"), path, "yolo", link=True)
    opened = open_classification if "folder" in name else open_detection
    with pytest.raises(DetkitError, match="got .*; did you mean 'val'\\?$"):
        opened("synthetic" if name == "synthetic" else path, "vla", DataConfig())
