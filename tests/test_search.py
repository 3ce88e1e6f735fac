"""`detkit search` on a supernet that the other commands trained: fitness, resuming, processes,
recipes for the winner, wrong input.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import detkit
from detkit import detnas
from detkit.cli.main import run
from detkit.cli.search import count
from detkit.config import SearchConfig, from_plain, read_toml
from detkit.engine import checkpoint as checkpoints
from detkit.errors import ConfigError
from detkit.fitness import Fitness, open_supernet
from detkit.models.search_space import SearchSpace
from detkit.nas.candidates import Candidate, Dropped
from detkit.nas.early_stop import EARLY, EarlyStop, kendall_tau, ranking_error
from detkit.nas.evolution import EvolutionSettings
from detkit.scales import weights_hash

SPACE = """
[space]
name = "own"
blocks = [1, 1, 1, 1]
stem = 4
channels = [8, 12, 16, 24]
last = 16
ops = ["shuffle3", "shuffle5", "xception"]

[model]
backbone = "detnas-supernet"
norm = "bn"

[nas]
eval_paths = 1
eval_calibration = 1

[data]
workers = 0
"""
DETECTOR = [
    *("--set", "data.short_side=64", "--set", "data.long_side=64", "--set", "data.multi_scale=[]"),
    *("--set", "data.workers=0", "--batch-size", "4", "--set", "model.neck_channels=8"),
    *("--set", "box.channels=16", "--set", "box.score_threshold=0.0", "--set", "nas.eval_paths=0"),
    *("--set", "rpn.post_nms_test=30", "--set", "rpn.post_nms_train=60"),
]
FEW = {"calibration_steps": 2, "calibration_batch": 3, "population": 4, "generations": 2}
SHORT = ["--set", "search.calibration_steps=2", "--set", "search.calibration_batch=3"]
SHORT += ["--population", "4", "--generations", "2"]
LIMIT = ["--max-macs", "2.7M"]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and the one JSON object on stdout."""
    capsys.readouterr()
    code = run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "detkit.cli", *arguments]


