"""Which way computes a convolution on CUDA: measured once per shape, remembered in the process.

``DETKIT_AUTOTUNE``, or :func:`autotune`, says among which ways: ``proven`` (default) takes the
vendor's convolution where it beats ours by columns; ``all`` also tries the fused kernels, which
have not run on a GPU yet and are kept only where they agree; ``off`` measures nothing and takes
columns.
"""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detkit.errors import ConfigError

AUTOTUNE_MODES = ("off", "proven", "all")
COLUMNS, FUSED, VENDOR = "columns", "fused", "vendor"
ALGORITHMS = {COLUMNS: 0, FUSED: 1}
"""The native operators' argument ``algorithm``."""

Way = Callable[..., Tensor]

_ROUNDS, _CALLS = 3, 5


@dataclass(frozen=True)
class Choice:
    """What was measured for one operator and shape."""

    op: str
    shape: str
    way: str
    milliseconds: Mapping[str, float]
    """Of each way that agreed with columns; forward, and backward where gradients were wanted."""


def _checked(mode: str, what: str) -> str:
    if mode not in AUTOTUNE_MODES:
        raise ConfigError(f"{what}: must be one of {', '.join(AUTOTUNE_MODES)}, got {mode!r}")
    return mode


_mode = _checked(os.environ.get("DETKIT_AUTOTUNE", "proven"), "DETKIT_AUTOTUNE")
_choices: dict[Hashable, Choice] = {}


def autotune(mode: str | None = None) -> str:
    """Set among which ways CUDA convolutions are chosen, and forget what was measured.

    Args:
        mode: ``off``, ``proven`` or ``all``; None changes and forgets nothing.

    Returns:
        The mode that holds from now on.

    Raises:
        ConfigError: On another mode.
    """
    global _mode
    if mode is not None:
        _mode = _checked(mode, "autotune")
        _choices.clear()
    return _mode


def choices() -> list[Choice]:
    """What was measured in this process, in order."""
    return list(_choices.values())


def may_choose(input: Tensor) -> bool:
    """Whether there is a choice for this input: eager CUDA, outside deterministic mode."""
    return (
        not torch.compiler.is_compiling()
        and input.is_cuda
        and _mode != "off"
        and type(input) in (Tensor, torch.nn.Parameter)  # no fake or traced tensor
        and input.numel() > 0
        and not torch.are_deterministic_algorithms_enabled()
    )


def run_fastest(
    op: str, tensors: Sequence[Tensor | None], settings: Hashable, ways: dict[str, Way]
) -> Tensor:
    """The output of the fastest way; asks :func:`may_choose` of the caller.

    Args:
        op: Operator.
        tensors: What the ways are called with, the input first.
        settings: Everything else that the speed depends on.
        ways: Name to call, columns among them.
    """
    return ways[pick(op, tensors, settings, ways)](*tensors)


def pick(
    op: str, tensors: Sequence[Tensor | None], settings: Hashable, ways: dict[str, Way]
) -> str:
    """The name of the fastest way, measured on the first call of a shape.

    While a CUDA graph is captured what was measured before holds, and columns otherwise; so do
    columns where the first output is not finite, as the ways cannot be compared then.
    """
    if _mode == "proven":
        ways = {name: way for name, way in ways.items() if name != FUSED}
    if len(ways) == 1:
        return COLUMNS
    wanted = _wants_gradients(tensors)
    key = (op, settings, tuple(ways), wanted, _autocast_dtype(), *map(_identity, tensors))
    if key not in _choices:
        if torch.cuda.is_current_stream_capturing():
            return COLUMNS
        choice = _measure(op, tensors, wanted, ways)
        if choice is None:
            return COLUMNS
        _choices[key] = choice
    return _choices[key].way


def fused_fits(input: Tensor, group_in: int) -> bool:
    """Whether the fused kernels take this input: packs of 16 bytes of channels, sm_80 or later;
    float32 only where torch's own convolutions may round it to TF32 as well.
    """
    dtype = _autocast_dtype() or input.dtype
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    tf32 = conv.fp32_precision == "tf32"
    dtypes = {torch.float16, torch.bfloat16} | ({torch.float32} if tf32 else set())
    return (
        input.is_cuda
        and dtype in dtypes
        and group_in > 0
        and group_in % (16 // dtype.itemsize) == 0
        and torch.cuda.get_device_capability(input.device) >= (8, 0)
    )


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def _identity(tensor: Tensor | None) -> Hashable:
    """What of a tensor the speed depends on."""
    if tensor is None:
        return None
    return tensor.device, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())


def _wants_gradients(tensors: Sequence[Tensor | None]) -> tuple[bool, ...]:
    enabled = torch.is_grad_enabled()
    return tuple(enabled and t is not None and t.requires_grad for t in tensors)


def _measure(
    op: str, tensors: Sequence[Tensor | None], wanted: tuple[bool, ...], ways: dict[str, Way]
) -> Choice | None:
    """The ways that agree with columns, timed in turn; None where the output is not finite."""
    inputs = [
        t if t is None else t.detach().requires_grad_(want)
        for t, want in zip(tensors, wanted, strict=True)
    ]
    expected = _outputs(ways[COLUMNS], inputs)
    if not all(bool(t.isfinite().all()) for t in expected):
        return None
    agreeing = {COLUMNS: ways[COLUMNS]}
    for name, way in ways.items():
        if name == COLUMNS:
            continue
        if all(map(_agree, _outputs(way, inputs), expected)):
            agreeing[name] = way
        else:
            warnings.warn(
                f"detkit: {op} gave other numbers by {name} than by columns, so {name} is not "
                f"used for inputs of shape {tuple(inputs[0].shape)}",  # type: ignore[union-attr]
                RuntimeWarning,
                stacklevel=4,
            )
    times: dict[str, list[float]] = {name: [] for name in agreeing}
    for _ in range(_ROUNDS):
        for name, way in agreeing.items():
            times[name].append(_milliseconds(way, inputs))
    medians = {name: statistics.median(values) for name, values in times.items()}
    shape = " ".join("x".join(map(str, t.shape)) for t in inputs if t is not None)
    dtype = str(inputs[0].dtype).removeprefix("torch.")  # type: ignore[union-attr]
    return Choice(op, f"{shape} {dtype}", min(medians, key=lambda n: medians[n]), medians)


def _outputs(way: Way, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The output and the gradients that are wanted."""
    with torch.enable_grad():
        output = way(*inputs)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not wanted:
        return [output]
    return [output, *torch.autograd.grad(output, wanted, torch.ones_like(output))]


def _agree(ours: Tensor, expected: Tensor) -> bool:
    """Equal up to a few roundings of the largest number: both sum in float32, in another order."""
    if expected.numel() == 0:
        return ours.shape == expected.shape
    finest = 1e-12 if expected.dtype == torch.float64 else 2**-11  # TF32's products, where allowed
    bound = 8 * max(torch.finfo(expected.dtype).eps, finest) * expected.double().abs().amax()
    return bool((ours.double() - expected.double()).abs().amax() <= bound)


def _milliseconds(way: Way, inputs: Sequence[Tensor | None]) -> float:
    """Of one call, from several enqueued back to back."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(inputs[0].device):  # type: ignore[union-attr]  # whose stream it is
        start.record()
        for _ in range(_CALLS):
            _outputs(way, inputs)
        stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / _CALLS
