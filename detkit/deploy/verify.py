"""An exported detector beside the one it was made of, on images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detkit.config import Config, DataConfig
from detkit.engine.inference import inference
from detkit.errors import ConfigError, VerificationError
from detkit.models.detector import TwoStageDetector
from detkit.types import Batch, Detections

BOX_TOLERANCE = 1e-3
"""Largest difference in pixels."""

SCORE_TOLERANCE = 1e-4
"""Largest difference of a score."""

MASK_TOLERANCE = 1e-3
"""Largest difference of a cell of a mask, a probability."""

Cells = tuple[Tensor, Tensor]


@dataclass
class Agreement:
    """How far ONNX Runtime and PyTorch are apart.

    Attributes:
        images: Compared so far.
        detections: PyTorch's on them.
        box: Largest difference of a coordinate in pixels.
        score: Largest difference of a score.
        mask: Largest difference of a mask's probability; 0 for detectors without masks.
        unmatched: Detections of either side without one of the same label on the other.
    """

    images: int = 0
    detections: int = 0
    box: float = 0.0
    score: float = 0.0
    mask: float = 0.0
    unmatched: int = 0

    def add(
        self, wanted: Detections, got: Detections, cut: float, cells: Cells | None = None
    ) -> None:
        """Count one image in.

        Each wanted detection takes the nearest of its label that is left, since scores that differ
        in the last digits may come in another order.

        Args:
            wanted: PyTorch's.
            got: ONNX Runtime's.
            cut: Score below which detections are dropped: one at most the tolerance above it may
                be missing on either side.
            cells: Probabilities (R, M, M) of both, of a detector with masks.
        """
        self.images += 1
        self.detections += len(wanted["boxes"])
        left = torch.ones(len(got["boxes"]), dtype=torch.bool)
        for row, (box, label, score) in enumerate(zip(*_columns(wanted), strict=True)):
            gaps = (got["boxes"] - box).abs().amax(1)
            shift = (got["scores"] - score).abs()
            apart = torch.maximum(gaps / BOX_TOLERANCE, shift / SCORE_TOLERANCE)
            apart[(got["labels"] != label) | ~left] = torch.inf
            nearest = int(apart.argmin()) if len(apart) else -1
            if nearest < 0 or not torch.isfinite(apart[nearest]):
                self.unmatched += bool(score > cut + SCORE_TOLERANCE)
                continue
            if apart[nearest] > 1 and score <= cut + SCORE_TOLERANCE:
                continue
            left[nearest] = False
            self.box = max(self.box, float(gaps[nearest]))
            self.score = max(self.score, float(shift[nearest]))
            if cells is not None:
                apart = (cells[1][nearest] - cells[0][row]).abs()
                self.mask = max(self.mask, float(apart.max()))
        self.unmatched += int((got["scores"][left] > cut + SCORE_TOLERANCE).sum())

    def check(self) -> None:
        """Raises VerificationError where a difference is above its limit."""
        found = (
            f"{self.box:.2e} pixels, {self.score:.2e} in scores, {self.mask:.2e} in masks and "
            f"{self.unmatched} detections without a counterpart over {self.images} images"
        )
        if not self.detections:
            raise VerificationError(
                f"--verify: must see at least one detection, got none on {self.images} images; "
                "train longer or name other images with --data"
            )
        far = self.box > BOX_TOLERANCE or self.score > SCORE_TOLERANCE or self.mask > MASK_TOLERANCE
        if far or self.unmatched:
            raise VerificationError(
                f"--verify: ONNX Runtime must agree with PyTorch within {BOX_TOLERANCE:g} pixels, "
                f"{SCORE_TOLERANCE:g} in scores and {MASK_TOLERANCE:g} in masks, got {found}"
            )


def compare(
    content: bytes,
    model: nn.Module,
    config: Config,
    batches: Iterable[Batch],
    size: tuple[int, int] | None = None,
) -> Agreement:
    """ONNX Runtime's detections beside those of ``model``.

    Args:
        content: The ONNX file.
        model: The detector it was made of, on the CPU.
        config: What the detector was built with, and the normalisation of the batches.
        batches: Images as the detector takes them.
        size: Height and width the file was made for, if fixed.

    Raises:
        ConfigError: An image does not fit into ``size``.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    data, box = config.data, config.box
    agreement = Agreement()
    with inference(model):
        for batch in batches:
            images = batch.images if size is None else _fitted(batch, size, data.pad_multiple)
            raw = raw_pixels(images, data)
            outputs = session.run(
                None, {"images": _of_size(raw, size), "sizes": batch.sizes.numpy()}
            )
            seen = normalised_pixels(raw, batch.sizes, data)
            wanted, cells = _detect(model, seen, batch.sizes)
            both = zip(cells, mask_cells(outputs), strict=True) if cells else [None] * len(wanted)
            rows = zip(wanted, detections(outputs), both, strict=True)
            for one, got, pair in rows:
                full = len(one["scores"]) == box.max_detections
                cut = float(one["scores"][-1]) if full else box.score_threshold
                agreement.add(one, got, cut, pair)
    return agreement


