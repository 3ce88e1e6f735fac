"""A training step of a whole model, beside torchvision's Faster R-CNN ResNet-50-FPN.

One optimiser step of Faster R-CNN with frozen batch norms and two frozen stages at short side 320:
ours in fp32 and in bf16 (what `train.amp = "auto"` takes on processors with bf16 instructions), and
torchvision's. Ours runs as in `detkit finetune`, in the memory format that takes and with the C
library keeping freed memory, torchvision's under the C library's defaults. Weights are random,
images noise with 15 boxes each. Contestants run in turn in one process; processor time with one
thread, time on the wall with more. For detection see `detect_speed.py`.

    python benchmarks/whole_models.py [--threads 1] [--rounds 5] [--batch 4] [--json FILE]
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from contestants import (
    CPU,
    LARGE,
    PEER,
    detector,
    facts,
    options,
    padded,
    peer,
    peer_model,
    settings,
    write,
)
from torch.amp.grad_scaler import GradScaler

from detkit.bench.timing import Call, clock
from detkit.engine.memory import reuse_freed_memory
from detkit.engine.optimizer import build_optimizer, set_factor
from detkit.engine.step import memory_format, train_step
from detkit.types import Batch, Target


def truth(generator: torch.Generator, count: int = 15) -> Target:
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([367.0, 260.0])
    sides = 15 + torch.rand(count, 2, generator=generator) * 45
    labels = torch.randint(1, 4, (count,), generator=generator)
    boxes = torch.cat([corner, corner + sides], 1)
    return Target(boxes, labels, torch.zeros(count, dtype=torch.bool))


def step(batch: Batch, amp: str) -> Call:
    """One of our training steps, the rate too small to move the weights far."""
    config, model = settings(LARGE), detector(LARGE, 3).train()
    layout = memory_format(model, CPU, amp)
    model.to(memory_format=layout)
    optimizer = build_optimizer(model, config.optim, len(batch.images))
    set_factor(optimizer, 1e-4, 1.0)
    scaler, images = GradScaler("cpu", enabled=False), len(batch.images)

    def run(_: int) -> None:
        reuse_freed_memory()  # as `detkit finetune` does
        train_step(
            model, [batch], optimizer, scaler, images=images, device=CPU, amp=amp, layout=layout
        )

    return run


def training_calls(tv: Any, count: int) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(count, 3, 320, 427, generator=generator)
    targets = [truth(generator) for _ in range(count)]
    batch = Batch(padded(pixels), torch.tensor([[320, 427]] * count), targets)
    their = peer_model(tv, 3, 320, 1333).train()
    wanted = [p for p in their.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(wanted, lr=1e-4, momentum=0.9, weight_decay=1e-4)
    theirs = [{"boxes": t.boxes, "labels": t.labels} for t in targets]

    def peer_step(_: int) -> None:
        reuse_freed_memory(False)
        sgd.zero_grad(set_to_none=True)
        sum(their(list(pixels), theirs).values()).backward()
        sgd.step()

    return {
        "Faster R-CNN, fp32": step(batch, "off"),
        "Faster R-CNN, bf16": step(batch, "bf16"),
        PEER: peer_step,
    }


def in_turn(calls: dict[str, Call], rounds: int) -> list[dict[str, Any]]:
    """A row per contestant, after one step of each that does not count.

    Steps take seconds, too few for `detkit.bench.timing.compare`: every one is taken ``rounds``
    times, and a ratio is the median over rounds.
    """
    for call in calls.values():
        call(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call, CPU, turn, 1))
    found = []
    for name, own in times.items():
        over = median(theirs / ours for theirs, ours in zip(times[PEER], own, strict=True))
        row = {"contestant": name, "ms": median(own), "over_peer": over, "rounds": rounds}
        found.append({**row, "all_ms": own})
        print(f"{name:20} {row['ms']:9.1f} ms   {over:6.2f} times torchvision's speed")
    return found


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="steps timed of each")
    parser.add_argument("--batch", type=int, default=4, help="images of a training step")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    tv = peer()
    hardware = facts(tv)
    found = in_turn(training_calls(tv, flags.batch), flags.rounds)
    write(flags.json, hardware, {"batch": flags.batch, "rows": found})


if __name__ == "__main__":
    main()
