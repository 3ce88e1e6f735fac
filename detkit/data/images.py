"""Image files: the size first, then the pixels as 8-bit RGB, and only from inside their folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from detkit.data.problems import ImageFileError

Floats = NDArray[np.float64]

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
)
"""File name endings (lower case) that count as images where a folder is listed."""

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where the point (x, y) of stored pixels (height h, width w) is shown.
_POINTS: dict[int, Callable[[Floats, Floats, int, int], tuple[Floats, Floats]]] = {
    2: lambda x, y, h, w: (w - x, y),
    3: lambda x, y, h, w: (w - x, h - y),
    4: lambda x, y, h, w: (x, h - y),
    5: lambda x, y, h, w: (y, x),
    6: lambda x, y, h, w: (h - y, x),
    7: lambda x, y, h, w: (h - y, w - x),
    8: lambda x, y, h, w: (y, w - x),
}
# What the decoders of Pillow raise on damaged input, as seen by feeding them damaged files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
)


@dataclass(frozen=True)
class Header:
    """Size of an image file before decoding it.

    Attributes:
        stored: (height, width) of the stored pixels.
        shown: (height, width) once the EXIF orientation is applied.
        orientation: EXIF orientation, 1 (upright) to 8.
    """

    stored: tuple[int, int]
    shown: tuple[int, int]
    orientation: int


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image when a folder is listed."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not os.path.basename(name).startswith(
        "."
    )


def confine(root: Path, name: str) -> Path:
    """Path of file ``name`` in ``root`` (resolved); raises ImageFileError where it leads out."""
    try:
        name.encode()
    except UnicodeError as error:
        raise ImageFileError("image-path", ascii(name), "a name that is no text") from error
    windows = PureWindowsPath(name)
    if (
        os.path.isabs(name)
        or windows.drive
        or windows.root
        or ".." in windows.parts
        or "\0" in name
    ):
        raise ImageFileError("image-path", name, "an absolute path or one with '..'")
    try:
        path = Path(os.path.realpath(root / name))
        path.is_file()
    except OSError as error:  # among others, a name longer than the file system allows
        raise ImageFileError("image-path", f"{name:.60}", str(error.strerror)) from error
    if not path.is_relative_to(root):
        raise ImageFileError("image-path", name, "a link that leads out of the folder")
    return path


def read_header(path: Path, max_pixels: int) -> Header:
    """Size and orientation of an image file; raises ImageFileError where it cannot be used."""
    with _opened(path, max_pixels) as image:
        return _header(image)


def check_complete(path: Path, max_pixels: int) -> None:
    """Raise ImageFileError where the file breaks off.

    A JPEG or PNG that ends as its format does counts as complete; any other file is decoded.
    """
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(0, os.SEEK_END)
        file.seek(-min(64, file.tell()), os.SEEK_END)
        end = file.read()
    if start.startswith(b"\xff\xd8") and b"\xff\xd9" in end:
        return
    if start == b"\x89PNG\r\n\x1a\n" and b"IEND" in end:
        return
    load_image(path, max_pixels)


def load_image(
    path: Path,
    max_pixels: int,
    *,
    as_stored: bool = False,
    at_least: tuple[int, int] | None = None,
) -> Image.Image:
    """Decode a file to 8-bit RGB, turned as EXIF says.

    Args:
        path: The file.
        max_pixels: More pixels than this raise ImageFileError before anything is decoded.
        as_stored: Leave the EXIF orientation out.
        at_least: (height, width) that is enough, as shown: a JPEG may then be decoded at 1/2, 1/4
            or 1/8 of its size, never below this.

    Raises:
        ImageFileError: the file is missing, no image, damaged, or too large.
    """
    with _opened(path, max_pixels) as image:
        turn = None if as_stored else _TURNS.get(_orientation(image))
        if at_least is not None and image.format == "JPEG":
            height, width = at_least
            image.draft(None, (height, width) if turn in _SWAPPING else (width, height))
        try:
            image.load()
            rgb = to_rgb(image)
        except _DECODE_ERRORS as error:
            rule = "image-truncated" if "truncated" in str(error).lower() else "image-unreadable"
            raise ImageFileError(rule, str(path), str(error) or type(error).__name__) from error
    return rgb if turn is None else rgb.transpose(turn)


def turn_points(points: Floats, orientation: int, stored: tuple[int, int]) -> Floats:
    """(P, 2) points x, y of an image of ``stored`` (height, width) where EXIF has them shown."""
    move = _POINTS.get(orientation)
    if move is None:
        return points
    return np.stack(move(points[:, 0], points[:, 1], *stored), axis=1)


def turn_mask(mask: NDArray[np.bool_], orientation: int) -> NDArray[np.bool_]:
    """(H, W) mask of the stored pixels as EXIF has it shown."""
    turn = _TURNS.get(orientation)
    if turn is None:
        return mask
    image = Image.fromarray(mask.astype(np.uint8)).transpose(turn)
    return np.asarray(image).astype(np.bool_)


_SWAPPING = {_TURNS[k] for k in (5, 6, 7, 8)}


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode.

    Transparent pixels are laid over white, as most viewers show them. 16-bit grey is divided by 257
    (the full range 0..65535 becomes 0..255), 32-bit integers likewise with clipping; floats are
    taken as 0..255.
    """
    mode = image.mode
    if mode.startswith("I"):  # I, I;16, I;16L, I;16B, I;16N
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(wide // 257, 0, 255).astype(np.uint8)).convert("RGB")
    if mode == "F":
        floats = np.nan_to_num(np.asarray(image, dtype=np.float32), nan=0.0)
        return Image.fromarray(np.clip(floats, 0, 255).astype(np.uint8)).convert("RGB")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("LA").convert("RGBA") if mode == "La" else image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if mode == "RGB":
        return image
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        if converted is None:
            raise ValueError("LAB could not be converted")
        return converted
    return image.convert("RGB")


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    # Pillow has a pixel limit of its own, which warns and raises at fixed sizes; ours replaces it.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image = Image.open(path)
    except FileNotFoundError as error:
        raise ImageFileError("image-missing", str(path), "no such file") from error
    except _DECODE_ERRORS as error:
        what = "an empty file" if path.is_file() and path.stat().st_size == 0 else _reason(error)
        raise ImageFileError("image-unreadable", str(path), what) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    with image:
        width, height = image.size
        if width * height > max_pixels:
            what = f"{width}x{height} = {width * height} pixels with a limit of {max_pixels}"
            raise ImageFileError("image-too-large", str(path), what)
        yield image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def _header(image: Image.Image) -> Header:
    width, height = image.size
    orientation = _orientation(image)
    shown = (width, height) if orientation >= 5 else (height, width)
    return Header((height, width), shown, orientation)


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns these itself and gives the size as shown
        return 1
    # Asked for the EXIF data of a PNG that has none in front, Pillow decodes it to look behind.
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODE_ERRORS:  # damaged EXIF data says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1
