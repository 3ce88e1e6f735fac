"""`detkit report`: its pages for every kind of run, and what it keeps between two reports."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from browser import browser, look
from html_pages import checked

from detkit import config as configs
from detkit import reporting
from detkit.cli.main import run
from detkit.detnas import SearchFolder, run_search
from detkit.engine.run import RunFolder
from detkit.models.search_space import SPACES, Genes

EVIL = "<script>alert('cat')</script>"
SMALL = [
    *("--set", "data.short_side=96", "--set", "data.long_side=128", "--set", "data.multi_scale=[]"),
    *("--set", "data.workers=0", "--batch-size", "2"),
]
ROOT = Path(__file__).parents[1]
DETECTED = ["accuracy", "precision", "iou-area", "confusion", "errors"]


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier and detectors trained for a step or two; one class is evil."""
    folder = tmp_path_factory.mktemp("road")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["data", "synth", "shapes", "--train", "6", "--val", "4", "--size", "128"]) == 0
        for file in Path("shapes/annotations").glob("*.json"):
            content = json.loads(file.read_text())
            content["categories"][0]["name"] = EVIL
            file.write_text(json.dumps(content))
        assert run(["pretrain", "--steps", "2", "--set", "data.workers=0"]) == 0
        line = ["finetune", "--data", "shapes", *SMALL]
        assert run([*line, "--steps", "2", "--out", "plain"]) == 0
        learn = ["--scales", "learn", "--set", "scales.images=2", "--set", "scales.log_every=1"]
        assert run([*line, "--steps", "2", "--out", "learn", *learn]) == 0
    return folder


