"""`detkit bench`: the estimator on known times, the cases, the commands, the page of results."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scripts import script
from torch import Tensor

from detkit.bench import boxes, operators, timing
from detkit.bench.box_cases import _nms_calls, _ps_calls
from detkit.bench.case import Case, Setting, forward
from detkit.bench.conv_cases import _scaled
from detkit.bench.peers import load_peers
from detkit.cli.main import cli, run
from detkit.deploy import form
from detkit.ops import _library

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SMALL = ["model", "--recipe", "tiny/light-head", "--size", "64x96", "--rounds", "3"]


# --- the estimator, on a clock that says what the calls return ------------------------------------


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Calls return (name, milliseconds); what was timed when is kept."""
    order: list[tuple[str, int]] = []

    def clock(call: Any, device: object, turn: int, repeats: int) -> float:
        name, spent = call(turn)
        order.append((name, turn))
        return float(spent)

    monkeypatch.setattr(timing, "clock", clock)
    return order


def contestant(name: str, spent: Callable[[int], float]) -> timing.Call:
    return lambda turn: (name, spent(turn))


def test_ratios_are_of_the_same_round(fake_clock: list[tuple[str, int]]) -> None:
    """A machine that is ten times as slow in every other round leaves them alone."""

    def load(_: int) -> float:
        return [1, 10][len(fake_clock) // 2 % 2]  # two calls each round, two to warm up

    calls = {
        "a": contestant("a", lambda t: 2 * load(t)),
        "b": contestant("b", lambda t: 6 * load(t)),
    }
    found, failures = timing.compare(calls, CPU, 0.0)
    assert failures == {}
    assert found["b"].ratio == 3
    assert found["b"].spread == 0
    assert found["a"].rounds == found["b"].rounds == timing.LEAST
    warm = 4  # two calls each, since they are short
    first = [name for name, _ in fake_clock[warm:]][::2]
    assert set(first) == {"a", "b"}, "who begins must move on"


def test_slow_contestants_run_seldom(fake_clock: list[tuple[str, int]]) -> None:
    calls = {
        "ours": contestant("ours", lambda _: 1.0),
        "slow": contestant("slow", lambda _: 2 * timing.SLOW),
        "endless": contestant("endless", lambda _: 20 * timing.SLOW),
        "reference": contestant("reference", lambda _: 5.0),
    }
    found, _ = timing.compare(calls, CPU, 0.0, few=("reference",))
    rounds = {name: t.rounds for name, t in found.items()}
    few = timing.FEW
    assert rounds == {"ours": timing.LEAST, "slow": few, "endless": 1, "reference": few}
    assert sum(name == "endless" for name, _ in fake_clock) == 1
    assert found["endless"].ratio == 20 * timing.SLOW


def test_rounds_go_on_while_a_ratio_moves(fake_clock: list[tuple[str, int]]) -> None:
    noise = np.random.default_rng(0).uniform(1, 3, 1000)
    calls = {
        "ours": contestant("ours", lambda _: 1.0),
        "steady": contestant("steady", lambda _: 2.0),
        "restless": contestant("restless", lambda _: noise[len(fake_clock)]),
    }
    found, _ = timing.compare(calls, CPU, 60.0)
    assert found["steady"].rounds == timing.LEAST
    assert found["restless"].rounds == timing.MOST


def test_a_peer_that_fails_is_named_and_ours_may_not(fake_clock: list[tuple[str, int]]) -> None:
    def broken(_: int) -> object:
        raise RuntimeError("no such kernel\nand more")

    ours = contestant("ours", lambda _: 1.0)
    found, failures = timing.compare({"ours": ours, "peer": broken}, CPU, 0.0)
    assert list(found) == ["ours"]
    assert failures == {"peer": "no such kernel"}
    with pytest.raises(RuntimeError, match="no such kernel"):
        timing.compare({"ours": broken, "peer": ours}, CPU, 0.0)


def test_peak_memory_counts_what_a_call_needs() -> None:
    peak = timing.peak_mib(lambda _: torch.ones(16 << 20).add_(1), CPU)
    assert peak is None or 60 < peak < 90  # 64 MiB


# --- the cases ------------------------------------------------------------------------------------


def test_every_operator_has_cases_and_no_two_are_the_same() -> None:
    cases = operators.all_cases()
    assert {case.op for case in cases} == set(_library.OPS)
    keys = [(case.op, case.size, case.part, case.dtype) for case in cases]
    assert len(set(keys)) == len(keys)


def test_the_reference_of_a_backward_pass_is_the_reference() -> None:
    """Its forward pass is made before anything is timed, and decides what runs backward."""
    (case, *_) = [c for c in operators.all_cases() if c.part == "backward"]
    modes = []

    def calls(_: Setting) -> dict[str, timing.Call]:
        modes.append(_library.MODE)
        return {"detkit": lambda turn: modes.append(_library.MODE)}

    run_reference = operators._by_reference(replace(case, calls=calls), Setting(CPU, 1, {}))
    run_reference(0)
    assert modes == ["reference", "reference"]


def test_targets_name_cases_and_contestants() -> None:
    keys = {(case.op, case.size, case.part, case.dtype) for case in operators.all_cases()}
    against = {"torchvision", "onnxruntime", "openvino", "F.conv2d", "detkit fp32"}
    for target in script("tools/performance_page.py").targets():
        assert (target["op"], target["size"], target["pass"], target["dtype"]) in keys
        assert target["against"] in against
        better = (1 if target["at_most"] else -1) * np.subtract(target["floor"], target["goal"])
        assert (better >= 0).all(), "a goal asks for more than its floor"


@pytest.fixture(scope="module")
def setting() -> Setting:
    peers = load_peers()
    if not peers:
        pytest.skip("no peer is installed")
    return Setting(CPU, 1, peers)


def test_peers_suppress_the_same_boxes(setting: Setting) -> None:
    calls = _nms_calls(setting, 1000, boxes.proposals)
    kept: Tensor = calls.pop("detkit")(0)  # type: ignore[assignment]
    for name, call in calls.items():
        answer: Any = call(0)
        if name == "torchvision":
            assert torch.equal(answer, kept)
        elif name == "onnxruntime":  # (kept, 3): image, class, box
            assert answer[0][:, 2].tolist() == kept.tolist()


def test_peers_convolve_alike(setting: Setting) -> None:
    """The offsets that the deformable convolutions get make the same scale."""
    calls = _scaled(setting, (512, 25, 42), "fp32", "forward")
    del calls["F.conv2d"]  # at the nearest whole dilation, another function
    ours: Tensor = calls.pop("detkit")(0)  # type: ignore[assignment]
    for call in calls.values():
        answer: Any = call(0)
        other = answer if isinstance(answer, Tensor) else torch.from_numpy(np.array(answer[0]))
        torch.testing.assert_close(other, ours, rtol=1e-3, atol=1e-3)


def test_peers_pool_alike(setting: Setting) -> None:
    calls = _ps_calls(setting, "nchw")
    ours = calls.pop("detkit")(0)
    for call in calls.values():
        torch.testing.assert_close(call(0), ours, rtol=1e-4, atol=1e-4)


# --- the commands ---------------------------------------------------------------------------------


def small_cases() -> list[Case]:
    """Two rows that take no time."""
    data = [boxes.mixed(50), boxes.mixed(50, 1)]

    def calls(_: Setting) -> dict[str, timing.Call]:
        def nms(b: Tensor, s: Tensor) -> object:
            from detkit import ops

            return ops.nms(b, s, 0.7)

        return {"detkit": forward(nms, data), "other": forward(nms, data)}

    return [
        Case("nms", "small", "forward", "fp32", calls, mbytes=1e-3),
        Case("dilated_conv2d", "small", "forward", "bf16", calls, gflop=1e-6, reference=False),
    ]


def test_bench_ops_gives_rows_and_saves_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "all_cases", small_cases)
    monkeypatch.setattr(operators, "limits", lambda _: {"fp32": 100.0, "bf16": 200.0, "copy": 30.0})
    saved = tmp_path / "new" / "ops.json"
    threads = torch.get_num_threads()
    answer = CliRunner().invoke(
        cli, ["bench", "ops", "--quick", "--threads", "1,2", "--json", "--save", str(saved)]
    )
    assert answer.exit_code == 0, answer.output
    result = json.loads(answer.stdout)
    assert result == json.loads(saved.read_text())
    assert torch.get_num_threads() == threads
    assert [(r["op"], r["threads"]) for r in result["rows"]] == [
        ("nms", 1), ("dilated_conv2d", 1), ("nms", 2), ("dilated_conv2d", 2),
    ]  # fmt: skip
    first, second = result["rows"][:2]
    assert set(first["others"]) == {"other", "reference"}
    assert set(second["others"]) == {"other"}
    assert (first["limit"], second["limit"]) == ("copy", "gemm")
    assert first["of_limit"] == pytest.approx(1e-3 / first["ms"] / 30)
    assert {"device", "torch", "extension", "load_before", "load_after"} <= set(result["hardware"])
    shown = CliRunner().invoke(cli, ["bench", "ops", "--quick", "--threads", "1"])
    assert shown.exit_code == 0
    assert max(len(line) for line in shown.stdout.splitlines() if "device" not in line) <= 160
    assert "limits with 1 threads" in shown.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ops", "--only", "nsm"], "--only: must be one of nms"),
        (["ops", "--threads", "0"], "--threads: must be positive numbers"),
        (["ops", "--recipe", "tiny/retinanet"], "bench ops: must stand without settings"),
        (["ops", "--out", "x"], "--out: must be left out here"),
        (["model", "--threads", "1,2"], "--threads: must be one number"),
        (["model", "--size", "big"], "--size: must read HEIGHTxWIDTH"),
        (
            [*SMALL, "--cuda-graph", "--device", "cpu"],
            "--cuda-graph: must go with a model on a CUDA",
        ),
        (
            [*SMALL, "--compile", "--set", "model.scales=learn"],
            "`detkit decompose` makes such a net",
        ),
    ],
)
def test_bad_options_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("what", ["ops", "model", "train"])
def test_a_dry_run_measures_nothing(what: str) -> None:
    answer = CliRunner().invoke(cli, ["bench", what, "--dry-run", "--json", "--threads", "2"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["dry_run"] is True


@pytest.mark.parametrize("recipe", ["tiny/light-head", "tiny/retinanet", "tiny/maskrcnn-fpn"])
def test_bench_model_times_forms_and_parts(recipe: str) -> None:
    words = ["bench", "model", "--recipe", recipe, "--size", "64x96", "--rounds", "3", "--json"]
    answer = CliRunner().invoke(cli, words)
    assert answer.exit_code == 0, answer.output
    result = json.loads(answer.stdout)
    assert result["size"] == [64, 96]
    assert result["failed"] == {}
    names = [v["variant"] for v in result["variants"]]
    assert names[:2] == ["eager", "folded"] and names[-1] == "folded, channels_last, fixed sizes"
    assert len(names) == 6
    assert {v["first_s"] for v in result["variants"]} == {None}
    assert "fixed" not in result["parts_of"], "its parts are one"
    two_stage = {"rpn", "proposals", "head", "post-processing"}
    expected = {"backbone", "neck"} | (two_stage if "retina" not in recipe else {"head"})
    assert expected <= set(result["parts"])
    assert ("mask head" in result["parts"]) == ("mask" in recipe)
    assert all(spent >= 0 for spent in result["parts"].values())


def test_bench_model_compiles_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many images at once, in every form of a CPU; without the compiler's own half minute."""
    monkeypatch.setattr(form, "compiled", functools.partial(form.compiled, backend="eager"))
    answer = CliRunner().invoke(cli, ["bench", *SMALL, "--batch", "16", "--compile"])
    assert answer.exit_code == 0, answer.output
    assert "folded, channels_last, fixed sizes" in answer.stdout
    assert "first call of folded, channels_last, compiled: " in answer.stdout
    assert "left out" not in answer.stdout


def test_bench_model_times_cuda_graphs() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    words = ["bench", *SMALL, "--batch", "16", "--cuda-graph", "--device", "cuda", "--json"]
    answer = CliRunner().invoke(cli, words)
    assert answer.exit_code == 0, answer.output
    last = json.loads(answer.stdout)["variants"][-1]
    assert last["variant"] == "folded, channels_last, CUDA graph"
    assert last["first_s"] > 0


def test_bench_model_says_which_form_a_net_has_not() -> None:
    answer = CliRunner().invoke(cli, ["bench", *SMALL, "--set", "model.scales=learn"])
    assert answer.exit_code == 0, answer.output
    reason = "fixed sizes: must be of a net without scale learners"
    assert f"folded, channels_last, fixed sizes is left out: {reason}" in answer.stdout


def test_bench_train_splits_a_step() -> None:
    words = ["bench", "train", "--steps", "1", "--batch-size", "2", "--set", "data.short_side=64"]
    answer = CliRunner().invoke(cli, [*words, "--set", "data.long_side=96", "--json"])
    assert answer.exit_code == 0, answer.output
    result = json.loads(answer.stdout)
    assert (result["steps"], result["batch"]) == (1, 2)
    names = ["data", "backbone", "neck", "rpn", "proposals, heads, losses", "backward", "optimizer"]
    assert list(result["parts"]) == names
    total = sum(result["parts"].values()) / 1e3
    assert result["images_per_second"] == pytest.approx(2 / total)
    assert result["data_wait"] == pytest.approx(result["parts"]["data"] / 1e3 / total)
    assert result["peak_gib"] > 0.1


# --- the page -------------------------------------------------------------------------------------


def test_the_page_shows_the_committed_numbers() -> None:
    page = script("tools/performance_page.py")
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render(text) == text, "run tools/performance_page.py"


def test_a_verdict_reads_both_kinds_of_target() -> None:
    verdict = script("tools/performance_page.py").verdict
    limits = {"floor": 2, "goal": 4}
    assert [verdict(r, False, limits) for r in (1.9, 2, 4)] == ["missed", "floor met", "goal met"]
    limits = {"floor": 1.2, "goal": 1.05}
    assert [verdict(r, True, limits) for r in (1.3, 1.2, 1)] == ["missed", "floor met", "goal met"]
