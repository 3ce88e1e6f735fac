"""POD from the command line: learn scales, measure them, decompose, fine-tune, evaluate."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detkit import api, pod
from detkit.cli.decompose import command
from detkit.cli.main import run
from detkit.config import ScalesConfig, resolve, to_plain
from detkit.engine import checkpoint as checkpoints
from detkit.engine import distributed
from detkit.engine.train import StepInfo
from detkit.errors import NonFiniteError, TrainingInterrupted
from detkit.models import DETECTORS
from detkit.scales import GlobalScaleConv2d, SplitConv2d, learners

SMALL = [
    *("--set", "data.short_side=64", "--set", "data.long_side=64", "--set", "data.multi_scale=[]"),
    *("--set", "data.workers=0", "--batch-size", "2"),
]
MODEL = ["--backbone", "resnet50-tiny", "--set", "model.norm=bn"]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the one JSON object on stdout."""
    capsys.readouterr()
    code = run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def unlike_one(path: str) -> None:
    """Give every learner of a checkpoint its own scales, as long training would."""
    stored = checkpoints.load(path)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in checkpoints.deployed(stored).items():
        if name.endswith("scale.bias"):
            tensor.copy_(torch.randn(2, generator=generator))
    checkpoints.save(path, stored)


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run ``gsl``, its scales moved away from 1 and measured again."""
    folder = tmp_path_factory.mktemp("pod")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(["data", "synth", "shapes", "--train", "6", "--val", "2", "--size", "64"]) == 0
        line = ["finetune", "--data", "shapes", "--scales", "learn", "--steps", "3", *SMALL, *MODEL]
        line += ["--set", "scales.log_every=2", "--set", "scales.images=4", "--set", "eval.every=2"]
        assert run([*line, "--set", "train.ema=0.9", "--out", "gsl"]) == 0
        shutil.copytree("gsl", "fresh")
        unlike_one("gsl/best.pth")
        assert run(["finetune", "--collect-scales", "gsl/best.pth"]) == 0
        yield folder


@pytest.fixture
def there(road: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(road)
    return road


def test_training_logs_and_stores_the_scales(there: Path) -> None:
    lines = [json.loads(line) for line in Path("fresh/metrics.jsonl").read_text().splitlines()]
    scales = {line["step"]: line["scales"] for line in lines if line["kind"] == "scales"}
    assert list(scales) == [2, 3]
    files = [checkpoints.load(f"fresh/{name}.pth") for name in ("best", "last")]
    for stored in files:
        assert stored["kind"] == "gsl"
        found = stored["scales"]
        paths = [layer["path"] for layer in found["layers"]]
        assert paths == list(found["stats"]) == list(scales[2])
        assert {s["count"] for s in found["stats"].values()} == {4}
        meta = found["meta"]
        assert (meta["images"], meta["split"], meta["short_side"]) == (4, "train", 64)
        assert meta["weights"] == pod.weights_hash(stored["ema"])
        assert any(s["mean"] != [1.0, 1.0] for s in found["stats"].values())


def test_statistics_are_those_of_single_images_of_the_training_set(there: Path) -> None:
    """Measured again by hand on all images: without flip, one by one, deployed weights."""
    shutil.copytree("fresh", "again")
    result = pod.collect_scales("again", overrides=[{"scales": {"images": 100}}])
    assert result["images"] == 6
    loaded = api.load("again/best.pth")
    dataset = api.open_detection("shapes", "train", loaded.config.data)
    path, learner = list(learners(loaded.model).items())[-1]
    seen = []
    for batch in api.eval_batches(dataset, loaded.config):
        loaded.model.detect(batch.images, batch.sizes)
        assert learner.last_scales is not None
        seen.append(learner.last_scales.double().mean(0))
    expected = torch.stack(seen)
    assert result["scales"][path]["mean"] == pytest.approx(expected.mean(0).tolist(), abs=1e-12)
    deviation = expected.std(0, correction=0).tolist()
    assert result["scales"][path]["std"] == pytest.approx(deviation, abs=1e-12)


def test_two_processes_collect_what_one_does(there: Path) -> None:
    """Five images, three and two: means of the processes' means would be other numbers."""
    stored = checkpoints.load("gsl/best.pth")
    generator = torch.Generator().manual_seed(2)
    for name, tensor in checkpoints.deployed(stored).items():
        if name.endswith("scale.weight"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    for name in ("one.pth", "two.pth"):
        checkpoints.save(name, stored)
    line = ["finetune", "--set", "scales.images=5", "--device", "cpu", "--collect-scales"]
    assert run([*line, "one.pth"]) == 0
    assert distributed.launch(2, [sys.executable, "-m", "detkit.cli", *line, "two.pth"]) == 0
    one, two = (checkpoints.load(name)["scales"] for name in ("one.pth", "two.pth"))
    assert two["meta"] == one["meta"] and two["meta"]["images"] == 5
    assert list(two["stats"]) == list(one["stats"])
    for path, expected in one["stats"].items():
        assert min(expected["std"]) > 0.01  # the images differ, so that how they are merged matters
        found = two["stats"][path]
        assert found["count"] == expected["count"] == 5
        for key in ("mean", "std", "min", "max"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4), (path, key)


def test_decompose_finetune_evaluate(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = call(capsys, "decompose", "gsl/best.pth")
    assert code == 0
    assert result["output"] == "gsl/best-fd.pth"
    first = result["layers"][0]
    assert {
        *("path", "label", "channels", "stride", "mean", "std", "case", "lower", "upper"),
        *("alpha", "alpha_realised", "macs_ratio"),
    } <= first.keys()
    assert set(first["lower"]) == {"kernel", "dilation", "padding", "channels"}
    before, after = result["totals"]["detector"]["params"]
    plain, fast = (sum(p.numel() for p in m.parameters()) for m in _nets("gsl/best-fd.pth"))
    assert (before, after) == (plain, fast)
    assert after <= before
    assert result["totals"]["macs"][1] <= result["totals"]["macs"][0]
    loaded = api.load("gsl/best-fd.pth")
    assert loaded.kind == "fd"
    split = {p: m for p, m in loaded.model.named_modules() if isinstance(m, SplitConv2d)}
    assert list(split) == [r["path"] for r in result["layers"] if len(r["parts"]) > 1]
    assert len(split) > 3
    assert not learners(loaded.model)

    line = ["finetune", "--data", "shapes", "--init-from", "gsl/best-fd.pth", "--batch-size", "2"]
    code, trained = call(capsys, *line, "--steps", "2", "--out", "fd")
    assert code == 0
    code, longer = call(capsys, *line, "--steps", "3", "--out", "fd", "--resume", "auto")
    assert code == 0
    stored = checkpoints.load("fd/last.pth")
    assert stored["kind"] == "fd"
    assert stored["scales"]["layers"] == result["layers"]
    assert stored["progress"]["step"] == 3
    code, scores = call(capsys, "eval", "fd/best.pth", "--data", "shapes")
    assert code == 0
    best = checkpoints.load("fd/best.pth")["progress"]["best_metrics"]
    assert scores["bbox"] == pytest.approx(best)


def _nets(path: str) -> tuple[nn.Module, nn.Module]:
    """The plain detector and the fast one of a checkpoint."""
    fast = api.load(path)
    plain = resolve([{"model": {"scales": "off"}}], fast.config)
    return api.build(plain, fast.categories), fast.model


def test_output_is_byte_identical_wherever_it_goes(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("elsewhere").mkdir()
    shutil.copy("gsl/best.pth", "elsewhere/gsl.pth")
    for weights in ("transfer", "none"):
        line = ["--weights", weights, "--align", "8", "--ways", "4"]
        assert run(["decompose", "gsl/best.pth", "-o", "one.pth", *line]) == 0
        torch.rand(3)  # what was drawn before must not matter
        assert run(["decompose", "elsewhere/gsl.pth", "--out", "elsewhere", *line]) == 0
        assert Path("one.pth").read_bytes() == Path("elsewhere/gsl-fd.pth").read_bytes()


def test_weights_of_a_backbone_are_cut_like_the_transfer(there: Path) -> None:
    """The paper's FD without weight transfer."""
    config = resolve([{"model": {"backbone": "resnet50-tiny", "norm": "bn"}}])
    backbone = api.build(config, 5, "backbone")
    file = "backbone.pth"
    stored = checkpoints.load("gsl/best.pth") | {"kind": "backbone", "config": to_plain(config)}
    stored |= {"model": backbone.state_dict(), "scales": {}}
    checkpoints.save(file, {k: v for k, v in stored.items() if k != "ema"})
    assert run(["decompose", "gsl/best.pth", "-o", "bb.pth", "--weights", file]) == 0
    assert run(["decompose", "gsl/best.pth", "-o", "none.pth", "--weights", "none"]) == 0
    state = checkpoints.deployed(checkpoints.load(file))
    cut, fresh = (checkpoints.load(f)["model"] for f in ("bb.pth", "none.pth"))
    rows = checkpoints.load("bb.pth")["scales"]["layers"]
    row = next(r for r in rows if r["upper"] and r["upper"]["kernel"] == [3, 3])
    upper = state[f"{row['path']}.weight"][row["lower"]["channels"] :]
    assert torch.equal(cut[f"{row['path']}.weights.1"], upper)
    assert not torch.equal(fresh[f"{row['path']}.weights.1"], upper)
    assert torch.equal(cut["rpn.head.conv.weight"], fresh["rpn.head.conv.weight"])


def test_dry_run_writes_nothing(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = call(capsys, "decompose", "gsl/best.pth", "-o", "dry.pth", "--dry-run")
    assert code == 0
    assert result["output"] is None
    assert result["layers"]
    assert not Path("dry.pth").exists()
    assert run(["decompose", "gsl/best.pth", "-o", "dry.pth", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert result["layers"][0]["label"] in shown
    assert "GMACs" in shown


@pytest.mark.parametrize("how", ["missing", "stale", "negative", "nan"])
def test_unusable_statistics_are_exit_3(
    how: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = checkpoints.load("gsl/best.pth")
    first = next(iter(stored["scales"]["stats"].values()))
    if how == "missing":
        del stored["scales"]
    elif how == "stale":
        next(iter(stored["ema"].values())).add_(1e-3)
    else:
        first["mean"][1] = -0.5 if how == "negative" else float("nan")
    checkpoints.save(f"{how}.pth", stored)
    code, answer = call(capsys, "decompose", f"{how}.pth")
    assert code == 3
    assert not Path(f"{how}-fd.pth").exists()
    if how in ("negative", "nan"):
        assert "must be" in answer["error"]
        return
    remedy = f"detkit finetune --collect-scales {how}.pth"
    assert f"`{remedy}`" in answer["error"]
    assert run(remedy.split()[1:]) == 0  # the command given is the exact one
    assert run(["decompose", f"{how}.pth", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("line", "code", "hint"),
    [
        ("decompose fresh/best-fd.pth", 2, "existing file"),
        ("decompose one-plain.pth", 3, "finetune --scales learn"),
        ("decompose fresh/best.pth -o fresh/best.pth", 2, "another file"),
        ("decompose fresh/best.pth --tol 0.5", 2, "tol"),
        ("decompose fresh/best.pth --ways 5", 2, "ways"),
        ("decompose fresh/best.pth --align 0", 2, "align"),
        ("decompose fresh/best.pth --weights transfr", 2, "did you mean 'transfer'"),
        ("decompose fresh/best.pth --weights fresh/last.pth", 3, "backbone"),
        ("decompose fresh/best.pth --set model.norm=bn", 2, "--set"),
        ("decompose fresh/best.pth --seed 3", 2, "--seed"),
        ("decompose fresh/best.pth --plot scales.txt", 2, ".png"),
        ("finetune --collect-scales fresh --steps 3", 2, "train.steps"),
        ("finetune --collect-scales fresh --init-from fresh/best.pth", 2, "--init-from"),
        ("finetune --collect-scales shapes", 3, "best.pth"),
        ("finetune --data shapes --init-from fresh/best.pth --scales off", 3, "detkit decompose"),
        ("finetune --data shapes --set model.scales=split --steps 1", 2, "detkit decompose"),
        ("finetune --data shapes --scales lern", 2, "learn"),
        ("pretrain --set model.scales=learn --steps 1", 2, "finetune"),
        ("finetune --data shapes --scales learn --set scales.map=elu --steps 1", 2, "elu1"),
    ],
)
def test_wrong_use_is_one_sentence(
    line: str, code: int, hint: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "one-plain" in line:
        stored = checkpoints.load("fresh/best.pth")
        stored["kind"] = "detector"
        checkpoints.save("one-plain.pth", stored)
    got, answer = call(capsys, *line.split())
    assert (got, answer["exit_code"]) == (code, code)
    assert hint in answer["error"]


def test_learners_start_from_a_plain_detector_and_go_on_learnt(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plain net's weights are all taken; a net with learners keeps its own."""
    assert run(["finetune", "--data", "shapes", "--steps", "1", *SMALL, "--out", "plain"]) == 0
    still = ["--steps", "1", "--batch-size", "2", "--set", "optim.lr=0.0"]
    for source, out in (("plain/last.pth", "grown"), ("gsl/best.pth", "kept")):
        line = ["finetune", "--data", "shapes", "--init-from", source, "--scales", "learn"]
        assert run([*line, *still, "--set", "scales.images=1", "--out", out]) == 0
    plain, grown, gsl, kept = (
        checkpoints.load(f)
        for f in ("plain/last.pth", "grown/last.pth", "gsl/best.pth", "kept/last.pth")
    )
    assert grown["kind"] == kept["kind"] == "gsl"
    added = grown["model"].keys() - plain["model"].keys()
    assert added
    assert all(".scale." in name and not grown["model"][name].any() for name in added)
    stats = grown["scales"]["stats"].values()
    assert all(s["mean"] == [1.0, 1.0] and s["std"] == [0.0, 0.0] for s in stats)
    assert torch.equal(plain["ema"]["rpn.head.conv.weight"], grown["ema"]["rpn.head.conv.weight"])
    name = next(name for name in gsl["ema"] if name.endswith("scale.bias"))
    assert torch.equal(kept["ema"][name], gsl["ema"][name])


def test_a_signal_ends_training_with_statistics(there: Path) -> None:
    config = api.resolve_config(
        "finetune",
        [
            {"data": {"path": "shapes", "short_side": 64, "long_side": 64, "multi_scale": []}},
            {"data": {"workers": 0}, "train": {"steps": 50, "batch_size": 2}},
            {"model": {"scales": "learn"}, "scales": {"images": 2}},
        ],
    )

    def stop(info: StepInfo) -> None:
        if info.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted) as stopped:
        api.train("finetune", config, out="stopped", device="cpu", on_step=stop)
    assert stopped.value.exit_code == 143
    stored = checkpoints.load("stopped/last.pth")
    assert stored["scales"]["meta"]["step"] == stored["progress"]["step"] < 50
    assert pod.decompose("stopped/last.pth", dry_run=True)["layers"]
    api.train(
        "finetune",
        resolve([{"train": {"steps": 4}}], config),
        out="stopped",
        device="cpu",
        resume="auto",
    )
    assert checkpoints.load("stopped/last.pth")["scales"]["meta"]["step"] == 4


def test_a_scale_that_is_not_finite_is_exit_6_and_names_the_images(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = api.resolve_config(
        "finetune",
        [
            {"data": {"path": "shapes", "short_side": 64, "long_side": 64, "multi_scale": []}},
            {"data": {"workers": 0}, "train": {"steps": 3, "batch_size": 2}},
            {"model": {"scales": "learn"}},
        ],
    )
    scales = GlobalScaleConv2d.scales
    monkeypatch.setattr(GlobalScaleConv2d, "scales", lambda self, x: scales(self, x) * torch.nan)
    with pytest.raises(NonFiniteError, match=r"step 1: .*scales must be finite.*\.png") as error:
        api.train("finetune", config, out="nan", device="cpu")
    assert error.value.exit_code == 6


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("backbone", ["resnet50-tiny", "detnet59-tiny"])
def test_every_detector_learns_scales_and_is_rebuilt(detector: str, backbone: str) -> None:
    tables = {"detector": detector, "backbone": backbone, "norm": "bn", "scales": "learn"}
    config = resolve([{"model": tables, "scales": {"group": "image"}}])
    with torch.device("meta"):
        model = api.build(config, 3)
    found = learners(model)
    assert len(found) > 3
    outside = [p for p in found if not p.startswith("backbone.")]
    assert {found[p].scale_group for p in outside} <= {"image"}
    assert bool(outside) == (detector == "frcnn-c4")
    plain = resolve([{"model": {"scales": "off"}}], config)
    rows = [{"path": p, "parts": _halves(m)} for p, m in found.items()]
    fast = resolve([{"model": {"scales": "split"}}], config)
    with torch.device("meta"):
        wanted = sum(p.numel() for p in api.build(plain, 3).parameters())
        rebuilt = api.build(fast, 3, "fd", rows)
    assert sum(p.numel() for p in rebuilt.parameters()) == wanted


def _halves(learner: GlobalScaleConv2d) -> list[dict[str, Any]]:
    half = learner.out_channels // 2
    return [
        {"kernel": [3, 3], "dilation": [d, d], "padding": [d, d], "channels": c}
        for d, c in ((1, half), (2, learner.out_channels - half))
    ]


@pytest.mark.slow
def test_the_python_of_the_guide_runs() -> None:
    """Its commands are run by test_docs_commands.py."""
    text = (Path(__file__).parents[1] / "docs" / "pod.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_the_guide_lists_every_setting_and_option() -> None:
    text = (Path(__file__).parents[1] / "docs" / "pod.md").read_text()
    listed = re.findall(r"^\| `scales\.(\w+)` \| (\S+) \|", text, re.MULTILINE)
    defaults = {k: str(v).removesuffix(".0") for k, v in asdict(ScalesConfig()).items()}
    assert {key: value.strip("`") for key, value in listed} == defaults
    options = {o.name for o in command.params if o.name in asdict(pod.Decomposition())} - {"seed"}
    rows = re.findall(r"^\| `--([\w-]+)` \|", text, re.MULTILINE)
    assert {row.replace("-", "_") for row in rows} == options | {"plot"}


def test_the_plot_shows_every_layer(there: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run(["decompose", "gsl/best.pth", "-o", "p.pth", "--plot", "scales.svg"]) == 0
    assert Path("scales.svg").stat().st_size > 5_000
    from detkit.report.scales import draw_scales

    layers = checkpoints.load("p.pth")["scales"]["layers"]
    figure = draw_scales({"a": layers, "b": layers})
    for panel in figure.axes:
        assert [t.get_text() for t in panel.get_xticklabels()] == [r["label"] for r in layers]
        lines = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
        assert lines["d_h (height)"] == [r["mean"][0] for r in layers]
        assert lines["d_w (width)"] == [r["mean"][1] for r in layers]
