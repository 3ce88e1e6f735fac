"""One way to read images: any mode, EXIF, limits."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_sets import picture, save
from PIL import Image, ImageOps

from detkit.data.images import load_image, read_header, to_rgb
from detkit.data.problems import ImageFileError

LIMIT = 10**8


def values(image: Image.Image) -> list[list[int]]:
    return [list(p) for p in np.asarray(image).reshape(-1, 3).tolist()]


MODES: dict[str, tuple[Image.Image, list[list[int]]]] = {
    "1": (Image.fromarray(np.array([[True, False]])), [[255] * 3, [0] * 3]),
    "L": (Image.fromarray(np.array([[7, 200]], np.uint8)), [[7] * 3, [200] * 3]),
    "I;16": (
        Image.fromarray(np.array([[0, 65535, 257]], np.uint16)),
        [[0] * 3, [255] * 3, [1] * 3],
    ),
    "I": (Image.fromarray(np.array([[-5, 99999, 514]], np.int32)), [[0] * 3, [255] * 3, [2] * 3]),
    "F": (
        Image.fromarray(np.array([[-3.0, 300.0, np.nan, 8.0]], np.float32)),
        [[0] * 3, [255] * 3, [0] * 3, [8] * 3],
    ),
    # transparent black over white, opaque red, half-transparent black
    "RGBA": (
        Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51]]], np.uint8)),
        [[255] * 3, [255, 0, 0], [204] * 3],
    ),
    "LA": (Image.fromarray(np.array([[[9, 0], [9, 255]]], np.uint8)), [[255] * 3, [9] * 3]),
    "CMYK": (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [[255, 0, 0]]),
    "RGB": (Image.new("RGB", (1, 1), (1, 2, 3)), [[1, 2, 3]]),
}


@pytest.mark.parametrize("mode", MODES)
def test_mode_to_rgb(mode: str) -> None:
    image, expected = MODES[mode]
    assert image.mode == mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert values(to_rgb(image)) == expected


@pytest.mark.parametrize("mode", ["La", "PA", "RGBa", "RGBX", "YCbCr", "HSV", "LAB", "P"])
def test_rare_modes_come_out_as_rgb(mode: str) -> None:
    sources = {"La": "LA", "RGBa": "RGBA", "LAB": "LAB"}
    image = (
        Image.new("LAB", (3, 2), (255, 128, 128))
        if mode == "LAB"
        else Image.new(sources.get(mode, "RGB"), (3, 2), "white").convert(mode)
        if mode != "PA"
        else Image.new("P", (3, 2), 255).convert("PA")
    )
    assert image.mode == mode
    result = to_rgb(image)
    assert (result.mode, result.size) == ("RGB", (3, 2))
    if mode != "PA":
        assert min(min(v) for v in values(result)) >= 250  # white stays white


def test_palette_with_transparency_through_a_file(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "p.png", transparency=bytes([255, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert values(load_image(tmp_path / "p.png", LIMIT)) == [[255, 0, 0], [255] * 3]


def test_transparent_colour_of_an_rgb_file(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "t.png", transparency=(1, 2, 3))
    assert values(load_image(tmp_path / "t.png", LIMIT)) == [[255] * 3]


def test_sixteen_bit_png(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535, 25700]], np.uint16)).save(tmp_path / "w.png")
    assert values(load_image(tmp_path / "w.png", LIMIT)) == [[0] * 3, [255] * 3, [100] * 3]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{suffix}", 40, 60, exif=exif)
    header = read_header(path, LIMIT)
    assert header.stored == (40, 60)
    assert header.shown == ((60, 40) if orientation >= 5 else (40, 60))
    with Image.open(path) as opened:
        shown = ImageOps.exif_transpose(opened).convert("RGB")
        stored = opened.convert("RGB")
    assert np.array_equal(load_image(path, LIMIT), shown)
    assert np.array_equal(load_image(path, LIMIT, as_stored=True), stored)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_orientation_is_applied_once(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.tif", 40, 60, exif=exif)
    turned = save(tmp_path / "a.png", 40, 60, exif=exif)
    assert read_header(path, LIMIT).shown == read_header(turned, LIMIT).shown
    assert np.array_equal(load_image(path, LIMIT), load_image(turned, LIMIT))


def test_jpeg_is_decoded_smaller_where_that_is_enough(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", 320, 480, quality=95)
    assert load_image(path, LIMIT, at_least=(320, 480)).size == (480, 320)
    assert load_image(path, LIMIT, at_least=(161, 200)).size == (480, 320)
    small = load_image(path, LIMIT, at_least=(160, 240))
    assert small.size == (240, 160)
    full = load_image(path, LIMIT).resize((240, 160), Image.Resampling.BOX)
    assert np.abs(np.asarray(small, float) - np.asarray(full, float)).mean() < 2


def test_smaller_decoding_of_a_turned_jpeg_counts_in_shown_sides(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.jpg", 320, 640, exif=exif)  # shown 640 high, 320 wide
    assert load_image(path, LIMIT, at_least=(640, 300)).size == (320, 640)
    assert load_image(path, LIMIT, at_least=(320, 160)).size == (160, 320)


def test_the_pixel_limit_is_ours_not_pillows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.png", 40, 60)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path, 2400).size == (60, 40)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(ImageFileError, match="limit of 2399"):
        read_header(path, 2399)


def test_a_bomb_is_refused_before_decoding(tmp_path: Path) -> None:
    """A PNG of 60000 x 60000 pixels in a few bytes: reading the header is enough to refuse it."""
    path = tmp_path / "bomb.png"
    small = tmp_path / "small.png"
    picture(1, 1).save(small)
    content = bytearray(small.read_bytes())
    start = content.index(b"IHDR")
    content[start + 4 : start + 12] = (60000).to_bytes(4, "big") * 2
    content[start + 17 : start + 21] = zlib.crc32(content[start : start + 17]).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(ImageFileError, match="60000x60000"):
        load_image(path, 178_956_970)


def test_messages_name_the_file_and_what_must_hold(tmp_path: Path) -> None:
    with pytest.raises(ImageFileError, match=r"gone\.jpg: the image file exists, got no such file"):
        load_image(tmp_path / "gone.jpg", LIMIT)
