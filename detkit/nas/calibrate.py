"""Batch-norm statistics of one path of a supernet (DetNAS, arXiv 1903.10979, section 3.3).

Statistics of a supernet mix those of all paths, so a candidate is scored with its own: from reset
norms, averaged over training batches. They are a small dict apart from the model, which is left as
it was: nothing is carried from one candidate to the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from detkit.errors import ConfigError, NonFiniteError
from detkit.models.detector import Detector
from detkit.models.norm import FrozenBatchNorm2d, SyncBatchNorm2d
from detkit.types import Batch, ClassificationBatch

Statistics = dict[str, Tensor]
"""``running_mean`` and ``running_var`` by their keys in the model's state dict."""

_Norm = nn.BatchNorm2d
_BUFFERS = ("running_mean", "running_var")


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch | ClassificationBatch],
    *,
    momentum: float | None = None,
    seed: int = 0,
) -> Statistics:
    """Statistics of the path that ``model`` runs, from forward passes in training mode.

    Weights, statistics and modes of the model are as before when it returns, and torch's generators
    too; the answer does not depend on anything calibrated before. Norms of frozen stages and frozen
    norms keep theirs and have no part in it. Detectors need batches with targets, since the norms
    of their heads see sampled RoIs.

    Args:
        model: Classifier or detector.
        batches: On the model's device.
        momentum: None averages all batches alike; a number in (0, 1] averages exponentially.
        seed: For the sampling of RoIs and for dropout.

    Returns:
        Statistics of the norms that ran; none where there is nothing to calibrate (group norms).

    Raises:
        ConfigError: No batches, a momentum out of range, or norms that average over processes.
        NonFiniteError: A statistic is not finite.
    """
    if momentum is not None and not 0 < momentum <= 1:
        raise ConfigError(f"momentum: must be in (0, 1] or none, got {momentum}")
    run: Callable[[Any], object] = model.run_norms if isinstance(model, Detector) else model
    with _as_it_was(model), _chance(model, seed):
        model.train()
        norms = _trained_norms(model)
        calls = _start_counting(norms, momentum)
        try:
            count = 0
            for batch in batches:
                run(batch)
                count += 1
        finally:
            for handle in calls.handles:
                handle.remove()
        if not count:
            raise ConfigError("calibration: must have at least one batch, got none")
        return _read(norms, calls.counts)


@contextlib.contextmanager
def statistics(model: nn.Module, found: Mapping[str, Tensor]) -> Iterator[None]:
    """``model`` in evaluation mode with statistics of :func:`calibrate`; as before afterwards.

    Raises:
        ValueError: A statistic the model has no norm for.
    """
    with _as_it_was(model):
        buffers = dict(model.named_buffers())
        with torch.no_grad():
            for key, value in found.items():
                if key not in buffers:
                    raise ValueError(f"statistics: must be of norms of the model, got {key}")
                buffers[key].copy_(value)
        model.eval()
        yield


class _Calls:
    """How often each norm has run, and what takes the counters off again."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.handles: list[RemovableHandle] = []


def _trained_norms(model: nn.Module) -> dict[str, _Norm]:
    norms = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if isinstance(module, FrozenBatchNorm2d) or not module.training:
            continue
        together = isinstance(module, SyncBatchNorm2d | nn.SyncBatchNorm)
        if together and dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                f"calibration: norms must be local, since processes may run different paths, got "
                f"{type(module).__name__} at {path}; build the model with model.norm=bn and "
                f"model.head_norm=bn, whose weights are the same"
            )
        if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None:
            raise ConfigError(
                f"calibration: norms must be two-dimensional batch norms with statistics, got "
                f"{type(module).__name__} at {path}"
            )
        norms[path] = module
    return norms


def _start_counting(norms: Mapping[str, _Norm], momentum: float | None) -> _Calls:
    """Reset the norms, and let each take the share of an equal average at every call.

    A head that runs once per level runs its norms once per level: calls count, not batches.
    """
    calls = _Calls()
    for path, norm in norms.items():
        norm.reset_running_stats()
        calls.counts[path] = 0

        def before(module: _Norm, _: object, path: str = path) -> None:
            calls.counts[path] += 1
            module.momentum = 1 / calls.counts[path] if momentum is None else momentum

        calls.handles.append(norm.register_forward_pre_hook(before))
    return calls


def _read(norms: Mapping[str, _Norm], counts: Mapping[str, int]) -> Statistics:
    found: Statistics = {}
    for path, norm in norms.items():
        if counts[path]:
            for name in _BUFFERS:
                value = norm.get_buffer(name).clone()
                if not bool(torch.isfinite(value).all()):
                    raise NonFiniteError(
                        f"calibration: statistics must be finite, got {path}.{name} that is not"
                    )
                found[f"{path}.{name}"] = value
    return found


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Put buffers, modes and momenta back, bit for bit."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(m, m.momentum) for m in model.modules() if isinstance(m, _Norm)]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode
        for norm, momentum in momenta:
            norm.momentum = momentum


@contextlib.contextmanager
def _chance(model: nn.Module, seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside, and from where the generators were outside."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield
