"""The built-in set: shapes of eight classes over textured backgrounds, made from a seed.

The outline makes the class; the hue only narrows it down to two. Sizes run from 8 to 200
pixels, and later shapes cover earlier ones. Raw PCG64 output, integers and uncompressed PNG keep
every byte the same on every machine.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import PCG64, SeedSequence
from numpy.typing import NDArray

from detkit.config import suggest
from detkit.data.masks import encode_counts
from detkit.errors import ConfigError
from detkit.types import CategoryMap

CLASSES = ("disc", "ring", "square", "triangle", "diamond", "cross", "star", "moon")
"""Class names, labels 1 to 8."""

IMAGES = {"train": 400, "val": 100}
"""Images of the set kept in memory, per split."""
CROPS = {"train": 4000, "val": 800}
"""Images of the classification set, per split."""
SIZE = 256
"""Side of an image of the detection set."""
CROP_SIZE = 64
"""Side of an image of the classification set."""

_SPLITS = {"train": 0, "val": 1}
_SMALLEST = 8
# Longer side (from, below) and the summed percentage of objects: few so small that it is guesswork.
_SIZES = ((_SMALLEST, 20, 6), (20, 48, 34), (48, 100, 82), (100, 201, 100))
_MAX_OBJECTS = 6
# No object hides more than this share (percent) of another's pixels: each place that would is
# given up for another one, and after so many tries the new object is left out.
_HIDDEN = 40
_PLACE_TRIES = 8
# Colours drawn until one stands out from what the object covers.
_COLOUR_TRIES = 20

Pixels = NDArray[np.uint8]
Ints = NDArray[np.int16] | NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Scene:
    """Image (H, W, 3) uint8; labels 1..8, xywh boxes and (H, W) masks of what is in sight."""

    image: Pixels
    labels: list[int]
    boxes: list[tuple[int, int, int, int]]
    masks: list[NDArray[np.bool_]]


class _Dice:
    """Whole numbers from PCG64's raw output, which numpy keeps stable from version to version."""

    def __init__(self, *key: int) -> None:
        self._bits = PCG64(SeedSequence(key))

    def below(self, n: int) -> int:
        return int(self._bits.random_raw()) % n

    def between(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high - 1``."""
        return low + self.below(high - low)

    def bytes(self, *shape: int) -> Pixels:
        count = math.prod(shape)
        raw = self._bits.random_raw(-(-count // 8)).astype("<u8")
        return raw.view(np.uint8)[:count].reshape(shape)


def scene(
    split: str,
    index: int,
    *,
    size: int = SIZE,
    sides: tuple[int, int] | None = None,
    seed: int = 0,
) -> Scene:
    """Image ``index`` of a split of the detection set; see :func:`write`."""
    dice = _Dice(seed, 1, _SPLITS[split], index)
    image = _background(dice, size, size)
    labels: list[int] = []
    outlines: list[NDArray[np.bool_]] = []
    visible: list[NDArray[np.bool_]] = []
    objects = dice.between(1, _MAX_OBJECTS + 1)
    drawn = [] if sides is None else _log_uniform_sides(dice, objects, *sides)
    for number in range(objects):
        label = dice.between(1, len(CLASSES) + 1)
        longer = drawn[number] if drawn else min(_longer_side(dice), size * 4 // 5)
        shape = _outline(dice, label - 1, longer)
        outline = _placed(dice, shape, size, outlines, visible)
        if outline is None:
            continue
        _paint(dice, image, outline, label - 1)
        visible = [v & ~outline for v in visible] + [outline]
        outlines.append(outline)
        labels.append(label)
    return Scene(image.astype(np.uint8), labels, [_bounds(v) for v in visible], visible)


def crop(split: str, index: int, *, seed: int = 0) -> tuple[Pixels, int]:
    """Image ``index`` (64, 64, 3) of a split of the classification set, and its label 0..7."""
    dice = _Dice(seed, 2, _SPLITS[split], index)
    image = _background(dice, CROP_SIZE, CROP_SIZE)
    label = index % len(CLASSES)
    longer = dice.between(CROP_SIZE * 5 // 10, CROP_SIZE * 15 // 16)
    mask = _outline(dice, label, longer)
    outline = _at_random_place(dice, mask, CROP_SIZE)
    _paint(dice, image, outline, label)
    return image.astype(np.uint8), label


def _placed(
    dice: _Dice,
    shape: NDArray[np.bool_],
    size: int,
    outlines: list[NDArray[np.bool_]],
    visible: list[NDArray[np.bool_]],
) -> NDArray[np.bool_] | None:
    """(size, size) outline of a shape at a place where it hides little of the earlier objects."""
    for _ in range(_PLACE_TRIES):
        outline = _at_random_place(dice, shape, size)
        pairs = zip(outlines, visible, strict=True)
        if all(100 * (v & ~outline).sum() >= (100 - _HIDDEN) * o.sum() for o, v in pairs):
            return outline
    return None


def _longer_side(dice: _Dice) -> int:
    share = dice.below(100)
    low, high = next((low, high) for low, high, below in _SIZES if share < below)
    return dice.between(low, high)


def _log_uniform_sides(dice: _Dice, count: int, low: int, high: int) -> list[int]:
    """Longer sides from ``low`` to ``high``, each octave as often as the next, largest first.

    Small objects drawn later hide little of large ones, so none has to be left out. Decimal powers
    are rounded alike everywhere, those of floats are not.
    """
    ratio = Decimal(high + 1) / low
    shares = (Decimal(dice.below(1 << 16)) / (1 << 16) for _ in range(count))
    return sorted((int(low * ratio**share) for share in shares), reverse=True)


def _at_random_place(dice: _Dice, shape: NDArray[np.bool_], size: int) -> NDArray[np.bool_]:
    h, w = shape.shape
    top, left = dice.below(size - h + 1), dice.below(size - w + 1)
    outline = np.zeros((size, size), dtype=np.bool_)
    outline[top : top + h, left : left + w] = shape
    return outline


def _outline(dice: _Dice, shape: int, longer: int) -> NDArray[np.bool_]:
    """(h, w) pixels of a shape stretched by up to 4:3 either way, mirrored at random."""
    shorter = max(6, longer * dice.between(75, 101) // 100)
    h, w = (longer, shorter) if dice.below(2) else (shorter, longer)
    # Pixel centres in units where the shape reaches from -s to s on both axes, all whole numbers.
    s = h * w
    u = (2 * np.arange(w, dtype=np.int64) + 1 - w)[None, :] * h
    v = (2 * np.arange(h, dtype=np.int64) + 1 - h)[:, None] * w
    inside: NDArray[np.bool_] = _inside(CLASSES[shape], u, v, s)
    return inside[:, ::-1] if dice.below(2) else inside


def _inside(name: str, u: Ints, v: Ints, s: int) -> Any:
    a, b = np.abs(u), np.abs(v)
    match name:
        case "disc":
            return u * u + v * v <= s * s
        case "ring":
            return (u * u + v * v <= s * s) & (4 * (u * u + v * v) >= s * s)
        case "square":
            return (a <= s) & (b <= s)
        case "triangle":
            return 2 * a <= v + s
        case "diamond":
            return a + b <= s
        case "cross":
            return (3 * a <= s) & (b <= s) | (3 * b <= s) & (a <= s)
        case "star":  # four points: sqrt(a) + sqrt(b) <= sqrt(1.2 s), squared twice
            rest = 6 * s // 5 - a - b
            return (rest >= 0) & (4 * a * b <= rest * rest) & (a <= s) & (b <= s)
        case _:  # moon: a disc without a disc of the same size, moved sideways
            shifted = u - 4 * s // 5
            return (u * u + v * v <= s * s) & (shifted * shifted + v * v > s * s)


def _bounds(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def _background(dice: _Dice, height: int, width: int) -> Ints:
    """(H, W, 3) values 0..255: two greyish colours mixed by a pattern, with grain."""
    base = dice.between(64, 192) + dice.bytes(3).astype(np.int16) // 5 - 25
    other = base + dice.between(-32, 33) + dice.bytes(3).astype(np.int16) // 10 - 12
    return _textured(dice, base, other, height, width, grain=12)


def _paint(dice: _Dice, image: Ints, outline: NDArray[np.bool_], shape: int) -> None:
    """Fill ``outline`` with a texture in a colour of the class that stands out from below it."""
    x, y, w, h = _bounds(outline)
    region = image[y : y + h, x : x + w]
    inside = outline[y : y + h, x : x + w]
    under = (region[inside].sum(axis=0, dtype=np.int64) // int(inside.sum())).astype(np.int16)
    for _ in range(_COLOUR_TRIES):
        base = _colour(dice, shape)
        if int(np.abs(base - under).sum()) >= 150:
            break
    other = base + dice.bytes(3).astype(np.int16) // 5 - 25
    region[inside] = _textured(dice, base, other, h, w, grain=8)[inside]


def _colour(dice: _Dice, shape: int) -> Ints:
    """RGB of a hue near the class's own, of any brightness and not too pale.

    The circle of hues has 1536 steps. A hue lies up to 192 steps from its class's, and classes are
    192 apart, so that each hue belongs to two classes and the outline has to decide.
    """
    hue = (192 * shape + dice.between(-192, 193)) % 1536
    rise, place = hue % 256, hue // 256
    full = [(255, rise, 0), (255 - rise, 255, 0), (0, 255, rise), (0, 255 - rise, 255)]
    full += [(rise, 0, 255), (255, 0, 255 - rise)]
    pale, bright = dice.below(128), dice.between(128, 256)
    saturated = np.array(full[place], dtype=np.int32)
    return ((saturated * (255 - pale) // 255 + pale) * bright // 255).astype(np.int16)


def _textured(dice: _Dice, base: Ints, other: Ints, height: int, width: int, grain: int) -> Ints:
    """(H, W, 3) values 0..255: a pattern of colours between ``base`` and ``other``, with grain."""
    steps = np.arange(256, dtype=np.int32)[:, None]
    colours = ((base * (255 - steps) + other * steps) // 255).astype(np.int16)  # (256, 3)
    grains = (np.arange(256) * (2 * grain + 1) // 256 - grain).astype(np.int16)
    noise = grains[dice.bytes(height, width)][:, :, None]
    values: Ints = np.clip(colours[_pattern(dice, height, width)] + noise, 0, 255)
    return values


def _pattern(dice: _Dice, height: int, width: int) -> Pixels:
    """(H, W) mix 0..255: plain, a ramp, stripes, checks or soft blotches."""
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    kind, period = dice.below(5), dice.between(3, 13)
    across, down = dice.between(-2, 3), dice.between(-2, 3)
    if kind == 0:
        return np.zeros((height, width), dtype=np.uint8)
    if kind == 1:
        return (x * 128 // width + y * 127 // height).astype(np.uint8)
    if kind == 2:
        return (((x * across + y * (down or 1)) // period & 1) * 255).astype(np.uint8)
    if kind == 3:
        return (((x // period ^ y // period) & 1) * 255).astype(np.uint8)
    return _blotches(dice, height, width)


def _blotches(dice: _Dice, height: int, width: int, cells: int = 5) -> Pixels:
    """Random values at the corners of a grid, linear in between, in 1/64 steps."""
    grid = dice.bytes(cells + 1, cells + 1).astype(np.int32)
    fy, fx = np.arange(height) * cells * 64 // height, np.arange(width) * cells * 64 // width
    (iy, ry), (ix, rx) = np.divmod(fy, 64), np.divmod(fx, 64)
    columns = grid[:, ix] * (64 - rx) + grid[:, ix + 1] * rx  # (cells + 1, W)
    mixed: Ints = columns[iy] * (64 - ry)[:, None] + columns[iy + 1] * ry[:, None]
    return (mixed // 4096).astype(np.uint8)


def content(
    split: str,
    count: int,
    *,
    size: int = SIZE,
    sides: tuple[int, int] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], Iterator[Scene]]:
    """A COCO json with the categories only, and the scenes for :func:`add_to` to fill it with."""
    if split not in _SPLITS:
        raise ConfigError(
            f"synthetic: split must be one of {', '.join(_SPLITS)}, got {split!r}"
            f"{suggest(split, _SPLITS)}"
        )
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASSES, 1)]
    empty: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    return empty, (scene(split, i, size=size, sides=sides, seed=seed) for i in range(count))


def add_to(coco: dict[str, Any], drawn: Scene) -> str:
    """Append one scene to a COCO json; returns its file name."""
    height, width = drawn.image.shape[:2]
    number = len(coco["images"]) + 1
    file = f"{number:06d}.png"
    coco["images"].append({"id": number, "file_name": file, "height": height, "width": width})
    for label, box, mask in zip(drawn.labels, drawn.boxes, drawn.masks, strict=True):
        coco["annotations"].append(
            {
                "id": len(coco["annotations"]) + 1,
                "image_id": number,
                "category_id": label,
                "bbox": list(box),
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [height, width], "counts": encode_counts(mask)},
            }
        )
    return file


def categories() -> CategoryMap:
    """The eight classes with ids 1 to 8."""
    return CategoryMap(CLASSES)


def write(
    folder: str | Path,
    *,
    images_train: int = 400,
    images_val: int = 100,
    size: int = SIZE,
    sides: tuple[int, int] | None = None,
    seed: int = 0,
) -> None:
    """Write the detection set as COCO json with masks (RLE) and PNG files, always the same bytes.

    Args:
        folder: New or empty; gets ``annotations/instances_<split>.json``, ``images/<split>/``.
        images_train: Images of the train split.
        images_val: Images of the val split.
        size: Side of the square images in pixels, 64 or more.
        sides: Smallest and largest longer side of an object in pixels, drawn log-uniformly: a set
            as rich in tiny objects as in those that fill the image. None for the usual mix.
        seed: Another seed gives another set.

    Raises:
        ConfigError: the size is too small, the sides do not fit it, a count or the seed negative,
            or the folder not empty.
    """
    folder = Path(folder)
    if size < 64:
        raise ConfigError(f"synthetic: size must be at least 64 pixels, got {size}")
    if sides is not None and not _SMALLEST <= sides[0] < sides[1] <= size:
        raise ConfigError(
            f"synthetic: sides must be two rising numbers in {_SMALLEST}..{size}, got "
            f"{sides[0]} and {sides[1]}"
        )
    if min(images_train, images_val, seed) < 0:
        got = f"{images_train}, {images_val} and {seed}"
        raise ConfigError(f"synthetic: image counts and seed must be zero or more, got {got}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: must be a new or empty folder, got one with files in it")
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", images_train), ("val", images_val)):
        images = folder / "images" / split
        images.mkdir(parents=True)
        coco, scenes = content(split, count, size=size, sides=sides, seed=seed)
        for drawn in scenes:
            (images / add_to(coco, drawn)).write_bytes(png(drawn.image))
        text = json.dumps(coco, separators=(",", ":"))
        (folder / "annotations" / f"instances_{split}.json").write_text(text, encoding="utf-8")


def png(image: Pixels) -> bytes:
    """A PNG of an (H, W, 3) uint8 image, not compressed: compressors differ between machines."""
    height, width = image.shape[:2]
    rows = np.zeros(
        (height, 1 + 3 * width), dtype=np.uint8
    )  # each row starts with its filter, 0 for none
    rows[:, 1:] = image.reshape(height, 3 * width)
    data = rows.tobytes()
    stream = b"\x78\x01"
    for start in range(0, len(data), 65535):
        block = data[start : start + 65535]
        last = start + 65535 >= len(data)
        stream += struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF) + block
    stream += struct.pack(">I", zlib.adler32(data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", stream), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
