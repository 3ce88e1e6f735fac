"""Segmentations: what is sound, and that sound ones mean what pycocotools reads in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from detkit.data.masks import (
    decode,
    encode_counts,
    segmentation_area,
    segmentation_box,
    segmentation_fault,
)


@st.composite
def pixels(draw: Any) -> Any:
    """Masks from empty to full, in noise or in blocks."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = rng.random((height, width)) < draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    return mask.repeat(draw(st.integers(1, 9)), axis=0)


@settings(max_examples=150, deadline=None)
@given(pixels())
def test_rle_in_both_forms(mask: Any) -> None:
    height, width = mask.shape
    packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = {"size": [height, width], "counts": packed["counts"].decode()}
    listed = {"size": [height, width], "counts": encode_counts(mask)}
    for rle in (text, listed):
        assert segmentation_fault(rle, height, width) == ""
        assert np.array_equal(decode(rle, height, width), mask)
        assert segmentation_area(rle, height, width) == mask.sum()
    assert listed["counts"] == coco_mask_counts(mask)


def coco_mask_counts(mask: Any) -> list[int]:
    """Run lengths by counting."""
    counts, value, run = [], False, 0
    for pixel in mask.ravel(order="F"):
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    return [*counts, run]


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=[chr(c) for c in range(40, 120)], max_size=12))
def test_texts_that_are_no_rle_are_refused(text: str) -> None:
    """What passes the check covers the image exactly, so decoding stays inside it."""
    rle = {"size": [5, 7], "counts": text}
    if segmentation_fault(rle, 5, 7) == "":
        assert sum(encode_counts(decode(rle, 5, 7))) == 35


def test_polygons_far_outside_are_cut_off() -> None:
    """pycocotools walks along outlines and fails on huge ones; only the part inside counts."""
    everything = [[-1e30, -1e30, 1e30, -1e30, 1e30, 1e30, -1e30, 1e30]]
    assert segmentation_area(everything, 40, 60) == 2400
    left = [[-1e9, -1e9, 30, -1e9, 30, 1e9, -1e9, 1e9]]
    assert decode(left, 40, 60).sum(axis=0).tolist() == [40] * 30 + [0] * 30


def test_boxes_of_segmentations() -> None:
    assert segmentation_box([[5, 6, 25, 6, 25, 15], [1, 7, 3, 8, 2, 9]], 40, 60) == [1, 6, 24, 9]
    mask = np.zeros((40, 60), dtype=np.bool_)
    mask[3:10, 20:22] = True
    rle = {"size": [40, 60], "counts": encode_counts(mask)}
    assert segmentation_box(rle, 40, 60) == [20, 3, 2, 7]


@pytest.mark.parametrize(
    ("segmentation", "fault"),
    [
        (5, "a value of type int"),
        ({"counts": [4]}, "RLE with size None"),
        ({"size": [2, 2]}, "RLE without counts"),
        ({"size": [2, 2], "counts": [1, 2]}, "RLE of 3 pixels for 4"),
        ({"size": [2, 3], "counts": [6]}, "RLE of 3x2 in an image of 2x2"),
    ],
)
def test_faults_are_named(segmentation: Any, fault: str) -> None:
    assert segmentation_fault(segmentation, 2, 2) == fault
