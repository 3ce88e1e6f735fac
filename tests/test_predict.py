"""`detkit predict` and `model.predict`: what is found, drawn and written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import picture
from PIL import Image

import detkit
from detkit import api
from detkit import config as configs
from detkit.cli.main import run
from detkit.data.pictures import find_pictures
from detkit.engine import checkpoint as checkpoints
from detkit.engine.checkpoint import Checkpoint
from detkit.errors import CheckpointError, DataError, DetkitError
from detkit.loading import Loaded
from detkit.prediction import picture_names
from detkit.types import CategoryMap

CATEGORIES = CategoryMap(["cat", "dog"], [3, 7])
SMALL = {"data": {"short_side": 96, "long_side": 128, "workers": 0}}
TURNED = {  # EXIF orientation, and how the upright image is stored under it
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


def write_checkpoint(path: Path, detector: str, kind: str = "detector") -> str:
    """A random detector that finds something everywhere."""
    torch.manual_seed(0)
    recipe = configs.read_toml(configs.recipe_path(f"tiny/{detector}"))
    layers = [recipe, SMALL, {"box": {"score_threshold": 0.0, "max_detections": 20}}]
    if kind == "gsl":
        layers.append({"model": {"scales": "learn"}})
    config = configs.resolve(layers)
    built = "backbone" if kind == "supernet" else kind
    content = Checkpoint(
        format=checkpoints.FORMAT,
        kind=kind,
        config=configs.to_plain(config),
        categories=CATEGORIES.to_plain(),
        model=api.build(config, CATEGORIES, built).state_dict(),
        provenance={},
    )
    checkpoints.save(path, content)
    return str(path)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "boxes.pth", "frcnn-fpn")


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "masks.pth", "maskrcnn-fpn")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images of one name in several folders, broken ones and others."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a/x.jpg", "a/x.png", "a/b/x.jpg", "c/X.jpg")):
        path = Path("photos", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(60, 90, seed=number).save(path)
    whole = Path("photos/a/x.jpg").read_bytes()
    Path("photos/cut.jpg").write_bytes(whole[: len(whole) // 2])
    Path("photos/broken.png").write_bytes(b"no image")
    Path("photos/notes.txt").write_text("no image by its name")
    return Path("photos")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the one JSON object on stdout, and stderr."""
    capsys.readouterr()
    code = run(["predict", *arguments, "--json"])
    shown = capsys.readouterr()
    return code, json.loads(shown.out), shown.err


