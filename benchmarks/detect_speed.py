"""Detection with whole models, beside torchvision's Faster R-CNN ResNet-50-FPN.

`detect` on one image of 700x1100: Light-Head R-CNN's setting S as it is and as `detkit.deploy.fast`
makes it, our Faster R-CNN, and torchvision's. Weights are random, images noise. Contestants run in
turn in one process; processor time with one thread, time on the wall with more.

    python benchmarks/detect_speed.py [--threads 1] [--seconds 60] [--json FILE]
"""

from __future__ import annotations

from typing import Any

import torch
from contestants import (
    LARGE,
    PEER,
    SMALL,
    detector,
    facts,
    options,
    padded,
    peer,
    peer_model,
    write,
)
from contestants import rows as timed

from detkit.bench.timing import Call
from detkit.deploy import fast


def detection_calls(tv: Any) -> dict[str, Call]:
    """The first is what the others are compared with."""
    pixels = torch.rand(1, 3, 700, 1100, generator=torch.Generator().manual_seed(0))
    images, sizes = padded(pixels), torch.tensor([[700, 1100]])
    plain, large = detector(SMALL, 80).eval(), detector(LARGE, 80).eval()
    peer = peer_model(tv, 80, 700, 1100).eval()
    quick, large_quick = fast(plain), fast(large)

    def bf16(_: int) -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return quick.detect(images, sizes)  # type: ignore[operator]

    return {
        "Light-Head S, fast": lambda _: quick.detect(images, sizes),  # type: ignore[operator]
        "Light-Head S": lambda _: plain.detect(images, sizes),
        "Light-Head S, fast, bf16": bf16,
        "Faster R-CNN, fast": lambda _: large_quick.detect(images, sizes),  # type: ignore[operator]
        "Faster R-CNN": lambda _: large.detect(images, sizes),
        PEER: lambda _: peer([pixels[0]]),
    }


def main() -> None:
    flags = options(__doc__.splitlines()[0], 60.0).parse_args()
    torch.set_num_threads(flags.threads)
    tv = peer()
    hardware = facts(tv)
    with torch.inference_mode():
        found = timed("detection", detection_calls(tv), flags.seconds)
    write(flags.json, hardware, {"rows": found})


if __name__ == "__main__":
    main()
