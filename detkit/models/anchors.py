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
        measured: Divide the padded image by the map instead of taking ``strides``: what torchvision
            does, another number where a map's size was rounded up.

    Raises:
        ValueError: ``strides`` and ``sizes`` differ in length.
    """

    def __init__(
        self,
        strides: Sequence[int],
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[float],
        measured: bool = False,
    ) -> None:
        if len(strides) != len(sizes):
            raise ValueError(
                f"anchors: one list of sizes per level ({len(strides)}), got {len(sizes)}"
            )
        self.strides = tuple(strides)
        self.measured = measured
        self.cells = [cell_anchors(s, ratios) for s in sizes]

    @property
    def per_cell(self) -> list[int]:
        """Anchors per cell of each level."""
        return [len(cell) for cell in self.cells]

    def __call__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device | str = "cpu",
        image: tuple[int, int] | None = None,
    ) -> list[Tensor]:
        """Anchors of each level, (H * W * per_cell, 4), row by row, those of a cell side by side.

        Args:
            shapes: (H, W) of each level.
            device: Where to put them.
            image: (height, width) in pixels of the padded image, for measured strides.

        Raises:
            ValueError: Strides are measured and ``image`` is not given.
        """
        return [
            self._level(cell, steps, shape, device)
            for cell, steps, shape in zip(
                self.cells, self._steps(shapes, image), shapes, strict=True
            )
        ]

    def _steps(
        self, shapes: Sequence[tuple[int, int]], image: tuple[int, int] | None
    ) -> list[tuple[int, int]]:
        """Pixels between cells of each level, down and right."""
        if not self.measured:
            return [(stride, stride) for stride in self.strides]
        if image is None:
            raise ValueError(
                "anchors: measured strides need the size of the padded image, got none"
            )
        return [(image[0] // height, image[1] // width) for height, width in shapes]

    @staticmethod
    def _level(
        cell: Tensor, steps: tuple[int, int], shape: tuple[int, int], device: torch.device | str
    ) -> Tensor:
        y = torch.arange(shape[0], dtype=torch.float32, device=device) * steps[0]
        x = torch.arange(shape[1], dtype=torch.float32, device=device) * steps[1]
        y, x = torch.meshgrid(y, x, indexing="ij")
        centre = torch.stack([x, y, x, y], -1)  # (H, W, 4)
        return (centre[:, :, None, :] + cell.to(device)).reshape(-1, 4)
