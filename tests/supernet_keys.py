"""Where the weights of a supernet belong."""

from __future__ import annotations


def block_of(key: str) -> tuple[int, int, int] | None:
    """Stage, index and gene of the block that a weight belongs to."""
    parts = key.split(".")
    stage = next((i for i, part in enumerate(parts) if part.startswith("stage")), None)
    if stage is None:
        return None
    return int(parts[stage][5:]), int(parts[stage + 1]), int(parts[stage + 2])
