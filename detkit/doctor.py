"""What is installed, which operator runs on which kernel and why, and what to do about it."""

from __future__ import annotations

import dataclasses
import importlib
import platform
from importlib import metadata
from types import ModuleType
from typing import Any

from detkit import __version__
from detkit.errors import DetkitError
from detkit.garbage import no_collection

OPTIONAL = ("hotcoco", "matplotlib", "onnx", "onnxscript", "onnxruntime", "tensorboard")


def report() -> dict[str, Any]:
    """Everything that decides how detkit runs here, as plain types.

    Returns:
        ``detkit``, ``python`` and ``platform``; ``torch`` (version, cuda, devices, threads; None
        where it does not import); ``extension`` (built, mode, and its build information or the
        error that kept it from loading); ``ops`` (operator to ``{"backend", "why"}``); ``autotune``
        (mode, and what this process has measured: see :func:`detkit.ops.choices`);
        ``packages`` (optional package to version or None); ``advice`` (what to do).
    """
    torch, torch_error = _import("torch")
    library, library_error = _import("detkit.ops._library")
    result: dict[str, Any] = {
        "detkit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": _torch_facts(torch) if torch else None,
        "extension": _extension_facts(library, library_error),
        "ops": _op_facts(library, torch) if library and torch else {},
        "autotune": _autotune_facts(library),
        "packages": {name: _version(name) for name in OPTIONAL},
    }
    result["advice"] = _advice(result, torch_error, library)
    return result


def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why not: a broken installation is what this file is for."""
    try:
        with no_collection():
            return importlib.import_module(name), ""
    except (ImportError, DetkitError) as error:
        return None, str(error)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch_facts(torch: ModuleType) -> dict[str, Any]:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": names,
        "threads": torch.get_num_threads(),
    }


def _extension_facts(library: ModuleType | None, error: str) -> dict[str, Any]:
    if library is None:
        return {"built": False, "mode": None, "error": error}
    return {"built": bool(library.BUILD_INFO), "mode": library.MODE, **library.BUILD_INFO}


def _op_facts(library: ModuleType, torch: ModuleType) -> dict[str, dict[str, str]]:
    facts = {}
    for op, backend in library.backend().items():
        facts[op] = {"backend": backend, "why": _why(op, backend, library, torch)}
    return facts


def _autotune_facts(library: ModuleType | None) -> dict[str, Any]:
    """Nothing where the operators do not import."""
    if library is None:
        return {}
    tuning = importlib.import_module("detkit.ops._autotune")
    return {
        "mode": tuning.autotune(),
        "choices": [dataclasses.asdict(choice) for choice in tuning.choices()],
    }


def _why(op: str, backend: str, library: ModuleType, torch: ModuleType) -> str:
    if backend == "native-cuda":
        return "CUDA kernel built, CUDA device found"
    if backend == "native-cpu":
        if "cuda" in library.KERNELS[op]:
            return "CUDA kernel built, no CUDA device found"
        if torch.cuda.is_available():
            return "built without CUDA: CUDA tensors run the reference"
        return "CPU kernel built, no CUDA device found"
    if library.MODE == "reference":
        return "DETKIT_OPS=reference"
    return "no kernel in the extension" if library.BUILD_INFO else "the extension is not built"


def _advice(result: dict[str, Any], torch_error: str, library: ModuleType | None) -> list[str]:
    advice = []
    if result["torch"] is None:
        advice.append(f"torch does not import ({torch_error}); install torch >= 2.11")
    elif library is None:
        advice.append(result["extension"]["error"])
    elif library.MODE == "auto" and not library.BUILD_INFO:
        advice.append(f"the operators are not built and run slowly; {library.BUILD_COMMAND}")
    elif library.BUILD_INFO and result["torch"]["devices"] and not library.BUILD_INFO["cuda"]:
        advice.append(
            "the operators run on the CPU kernels alone, and there is a GPU; where nvcc and a CUDA "
            f"torch are installed, DETKIT_CUDA=1 {library.BUILD_COMMAND}"
        )
    return advice
