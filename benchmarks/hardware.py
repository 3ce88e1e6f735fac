"""What measured numbers hold for."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from detkit.ops import _library


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor or GPU, cores and threads, versions, how the operators were built, and the load."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
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
