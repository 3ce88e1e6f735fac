"""Memory: what crowded images cost, and what a step says when there is none left."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detkit.cli.main import run
from detkit.engine.classification import top1
from detkit.engine.detections import detect_dataset
from detkit.engine.memory import explained, is_out_of_memory
from detkit.errors import OutOfMemoryError
from detkit.models.detector import TwoStageDetector
from detkit.types import Batch, CategoryMap, ClassificationBatch, Target

# --- crowded images -------------------------------------------------------------------------------

CROWDED = """
import json, resource, sys, torch
from detkit.types import Batch, Target

torch.set_num_threads(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux gives KiB

def crowded(count, height, width):
    sides = 4 + 40 * torch.rand(count, 2)
    corner = torch.rand(count, 2) * (torch.tensor([width, height]) - sides)
    crowd = torch.arange(count) % 10 == 9
    return Target(torch.cat([corner, corner + sides], 1), torch.ones(count).long(), crowd)
"""

MATCHING = """
from detkit.models.anchors import AnchorGrid
from detkit.models.targets import match

shapes = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
grid = AnchorGrid((4, 8, 16, 32, 64), [(s,) for s in (32, 64, 128, 256, 512)], (0.5, 1, 2))
anchors = torch.cat(grid(shapes))
few, many = crowded(30, 800, 1333), crowded(3000, 800, 1333)
match(anchors, few, 0.7, 0.3, keep_best=True)
before = peak()
matches = match(anchors, many, 0.7, 0.3, keep_best=True)
assert (matches.label == 1).sum() > 2000
print(json.dumps({"anchors": len(anchors), "grown": peak() - before}))
"""

TRAINING = """
from detkit.config import resolve
from detkit.models import build_detector

small = {
    "model": {"detector": sys.argv[1], "backbone": "resnet50-tiny", "norm": "bn"},
    **({"box": {"channels": 64}} if sys.argv[1] == "frcnn-fpn" else {}),
}
model = build_detector(resolve([small]), 1)

def step(count):
    target = crowded(count, 384, 512)
    batch = Batch(torch.randn(1, 3, 384, 512), torch.tensor([[384, 512]]), [target])
    torch.stack(list(model(batch).values())).sum().backward()

for _ in range(2):
    step(3)
before = peak()
step(3000)
print(json.dumps({"anchors": 0, "grown": peak() - before}))
"""


def grown(script: str, *arguments: str) -> dict[str, float]:
    """What the script prints: by how many MiB the process's peak grew from few boxes to many."""
    command = [sys.executable, "-c", CROWDED + script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_matching_three_thousand_boxes_needs_little_memory() -> None:
    """The whole matrix of overlaps would be 3 GB, and its arithmetic several times that."""
    answer = grown(MATCHING)
    assert answer["anchors"] > 250_000
    assert answer["grown"] < 100


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["frcnn-fpn", "retinanet", "rfcn"])
def test_training_on_three_thousand_boxes_needs_little_more_than_on_three(detector: str) -> None:
    """Anchors, RoIs, crowds and losses: nothing holds boxes times anchors."""
    assert grown(TRAINING, detector)["grown"] < 200


# --- none left ------------------------------------------------------------------------------------


def cpu_error() -> Exception:
    """What torch itself raises for a tensor no machine can hold."""
    try:
        torch.empty(1 << 55, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("there was room for 32 PiB")


ERRORS = {
    "cpu": cpu_error(),
    "cuda": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
    ),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "numpy": MemoryError("Unable to allocate 3.2 GiB for an array"),
}


class Exhausted(nn.Module):
    """A model whose every call finds no memory."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.error = error

    def detect(self, images: Tensor, sizes: Tensor, original_sizes: Tensor | None) -> list:
        raise self.error

    def classify(self, images: Tensor) -> Tensor:
        raise self.error


def target(boxes: int) -> Target:
    return Target(torch.ones(boxes, 4), torch.ones(boxes).long(), torch.zeros(boxes).bool())


@pytest.mark.parametrize("name", ERRORS)
def test_every_kind_of_exhaustion_is_told_apart_from_bugs(name: str) -> None:
    assert is_out_of_memory(ERRORS[name])
    for bug in (RuntimeError("shapes do not match"), ValueError("can't allocate memory")):
        assert not is_out_of_memory(bug)
        with pytest.raises(type(bug), match=str(bug)), explained("step", [], training=True):
            raise bug


def test_message_names_the_largest_part_its_boxes_and_the_settings() -> None:
    small = Batch(torch.zeros(2, 3, 8, 8), torch.tensor([[8, 8]] * 2), [target(90), target(5)])
    large = Batch(torch.zeros(2, 3, 96, 128), torch.tensor([[90, 120]] * 2), [target(7), target(3)])
    with (
        pytest.raises(OutOfMemoryError) as caught,
        explained("training step 4", [small, large], training=True),
    ):
        raise ERRORS["cuda"]
    assert str(caught.value) == (
        "training step 4: must fit into memory, got 2 images of 96x128 pixels at once with "
        "10 boxes, 7 of them in one image; lower --batch-size, data.short_side or "
        "the RoIs of two stages (box.batch_per_image, with box.ohem rpn.post_nms_train), "
        "raise train.accumulate, or set train.amp=bf16 "
        "(CUDA out of memory. Tried to allocate 2.00 GiB)"
    )
    assert caught.value.exit_code == 2
    with pytest.raises(OutOfMemoryError) as caught, explained("step", [small], training=True):
        raise ERRORS["cpu"]
    assert "(DefaultCPUAllocator: can't allocate memory: you tried to allocate" in str(caught.value)
    assert "alloc_cpu.cpp" not in str(caught.value)


@pytest.mark.parametrize("name", ["cpu", "numpy"])
def test_evaluation_names_the_image(name: str) -> None:
    images = torch.zeros(1, 3, 96, 128)
    batch = Batch(images, torch.tensor([[90, 120]]), files=["a.jpg"], image_ids=[1])
    model = Exhausted(ERRORS[name])
    message = r"evaluation of a.jpg: must fit into memory, got 1 image of 96x128 pixels at once; "
    with pytest.raises(OutOfMemoryError, match=message + "lower data.short_side or data.long_side"):
        detect_dataset(model, [batch], CategoryMap(["a"]), "cpu")
    classified = ClassificationBatch(images, torch.zeros(1).long())
    with pytest.raises(OutOfMemoryError, match=r"of 96x128 pixels at once; lower data.short_side"):
        top1(model, [classified], "cpu")


def test_training_command_is_exit_2_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third step runs out; the run's log keeps the sentence."""
    monkeypatch.chdir(tmp_path)
    assert run(["data", "synth", "shapes", "--train", "4", "--val", "2", "--size", "64"]) == 0
    steps = iter([None, None, cpu_error()])
    losses = TwoStageDetector.forward

    def forward(self: TwoStageDetector, batch: Batch) -> dict[str, Tensor]:
        error = next(steps)
        if error is not None:
            raise error
        return losses(self, batch)

    monkeypatch.setattr(TwoStageDetector, "forward", forward)
    line = ["finetune", "--data", "shapes", "--steps", "5", "--batch-size", "2", "--out", "run"]
    line += ["--set", "data.short_side=64", "--set", "data.multi_scale=[]"]
    capsys.readouterr()
    assert run([*line, "--set", "data.workers=0", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == 2
    message = "training step 3: must fit into memory, got 2 images of 64x64 pixels at once with "
    assert answer["error"].startswith(message)
    assert message in Path("run/log.txt").read_text()
    assert "data.short_side" in answer["error"]


# --- freed memory ---------------------------------------------------------------------------------


FAULTS = """
import resource
import torch
from detkit import api
from detkit.engine.memory import reuse_freed_memory
from detkit.errors import DetkitError

def once():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def faults():
    return min(once() for _ in range(8))  # small blocks in between can take the place of the first

"""
"""A block of 64 MiB is 16,384 pages, each of them a fault where it is had anew."""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def in_a_process_of_its_own(program: str) -> None:
    """What other tests leave in the heap decides where a block is put."""
    done = subprocess.run([sys.executable, "-c", FAULTS + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_glibc
def test_freed_memory_is_there_for_the_next() -> None:
    in_a_process_of_its_own(
        "assert reuse_freed_memory()\n"
        "assert faults() < 1000, faults()\n"
        "assert not reuse_freed_memory(False)\n"
    )


@needs_glibc
@pytest.mark.parametrize("call", ["predict('none.pth', images='none')", "detect_split('none.pth')"])
def test_detection_reuses_freed_memory(call: str) -> None:
    """The first thing it does, so that it shows without a checkpoint too."""
    in_a_process_of_its_own(
        f"try:\n    api.{call}\nexcept DetkitError:\n    assert faults() < 1000, faults()\n"
        "else:\n    raise SystemExit('none.pth was read')\n"
    )