def sequence(folder: str | Path) -> list[dict[str, Any]]:
    """Lines of a search in order, without what differs between two runs of the same one."""
    text = (Path(folder) / "candidates.jsonl").read_text()
    lines = sorted((json.loads(line) for line in text.splitlines()), key=lambda x: x["index"])
    return [{k: v for k, v in line.items() if k not in ("seconds", "rank")} for line in lines]


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a pre-trained and a fine-tuned supernet and one search of the second."""
    folder = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("own.toml").write_text(SPACE)
        assert run(["data", "synth", "shapes", "--train", "20", "--val", "3", "--size", "64"]) == 0
        line = ["pretrain", "--config", "own.toml", "--steps", "2", "--batch-size", "8"]
        assert run([*line, "--set", "data.short_side=32", "--set", "data.long_side=32"]) == 0
        (first,) = Path("runs/pretrain").iterdir()
        line = ["finetune", "--data", "shapes", "--config", "own.toml", "--steps", "12"]
        line += ["--recipe", "tiny/supernet-frcnn-fpn", "--init-from", str(first / "last.pth")]
        assert run([*line, *DETECTOR]) == 0
        assert run(["search", *SHORT, *LIMIT, "--out", "found"]) == 0  # the newest supernet
        yield folder


@pytest.fixture
def there(road: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(road)
    return road


def supernet() -> str:
    return detnas.newest_supernet()


# -- fitness


def fitness(**settings: Any) -> Fitness:
    layers = [{"search": FEW | settings}]
    return Fitness(open_supernet(supernet(), layers), torch.device("cpu"))


def test_a_path_scores_the_same_whatever_came_before(there: Path) -> None:
    of = fitness()
    before = weights_hash(of._paths._model.state_dict())
    one, other, again = (dict(of(genes)) for genes in ((0, 1, 2, 0), (2, 2, 1, 1), (0, 1, 2, 0)))
    assert one == again and one != other
    assert one["AP"] > 0 and other["AP"] > 0  # two zeros would be equal too
    assert weights_hash(of._paths._model.state_dict()) == before
    # Neither do batches, memory or the early stop's two parts change a number.
    assert dict(fitness(batch_size=1)((0, 1, 2, 0))) == one
    assert dict(fitness(cache_mib=0)((0, 1, 2, 0))) == one
    parts = dict(fitness(early_stop=0.5)((0, 1, 2, 0)))
    assert parts.pop(EARLY) != one["AP"]
    assert parts == one


def test_a_hopeless_path_is_dropped_after_the_first_images(there: Path) -> None:
    of = fitness(early_stop=0.5, early_margin=0.0)
    early = of((0, 1, 2, 0))[EARLY]
    of.begin([Candidate(0, 0, (1, 1, 1, 1), 0.9, {EARLY: 0.9})])
    with pytest.raises(Dropped) as dropped:
        of((0, 1, 2, 0))
    assert dropped.value.metrics == {EARLY: early}
    of.begin([])  # the first generation has nobody to compare with
    assert of((0, 1, 2, 0))[EARLY] == early


def test_early_stops_are_measured_by_what_they_would_have_lost() -> None:
    def history(early: list[float], full: list[float]) -> list[Candidate]:
        pairs = enumerate(zip(early, full, strict=True))
        return [Candidate(i, i // 4, (i,), f, {EARLY: e}) for i, (e, f) in pairs]

    stop = EarlyStop(quantile=0.5, margin=0.1)
    assert stop.bound([]) == float("-inf")
    assert stop.bound(history([0.0, 0.2, 0.4, 0.6], [0.0] * 4)) == pytest.approx(0.2)
    right = ranking_error(
        history([0.1, 0.2, 0.3, 0.4, 0.0, 0.1, 0.2, 0.9], [0.1, 0.2, 0.3, 0.4, 0.0, 0.1, 0.2, 0.9]),
        stop,
        keep=2,
    )
    assert (right.dropped, right.lost, right.best_lost) == (2 / 8, 0.0, False)
    assert right.tau == pytest.approx(1)
    wrong = ranking_error(
        history([0.1, 0.2, 0.3, 0.4, 0.0, 0.1, 0.2, 0.9], [0.1, 0.2, 0.3, 0.4, 1.0, 0.1, 0.2, 0.9]),
        stop,
        keep=2,
    )
    assert (wrong.dropped, wrong.lost, wrong.best_lost) == (2 / 8, 1 / 2, True)
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 1, 1], [1, 2, 3]) == 0


# -- the command


def test_a_search_leaves_its_result_and_goes_on_where_it_stands(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = sequence("found")
    assert [line["index"] for line in lines] == list(range(8))
    assert len({line["genes"] for line in lines}) == 8
    assert all(line["macs"] <= 2_700_000 for line in lines)
    found = json.loads(Path("found/search.json").read_text())
    assert found["finished"] and found["limits"] == {"macs": 2_700_000}
    assert found["best"]["fitness"] == max(line["fitness"] for line in lines)
    assert [net["fitness"] for net in found["top"]] == sorted(
        (line["fitness"] for line in lines), reverse=True
    )
    assert found["best"]["backbone"] == f"detnas:own:{found['best']['genes']}:shuffle2"
    assert found["data"]["images"] == 4 and found["data"]["training_images"] == 16
    assert "8 of 8" in Path("found/log.txt").read_text()
    code, answer = call(capsys, "search", "--out", "found", "--resume", "auto", *SHORT, *LIMIT)
    assert code == 0 and answer["best"] == found["best"]
    assert sequence("found") == lines
    # A longer search is the same one for as long as the shorter was.
    longer = ["search", "--resume", "found", *SHORT, *LIMIT, "--generations", "3"]
    code, answer = call(capsys, *longer)
    assert code == 0 and answer["evaluations"] == 12
    assert sequence("found")[:8] == lines
    again = detkit.search(supernet(), overrides=[{"search": FEW | {"max_macs": 2_700_000}}])
    assert again["run"].startswith("runs/search/") and sequence(again["run"]) == lines
    assert detnas.newest_search() == again["run"]
    assert detkit.search is not detnas


def test_what_would_mix_two_searches_is_refused(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer = call(capsys, "search", supernet(), "--out", "found", *SHORT, *LIMIT)
    assert code == 2 and "continue it with --resume auto" in answer["error"]
    line = ["search", "--out", "found", "--resume", "auto", *SHORT, *LIMIT, "--seed", "1"]
    code, answer = call(capsys, *line)
    assert code == 2 and answer["error"].startswith("search.seed: must stay 0 as in found, got 1")
    stored = checkpoints.load(supernet())
    checkpoints.deployed(stored)["backbone.stem.0.weight"].add_(1)
    checkpoints.save("other.pth", stored)
    line = ["search", "other.pth", "--out", "found", "--resume", "auto", *SHORT, *LIMIT]
    code, answer = call(capsys, *line)
    assert code == 3 and "must be the supernet that found searches" in answer["error"]
    begun = json.loads(Path("found/search.json").read_text())
    del begun["draws"]  # as versions wrote it that drew other RoIs
    shutil.copytree("found", "older")
    Path("older/search.json").write_text(json.dumps(begun))
    line = ["search", supernet(), "--out", "older", "--resume", "auto", *SHORT, *LIMIT]
    code, answer = call(capsys, *line)
    assert code == 2 and "older: must be begun by a version that draws" in answer["error"]


def test_killed_it_goes_on_with_the_same_sequence(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["search", supernet(), *SHORT, *LIMIT, "--out", "killed", "--resume", "auto"]
    for lines, number in ((2, signal.SIGKILL), (4, signal.SIGTERM)):
        process = subprocess.Popen(command(*line), stderr=subprocess.PIPE, text=True)
        journal = Path("killed/candidates.jsonl")
        while not journal.is_file() or len(journal.read_bytes().splitlines()) < lines:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(number)
        _, text = process.communicate(timeout=120)
        if number == signal.SIGTERM:
            assert process.returncode == 143 and "--resume auto goes on" in text
    assert json.loads(Path("killed/search.json").read_text())["finished"] is False
    assert call(capsys, *line)[0] == 0
    assert sequence("killed") == sequence("found")[:8]


DYING = """
import os, sys
from pathlib import Path
from detkit import fitness
from detkit.cli.main import main

