"""Draws docs/detnas.png anew, the published networks of DetNAS: `python tools/draw_detnas.py`."""

from __future__ import annotations

from pathlib import Path

from detkit.models.search_space import ARCHITECTURES, SPACES
from detkit.report.architectures import draw_architectures

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "detnas.png"


def main() -> None:
    """All networks that have a name."""
    nets = {
        name: (SPACES[found.space], SPACES[found.space].parse(found.genes))
        for name, found in ARCHITECTURES.items()
    }
    draw_architectures(nets, PICTURE)


if __name__ == "__main__":
    main()
