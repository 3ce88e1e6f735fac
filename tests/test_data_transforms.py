"""Boxes, polygons and masks move with the pixels, whatever the view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import picture, save
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from detkit.data import transforms
from detkit.data.images import load_image
from detkit.data.masks import encode_counts
from detkit.data.transforms import Geometry

sides = st.integers(30, 120)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def views(draw: Any) -> tuple[Geometry, NDArray[np.float64]]:
    """A random training view of an image with one box of whole pixels, 8 pixels or more a side."""
    height, width = draw(sides), draw(sides)
    x0, y0 = draw(st.integers(0, width - 8)), draw(st.integers(0, height - 8))
    x1, y1 = draw(st.integers(x0 + 8, width)), draw(st.integers(y0 + 8, height))
    box = np.array([[x0, y0, x1, y1]], dtype=np.float64)
    geometry = transforms.random_detection(
        np.random.default_rng(draw(seeds)),
        (height, width),
        box,
        short_side=draw(st.integers(24, 160)),
        long_side=200,
        flip=0.5,
        min_crop=draw(st.sampled_from([0.3, 0.7, 1.0])),
    )
    return geometry, box


def filled(geometry: Geometry, box: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The box as a mask of the whole image."""
    x0, y0, x1, y1 = box[0].astype(int)
    mask = np.zeros(geometry.source, dtype=np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def bounds(mask: NDArray[np.bool_]) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@settings(max_examples=150, deadline=None)
@given(views())
def test_boxes_follow_pixels(view: tuple[Geometry, NDArray[np.float64]]) -> None:
    geometry, box = view
    white = Image.fromarray(filled(geometry, box).astype(np.uint8) * 255)
    pixels = np.asarray(geometry.image(white))
    assert pixels.shape == geometry.size
    [expected] = geometry.clipped(box)
    assert (expected[2:] >= expected[:2]).all()
    if (expected[2:] - expected[:2]).min() >= 3:
        assert np.abs(np.array(bounds(pixels >= 128)) - expected).max() <= 1


@settings(max_examples=80, deadline=None)
@given(views(), st.booleans())
def test_masks_follow_pixels(view: tuple[Geometry, NDArray[np.float64]], polygon: bool) -> None:
    geometry, box = view
    x0, y0, x1, y1 = box[0].tolist()
    whole = filled(geometry, box)
    rle = {"size": list(geometry.source), "counts": encode_counts(whole)}
    mask = geometry.mask([[x0, y0, x1, y0, x1, y1, x0, y1]] if polygon else rle)
    assert mask.shape == geometry.size
    pixels = np.asarray(geometry.image(Image.fromarray(whole.astype(np.uint8) * 255))) >= 128
    [expected] = geometry.clipped(box)
    if (expected[2:] - expected[:2]).min() >= 3:
        border = 2 * (expected[2:] - expected[:2]).sum()
        assert (mask ^ pixels).sum() <= border  # polygons round at their border, at most a pixel


@settings(max_examples=100, deadline=None)
@given(views())
def test_flipping_mirrors(view: tuple[Geometry, NDArray[np.float64]]) -> None:
    geometry, box = view
    plain = Geometry(geometry.source, geometry.crop, geometry.size)
    mirrored = Geometry(geometry.source, geometry.crop, geometry.size, flip=True)
    width = geometry.size[1]
    x0, y0, x1, y1 = plain.boxes(box)[0]
    np.testing.assert_allclose(mirrored.boxes(box)[0], [width - x1, y0, width - x0, y1])
    image = picture(*geometry.source)
    assert np.array_equal(
        np.asarray(plain.image(image))[:, ::-1], np.asarray(mirrored.image(image))
    )


@given(sides, sides, st.integers(8, 300), st.integers(0, 300))
def test_resized_keeps_shape_and_limits(height: int, width: int, short: int, more: int) -> None:
    long = short + more
    h, w = transforms.resized((height, width), short, long)
    assert min(h, w) <= short and max(h, w) <= long
    assert min(h, w) == short or max(h, w) == long
    factor = min(short / min(height, width), long / max(height, width))
    assert abs(h - height * factor) <= 0.5 and abs(w - width * factor) <= 0.5


@settings(max_examples=100, deadline=None)
@given(views())
def test_a_cut_keeps_an_object(view: tuple[Geometry, NDArray[np.float64]]) -> None:
    geometry, box = view
    x0, y0, x1, y1 = geometry.crop
    centre = (box[0, :2] + box[0, 2:]) / 2
    assert x0 <= centre[0] < x1 and y0 <= centre[1] < y1
    assert 0 <= x0 < x1 <= geometry.source[1] and 0 <= y0 < y1 <= geometry.source[0]


@given(sides, sides, seeds, st.sampled_from([0.08, 0.5, 1.0]))
def test_classifier_view(height: int, width: int, seed: int, least: float) -> None:
    rng = np.random.default_rng(seed)
    view = transforms.random_classification(rng, (height, width), side=32, flip=0.5, min_area=least)
    x0, y0, x1, y1 = view.crop
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    assert view.size == (32, 32)
    share = (x1 - x0) * (y1 - y0) / (height * width)
    square = (x1 - x0) == (y1 - y0) == min(height, width)
    assert square or share >= least * 0.9 - 0.02  # whole pixels


def test_central_view() -> None:
    view = transforms.central((100, 200), side=56, share=0.875)
    assert view.crop == (56.25, 6.25, 143.75, 93.75)
    assert view.size == (56, 56)


def test_the_whole_view_leaves_pixels_alone() -> None:
    image = picture(40, 60)
    geometry = transforms.whole((40, 60), 40, 60)
    assert np.array_equal(geometry.image(image), image)


def test_half_pixel_centres() -> None:
    """Doubling a ramp: output pixel k looks at (k + 0.5) / 2 - 0.5."""
    ramp = np.tile(np.arange(20, dtype=np.uint8) * 10, (20, 1))
    doubled = np.asarray(transforms.whole((20, 20), 40, 40).image(Image.fromarray(ramp)))
    expected = 10 * ((np.arange(40) + 0.5) / 2 - 0.5)
    assert np.abs(doubled[20, 2:-2] - expected[2:-2]).max() <= 1


@pytest.mark.parametrize("size", [(31, 77), (90, 130)])
def test_resizing_is_torchs_antialiased_bilinear(size: tuple[int, int]) -> None:
    image = picture(60, 100)
    geometry = Geometry((60, 100), (0, 0, 100, 60), size)
    ours = torch.from_numpy(np.array(geometry.image(image))).permute(2, 0, 1).float()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    theirs = torch.nn.functional.interpolate(
        pixels, size=size, mode="bilinear", align_corners=False, antialias=True
    )[0]
    assert (ours - theirs).abs().max() <= 1.01  # Pillow rounds to whole values, twice


def test_a_smaller_decoded_jpeg_gives_the_same_view(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", 401, 603, quality=95)  # odd sides: 1/2 is rounded up
    geometry = Geometry((401, 603), (57.0, 20.0, 457.0, 320.0), (66, 88), flip=True)
    small = load_image(path, 10**7, at_least=geometry.needed)
    assert small.size == (151, 101)
    full = load_image(path, 10**7)
    ours, theirs = (np.asarray(geometry.image(i), dtype=float) for i in (small, full))
    assert np.abs(ours - theirs).mean() < 1
    assert np.abs(ours - theirs).max() < 12


def test_cut_objects_are_dropped_ignored_or_kept() -> None:
    geometry = Geometry((100, 100), (50, 0, 100, 100), (100, 50))
    boxes = np.array(
        [[0, 0, 40, 40], [0, 0, 60, 40], [0, 0, 80, 40], [60, 0, 80, 40]], dtype=np.float64
    )
    left, enough = transforms.still_visible(geometry, boxes)
    assert left.tolist() == [False, True, True, True]
    assert enough.tolist() == [False, False, True, True]  # 0, 1/6, 3/8 and all of it


def test_jitter_is_random_and_bounded() -> None:
    image = picture(40, 40)
    rng = np.random.default_rng(0)
    results = [np.asarray(transforms.jitter(rng, image, 0.4), float) for _ in range(5)]
    assert all(r.shape == (40, 40, 3) for r in results)
    assert np.abs(results[0] - results[1]).mean() > 1
    still = transforms.jitter(np.random.default_rng(0), image, 0.0)
    assert np.abs(np.asarray(still, float) - np.asarray(image, float)).max() <= 1


def test_lighting_spreads_as_published() -> None:
    rng = np.random.default_rng(0)
    shifts = np.stack([transforms.lighting(rng, 0.1) for _ in range(20_000)])
    # Grey (brighter or darker) varies most, by 0.1 * 0.2175 along an axis of length one.
    values, axes = np.linalg.eigh(np.cov(shifts.T))
    np.testing.assert_allclose(np.sqrt(values), [0.00045, 0.00188, 0.02175], rtol=0.03)
    assert abs(axes[:, 2] @ [0.5675, 0.5808, 0.5836]) == pytest.approx(1, abs=1e-3)
    assert np.abs(shifts.mean(0)).max() < 3 * 0.02175 / np.sqrt(20_000)
    assert not transforms.lighting(rng, 0.0).any()


def test_normalising() -> None:
    image = picture(4, 6)
    out = torch.zeros(3, 8, 8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    transforms.normalise_into(out, image, mean, std)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
    expected = (pixels - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)
    torch.testing.assert_close(out[:, :4, :6], expected.float(), atol=1e-5, rtol=1e-5)
    assert not out[:, 4:].any() and not out[:, :, 6:].any()


def test_blue_comes_first_where_it_shall() -> None:
    """Mean and deviation stay those of R, G and B; deviations of 1/255 leave 0..255 untouched."""
    image = picture(4, 6)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    for into in (
        transforms.normalise_into,
        lambda out, *args: transforms.normalise_then_resize_into(out, args[0], (4, 6), *args[1:]),
    ):
        rgb, bgr, raw = (torch.zeros(3, 4, 6) for _ in range(3))
        into(rgb, image, mean, std)
        into(bgr, image, mean, std, "bgr")
        assert torch.equal(bgr, rgb.flip(0)) and not torch.equal(bgr, rgb)
        into(raw, image, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), "bgr")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).flip(0).float()
        torch.testing.assert_close(raw, pixels, rtol=0, atol=1e-4)