once, inner = Path("died"), fitness.Fitness.__call__

def call(self, genes):
    begun = Path("two/candidates.jsonl").is_file()
    if os.environ["RANK"] == "1" and begun and not once.is_file():
        once.touch()
        os._exit(9)
    return inner(self, genes)

fitness.Fitness.__call__ = call
main(sys.argv[1:])
"""


def test_processes_share_a_search_and_one_may_die(there: Path) -> None:
    """torchrun starts both anew; one process finds the same networks."""
    Path("dying.py").write_text(DYING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    line = ["search", supernet(), *SHORT, *LIMIT, "--out", "two", "--resume", "auto"]
    done = subprocess.run(
        [*launcher, "dying.py", *line], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path("died").is_file()
    assert sequence("two") == sequence("found")[:8]
    text = Path("two/candidates.jsonl").read_text()
    assert {json.loads(line)["rank"] for line in text.splitlines()} == {0, 1}
    assert done.stdout.count("fittest networks") == 1


def test_processes_of_one_machine_share_a_search(there: Path) -> None:
    line = ["search", supernet(), *SHORT, *LIMIT, "--out", "cores", "--processes", "2", "--json"]
    done = subprocess.run(command(*line), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sequence("cores") == sequence("found")[:8]
    assert json.loads(done.stdout)["evaluations"] == 8


def test_a_search_takes_a_process_per_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert detnas.processes("cpu") == (4, 1)
    assert detnas.processes("cpu", wanted=2) == (2, 2)
    assert detnas.processes("cpu", wanted=8) == (8, 1)
    assert detnas.processes("cpu", gpus=3) == (3, None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert detnas.processes("cpu") == (16, 4)
    with pytest.raises(ConfigError, match="--processes: must be left to searches on a CPU, got 2"):
        detnas.processes("cpu", 3, 2)


def test_a_latency_limit_has_its_table_beside_the_run(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["search", supernet(), *SHORT, "--population", "2", "--generations", "1"]
    code, answer = call(capsys, *line, "--max-latency", "1000", "--out", "timed")
    assert code == 0 and answer["limits"] == {"latency_ms": 1000.0}
    table = json.loads(Path("timed/latency.json").read_text())
    first = sequence("timed")[0]
    expected = table["stem"] + sum(
        times[int(gene)]
        for times, gene in zip(table["blocks"], first["genes"].replace("-", ""), strict=True)
    )
    assert first["latency_ms"] == pytest.approx(expected)
    assert table["shape"] == [1, 64, 64]
    code, answer = call(capsys, *line, "--max-latency", "0.0001", "--out", "too-fast")
    assert code == 2 and "the fastest network of the own space" in answer["error"]


# -- recipes for the winner


def test_the_winner_is_trained_by_its_recipes(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer = call(capsys, "search", "found", "--export", "best.toml")
    assert code == 0
    pretrain, finetune = read_toml("best.toml"), read_toml("best-finetune.toml")
    assert pretrain["model"]["backbone"] == finetune["model"]["backbone"] == answer["backbone"]
    assert pretrain["space"]["name"] == "own" and "nas" not in pretrain
    assert pretrain["train"]["steps"] == 2 and "norm_momentum" not in pretrain["model"]
    assert finetune["model"]["norm_momentum"] == 0.01
    assert finetune["train"]["steps"] == 12 and finetune["data"]["path"] == "shapes"
    line = ["pretrain", "--recipe", "best.toml", "--steps", "1", "--out", "single"]
    assert call(capsys, *line)[0] == 0
    line = ["finetune", "--recipe", "best-finetune.toml", "--init-from", "single/best.pth"]
    code, trained = call(capsys, *line, "--steps", "1", "--out", "winner")
    assert code == 0
    stored = checkpoints.load(trained["checkpoint"])
    assert stored["kind"] == "detector"
    assert stored["config"]["model"]["backbone"] == answer["backbone"]
    space = SearchSpace.from_plain(stored["config"]["space"])
    assert space.text(space.parse(answer["genes"])) == answer["genes"]
    # The whole training split, not what the search left of it.
    assert (
        stored["progress"]["epoch"] == pytest.approx(4 / 20)
        if "epoch" in stored["progress"]
        else stored["progress"]["images_seen"] == 4
    )


def test_a_supernet_started_from_nothing_needs_a_recipe_for_pretraining(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = checkpoints.load(supernet())
    del stored["provenance"]["init_from"]
    checkpoints.save("scratch.pth", stored)
    line = ["search", "scratch.pth", *SHORT, "--population", "2", "--generations", "1"]
    assert call(capsys, *line, "--out", "scratch")[0] == 0
    code, answer = call(capsys, "search", "scratch", "--export", "scratch.toml")
    assert code == 2 and "give --recipe" in answer["error"]
    line = ["search", "scratch", "--export", "scratch.toml", "--recipe", "tiny/supernet-pretrain"]
    assert call(capsys, *line)[0] == 0
    assert read_toml("scratch.toml")["train"]["epochs"] == 60


# -- baselines


def test_random_search_has_the_same_evaluator_and_budget(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["search", supernet(), *SHORT, *LIMIT, "--method", "random", "--out", "chance"]
    code, answer = call(capsys, *line)
    assert code == 0 and (answer["method"], answer["evaluations"]) == ("random", 8)
    assert sequence("chance")[:4] == sequence("found")[:4]  # the first generation is random too
    assert sequence("chance") != sequence("found")[:8]


def test_a_pretrained_supernet_is_searched_for_classification(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["search", "--fitness", "classification", *SHORT, "--population", "2"]
    line += ["--generations", "1", "--set", "search.batch_size=200"]
    code, answer = call(capsys, *line, "--out", "classes")
    assert code == 0 and answer["metric"] == "top1"
    assert all(0 < network["fitness"] < 1 for network in answer["top"])
    code, answer = call(capsys, "search", "classes", "--export", "classes.toml")
    assert code == 0 and answer["finetune"] is None
    assert read_toml("classes.toml")["model"]["backbone"] == answer["backbone"]


# -- wrong input


def test_wrong_input_is_one_sentence(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pretrained,) = Path("runs/pretrain").glob("*/last.pth")
    stored = checkpoints.load(supernet())
    del stored["search_split"]
    checkpoints.save("nosplit.pth", stored)
    plain: dict[str, Any] = {**stored, "kind": "detector"}
    checkpoints.save("plain.pth", plain)
    good = supernet()
    cases = [
        (["plain.pth"], 3, "must be of kind 'supernet', got 'detector'"),
        ([str(pretrained)], 3, "stage of the supernet must be 'finetune'"),
        ([good, "--fitness", "classification"], 3, "stage of the supernet must be 'pretrain'"),
        (["nosplit.pth"], 3, "must hold which images were kept for the search"),
        (["gone.pth"], 2, "must be an existing file"),
        ([good, "--max-macs", "1K"], 2, "search.max_macs: must be at least"),
        ([good, "--max-macs", "many"], 2, "--max-macs: must be a number"),
        ([good, "--set", "model.norm=gn"], 2, "model.norm: must stay the supernet's own 'bn'"),
        ([good, "--set", "data.channels=bgr"], 2, "data.channels: must stay the supernet's own"),
        ([good, "--population", "3", "--set", "search.mutants=4"], 2, "mutants and crossovers"),
        ([good, "--set", "search.populaton=3"], 2, "search.population"),
        ([good, "--recipe", "tiny/frcnn-fpn"], 2, "--recipe: must not be given to search"),
        ([good, "--data", "no/such/set"], 2, "no/such/set"),
        ([good, "--set", "eval.metric=AP51"], 2, "eval.metric"),
        (["shapes", "--export", "best.toml"], 2, "must be the folder of a search"),
        (["found", "--export", "best.yaml"], 2, "--export: must be a .toml file"),
        (["found", "--export", "x.toml", "--method", "random"], 2, "must stand without"),
        ([good, "--resume", "shapes"], 3, "must be the folder of a search"),
    ]
    for arguments, code, message in cases:
        got, answer = call(capsys, "search", *arguments, *([] if code == 3 else []))
        assert (got, message in answer["error"]) == (code, True), (arguments, answer)
        assert "\n" not in answer["error"]


def test_a_dry_run_tells_and_evaluates_nothing(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer = call(capsys, "search", *SHORT, *LIMIT, "--dry-run", "--out", "dry")
    assert code == 0 and not Path("dry").exists()
    assert (answer["networks"], answer["evaluations"]) == (81, 8)
    assert (answer["search_images"], answer["calibration_images"]) == (4, 6)
    assert answer["macs"][0] <= answer["limits"]["macs"] <= answer["macs"][1]


def test_other_images_score_on_request(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["search", "--split", "val", "--dry-run", *SHORT, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["search_images"] == 3
    assert "what is found was chosen by it" in printed.err
    split = checkpoints.load(supernet())["search_split"]
    moved = {**split, "search": split["search"] + split["train"][:2], "train": split["train"][2:]}
    Path("split.json").write_text(json.dumps(moved))
    code, answer = call(capsys, "search", "--split", "split.json", "--dry-run", *SHORT)
    assert code == 0 and answer["search_images"] == 6


def test_numbers_with_units() -> None:
    assert [count("--n", text) for text in ("300M", "1.3G", "25k", "7")] == [
        300_000_000,
        1_300_000_000,
        25_000,
        7,
    ]
    with pytest.raises(ConfigError, match="--n: must be a number with K, M or G"):
        count("--n", "3T")


def test_the_defaults_are_the_papers() -> None:
    assert detnas.evolution_settings(SearchConfig()) == EvolutionSettings()
    small = from_plain({"search": {"population": 6, "mutants": 1}}).search
    found = detnas.evolution_settings(small)
    assert (found.mutants, found.crossovers) == (1, 2)
