"""Detection with whole models, beside torchvision's Faster R-CNN ResNet-50-FPN.

`detect` on one image of 700x1100: Light-Head R-CNN's setting S as it is and as `detkit.deploy.fast`
makes it, our Faster R-CNN, and torchvision's. Weights are random, images noise. Contestants run in
turn in one process; processor time with one thread, time on the wall with more.

    python benchmarks/detect_speed.py [--device cuda] [--small] [--threads 1] [--seconds 60] \
        [--json FILE]
"""

from __future__ import annotations

from typing import Any

import torch
from contestants import (
    CPU,
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


def detection_calls(tv: Any, size: tuple[int, int], device: torch.device) -> dict[str, Call]:
    """The first is what the others are compared with."""
    pixels = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    images, sizes = padded(pixels), torch.tensor([size])
    plain, large = (detector(name, 80).eval().to(device) for name in (SMALL, LARGE))
    peer = peer_model(tv, 80, *size).eval().to(device)
    quick, large_quick = fast(plain), fast(large)

    def bf16(_: int) -> object:
        with torch.autocast(device.type, torch.bfloat16):
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
    parser = options(__doc__.splitlines()[0], 60.0)
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--small", action="store_true", help="96x160, to try the script")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    tv, size = peer(), (96, 160) if flags.small else (700, 1100)
    hardware = facts(tv, flags.device)
    with torch.inference_mode():
        calls = detection_calls(tv, size, flags.device)
        found = timed("detection", calls, flags.seconds, flags.device)
    write(flags.json, hardware, {"size": size, "rows": found})


if __name__ == "__main__":
    main()
