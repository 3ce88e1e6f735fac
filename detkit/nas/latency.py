"""Latency of every network of a search space on one device, from a table measured once.

Blocks run one after another, so a network is taken to need the sum of its parts. What runs beside
them (neck, heads) is the same for all networks of a search and not counted.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detkit.errors import ConfigError, DataError
from detkit.models.backbones.shuffle import ShuffleBlock, stem_layers
from detkit.models.norm import norm_named
from detkit.models.search_space import OPS, SearchSpace
from detkit.storage import writing

Clock = Callable[[Callable[[], object]], float]
"""Milliseconds that one call takes, work on the device included."""


@dataclass(frozen=True)
class LatencyTable:
    """Measured milliseconds of stem and blocks.

    Attributes:
        space: The space.
        device: What it was measured on, in words.
        shape: (N, H, W) of the images.
        stem: Milliseconds of the stem.
        blocks: Milliseconds of each position's blocks, by gene.
    """

    space: SearchSpace
    device: str
    shape: tuple[int, int, int]
    stem: float
    blocks: tuple[tuple[float, ...], ...]

    def body(self, genes: Sequence[int]) -> float:
        """Milliseconds of a network; raises ConfigError for genes not of the space."""
        chosen = zip(self.blocks, self.space.check(genes), strict=True)
        return self.stem + sum(times[gene] for times, gene in chosen)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; raises StorageError when the disk refuses."""
        plain = {
            "space": self.space.to_plain(),
            "device": self.device,
            "shape": list(self.shape),
            "stem": self.stem,
            "blocks": [list(times) for times in self.blocks],
        }
        with writing(path):
            Path(path).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def load_latency(path: str | Path, space: SearchSpace) -> LatencyTable:
    """The table of a file.

    Raises:
        ConfigError: It is of another space.
        DataError: The file is missing or no such table.
    """
    try:
        plain: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        blocks = tuple(tuple(float(t) for t in times) for times in plain["blocks"])
        n, h, w = (int(size) for size in plain["shape"])
        device, stem = str(plain["device"]), float(plain["stem"])
        found = SearchSpace.from_plain(plain["space"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"latency table {path}: must be readable, got {error!r}") from error
    if found != space:
        raise ConfigError(
            f"latency table {path}: must be of the {space.name} space (shuffle {space.shuffle}), "
            f"got {found.name} (shuffle {found.shuffle}) or other numbers; measure it again"
        )
    if [len(times) for times in blocks] != [len(space.ops)] * len(space):
        raise DataError(f"latency table {path}: must hold {len(space)} x {len(space.ops)} times")
    return LatencyTable(space, device, (n, h, w), stem, blocks)


@torch.no_grad()
def measure_latency(
    space: SearchSpace,
    device: torch.device,
    height: int,
    width: int,
    *,
    batch: int = 1,
    rounds: int = 20,
    clock: Clock | None = None,
) -> LatencyTable:
    """Measure every block of a space in evaluation mode, in fp32.

    Equal blocks on equal maps are measured once. Blocks take turns: a disturbance hits all of them
    a little and not one of them much. The median over the rounds counts, after one to warm up.

    Args:
        space: The space.
        device: Where; nothing else should run there meanwhile.
        height: Height of the image in pixels.
        width: Its width.
        batch: Images at once.
        rounds: Turns of every block.
        clock: Another way to take the time.

    Raises:
        ConfigError: A size or number out of range.
    """
    if min(height, width, batch, rounds) < 1:
        raise ConfigError(
            f"latency: sizes and rounds must be positive, got {height}x{width}, batch {batch}, "
            f"{rounds} rounds"
        )
    stem = stem_layers(space.stem, norm_named("bn")).to(device).eval()
    x = torch.randn(batch, 3, height, width, device=device)
    parts: dict[Any, tuple[nn.Module, Tensor]] = {"stem": (stem, x)}
    keys: list[list[Any]] = []
    x = stem(x)
    for position in space.positions():
        keys.append([])
        for op in space.ops:
            key = (position.cin, position.cout, position.stride, op, tuple(x.shape))
            if key not in parts:
                block = ShuffleBlock(position, OPS[op], space.shuffle, norm_named("bn"))
                parts[key] = (block.to(device).eval(), x)
            keys[-1].append(key)
        first, x = parts[keys[-1][0]]
        x = first(x)
    times = _take_turns(parts, rounds, clock or _clock(device))
    blocks = tuple(tuple(times[key] for key in row) for row in keys)
    return LatencyTable(space, _name(device), (batch, height, width), times["stem"], blocks)


def _take_turns(
    parts: dict[Any, tuple[nn.Module, Tensor]], rounds: int, clock: Clock
) -> dict[Any, float]:
    taken: dict[Any, list[float]] = {key: [] for key in parts}
    for turn in range(rounds + 1):
        for key, (module, x) in parts.items():
            spent = clock(lambda module=module, x=x: module(x))  # type: ignore[misc]
            if turn:
                taken[key].append(spent)
    return {key: statistics.median(spent) for key, spent in taken.items()}


def _clock(device: torch.device) -> Clock:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def measure(run: Callable[[], object]) -> float:
        wait()
        begun = time.perf_counter()
        run()
        wait()
        return (time.perf_counter() - begun) * 1000

    return measure


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
