"""Strips of blocks: one cell per gene, in the order of the genes, told apart by letter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from detkit.errors import ConfigError
from detkit.models.search_space import SPACES
from detkit.report.architectures import STYLES, architecture_figure, draw_architectures

pytest.importorskip("matplotlib", reason="pictures need the extra detkit[plots]")

TINY, SMALL = SPACES["tiny"], SPACES["small"]


def test_every_gene_is_a_cell_in_order() -> None:
    own = replace(TINY, name="mine", ops=("xception", "shuffle7"))
    nets = {
        "first": (TINY, TINY.parse("01-23-0123-30")),
        "large": (SMALL, SMALL.parse("2120-2112-33130031-3132")),
        "mine": (own, (0, 1) * 5),
    }
    (panel,) = architecture_figure(nets).axes
    letters = {letter for _, letter, _, _ in STYLES.values()}
    rows: dict[float, list[tuple[float, str]]] = {}
    for text in panel.texts:
        x, y = text.get_position()
        if text.get_text() in letters:
            rows.setdefault(y, []).append((x, text.get_text()))
    found = ["".join(letter for _, letter in sorted(row)) for _, row in sorted(rows.items())]
    # networks with as many blocks per stage stand together
    assert found == ["357x357xx3", "x7x7x7x7x7", "75737557xx5x33x5x5x7"]
    names = [t.get_text() for t in panel.texts if t.get_text() in nets]
    assert names == ["first", "mine", "large"]
    corners = [patch.get_x() for patch in panel.patches]
    assert len(panel.patches) == 10 + 10 + 20 and min(corners) >= 0
    assert max(corners) + 1 <= panel.get_xlim()[1]


def test_it_is_written_in_the_format_of_its_suffix(tmp_path: Path) -> None:
    nets = {"a": (TINY, (0,) * 10)}
    draw_architectures(nets, tmp_path / "a.png")
    draw_architectures(nets, tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_wrong_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at least one network"):
        architecture_figure({})
    with pytest.raises(ConfigError, match="must be 10 numbers in"):
        architecture_figure({"a": (TINY, (0,) * 9)})
