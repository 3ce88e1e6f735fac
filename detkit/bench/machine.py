"""What measured numbers hold for: processor, versions, and the limits of the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.bench.timing import Call, milliseconds
from detkit.ops import _library


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor or GPU, cores and threads, versions, how the operators were built, and the load."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "extension": _library.BUILD_INFO,
        "load_before": os.getloadavg()[0],
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@torch.no_grad()
def limits(device: torch.device, seconds: float = 0.4) -> dict[str, float]:
    """What this machine reaches at the present number of threads, measured now.

    Args:
        device: Where.
        seconds: Time for each measurement; the best run counts.

    Returns:
        ``fp32`` and ``bf16``, the highest rate of multiplications and additions in GFLOP/s among a
        large matrix product and plain 1x1 and 3x3 convolutions, and ``copy``, GB/s read and written
        by a large copy.
    """
    found = {"fp32": 0.0, "bf16": 0.0}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for flop, call in _dense_work(device, dtype):
            found[name] = max(found[name], flop / 1e6 / min(milliseconds(call, device, seconds)))
    source = torch.ones(64 << 20, device=device)
    target = torch.zeros_like(source)
    best = min(milliseconds(lambda _: target.copy_(source), device, seconds))
    return found | {"copy": 2 * 4 * source.numel() / 1e6 / best}


def _dense_work(device: torch.device, dtype: torch.dtype) -> list[tuple[float, Call]]:
    """Operations, and what does them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    scale = 4 if device.type == "cuda" else 1  # a GPU needs more to be filled
    a, b = normal(2048 * scale, 2048), normal(2048, 2048 * scale)
    maps, point = normal(scale**2, 1024, 64, 64), normal(1024, 1024, 1, 1)
    small, square = normal(scale**2, 256, 56, 84), normal(256, 256, 3, 3)
    taps = (3 * 56 - 2) * (3 * 84 - 2)  # those inside the image, over all outputs
    return [
        (2.0 * 2048**3 * scale**2, lambda _: a @ b),
        (2.0 * 1024**2 * 64**2 * scale**2, lambda _: F.conv2d(maps, point)),
        (2.0 * 256**2 * taps * scale**2, lambda _: F.conv2d(small, square, padding=1)),
    ]
