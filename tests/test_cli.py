"""Each command as a user types it: on synthetic and real data, wrong input, README lines."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from detkit.cli.main import COMMANDS, run

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--set", "data.short_side=96", "--set", "data.long_side=128", "--set", "data.multi_scale=[]"),
    *("--set", "data.workers=0", "--batch-size", "2"),
]
BOX_NUMBERS = {
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
}


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    """Exit code and the one JSON object on stdout."""
    capsys.readouterr()
    code = run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a backbone and a detector were trained for a few steps."""
    folder = tmp_path_factory.mktemp("road")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["data", "synth", "shapes", "--train", "12", "--val", "4", "--size", "128"]) == 0
        assert run(["pretrain", "--steps", "2", "--set", "data.workers=0"]) == 0
        assert run(["finetune", "--data", "shapes", "--steps", "3", *SMALL]) == 0
    return folder


@pytest.fixture
def there(road: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(road)
    return road


@pytest.mark.parametrize("command", [*COMMANDS, "data check", "data synth"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"detkit {command}" in text.split("Example", 1)[1]


def test_help_and_import_load_no_torch() -> None:
    code = (
        "import sys, detkit, detkit.cli.main as m; m.run(['--help']); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("pretrian", "pretrain"),
        ("finetune --bach-size 3", "--batch-size"),
        ("finetune --scales lern", "did you mean 'learn'?"),
        ("search --method evolve", "did you mean 'evolution'?"),
        ("finetune --set batch_sise=3", "did you mean 'train.batch_size'?"),
        ("finetune --set train.amp=bf17", "did you mean 'bf16'?"),
        ("finetune --set optim.lrr=1", "optim.lr"),
        ("finetune --recipe tiny/frcn-fpn", "tiny/frcnn-fpn"),
        ("finetune --backbone detnet-59 --dry-run --data synthetic", "detnet59"),
        ("finetune --data no/such/folder", "no/such/folder"),
        ("pretrain --set eval.metric=top2 --steps 1", "top1"),
        ("eval --detections x.json --data no/such/folder", "no/such/folder"),
        ("models --size 800", "800x1344"),
        ("finetune --device gpu --steps 1", "cuda"),
        ("eval --coco no/such/folder", "annotations/instances_val2017.json"),
        ("data check no/such/folder", "no/such/folder"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_2(
    line: str,
    hint: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, answer = call(capsys, *shlex.split(line))
    assert (code, answer["exit_code"]) == (2, 2)
    assert hint in answer["error"]
    assert not list(tmp_path.iterdir())  # nothing was started


def test_road_trains_evaluates_and_scores_its_own_detections(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, scores = call(
        capsys, "eval", "--data", "shapes", "--analysis", "--save-detections", "found.json"
    )
    assert code == 0
    assert set(scores["bbox"]) == BOX_NUMBERS
    assert scores["images"] == 4
    assert len(scores["per_class"]) == 8
    assert set(scores["analysis"]) == {"AP", "AR", "AR_class_agnostic"}
    code, again = call(
        capsys, "eval", "--data", "shapes", "--detections", "found.json", "--analysis"
    )
    assert code == 0
    assert {k: again[k] for k in ("bbox", "per_class", "analysis")} == {
        k: scores[k] for k in ("bbox", "per_class", "analysis")
    }
    code, voc = call(
        capsys, "eval", "--data", "shapes", "--detections", "found.json", "--metric", "voc07"
    )
    assert code == 0
    assert 0 <= voc["voc07"]["mAP"] <= 1
    assert scores["detections"] > 4
    code, few = call(capsys, "eval", "--data", "shapes", "--set", "box.max_detections=1")
    assert (code, few["detections"]) == (0, 4)  # settings reach the model too


REFUSING_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is refused")

sys.meta_path.insert(0, Refuse())
from detkit.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize("what", [["--analysis"], ["--metric", "voc12"]])
def test_a_results_file_is_scored_without_torch(
    there: Path, capsys: pytest.CaptureFixture[str], what: list[str]
) -> None:
    """Numbers as a process with torch gives them; `data check` and `show` need none either."""
    assert call(capsys, "eval", "--data", "shapes", "--save-detections", "own.json")[0] == 0
    for line in [
        ["eval", "--data", "shapes", "--detections", "own.json", *what],
        ["data", "check", "shapes"],
        ["data", "show", "shapes"],
    ]:
        words = [sys.executable, "-c", REFUSING_TORCH, *line, "--json"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert (0, json.loads(done.stdout)) == call(capsys, *line)


def test_compare_takes_runs_checkpoints_and_results(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's own detections differ from it by nothing, on the data set it was trained on."""
    (folder,) = {path.parent for path in Path("runs/finetune").glob("*/best.pth")}
    code, scores = call(capsys, "eval", str(folder / "best.pth"), "--save-detections", "own.json")
    assert code == 0
    for b in ("own.json", str(folder / "last.pth")):
        code, answer = call(capsys, "eval", "--compare", str(folder), b, "--resamples", "20")
        assert code == 0
        assert answer["a"] == scores
    assert answer["images"] == 4
    line = ["eval", "--compare", str(folder), "own.json", "--resamples", "20", "--fold"]
    code, answer = call(capsys, *line)
    assert code == 0
    spread = answer["difference"]["bbox"]["AP50"]
    assert spread == pytest.approx({"value": 0, "low": 0, "high": 0}, abs=1e-3)


def test_folded_batch_norms_detect_the_same(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No batch norm runs, and the detections are those of the model as it was trained."""
    rows = []
    for name in ("plain", "folded"):
        flags = ["--fold"] if name == "folded" else []
        with pytest.MonkeyPatch.context() as patch:
            if flags:
                patch.setattr(torch.nn.BatchNorm2d, "forward", None)
            line = ["eval", "--data", "shapes", "--save-detections", f"{name}.json", *flags]
            code, _ = call(capsys, *line)
        assert code == 0
        rows.append(json.loads(Path(f"{name}.json").read_text()))
    assert len(rows[0]) == len(rows[1]) > 0
    for one, other in zip(*rows, strict=True):
        assert one["category_id"] == other["category_id"]
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.05)
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)
    code, answer = call(capsys, "eval", "--data", "shapes", "--detections", "plain.json", "--fold")
    assert code == 2
    assert "--fold: must go with a checkpoint" in answer["error"]


def test_finetune_without_arguments_starts_from_the_newest_pretrain_run(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["finetune", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "starting from runs/pretrain/" in shown.err
    assert "are one pass" in shown.out


def test_a_recipe_freezes_the_batch_norms_of_the_backbone_it_starts_from(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = str(next(Path("runs/pretrain").glob("*/best.pth")))
    line = ["finetune", "--data", "shapes", "--init-from", backbone, "--steps", "1", "--dry-run"]
    code, plan = call(capsys, *line, "--recipe", "detnet/detnet59-fpn")
    assert code == 0
    model = plan["config"]["model"]
    assert (model["backbone"], model["norm"], model["frozen_stages"]) == (
        "resnet50-tiny",
        "frozen_bn",
        1,
    )


def test_resume_auto_continues_the_same_run_and_ends_alike(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "finetune",
        "--data",
        "shapes",
        "--recipe",
        "tiny/frcnn-fpn",
        *SMALL,
        "--set",
        "train.save_every=2",
    ]
    code, whole = call(capsys, *line, "--steps", "4", "--out", "whole")
    assert code == 0
    again = subprocess.Popen(
        [sys.executable, "-m", "detkit.cli", *line, "--steps", "4", "--out", "parts"],
        stderr=subprocess.PIPE,
    )
    while not Path("parts/last.pth").exists() and again.poll() is None:
        time.sleep(0.05)
    again.send_signal(signal.SIGTERM)
    again.communicate()
    code, resumed = call(capsys, *line, "--steps", "4", "--out", "parts", "--resume", "auto")
    assert code == 0
    assert resumed["metrics"] == whole["metrics"]
    weights = [
        torch.load(f"{name}/last.pth", weights_only=True)["model"] for name in ("whole", "parts")
    ]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_out_is_never_overwritten(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    code, answer = call(
        capsys, "finetune", "--data", "shapes", "--steps", "1", *SMALL, "--out", "mine"
    )
    assert code == 2
    assert "notes.txt" in answer["error"]
    assert Path("mine/notes.txt").read_text() == "keep"


def test_init_from_keeps_classes_by_name_and_refuses_other_architectures(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = str(next(Path("runs/finetune").glob("*/best.pth")))
    renamed = json.loads(Path("shapes/annotations/instances_train.json").read_text())
    for split in ("train", "val"):
        file = Path(f"shapes/annotations/instances_{split}.json")
        renamed = json.loads(file.read_text())
        renamed["categories"][0]["name"] = "novelty"
        target = Path(f"renamed/annotations/instances_{split}.json")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(renamed))
    Path("renamed/images").symlink_to(Path("shapes/images").resolve())
    capsys.readouterr()
    line = ["finetune", "--data", "renamed", "--init-from", best, "--steps", "1", *SMALL]
    assert run([*line, "--set", "optim.lr=0"]) == 0
    assert "started afresh: novelty" in capsys.readouterr().err
    code, answer = call(capsys, *line, "--backbone", "detnet59-tiny")
    assert code == 3
    assert "model.backbone" in answer["error"]


def test_broken_and_foreign_checkpoints_are_exit_3(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.pth").write_bytes(b"not a checkpoint")
    torch.save({"state_dict": {}}, "foreign.pth")
    for name in ("broken.pth", "foreign.pth"):
        code, answer = call(capsys, "eval", name, "--data", "shapes")
        assert code == 3
        assert name in answer["error"]
    backbone = str(next(Path("runs/pretrain").glob("*/best.pth")))
    code, answer = call(capsys, "eval", backbone, "--data", "shapes")
    assert code == 3
    assert "backbone" in answer["error"]


def test_training_lists_the_files_it_skips(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("shapes", "damaged")
    broken = min(Path("damaged/images/train").iterdir())
    broken.write_bytes(b"no image")
    line = ["finetune", "--data", "damaged", "--steps", "1", *SMALL, "--out", "skips"]
    capsys.readouterr()
    assert run(line) == 0
    for text in (capsys.readouterr().err, Path("skips/log.txt").read_text()):
        assert "train split: 1 image-unreadable" in text
        assert f"not used: image-unreadable: {broken.name}" in text
    code, answer = call(capsys, *line[:-1], "fails", "--on-bad-image", "fail")
    assert code == 2
    assert broken.name in answer["error"]


def test_exploding_training_is_exit_6_and_names_the_images(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["--set", "optim.lr=1e25", "--set", "train.clip=0.0", "--set", "train.amp=off"]
    code, answer = call(
        capsys, "finetune", "--data", "shapes", "--steps", "20", *SMALL, *wild, "--out", "wild"
    )
    assert code == 6
    assert ".png" in answer["error"]


def test_demo_ends_with_scores_a_picture_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, result = call(capsys, "demo", "--steps", "2", "--set", "data.workers=0")
    assert code == 0
    assert set(result["eval"]["bbox"]) == BOX_NUMBERS
    assert result["fast"]["metrics"]["AP"] == pytest.approx(result["eval"]["bbox"]["AP"])
    assert len(result["decompose"]["layers"]) == 12
    assert Path(result["picture"]).stat().st_size > 10_000
    page = Path(result["report"]).read_text(encoding="utf-8")
    for section in ("training", "accuracy", "errors", "scales", "pictures"):
        assert f'<section id="{section}"' in page


def test_models_lists_the_published_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    code, table = call(capsys, "models", "--size", "800x1344", "--backbone", "detnet59")
    assert code == 0
    (row,) = table["backbones"]
    assert (row["params"], row["macs_224"]) == (18_372_648, 4_846_018_560)
    assert [s["stride"] for s in row["stages"]] == [4, 8, 16, 16, 16]
    assert table["detectors"][0]["macs"] > 200e9
    assert {r["name"] for r in table["recipes"]} >= {"tiny/frcnn-fpn", "detnet/detnet59-fpn"}


def test_models_counts_any_network_of_detnas_and_ranges_of_supernets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    genes = "2120-2112-33130031-3132"
    code, table = call(capsys, "models", "--backbone", f"detnas:small:{genes}:shuffle1")
    assert code == 0 and not table["supernets"]
    (row,) = table["backbones"]
    assert (row["params"], row["macs_224"]) == (3_533_112, 321_219_008)
    code, table = call(capsys, "models", "--size", "64x64", "--backbone", "detnas-supernet20")
    assert code == 0 and not table["backbones"] and not table["detectors"]
    (row,) = table["supernets"]
    assert (row["positions"], row["choices"], row["params"]) == (20, 4, 8_491_688)
    assert row["body_macs_224"] == [237_222_720, 365_472_576]
    code, wrong = call(capsys, "models", "--backbone", "detnas:small:2120")
    assert code == 2 and "must be 20 numbers" in wrong["error"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bccd", "coco_mini", "raccoon_voc", "nuts_seg"])
def test_real_sets_train_and_evaluate(
    name: str,
    real_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = str(real_data / name)
    assert run(["data", "check", data]) == 0
    line = ["finetune", "--data", data, "--recipe", "tiny/frcnn-fpn", "--steps", "2", *SMALL]
    assert run(line) == 0
    code, scores = call(capsys, "eval", "--data", data)
    assert code == 0
    assert scores["bbox"]["AP"] is not None


@pytest.mark.slow
def test_real_image_folder_pretrains(
    real_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = str(real_data / "sign_digits_imagefolder")
    code, result = call(
        capsys, "pretrain", "--data", data, "--recipe", "tiny/pretrain", "--steps", "2"
    )
    assert code == 0
    assert 0 <= result["metrics"]["top1"] <= 1