@pytest.fixture
def there(road: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(road)
    return road


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    code = run(["report", *arguments, "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert code == 0, answer
    return answer


def test_a_detector_is_detected_once_and_its_names_are_escaped(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = report(capsys, "plain")
    assert answer["report"] == "plain/report.html"
    wanted = ["overview", "training", *DETECTED, "pictures", "settings"]
    assert answer["sections"] == wanted
    text = checked(Path("plain/report.html").read_text())
    assert EVIL not in text
    assert "&lt;script&gt;alert" in text
    assert set(re.findall(r'<section id="([^"]+)"', text)) == set(wanted)
    code = run(["eval", "plain/best.pth", "--json"])
    scores = json.loads(capsys.readouterr().out)
    assert (code, answer["runs"][0]["metrics"]["bbox"]) == (0, scores["bbox"])
    with monkeypatch.context() as patch:
        patch.setattr(reporting, "restore", None)  # no model is built for the second report
        assert report(capsys, "plain")["runs"] == answer["runs"]
    assert checked(Path("plain/report.html").read_text()) == text
    report(capsys, "plain", "--set", "box.max_detections=1", "-o", "other.html")
    assert len(list(Path("plain").glob("detections-*.json"))) == 2  # other settings, other file
    assert report(capsys, "plain", "--limit", "2", "-o", "two.html")["runs"][0]["images"] == 2


def test_runs_side_by_side(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (classifier,) = Path("runs/pretrain").iterdir()
    answer = report(capsys, "plain", "learn", str(classifier), "-o", "all.html")
    assert [r["name"] for r in answer["runs"]] == ["plain", "learn", classifier.name]
    wanted = ["overview", "training", *DETECTED, "scales", "pictures", "settings"]
    assert answer["sections"] == wanted
    text = checked(Path("all.html").read_text())
    for part in (
        "Settings that differ",
        "model.scales",
        "Course over training",
        "AP of each class",
    ):
        assert part in text


def test_without_a_run_it_takes_the_newest(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = report(capsys)
    assert answer["sections"] == ["overview", "training", "settings"]
    assert answer["runs"][0]["run"].startswith("runs/pretrain/")
    assert "top1" in checked(Path(answer["report"]).read_text())


def test_an_interrupted_run_is_told_as_far_as_it_came(
    there: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    shutil.copy("plain/config.toml", folder)
    answer = report(capsys, str(folder))
    assert answer["sections"] == ["overview", "settings"]
    lines = Path("plain/metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text(lines[0] + "\n" + lines[1][:20])
    answer = report(capsys, str(folder))
    assert answer["sections"] == ["overview", "training", "settings"]
    assert any("50%" in note for note in answer["runs"][0]["notes"])
    assert any("no checkpoint" in note for note in answer["runs"][0]["notes"])
    assert "no checkpoint" in checked((folder / "report.html").read_text())
    # The report does not keep the run from being started again in its folder.
    line = ["finetune", "--data", "shapes", *SMALL, "--steps", "1", "--out", str(folder)]
    assert run(line) == 0


def test_a_run_whose_data_is_gone_still_has_its_curves(
    there: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree("plain", tmp_path / "plain")
    target = str(tmp_path / "plain")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.chdir(tmp_path)
        answer = report(capsys, target)
        assert answer["sections"] == ["overview", "training", "settings"]
        assert any("shapes" in note for note in answer["runs"][0]["notes"])
        assert run(["report", target, "--data", "elsewhere"]) == 2  # asked for by name: refused


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("report nowhere", "config.toml"),
        ("report .", "plain"),
        ("report plain plain", "once each"),
        ("report plain -o no/such/report.html", "-o"),
        ("report plain --recipe tiny/pretrain", "--recipe"),
    ],
)
def test_wrong_usage_is_refused(
    line: str, hint: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run([*line.split(), "--json"]) == 2
    assert hint in json.loads(capsys.readouterr().out)["error"]


def test_without_matplotlib_it_says_what_to_install(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    capsys.readouterr()
    assert run(["report", "plain", "--json"]) == 2
    assert "pip install detkit[plots]" in json.loads(capsys.readouterr().out)["error"]


def test_the_examples_of_the_docs_run_as_written(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    lines = re.findall(r"^detkit (report.*?)\s*(?:#.*)?$", text, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        assert run(line.split()) == 0, line
    assert checked(Path("both.html").read_text())
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    capsys.readouterr()
    exec(compile(example, "docs/report.md", "exec"), {})
    assert capsys.readouterr().out.startswith("page.html ")
    titles = set(re.findall(r"^\| ([A-Z][^|]*?) \|", text, re.MULTILINE))
    page = Path("both.html").read_text()
    shown = set(re.findall(r'<h2 id="[^"]+"><a href="[^"]+">([^<]+)</a>', page))
    assert titles == shown - {"Overview"} | {"Search"}


def searched(folder: Path, method: str, generations: int = 3, metric: str = "AP") -> Path:
    """A search of the tiny space by a fitness that fails on some networks."""

    def evaluate(genes: Genes) -> dict[str, float]:
        if genes[0] == 3:
            raise FloatingPointError("no number")
        return {metric: sum(genes) / 30}

    space, limits = SPACES["tiny"], {"macs": 60e6}
    wanted = {"method": method, "population": 6, "generations": generations, "parents": 3}
    config = configs.resolve([{"search": wanted}])
    folder.mkdir()
    configs.write_toml(config, folder / "config.toml")
    journal = folder / "candidates.jsonl"
    found = run_search(space, config.search, evaluate, metric, journal, limits=limits)
    record = {"method": method, "fitness": "detection", "metric": metric, "limits": limits}
    record |= {"finished": True, "space": space.to_plain(), "supernet": {"file": "best.pth"}}
    SearchFolder(folder).write(record)
    assert len(found.history) == 6 * generations
    return folder


def test_searches_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(searched(tmp_path / method, method)) for method in ("evolution", "random")]
    answer = report(capsys, *folders)
    assert answer["sections"] == ["overview", "search", "settings"]
    text = checked((tmp_path / "evolution" / "report.html").read_text())
    lines = [json.loads(row) for row in (tmp_path / "random/candidates.jsonl").open()]
    best = max((line for line in lines if line["fitness"] is not None), key=lambda x: x["fitness"])
    assert best["genes"] in text
    assert f"random 1: {best['fitness']:.3f}" in text  # its strip
    for part in ("Best so far", "Fitness against multiply-adds; dashed: the limit", "stride 16"):
        assert part in text


def test_searches_of_other_metrics_have_axes_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alike = [str(searched(tmp_path / name, name)) for name in ("evolution", "random")]
    other = searched(tmp_path / "other", "random", metric="top1")
    report(capsys, *alike, str(other))
    text = checked((tmp_path / "evolution" / "report.html").read_text())
    assert text.count("<figcaption>Best so far<") == 2
    assert ">AP<" in text
    assert ">top1<" in text


def test_a_search_that_runs_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a line at the end may be on its way; there is no result before the first generation."""
    folder = searched(tmp_path / "run", "random")
    (folder / "search.json").unlink()
    journal = folder / "candidates.jsonl"
    content = journal.read_bytes()[:-30]
    journal.write_bytes(content)
    answer = report(capsys, str(folder))
    assert journal.read_bytes() == content
    assert answer["sections"] == ["overview", "search", "settings"]
    assert any("17 of 18" in note for note in answer["runs"][0]["notes"])
    assert "stride 16" not in checked((folder / "report.html").read_text())


@pytest.mark.slow
def test_a_browser_shows_every_section_on_a_telephone_and_a_desktop(
    there: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """No console message, nothing requested, nothing wider than the screen, text one can read."""
    browser()
    answer = report(capsys, "learn", "plain", "-o", str(tmp_path / "report.html"))
    for width in (390, 1280):
        folder = tmp_path / str(width)
        folder.mkdir()
        seen = look(tmp_path / "report.html", width, folder)
        assert seen["console"] == seen["requests"] == seen["wide"] == []
        assert seen["width"] == width
        assert seen["scrollWidth"] <= width
        assert seen["sections"] == dict.fromkeys(answer["sections"], True)
        assert seen["images"] > 0
        assert seen["broken"] == 0
        assert seen["smallestText"] > 8


def test_the_browser_sees_what_is_wrong(tmp_path: Path) -> None:
    """Guards the test above: a page with every fault it looks for."""
    browser()
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><body><section id=gone style='display:none'>x</section>"
        "<p style='width:900px'>wide</p><img src='data:image/png;base64,AAAA'>"
        "<link rel=stylesheet href=http://127.0.0.1:9/none.css><script>console.error('oh')</script>"
    )
    (tmp_path / "look").mkdir()
    seen = look(page, 390, tmp_path / "look")
    assert seen["scrollWidth"] > 390
    assert any("900px" in element for element in seen["wide"])
    assert seen["sections"] == {"gone": False}
    assert seen["broken"] == 1
    assert any("oh" in row for row in seen["console"])
    assert any(name.endswith("none.css") for name in seen["requests"])


@pytest.mark.parametrize(
    ("stage", "does", "detector"),
    [("pretrain", "classifies", None), ("finetune", "detects", "frcnn-fpn")],
)
def test_a_supernet_is_told_as_what_it_was_trained_as(
    stage: str, does: str, detector: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pre-trained one is no detector, though its settings name the default one."""
    monkeypatch.setattr(reporting, "_parameters", lambda stored: 1)
    stored: Any = {"kind": "supernet", "stage": stage, "categories": {"names": ["a"]}}
    config = configs.resolve([{"model": {"backbone": "detnas-supernet-tiny", "norm": "bn"}}])
    assert reporting._facts(config, [], stored, None).get("detector") == detector
    run = RunFolder("nowhere")
    notes = reporting._state(run, [], stored)
    assert f"A supernet {does} along one path only; `detkit search` tries its paths." in notes
