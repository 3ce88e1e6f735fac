"""Times of calls that take turns, their ratios, and the memory a call needs.

Absolute times move with the machine's clock, its caches and its other users. Contestants therefore
run in turn, in an order that moves on, and a ratio is the median over rounds of two times taken in
the same round, so that a disturbance touches both.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[int], object]
"""Runs once; the number says which turn it is, and so which of several data sets to take."""

BLOCK = 8.0
"""Milliseconds that one time covers at least: short calls are repeated."""

SLOW = 400.0
"""Milliseconds from which on a contestant runs `FEW` times, the first run included."""

FEW = 3
LEAST = 5
MOST = 60
STEADY = 0.02
"""Standard error of a median ratio, as a part of it, that ends the rounds."""


@dataclass(frozen=True)
class Timing:
    """Of one contestant.

    Attributes:
        ms: Median milliseconds.
        ratio: Median of its time over the first contestant's in the same round.
        spread: Distance of the ratio's quartiles as a part of it, None under four rounds.
        rounds: Times taken.
    """

    ms: float
    ratio: float
    spread: float | None
    rounds: int


def milliseconds(call: Call, device: torch.device, seconds: float) -> list[float]:
    """Times of single calls that fill ``seconds``, three at least, after one not counted."""
    call(0)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times.append(clock(call, device, len(times), 1))
    return times


def clock(call: Call, device: torch.device, turn: int, repeats: int) -> float:
    """Milliseconds of one call, over ``repeats`` with the same turn and the following ones.

    On CUDA by events. On the CPU with one thread it is the processor time of the process, in which
    other users of the machine have no part, and with more threads the time on the wall.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):  # whose stream the events are to be on
            start.record()
            for i in range(repeats):
                call(turn + i)
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / repeats
    read = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begun = read()
    for i in range(repeats):
        call(turn + i)
    return 1e3 * (read() - begun) / repeats


def compare(
    calls: Mapping[str, Call], device: torch.device, seconds: float, few: Sequence[str] = ()
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times of contestants in turn, until every ratio stands still or the time is over.

    Args:
        calls: The first is the one the others are compared with.
        device: Where they run.
        seconds: Time to spend; every contestant has a least number of rounds beside it.
        few: Contestants that run `FEW` times at most, such as a slow reference.

    Returns:
        the timings, and of contestants that failed (the first may not) the first line of why.
    """
    warm, failures = _warm_all(calls, device)
    names = list(warm)
    repeats = {name: max(1, round(BLOCK / max(ms, 1e-3))) for name, ms in warm.items()}
    least = {name: _least(ms, name in few) for name, ms in warm.items()}
    least[names[0]] = LEAST if warm[names[0]] <= SLOW else FEW
    # where a call is so long, its first run counts
    times: dict[str, list[float | None]] = {
        name: [warm[name]] if warm[name] > SLOW and name != names[0] else [] for name in names
    }
    end, turn = time.perf_counter() + seconds, 0
    gc.collect()
    while True:
        more = time.perf_counter() < end
        order = [n for n in names if _goes_on(n, names[0], times, least, more)]
        if turn and not order:
            break
        order = order if names[0] in order else [names[0], *order]
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            if len(times[name]) <= turn:
                times[name].append(clock(calls[name], device, turn * repeats[name], repeats[name]))
        for own in times.values():
            own.extend([None] * (turn + 1 - len(own)))
        turn += 1
    return {name: _timing(times[name], times[names[0]]) for name in names}, failures


def _warm_all(
    calls: Mapping[str, Call], device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of the contestants that run, and why the others do not."""
    warm: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, call in calls.items():
        try:
            warm[name] = _warm_up(call, device)
        except Exception as error:  # whatever stops a peer is its result, and ends no table
            if not warm:
                raise
            failures[name] = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return warm, failures


def _least(ms: float, seldom: bool) -> int:
    """Rounds of a contestant whose call takes ``ms``, at least."""
    if ms > (SLOW if seldom else 10 * SLOW):
        return 1
    return FEW if seldom or ms > SLOW else LEAST


def _warm_up(call: Call, device: torch.device) -> float:
    """Milliseconds of a call after the first; of the first where that takes long."""
    once = clock(call, device, 0, 1)
    return once if once > SLOW else min(once, clock(call, device, 1, 1))


def _goes_on(
    name: str,
    first: str,
    times: Mapping[str, Sequence[float | None]],
    least: Mapping[str, int],
    more: bool,
) -> bool:
    """Whether the contestant needs another round."""
    done = sum(t is not None for t in times[name])
    if done < least[name]:
        return True
    if least[name] < LEAST or done >= MOST or not more:
        return False
    timing = _timing(times[name], times[first])
    # 0.93 of the quartiles' distance over the root of the count is the error of a median
    return timing.spread is None or 0.93 * timing.spread / done**0.5 > STEADY


def _timing(own: Sequence[float | None], base: Sequence[float | None]) -> Timing:
    pairs = [(t, b) for t, b in zip(own, base, strict=False) if t is not None and b is not None]
    ratios = [t / b for t, b in pairs]
    middle = statistics.median(ratios)
    spread = None
    if len(ratios) > 3:
        low, _, high = statistics.quantiles(ratios, n=4)
        spread = (high - low) / middle
    return Timing(statistics.median(t for t, _ in pairs), middle, spread, len(pairs))


def peak_mib(call: Call, device: torch.device) -> float | None:
    """MiB that one call needs beyond what is there before it, its result included.

    On CUDA from torch's allocator; on Linux from the process's peak resident size, after freed
    memory has been given back; None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call(0)
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        clear.write_text("5")  # the peak is counted anew
        before = _resident(status, "VmRSS")
        call(0)
        return max(0.0, (_resident(status, "VmHWM") - before) / 1024)
    except (OSError, AttributeError):  # no /proc that can be written, or another C library
        return None


def _resident(status: Path, field: str) -> float:
    """KiB of a field of /proc/self/status."""
    lines = status.read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field)))
