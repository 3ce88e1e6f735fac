"""Anchors with an explicit (stride, sizes) per level: several levels may share a stride."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Anchors around the origin, (len(ratios) * len(sizes), 4), ratio-major, in whole pixels.

    Args:
        sizes: Side in pixels of the square anchor of the same area.
        ratios: Height divided by width.
    """
    size = torch.tensor(sizes, dtype=torch.float32, device="cpu")
    root = torch.tensor(ratios, dtype=torch.float32, device="cpu").sqrt()
    w = (size[None, :] / root[:, None]).flatten()
    h = (size[None, :] * root[:, None]).flatten()
    return (torch.stack([-w, -h, w, h], 1) / 2).round()


class AnchorGrid:
    """Anchors of several levels.

    Args:
        strides: Input pixels between neighbouring cells of each level.
        sizes: Anchor sides of each level.
        ratios: Heights divided by widths, the same for all levels.

    Raises:
        ValueError: ``strides`` and ``sizes`` differ in length.
    """

    def __init__(
        self, strides: Sequence[int], sizes: Sequence[Sequence[float]], ratios: Sequence[float]
    ) -> None:
        if len(strides) != len(sizes):
            raise ValueError(
                f"anchors: one list of sizes per level ({len(strides)}), got {len(sizes)}"
            )
        self.strides = tuple(strides)
        self.cells = [cell_anchors(s, ratios) for s in sizes]

    @property
    def per_cell(self) -> list[int]:
        """Anchors per cell of each level."""
        return [len(cell) for cell in self.cells]

    def __call__(
        self, shapes: Sequence[tuple[int, int]], device: torch.device | str = "cpu"
    ) -> list[Tensor]:
        """Anchors of each level, (H * W * per_cell, 4), row by row, those of a cell side by side.

        Args:
            shapes: (H, W) of each level.
            device: Where to put them.
        """
        return [
            self._level(*args, device)
            for args in zip(self.cells, self.strides, shapes, strict=True)
        ]

    @staticmethod
    def _level(
        cell: Tensor, stride: int, shape: tuple[int, int], device: torch.device | str
    ) -> Tensor:
        y = torch.arange(shape[0], dtype=torch.float32, device=device) * stride
        x = torch.arange(shape[1], dtype=torch.float32, device=device) * stride
        y, x = torch.meshgrid(y, x, indexing="ij")
        centre = torch.stack([x, y, x, y], -1)  # (H, W, 4)
        return (centre[:, :, None, :] + cell.to(device)).reshape(-1, 4)
