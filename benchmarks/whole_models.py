"""A training step of a whole model, beside torchvision's Faster R-CNN ResNet-50-FPN.

One optimiser step of Faster R-CNN with frozen batch norms and two frozen stages at short side 320:
ours in fp32 and in bf16 (what `train.amp = "auto"` takes on processors with bf16 instructions), and
torchvision's. Weights are random, images noise with 15 boxes each. Contestants run in turn in one
process; processor time with one thread, time on the wall with more. For detection see
`detect_speed.py`.

    python benchmarks/whole_models.py [--threads 1] [--seconds 60] [--batch 4] [--json FILE]
"""

from __future__ import annotations

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
    rows,
    settings,
    write,
)
from torch.amp.grad_scaler import GradScaler

from detkit.bench.timing import Call
from detkit.engine.optimizer import build_optimizer, set_factor
from detkit.engine.step import train_step
from detkit.types import Batch, Target


def truth(generator: torch.Generator, count: int = 15) -> Target:
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([367.0, 260.0])
    sides = 15 + torch.rand(count, 2, generator=generator) * 45
    labels = torch.randint(1, 4, (count,), generator=generator)
    boxes = torch.cat([corner, corner + sides], 1)
    return Target(boxes, labels, torch.zeros(count, dtype=torch.bool))


def step(batch: Batch, amp: str, layout: torch.memory_format) -> Call:
    """One of our training steps, the rate too small to move the weights far."""
    config, model = settings(LARGE), detector(LARGE, 3).train().to(memory_format=layout)
    optimizer = build_optimizer(model, config.optim, len(batch.images))
    set_factor(optimizer, 1e-4, 1.0)
    scaler, images = GradScaler("cpu", enabled=False), len(batch.images)
    return lambda _: train_step(
        model, [batch], optimizer, scaler, images=images, device=CPU, amp=amp, layout=layout
    )


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
        sgd.zero_grad(set_to_none=True)
        sum(their(list(pixels), theirs).values()).backward()
        sgd.step()

    return {
        "Faster R-CNN, fp32": step(batch, "off", torch.contiguous_format),
        "Faster R-CNN, bf16": step(batch, "bf16", torch.channels_last),
        PEER: peer_step,
    }


def main() -> None:
    parser = options(__doc__.splitlines()[0], 60.0)
    parser.add_argument("--batch", type=int, default=4, help="images of a training step")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    tv = peer()
    hardware = facts(tv)
    found = rows("training", training_calls(tv, flags.batch), flags.seconds)
    write(flags.json, hardware, {"batch": flags.batch, "rows": found})


if __name__ == "__main__":
    main()
