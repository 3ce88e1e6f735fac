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


def caffe_cell_anchors(sizes: Sequence[float], ratios: Sequence[float], stride: int) -> Tensor:
    """Anchors around a cell's centre, (len(ratios) * len(sizes), 4), ratio-major.

    As Faster R-CNN's first code makes them, R-FCN and Light-Head R-CNN after it: whole-pixel shapes
    of the cell's own area, then scaled. Its boxes count their last pixel in (centre 7.5 at stride
    16), ours end behind it (centre 8): the pixels are the same.

    Args:
        sizes: Side in pixels of the square anchor.
        ratios: Height divided by width.
        stride: Side in pixels of a cell.
    """
    ratio = torch.tensor(ratios, dtype=torch.float64, device="cpu")
    scale = torch.tensor(sizes, dtype=torch.float64, device="cpu") / stride
    w = (stride / ratio.sqrt()).round()
    h = (w * ratio).round()
    w, h = ((side[:, None] * scale).flatten() for side in (w, h))
    return (torch.stack([stride - w, stride - h, stride + w, stride + h], 1) / 2).float()


class AnchorGrid:
    """Anchors of several levels.

    Args:
        strides: Input pixels between neighbouring cells of each level.
        sizes: Anchor sides of each level.
        ratios: Heights divided by widths, the same for all levels.
        style: ``torchvision`` (:func:`cell_anchors`) or ``caffe`` (:func:`caffe_cell_anchors`).
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
        style: str = "torchvision",
        measured: bool = False,
    ) -> None:
        if len(strides) != len(sizes):
            raise ValueError(
                f"anchors: one list of sizes per level ({len(strides)}), got {len(sizes)}"
            )
        self.strides = tuple(strides)
        self.measured = measured
        if style == "caffe":
            levels = zip(sizes, strides, strict=True)
            self.cells = [caffe_cell_anchors(s, ratios, stride) for s, stride in levels]
        else:
            self.cells = [cell_anchors(s, ratios) for s in sizes]
        self._placed: dict[torch.device, list[Tensor]] = {}

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
                self._cells_on(torch.device(device)),
                self._steps(shapes, image),
                shapes,
                strict=True,
            )
        ]

    def _cells_on(self, device: torch.device) -> list[Tensor]:
        """The cells' anchors; on a GPU copied once, since a CUDA graph can hold no such copy."""
        if device.type == "cpu":
            return self.cells
        if device not in self._placed:
            self._placed[device] = [cell.to(device) for cell in self.cells]
        return self._placed[device]

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
        return (centre[:, :, None, :] + cell).reshape(-1, 4)
