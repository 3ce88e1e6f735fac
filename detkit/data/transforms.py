"""Geometry and colour of one sample: what is cut out, how it is scaled, whether it is mirrored.

A :class:`Geometry` is drawn first, from the size alone; pixels, boxes, polygons and masks then all
go through the same one. The pixel grid is continuous: pixel (i, j) covers [j, j + 1) x [i, i + 1),
a box is xyxy in that grid, and resizing by s maps x to s * x (bilinear with half-pixel centres and,
when shrinking, a triangle as wide as the step).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn import functional as F

from detkit.data import masks

# An object stays truth while a cut leaves this share of its box; below, the rest is ignored.
_KEPT_SHARE = 0.25
_CROP_TRIES = 10
_RATIO = (3 / 4, 4 / 3)

# Principal components of the RGB values (0..1) of ImageNet's training images, one per column, and
# the deviations along them, as published with AlexNet's augmentation.
_COLOR_AXES = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
_COLOR_SPREAD = np.array([0.2175, 0.0188, 0.0045])


@dataclass(frozen=True)
class Geometry:
    """Cut ``crop`` out of a ``source`` image, resize it to ``size``, mirror it if ``flip``.

    Attributes:
        source: (height, width) of the whole image.
        crop: x0, y0, x1, y1 in pixels of the whole image.
        size: (height, width) of the result.
        flip: Mirror left and right at the end.
    """

    source: tuple[int, int]
    crop: tuple[float, float, float, float]
    size: tuple[int, int]
    flip: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """Factors of y and x."""
        x0, y0, x1, y1 = self.crop
        return self.size[0] / (y1 - y0), self.size[1] / (x1 - x0)

    @property
    def needed(self) -> tuple[int, int]:
        """(height, width) at which the whole image has all the detail that the result shows."""
        sy, sx = self.scale
        return math.ceil(self.source[0] * sy), math.ceil(self.source[1] * sx)

    def image(self, image: Image.Image) -> Image.Image:
        """The pixels; ``image`` is the whole image, maybe at 1/2, 1/4 or 1/8 of its size."""
        reduced = round(max(self.source) / max(image.size))
        x0, y0, x1, y1 = (v / reduced for v in self.crop)
        height, width = self.size
        if (width, height) != image.size or (x0, y0, x1, y1) != (0, 0, width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image

    def cut(self, image: Image.Image) -> Image.Image:
        """The pixels before resizing; ``image`` is the whole image and ``crop`` in whole pixels."""
        x0, y0, x1, y1 = (round(v) for v in self.crop)
        image = image.crop((x0, y0, x1, y1))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image

    def points(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(P, 2) points x, y."""
        sy, sx = self.scale
        moved = (points - self.crop[:2]) * (sx, sy)
        if self.flip:
            moved[:, 0] = self.size[1] - moved[:, 0]
        return moved

    def boxes(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """(G, 4) xyxy boxes, not clipped to the result."""
        corners = self.points(boxes.reshape(-1, 2)).reshape(-1, 4)
        return corners[:, [2, 1, 0, 3]] if self.flip else corners

    def clipped(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """(G, 4) xyxy boxes, clipped to the result."""
        height, width = self.size
        return np.clip(self.boxes(boxes), 0, [width, height, width, height])

    def mask(self, segmentation: Any) -> NDArray[np.bool_]:
        """(height, width) mask of a segmentation of the whole image."""
        height, width = self.size
        if isinstance(segmentation, list):
            moved = [self.points(np.reshape(p, (-1, 2))).ravel().tolist() for p in segmentation]
            return masks.decode(moved, height, width)
        whole = Image.fromarray(masks.decode(segmentation, *self.source).astype(np.uint8) * 255)
        return np.asarray(self.image(whole)) >= 128


def resized(
    source: tuple[int, int], short_side: int, long_side: int, resize: str = "antialias"
) -> tuple[int, int]:
    """(height, width) with the shorter side ``short_side`` and the longer at most ``long_side``.

    Sides are rounded to the nearest pixel; with ``resize`` ``torchvision`` down, as its own
    arithmetic does (799 where 800 / 480 * 480 falls below 800).
    """
    factor = min(short_side / min(source), long_side / max(source))
    half = 0.0 if resize == "torchvision" else 0.5
    height, width = (max(1, math.floor(side * factor + half)) for side in source)
    return height, width


def whole(
    source: tuple[int, int], short_side: int, long_side: int, resize: str = "antialias"
) -> Geometry:
    """The whole image, resized; what detectors are evaluated on."""
    height, width = source
    size = resized(source, short_side, long_side, resize)
    return Geometry(source, (0, 0, width, height), size)


def random_detection(
    rng: Generator,
    source: tuple[int, int],
    boxes: NDArray[np.float64],
    *,
    short_side: int,
    long_side: int,
    flip: float,
    min_crop: float,
    resize: str = "antialias",
) -> Geometry:
    """A training view for detectors: maybe cut, resized, maybe mirrored.

    Args:
        rng: Source of chance; the same state gives the same view.
        source: (height, width) of the image.
        boxes: (G, 4) xyxy; a cut keeps the centre of at least one, if there is any.
        short_side: Shorter side of the result.
        long_side: Limit of its longer side.
        flip: Chance of mirroring.
        min_crop: Smallest share of each side that is kept; 1 never cuts.
        resize: How sides are rounded, see :func:`resized`.
    """
    mirrored = bool(rng.random() < flip)
    crop = (
        _random_crop(rng, source, boxes, min_crop) if min_crop < 1 else (0, 0, source[1], source[0])
    )
    x0, y0, x1, y1 = crop
    size = resized((y1 - y0, x1 - x0), short_side, long_side, resize)
    return Geometry(source, crop, size, mirrored)


def _random_crop(
    rng: Generator, source: tuple[int, int], boxes: NDArray[np.float64], min_crop: float
) -> tuple[int, int, int, int]:
    height, width = source
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    for _ in range(_CROP_TRIES):
        h, w = (max(1, round(side * rng.uniform(min_crop, 1))) for side in source)
        y0, x0 = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        inside = ((centres >= (x0, y0)) & (centres < (x0 + w, y0 + h))).all(axis=1)
        if inside.any() or not len(boxes):
            return x0, y0, x0 + w, y0 + h
    return 0, 0, width, height


def random_classification(
    rng: Generator, source: tuple[int, int], *, side: int, flip: float, min_area: float
) -> Geometry:
    """A training view for classifiers: ``min_area``..1 of the area as a square of ``side`` pixels.

    Width to height is drawn between 3/4 and 4/3; with ``min_area`` 1 it is the central square.
    """
    height, width = source
    mirrored = bool(rng.random() < flip)
    for _ in range(_CROP_TRIES if min_area < 1 else 0):
        area = height * width * rng.uniform(min_area, 1)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            y0, x0 = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return Geometry(source, (x0, y0, x0 + w, y0 + h), (side, side), mirrored)
    centre = central(source, side=side, share=1.0)
    return Geometry(source, centre.crop, centre.size, mirrored)


def central(source: tuple[int, int], *, side: int, share: float) -> Geometry:
    """The central square, ``share`` of the shorter side; what classifiers are evaluated on."""
    height, width = source
    edge = min(source) * share
    x0, y0 = (width - edge) / 2, (height - edge) / 2
    return Geometry(source, (x0, y0, x0 + edge, y0 + edge), (side, side))


def still_visible(
    geometry: Geometry, boxes: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which boxes have any pixel left, and which enough of them to stay truth: two (G,) masks."""
    moved, clipped = geometry.boxes(boxes), geometry.clipped(boxes)
    left, full = _areas(clipped), _areas(moved)
    any_left = left > 0
    return any_left, any_left & (left >= _KEPT_SHARE * full)


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def jitter(rng: Generator, image: Image.Image, strength: float) -> Image.Image:
    """Brightness, contrast and saturation, each times a factor in 1 - strength .. 1 + strength."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(max(0.0, rng.uniform(1 - strength, 1 + strength)))
    return image


def lighting(rng: Generator, strength: float) -> NDArray[np.float64]:
    """(3,) shift of all R, G, B values in 0..1 (Krizhevsky et al., 2012, section 4.1).

    Along each principal colour of ImageNet by its deviation times a normal number of deviation
    ``strength``.
    """
    shift: NDArray[np.float64] = _COLOR_AXES @ (_COLOR_SPREAD * rng.normal(0, strength, 3))
    return shift


def normalise_then_resize_into(
    out: Tensor,
    image: Image.Image,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    channels: str = "rgb",
) -> None:
    """Normalise an RGB image, then resize it into the top left of ``out`` (3, H, W).

    Bilinear with half-pixel centres and without antialias; the operations and their order are those
    of torchvision's detectors, so that the pixels are the same to the last bit.

    Args:
        out: Where to write.
        image: Not yet resized.
        size: (height, width) to write.
        mean: Subtracted from R, G and B in 0..1.
        std: Divides them.
        channels: Order of the planes of ``out``: ``rgb`` or ``bgr``.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    pixels.sub_(torch.tensor(mean).reshape(3, 1, 1)).div_(torch.tensor(std).reshape(3, 1, 1))
    pixels = _ordered(pixels, channels)
    out[:, : size[0], : size[1]] = F.interpolate(pixels[None], size, mode="bilinear")[0]


def normalise_into(
    out: Tensor,
    image: Image.Image,
    mean: Sequence[float],
    std: Sequence[float],
    channels: str = "rgb",
) -> None:
    """Write (value / 255 - mean) / std of an RGB image into the top left of ``out`` (3, H, W).

    ``mean`` and ``std`` are of R, G and B, whatever the order ``channels`` of the planes of
    ``out``.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, h, w) uint8
    offset = torch.tensor(mean).mul(255).reshape(3, 1, 1)
    factor = torch.tensor(std).mul(255).reciprocal().reshape(3, 1, 1)
    pixels, offset, factor = (_ordered(planes, channels) for planes in (pixels, offset, factor))
    view = out[:, : pixels.shape[1], : pixels.shape[2]]
    view.copy_(pixels).sub_(offset).mul_(factor)


def _ordered(planes: Tensor, channels: str) -> Tensor:
    """Planes (3, ...) of R, G and B in the order of ``channels``."""
    return planes.flip(0) if channels == "bgr" else planes
