"""Two gloo processes: one search shared between them, and one path trained by both."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from detkit.config import resolve
from detkit.engine import distributed
from detkit.errors import ConfigError
from detkit.models.backbones.shuffle_supernet import ShuffleSupernet, find_supernet
from detkit.models.classifier import Classifier
from detkit.models.detector import TwoStageDetector
from detkit.models.search_space import SPACES, Genes
from detkit.models.zoo import build_detector
from detkit.nas.calibrate import calibrate
from detkit.nas.candidates import Evaluator, Journal, SearchResult
from detkit.nas.evolution import EvolutionSettings, evolve
from detkit.nas.paths import UniformPaths
from detkit.nas.work_queue import LocalQueue, StoreQueue, WorkQueue, work_queue
from detkit.types import Batch, ClassificationBatch, Target

TINY = SPACES["tiny"]
SETTINGS = EvolutionSettings(population=8, generations=3, parents=3, mutants=3, crossovers=3)
SHARE = np.random.default_rng(0).normal(size=(len(TINY), 4))


def score(genes: Genes) -> dict[str, float]:
    return {"AP": float(sum(SHARE[i, g] for i, g in enumerate(genes)))}


class Slow:
    """The second process waits in its first evaluation until the other one has done four."""

    def __init__(self, rank: int, journal: Path) -> None:
        self.waits = rank == 1
        self.journal = journal

    def __call__(self, genes: Genes) -> dict[str, float]:
        while self.waits:
            there = self.journal.is_file()
            self.waits = not there or len(self.journal.read_bytes().splitlines()) < 4
            time.sleep(0.01)
        return score(genes)


class Dying:
    """The second process dies in its third evaluation."""

    def __init__(self, rank: int) -> None:
        self.left = 3 if rank == 1 else 0

    def __call__(self, genes: Genes) -> dict[str, float]:
        self.left -= 1
        if not self.left:
            os._exit(9)
        time.sleep(0.02)  # so that the first process cannot take everything
        return score(genes)


def search(path: Path, evaluate: object, queue: WorkQueue) -> SearchResult:
    evaluator = Evaluator(TINY, evaluate, "AP", Journal(path), lambda genes: {}, queue)
    return evolve(TINY, SETTINGS, evaluator, lambda genes: True)


def join(rank: int, folder: str, name: str) -> None:
    os.environ["MASTER_ADDR"] = "localhost"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/{name}", rank=rank, world_size=2)


def share_a_search(rank: int, folder: str) -> None:
    join(rank, folder, "share")
    path = Path(folder) / "shared.jsonl"
    with work_queue() as queue:
        assert isinstance(queue, StoreQueue) and queue.rank == rank
        result = search(path, Slow(rank, path), queue)
    with work_queue() as queue:
        assert search(path, Slow(rank, path), queue) == result
    Path(folder, f"result{rank}").write_text(repr(result))
    _train_together()
    _refuse_norms_over_processes()
    dist.destroy_process_group()


def _train_together() -> None:
    """Both take the same path; idle blocks get no gradient and stay, and nothing hangs."""
    torch.manual_seed(0)
    model = Classifier(ShuffleSupernet(TINY), 4)
    wrapped = distributed.wrap(model, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    sampler = UniformPaths(TINY, 5)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(dist.get_rank()))
    for step in range(3):
        find_supernet(wrapped).set_path(sampler(step))
        genes = distributed.gather(model.backbone.path)
        assert genes[0] == genes[1]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad(set_to_none=True)
        wrapped(ClassificationBatch(images, torch.tensor([0, 1])))["loss"].backward()
        optimizer.step()
        idle = {name for name, p in model.named_parameters() if p.grad is None}
        assert {name.split(".")[3] != str(_gene(model, name)) for name in idle} == {True}
        same = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
        assert idle and idle == same
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    first, second = (distributed.gather(weights)[i] for i in range(2))
    assert torch.equal(first, second)


def _gene(model: nn.Module, name: str) -> int | None:
    choice: nn.Module = model.get_submodule(".".join(name.split(".")[:3]))
    gene: int | None = choice.gene
    return gene


def _refuse_norms_over_processes() -> None:
    model = Classifier(ShuffleSupernet(TINY, "sync_bn"), 4)
    model.backbone.set_path((0,) * 10)
    batch = ClassificationBatch(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="norms must be local, .* build the model with model.nor"):
        calibrate(model, [batch])


def scene(number: int) -> Batch:
    """One image of noise; all have the same objects, so losses count as many samples in each."""
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(number))
    boxes = torch.tensor([[4.0, 4.0, 36.0, 40.0], [20.0, 24.0, 60.0, 56.0]])
    truth = Target(boxes, torch.tensor([1, 2]), torch.zeros(2, dtype=torch.bool))
    return Batch(pixels, torch.tensor([[64, 64]]), [truth], [f"{number}.png"])


def detector() -> TwoStageDetector:
    """A detector with a supernet where chance draws no samples, since all are taken."""
    norms = {"backbone": "detnas-supernet-tiny", "norm": "sync_bn", "head_norm": "sync_bn"}
    few = {"pre_nms_train": 20, "post_nms_train": 8, "batch_per_image": 100_000}
    tables = {
        "model": norms | {"detector": "frcnn-fpn", "neck_channels": 8},
        "rpn": few | {"drop_straddling": False, "positive_fraction": 1.0},
        "box": {"channels": 16, "batch_per_image": 1000, "positive_fraction": 1.0},
    }
    torch.manual_seed(3)
    model = build_detector(resolve([tables]), 2)
    assert isinstance(model, TwoStageDetector)
    return model


def fine_tune(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Weights after two steps, each on a path of its own; statistics too."""
    sampler = UniformPaths(TINY, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-3)
    for step in range(2):
        find_supernet(model).set_path(sampler(step))
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(model(batch).values())).sum().backward()
        optimizer.step()
    return {key.removeprefix("module."): value for key, value in model.state_dict().items()}