def _detect(
    model: nn.Module, images: Tensor, sizes: Tensor
) -> tuple[list[Detections], list[Tensor]]:
    """Detections, and of a detector with masks their probabilities before pasting."""
    if isinstance(model, TwoStageDetector):
        return model.detect_cells(images, sizes)
    found: list[Detections] = model.detect(images, sizes)  # type: ignore[operator]
    return found, []


def detections(outputs: list[Any]) -> list[Detections]:
    """What an exported detector gave for each image, without the rows that fill up.

    Args:
        outputs: boxes (N, D, 4), labels (N, D), scores (N, D), count (N,) as arrays; more are
            not looked at.
    """
    boxes, labels, scores, count = (torch.from_numpy(np.asarray(a)) for a in outputs[:4])
    return [
        Detections(boxes=boxes[i, :n], labels=labels[i, :n], scores=scores[i, :n])
        for i, n in enumerate(count.tolist())
    ]


def mask_cells(outputs: list[Any]) -> list[Tensor]:
    """Probabilities (R, M, M) of each image's detections.

    Args:
        outputs: boxes, labels, scores, count (N,) and masks (N, D, M, M) as arrays.
    """
    count, masks = (torch.from_numpy(np.asarray(a)) for a in outputs[3:])
    return [masks[i, :n] for i, n in enumerate(count.tolist())]


def raw_pixels(images: Tensor, data: DataConfig) -> Any:
    """The uint8 pixels (N, 3, H, W) that gave the normalised ``images``."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    images = images.flip(1) if data.channels == "bgr" else images
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def normalised_pixels(raw: Any, sizes: Tensor, data: DataConfig) -> Tensor:
    """What a detector takes of uint8 pixels (N, 3, H, W), zero outside the images' ``sizes``.

    The same as a loader gives, but for ``data.resize`` torchvision, which resizes what is already
    normalised and so gives colours between whole numbers.
    """
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    planes = (torch.from_numpy(raw) - mean * 255) * (std * 255).reciprocal()
    planes = planes.flip(1) if data.channels == "bgr" else planes
    out = torch.zeros_like(planes)
    for target, image, (height, width) in zip(out, planes, sizes.tolist(), strict=True):
        target[:, :height, :width] = image[:, :height, :width]
    return out


def _fitted(batch: Batch, size: tuple[int, int], multiple: int) -> Tensor:
    """The images of a batch in the top left of ``size``, padded as the exported graph pads it."""
    height, width = (int(side) for side in batch.sizes.amax(0))
    if height > size[0] or width > size[1]:
        raise ConfigError(
            f"--size: must hold the images to verify with, {height}x{width} pixels, got "
            f"{size[0]}x{size[1]}"
        )
    padded = (-(-side // multiple) * multiple for side in size)
    images = batch.images.new_zeros(len(batch.images), 3, *padded)
    images[:, :, :height, :width] = batch.images[:, :, :height, :width]
    return images


def _of_size(pixels: Any, size: tuple[int, int] | None) -> Any:
    return pixels if size is None else pixels[:, :, : size[0], : size[1]]


def _columns(found: Detections) -> tuple[Tensor, Tensor, Tensor]:
    return found["boxes"], found["labels"], found["scores"]
