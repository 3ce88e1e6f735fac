"""Latency tables: what is measured how often, sums, files of other spaces refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from detkit.errors import ConfigError, DataError, StorageError
from detkit.models.search_space import SPACES
from detkit.nas.cost import cost_table
from detkit.nas.latency import LatencyTable, load_latency, measure_latency

TINY = SPACES["tiny"]
CPU = torch.device("cpu")


class Ticking:
    """Every block takes as long as it has parameters; each call runs it, so that shapes fit."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()

    def __call__(self, run: Callable[[], object]) -> float:
        weights: list[int] = []

        def see(module: nn.Module, _: object, out: object) -> None:
            weights.append(sum(p.numel() for p in module.parameters(recurse=False)))

        handle = nn.modules.module.register_module_forward_hook(see)
        try:
            run()
        finally:
            handle.remove()
        self.calls[sum(weights)] += 1
        # the first call is slow, and one in ten is disturbed
        disturbed = self.calls[sum(weights)] in (1, 5)
        return sum(weights) * (1000.0 if disturbed else 1.0)


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return measure_latency(TINY, CPU, 64, 96, rounds=5, clock=Ticking())


def test_a_network_takes_the_sum_of_its_parts(table: LatencyTable) -> None:
    """Parameters stand for times here: the cost table tells what must come out."""
    costs = cost_table(TINY)
    genes = TINY.parse("01-23-0123-30")
    assert table.body(genes) == costs.body(genes).params
    assert table.stem == costs.stem.params
    assert table.blocks == tuple(tuple(float(c.params) for c in row) for row in costs.blocks)
    assert table.shape == (1, 64, 96) and table.device.startswith("cpu")
    with pytest.raises(ConfigError, match="must be 10 numbers"):
        table.body(genes[1:])


def test_equal_blocks_are_measured_once() -> None:
    clock = Ticking()
    measure_latency(TINY, CPU, 64, 64, rounds=2, clock=clock)
    # the stem, and per stage one first block and one other, each with four ops; warm-up and rounds
    assert sum(clock.calls.values()) == (1 + 4 * 2 * 4) * 3


def test_a_table_read_back(table: LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "t.json")
    assert load_latency(tmp_path / "t.json", TINY) == table
    with pytest.raises(
        ConfigError, match=r"must be of the tiny space \(shuffle 1\), got tiny \(sh"
    ):
        load_latency(tmp_path / "t.json", replace(TINY, shuffle=1))
    with pytest.raises(ConfigError, match="must be of the small space"):
        load_latency(tmp_path / "t.json", SPACES["small"])
    replace(table, blocks=table.blocks[1:]).save(tmp_path / "short.json")
    with pytest.raises(DataError, match="must hold 10 x 4 times"):
        load_latency(tmp_path / "short.json", TINY)
    (tmp_path / "other.json").write_text("[]")
    for name in ("other.json", "none.json"):
        with pytest.raises(DataError, match=r"latency table .* must be readable"):
            load_latency(tmp_path / name, TINY)
    with pytest.raises(StorageError, match="must be writable"):
        table.save(tmp_path / "none" / "t.json")


def test_the_real_clock_and_wrong_sizes() -> None:
    space = replace(TINY, blocks=(1, 1, 1, 1), ops=("shuffle3", "xception"))
    found = measure_latency(space, CPU, 32, 32, batch=2, rounds=2)
    assert found.stem > 0 and all(t > 0 for times in found.blocks for t in times)
    assert found.shape == (2, 32, 32)
    with pytest.raises(ConfigError, match="sizes and rounds must be positive, got 0x32"):
        measure_latency(space, CPU, 0, 32)
