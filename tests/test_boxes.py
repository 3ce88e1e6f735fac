"""Box arithmetic: by hand, against torchvision, and the rules for NaN, empty and half boxes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detkit.ops import boxes

NAN = float("nan")
HAND = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [0, 0, 0, 10], [20, 20, 30, 40]])


def random_boxes(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    corner = torch.rand(n, 2, dtype=dtype) * 100
    return torch.cat([corner, corner + 1 + torch.rand(n, 2, dtype=dtype) * 60], 1)


def test_area_and_iou_by_hand() -> None:
    assert boxes.area(HAND).tolist() == [100, 100, 0, 200]
    expected = torch.tensor([[1, 1 / 3, 0, 0], [1 / 3, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(boxes.iou(HAND, HAND), expected)


def test_share_inside_a_crowd_by_hand() -> None:
    crowd = torch.tensor([[0.0, 0, 10, 5]])
    assert boxes.overlap_share(HAND, crowd)[:, 0].tolist() == [0.5, 0.25, 0, 0]


def test_iou_equals_torchvision(tv) -> None:
    a, b = random_boxes(40), random_boxes(30)
    torch.testing.assert_close(boxes.iou(a, b), tv.ops.box_iou(a, b), rtol=1e-12, atol=0)


def test_coding_equals_torchvision(tv) -> None:
    weights = (10.0, 10.0, 5.0, 5.0)
    coder = tv.models.detection._utils.BoxCoder(weights)
    truth, anchors = random_boxes(50), random_boxes(50)
    deltas = boxes.encode(truth, anchors, weights)
    torch.testing.assert_close(deltas, coder.encode_single(truth, anchors))
    noisy = deltas + torch.randn_like(deltas) * 8  # some beyond the growth limit
    decoded = coder.decode_single(noisy, anchors)
    torch.testing.assert_close(boxes.decode(noisy, anchors, weights), decoded)


def test_decode_undoes_encode() -> None:
    truth, anchors = random_boxes(200), random_boxes(200)
    weights = (10.0, 10.0, 5.0, 5.0)
    back = boxes.decode(boxes.encode(truth, anchors, weights), anchors, weights)
    torch.testing.assert_close(back, truth, rtol=1e-12, atol=1e-12)


def test_decode_per_class_decodes_each_class() -> None:
    anchors, deltas = random_boxes(6), torch.randn(6, 3, 4, dtype=torch.float64)
    together = boxes.decode(deltas, anchors)
    for k in range(3):
        assert torch.equal(together[:, k], boxes.decode(deltas[:, k], anchors))


def test_decode_limits_growth() -> None:
    anchor = torch.tensor([[0.0, 0, 16, 16]])
    grown = boxes.decode(torch.tensor([[0.0, 0, 50, math.inf]]), anchor)
    torch.testing.assert_close(grown, torch.tensor([[-492.0, -492, 508, 508]]))


def test_gradients_of_decode_and_iou() -> None:
    anchors = random_boxes(4)
    deltas = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: boxes.decode(d, anchors), deltas)
    truth = random_boxes(3)
    moved = anchors.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda b: boxes.iou(b, truth), moved)


@given(st.integers(0, 3), st.integers(0, 4))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_nan_stays_in_its_box(column: int, row: int) -> None:
    a, b = random_boxes(5), random_boxes(4)
    broken = a.clone()
    broken[row, column] = NAN
    others = [i for i in range(5) if i != row]
    for function in (
        lambda x: boxes.iou(x, b),
        lambda x: boxes.overlap_share(x, b),
        lambda x: boxes.area(x),
        lambda x: boxes.decode(torch.zeros_like(x), x),
        lambda x: boxes.encode(a, x),
    ):
        result, clean = function(broken), function(a)
        assert torch.equal(result[others], clean[others])
        assert result[row].isnan().any()
    assert boxes.iou(broken, b)[row].isnan().all()
    assert boxes.clip(broken, 50, 50)[row, column].isnan()


def test_clip_moves_boxes_inside() -> None:
    clipped = boxes.clip(torch.tensor([[-5.0, -6, 200, 300], [1, 2, 3, 4]]), 100, 50)
    assert clipped.tolist() == [[0, 0, 50, 100], [1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_boxes_do_not_overflow(dtype: torch.dtype) -> None:
    large = torch.tensor([[0.0, 0, 1024, 1024]], dtype=dtype)
    assert boxes.area(large).item() == 2**20
    assert boxes.iou(large, large).item() == 1
    assert boxes.decode(torch.zeros(1, 4, dtype=dtype), large).dtype == torch.float32


def test_no_boxes() -> None:
    none = torch.zeros(0, 4)
    assert boxes.iou(none, HAND).shape == (0, 4)
    assert boxes.iou(HAND, none).shape == (4, 0)
    assert boxes.decode(torch.zeros(0, 7, 4), none).shape == (0, 7, 4)
    assert boxes.encode(none, none).shape == (0, 4)
