"""Loads the compiled operators and decides, per operator and device, between native and reference.

``DETKIT_OPS`` is read once, on import: ``auto`` (default) takes a native kernel where there is one
and otherwise the reference, with one warning; ``native`` makes a missing kernel an error;
``reference`` never uses native kernels.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from detkit.errors import ConfigError

BUILD_COMMAND = "pip install --no-build-isolation -e ."
OPS = (
    "nms",
    "batched_nms",
    "roi_align",
    "ps_roi_align",
    "dilated_conv2d",
    "scaled_conv2d",
    "split_conv2d",
)
MODES = ("auto", "native", "reference")


class ReferenceWarning(UserWarning):
    """An operator runs its PyTorch reference because no native kernel was built for its device."""


def _read_mode() -> str:
    mode = os.environ.get("DETKIT_OPS", "auto")
    if mode not in MODES:
        raise ConfigError(f"DETKIT_OPS: must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def _load() -> dict[str, object]:
    """Build information of the extension, empty where it was not built; raises where broken."""
    if MODE == "reference":
        return {}
    try:
        extension = importlib.import_module("detkit._C")
    except ModuleNotFoundError as error:
        if error.name != "detkit._C":
            raise
        return {}
    except ImportError as error:
        raise ImportError(
            "detkit._C: must load with this torch "
            f"({torch.__version__}), got {error}; build it again with `{BUILD_COMMAND}`"
        ) from error
    return dict(extension.build_info())


def _find_kernels() -> dict[str, frozenset[str]]:
    """Device types that each operator, backward operators included, has a native kernel for."""
    if not BUILD_INFO:
        return {op: frozenset() for op in OPS}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    found = {}
    for op in OPS:
        devices = {key.lower() for key in ("CPU", "CUDA") if has_kernel(f"detkit::{op}", key)}
        found[op] = frozenset(devices | {"meta"} if devices else devices)
    return found


MODE = _read_mode()
BUILD_INFO = _load()
KERNELS = _find_kernels()
_warned: set[str] = set()


def use_native(op: str, *tensors: Tensor) -> bool:
    """Whether ``op`` runs its native kernel on these tensors; traceable by torch.compile.

    Args:
        op: Name in :data:`OPS`.
        tensors: The call's tensors; the first one's device decides.

    Raises:
        ConfigError: Under ``DETKIT_OPS=native`` where there is no native kernel.
    """
    device = tensors[0].device.type
    if device in KERNELS[op]:
        return True
    if MODE != "reference":
        _report_missing(op, device)
    return False


def _report_missing(op: str, device: str) -> None:
    what = "the compiled operators" if not BUILD_INFO else f"{op} for {device} tensors"
    remedy = f"build with `{BUILD_COMMAND}`"
    if BUILD_INFO and device == "cuda":
        remedy += " where nvcc and a CUDA torch are installed"
    if MODE == "native":
        raise ConfigError(
            f"DETKIT_OPS=native: {op} must have a native {device} kernel, got none; {remedy}"
        )
    if what not in _warned:
        _warned.add(what)
        warnings.warn(
            f"detkit: {what} not built, so the slower PyTorch reference runs; {remedy}, or set "
            "DETKIT_OPS=reference to choose it",
            ReferenceWarning,
            stacklevel=4,
        )


@contextmanager
def reference_only() -> Iterator[None]:
    """Every operator runs its reference inside the block, for comparisons; for one thread only."""
    global MODE
    mode, kernels = MODE, dict(KERNELS)
    MODE = "reference"
    KERNELS.update({op: frozenset() for op in OPS})
    try:
        yield
    finally:
        MODE = mode
        KERNELS.update(kernels)


def backend(device: str | None = None) -> dict[str, str]:
    """The backend of each operator here: ``native-cuda``, ``native-cpu`` or ``reference``.

    Args:
        device: On tensors of this type, ``cpu`` or ``cuda``; by default the best there is.
    """
    result = {}
    for op, devices in KERNELS.items():
        if device is not None:
            result[op] = f"native-{device}" if device in devices else "reference"
        elif "cuda" in devices and torch.cuda.is_available():
            result[op] = "native-cuda"
        else:
            result[op] = "native-cpu" if "cpu" in devices else "reference"
    return result