def fine_tune_half(rank: int, folder: str) -> None:
    join(rank, folder, "half")
    state = fine_tune(distributed.wrap(detector(), torch.device("cpu")), scene(rank))
    torch.save(state, Path(folder) / f"half{rank}.pth")
    dist.destroy_process_group()


def test_two_processes_fine_tune_a_detector_as_one(tmp_path: Path) -> None:
    """Half of the batch each: norms over all of it, gradients averaged, idle blocks left alone."""
    before, (one, two) = detector().state_dict(), (scene(0), scene(1))
    whole = Batch(
        torch.cat([one.images, two.images]),
        torch.cat([one.sizes, two.sizes]),
        one.targets + two.targets,
        one.files + two.files,
    )
    alone = fine_tune(detector(), whole)
    mp.spawn(fine_tune_half, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"half{rank}.pth", weights_only=True) for rank in range(2)]
    assert all(torch.equal(value, halves[1][key]) for key, value in halves[0].items())
    names = [name for name, _ in detector().named_parameters()]
    for part in ("backbone", "neck", "rpn", "head"):
        keys = [name for name in names if name.startswith(part)]
        update, apart = (
            torch.cat([(alone[key] - other[key]).flatten() for key in keys]).norm()
            for other in (before, halves[0])
        )
        # Rounding, which norms over next to no deviation blow up: 0.04 at most. With norms over
        # each half alone the backbone is off by 10, the neck and the head by 1.
        assert apart < 0.1 * update, part
    idle = [key for key, value in alone.items() if torch.equal(value, before[key])]
    assert idle == [key for key, value in halves[0].items() if torch.equal(value, before[key])]


def die_in_a_search(rank: int, folder: str) -> None:
    join(rank, folder, "die")
    with work_queue() as queue:
        search(Path(folder) / "dying.jsonl", Dying(rank), queue)


def test_two_processes_search_as_one_and_train_one_path(tmp_path: Path) -> None:
    alone = search(tmp_path / "alone.jsonl", score, LocalQueue())
    mp.spawn(share_a_search, (str(tmp_path),), nprocs=2)
    assert [(tmp_path / f"result{rank}").read_text() for rank in range(2)] == [repr(alone)] * 2
    _, ranks = check_journals(tmp_path, "shared.jsonl")
    assert set(ranks) == {0, 1}


def test_a_process_that_dies_loses_its_own_candidate_alone(tmp_path: Path) -> None:
    alone = search(tmp_path / "alone.jsonl", score, LocalQueue())
    with pytest.raises(mp.ProcessExitedException):
        mp.spawn(die_in_a_search, (str(tmp_path),), nprocs=2)
    survived = (tmp_path / "dying.jsonl").read_bytes()
    ranks = [json.loads(line)["rank"] for line in survived.splitlines(keepends=True)]
    assert ranks.count(1) == 2 and 0 in ranks
    assert search(tmp_path / "dying.jsonl", score, LocalQueue()) == alone  # one goes on for two
    assert (tmp_path / "dying.jsonl").read_bytes().startswith(survived)
    check_journals(tmp_path, "dying.jsonl")


def check_journals(folder: Path, name: str) -> tuple[list[str], list[int]]:
    """The same candidates as one process evaluated, each once; genes and ranks by index."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    expected = [json.loads(line) for line in (folder / "alone.jsonl").read_text().splitlines()]
    found.sort(key=lambda line: line["index"])
    for one, other in zip(found, expected, strict=True):
        assert {**one, "seconds": 0, "rank": 0} == {**other, "seconds": 0}
    return [line["genes"] for line in found], [line["rank"] for line in found]
