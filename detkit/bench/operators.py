"""Every operator beside its reference and the peers that are installed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from detkit.bench.box_cases import nms_cases, roi_cases
from detkit.bench.case import Case, Setting
from detkit.bench.conv_cases import dilated_cases, scaled_cases, split_cases
from detkit.bench.machine import limits, machine
from detkit.bench.peers import load_peers, versions
from detkit.bench.timing import Call, compare, peak_mib
from detkit.config.checks import one_of
from detkit.errors import ConfigError
from detkit.ops import _library

Row = dict[str, Any]


def all_cases() -> list[Case]:
    """The table's rows, in order."""
    return nms_cases() + roi_cases() + dilated_cases() + scaled_cases() + split_cases()


def bench_ops(
    *,
    device: str = "cpu",
    threads: Sequence[int] = (),
    only: Collection[str] = (),
    seconds: float = 1.0,
    on_row: Callable[[Row, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Time the operators on one device.

    On CUDA fp32 is multiplied as it is, by peers too: torch's convolutions would round to TF32.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        threads: CPU thread counts, by default one and all; none on CUDA.
        only: Operators; all by default.
        seconds: Time per row beside its least number of rounds.
        on_row: Called with each row when it is ready, and the result as far as it is.

    Returns:
        ``hardware``, ``peers`` (versions), ``limits`` (by thread count, see
        :func:`detkit.bench.machine.limits`) and ``rows``: ``op``, ``size``, ``pass``, ``dtype``,
        ``threads``, ``ms``, ``limit`` and ``of_limit`` (the fraction reached), ``peak_mib``, and
        by contestant ``others``: ``{"ms", "ratio", "spread", "rounds"}`` with ``ratio`` its time
        over detkit's, or ``{"failed": why}``.

    Raises:
        ConfigError: An unknown operator, or operators that were not built.
    """
    for name in only:
        one_of("--only", name, _library.OPS)
    place = torch.device(device)
    if not any(place.type in devices for devices in _library.KERNELS.values()):
        raise ConfigError(
            f"bench ops: the {place.type} operators must be built, got none; "
            f"{_library.BUILD_COMMAND}"
        )
    counts = list(threads) or sorted({1, os.cpu_count() or 1})
    cases = [case for case in all_cases() if not only or case.op in only]
    peers, before = load_peers(), torch.get_num_threads()
    rounding = torch.backends.cudnn.allow_tf32
    result: dict[str, Any] = {"hardware": machine(device), "peers": versions(peers)}
    result |= {"limits": {}, "rows": []}
    try:
        torch.backends.cudnn.allow_tf32 = False
        for count in counts if place.type == "cpu" else [before]:
            torch.set_num_threads(count)
            reached = result["limits"][str(count)] = limits(place)
            for case in cases:
                row = measure(case, Setting(place, count, peers), seconds, reached)
                result["rows"].append(row)
                if on_row is not None:
                    on_row(row, result)
    finally:
        torch.backends.cudnn.allow_tf32 = rounding
        torch.set_num_threads(before)
    result["hardware"]["load_after"] = os.getloadavg()[0]
    return result


def measure(case: Case, setting: Setting, seconds: float, reached: dict[str, float]) -> Row:
    """One row; a peer that fails is told of, and the others run."""
    calls = case.calls(setting)
    ours = calls["detkit"]
    if case.reference:
        calls["reference"] = _by_reference(case, setting)
    timings, failures = compare(calls, setting.device, seconds, few=("reference",))
    own = timings.pop("detkit")
    limit, fraction = _of_limit(case, own.ms, reached)
    return {
        "op": case.op,
        "size": case.size,
        "pass": case.part,
        "dtype": case.dtype,
        "threads": setting.threads,
        "ms": own.ms,
        "rounds": own.rounds,
        "limit": limit,
        "of_limit": fraction,
        "peak_mib": peak_mib(ours, setting.device),
        "others": {name: dataclasses.asdict(timing) for name, timing in timings.items()}
        | {name: {"failed": why} for name, why in failures.items()},
    }


def _by_reference(case: Case, setting: Setting) -> Call:
    with _library.reference_only():  # a backward pass has its forward pass made here
        call = case.calls(dataclasses.replace(setting, peers={}))["detkit"]

    def run(turn: int) -> object:
        with _library.reference_only():
            return call(turn)

    return run


def _of_limit(case: Case, ms: float, reached: dict[str, float]) -> tuple[str, float]:
    """Which limit the case is held against, and the fraction of it reached."""
    if case.gflop:
        return "gemm", 1e3 * case.gflop / ms / reached[case.dtype]
    return "copy", case.mbytes / ms / reached["copy"]