def test_a_folder_gives_a_picture_of_each_image_and_names_the_broken(
    boxes: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result, shown = call(capsys, boxes, "photos", "--out", "found", "--score", "0")
    assert code == 0
    files = ["photos/a/x.jpg", "photos/a/x.png", "photos/a/b/x.jpg", "photos/c/X.jpg"]
    assert [image["file"] for image in result["images"]] == files
    assert {Path(skip["file"]).name for skip in result["skipped"]} == {"cut.jpg", "broken.png"}
    assert "cut.jpg" in shown
    assert "broken.png" in shown
    pictures = {image["picture"] for image in result["images"]}
    assert len(pictures) == 4
    for path in pictures:
        assert Image.open(path).size == (480, 320)  # enlarged, so that names can be read
    assert set(Path("found").rglob("*.png")) == {Path(path) for path in pictures}


def test_results_are_those_of_eval_and_explained_by_their_key(
    boxes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    size = ["--train", "1", "--val", "3", "--size", "128"]
    assert run(["data", "synth", "shapes", *size]) == 0
    renamed = Path("shapes/annotations/instances_val.json")
    content = json.loads(renamed.read_text())
    content["categories"] = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = 3
    renamed.write_text(json.dumps(content))
    wanted, _ = api.detect_split(boxes, data="shapes")
    code, result, _ = call(capsys, boxes, "shapes/images/val", "--out", "found", "--score", "0")
    assert code == 0
    key = json.loads(Path(result["key"]).read_text())
    ids = {Path(image["file_name"]).name: image["id"] for image in key["images"]}
    truth = {image["id"]: ids[image["file_name"]] for image in content["images"]}
    got = json.loads(Path(result["results"]).read_text())
    assert got == [row | {"image_id": truth[row["image_id"]]} for row in wanted]
    assert len(got) > 10
    assert key["categories"] == content["categories"]
    shown = [d for image in result["images"] for d in image["detections"]]
    names = {3: "cat", 7: "dog"}
    assert [(d["name"], d["bbox"]) for d in shown] == [
        (names[row["category_id"]], row["bbox"]) for row in got
    ]


def test_masks_are_in_pixels_of_the_image(masks: str, tmp_path: Path) -> None:
    picture(60, 90).save(tmp_path / "one.png")
    result = detkit.load(masks).predict(tmp_path / "one.png", score=0.0)
    assert isinstance(result.masks, torch.Tensor)
    assert result.masks.shape == (len(result), 60, 90)
    assert "segmentation" in result.results[0]
    assert result.masks.any()
    for mask, box in zip(result.masks, result.boxes, strict=True):
        ys, xs = torch.nonzero(mask, as_tuple=True)
        if len(xs):
            assert box[0] - 1 <= xs.min() and xs.max() <= box[2] + 1
            assert box[1] - 1 <= ys.min() and ys.max() <= box[3] + 1
    least = float(result.scores.max()) + 1e-6
    nothing = detkit.load(masks).predict(tmp_path / "one.png", score=least)
    assert nothing.masks is not None and nothing.masks.shape == (0, 60, 90)
    assert nothing.boxes.shape == (0, 4)


@pytest.mark.parametrize("orientation", TURNED)
def test_turned_images_are_seen_and_drawn_upright(
    orientation: int, boxes: str, tmp_path: Path
) -> None:
    """PNG keeps its pixels, so that what is found is that of the upright image to the last bit."""
    upright, exif = picture(60, 90), Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(TURNED[orientation]).save(tmp_path / "turned.png", exif=exif)
    model = detkit.load(boxes)
    sources = [tmp_path / "turned.png", Image.open(tmp_path / "turned.png"), np.asarray(upright)]
    found = model.predict(sources, score=0.0)
    for one in found:
        assert one.size == (60, 90)
        assert torch.equal(one.boxes, found[-1].boxes)
        assert np.array_equal(np.asarray(one.draw()), np.asarray(found[-1].draw()))
    assert len(found[0]) > 5


def test_three_lines_of_python(boxes: str, photos: Path) -> None:
    model = detkit.load(boxes)
    result = model.predict("photos/a/x.jpg", score=0.0)
    drawn = result.draw("out.png")
    assert Image.open("out.png").size == drawn.size == (480, 320)
    assert np.asarray(drawn).shape == (320, 480, 3)
    assert len(result) == len(result.names) == len(result.scores) == len(result.labels)
    assert set(result.names) <= {"cat", "dog"}
    assert result.masks is None
    assert torch.equal(result.scores, result.scores.sort(descending=True).values)
    assert [CATEGORIES.name(k) for k in result.labels.tolist()] == result.names
    assert len(model.predict("photos/a/x.jpg", score=1.0)) == 0


def test_a_list_gives_a_list_in_batches(boxes: str, photos: Path) -> None:
    """Images of one size pad alike, so that a batch changes nothing but rounding."""
    model = detkit.load(boxes)
    images = [picture(60, 90, seed=k) for k in range(3)]
    together = model.predict(images, score=0.0, batch_size=2)
    for image, one in zip(images, together, strict=True):
        alone = model.predict(image, score=0.0)
        torch.testing.assert_close(one.scores, alone.scores, atol=1e-5, rtol=0)
    assert model.predict([]) == []
    with pytest.raises(DataError, match="broken.png"):
        model.predict(["photos/a/x.jpg", "photos/broken.png"])


@pytest.mark.parametrize(
    ("image", "must"),
    [
        (np.zeros((4, 4, 3)), "uint8 array.*got float64"),
        (np.zeros((4, 4, 4), dtype=np.uint8), r"shape \(height, width, 3\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "shape"),
        (7, "got int"),
        (".", "a folder"),
        ("no/such.jpg", "no such file"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, must: str, boxes: str) -> None:
    with pytest.raises(DetkitError, match=must):
        detkit.load(boxes).predict(image)


@pytest.mark.parametrize(
    ("line", "code", "must"),
    [
        ("{boxes} photos/broken.png", 2, "at least one must be readable, got none of 1"),
        ("{boxes} photos/none.jpg", 2, "photos/none.jpg: no such file"),
        ("{boxes} photos/*.webp", 2, "photos/*.webp: no match"),
        ("{boxes} photos/empty", 2, "photos/empty: a folder without images"),
        ("{boxes} photos --out photos", 2, "must be a new or empty folder"),
        ("{boxes} photos --recipe tiny/frcnn-fpn", 2, "--recipe"),
        ("{boxes} photos --on-bad-image fail", 2, "broken.png"),
        ("{boxes}", 2, "IMAGES"),
        ("{boxes} photos --score 2", 2, "--score"),
        ("{boxes} photos --bach-size 2", 2, "--batch-size"),
        ("none.pth photos", 2, "none.pth"),
        ("photos/broken.png photos", 3, "broken.png"),
    ],
)
def test_wrong_use_writes_nothing(
    line: str,
    code: int,
    must: str,
    boxes: str,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("photos/empty").mkdir()
    got, answer, _ = call(capsys, *line.format(boxes=boxes).split())
    assert (got, answer["exit_code"]) == (code, code)
    assert must in answer["error"]
    assert {path.name for path in Path().iterdir()} == {"photos"}


@pytest.mark.parametrize(("kind", "advice"), [("backbone", "finetune"), ("supernet", "search")])
def test_what_is_no_detector_is_refused_with_advice(kind: str, advice: str, boxes: str) -> None:
    loaded = detkit.load(boxes)
    other = Loaded(loaded.model, loaded.config, loaded.categories, kind)
    with pytest.raises(CheckpointError, match=f"must be a detector, got kind {kind!r}.*{advice}"):
        other.predict(picture(8, 8))


def test_learnt_scales_and_their_plain_net_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["data", "synth", "shapes", "--train", "4", "--val", "2", "--size", "64"]) == 0
    line = ["finetune", "--data", "shapes", "--scales", "learn", "--steps", "1", "--out", "gsl"]
    small = ["data.short_side=64", "data.multi_scale=[]", "data.workers=0", "train.batch_size=2"]
    settings = [word for key in small for word in ("--set", key)]
    assert run([*line, *settings, "--set", "scales.images=2"]) == 0
    assert run(["decompose", "gsl/best.pth", "-o", "fd.pth"]) == 0
    for checkpoint in ("gsl/best.pth", "fd.pth"):
        code, result, _ = call(capsys, checkpoint, "shapes/images/val", "--score", "0")
        assert code == 0
        assert Path(result["out"]).parent == Path("runs/predict")
        assert all(image["detections"] for image in result["images"])
        Path(result["out"]).rename(tmp_path / Path(checkpoint).stem)


def test_dry_run_lists_the_images_and_writes_nothing(
    boxes: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, plan, _ = call(capsys, boxes, "photos/a", "photos/a/x.jpg", "--dry-run")
    assert code == 0
    assert plan["images"] == ["photos/a/x.jpg", "photos/a/x.png", "photos/a/b/x.jpg"]
    assert {path.name for path in Path().iterdir()} == {"photos"}


def test_finding_takes_patterns_and_leaves_the_results_out(photos: Path) -> None:
    assert find_pictures(["photos/**/x.jpg"]) == [Path("photos/a/b/x.jpg"), Path("photos/a/x.jpg")]
    assert find_pictures(["photos/notes.txt"]) == [Path("photos/notes.txt")]  # named, so meant
    found = find_pictures(["."], without=photos / "a")
    assert [path.name for path in found] == ["broken.png", "cut.jpg", "X.jpg"]


def test_picture_names_never_meet() -> None:
    paths = ["s/a.jpg", "s/a.png", "s/A.gif", "s/a.jpg.jpg", "s/a.png.bmp", "s/t/a.jpg", "s/b.jpg"]
    names = picture_names([Path(path) for path in paths])
    assert len({str(name).casefold() for name in names}) == len(paths)
    assert names[-2:] == [Path("t/a.png"), Path("b.png")]
    assert picture_names([Path("one/x.jpg"), Path("two/x.jpg")]) == [
        Path("one/x.png"),
        Path("two/x.png"),
    ]
