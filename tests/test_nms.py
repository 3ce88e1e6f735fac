"""nms and batched_nms: by hand, against the reference and torchvision, NaN, torch's own checks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detkit import ops
from detkit.ops.reference import nms as reference

THRESHOLDS = (0.0, 0.3, 0.5, 0.7, 1.0)


def candidates(
    n: int, dtype: torch.dtype = torch.float32, side: float = 30.0
) -> tuple[Tensor, ...]:
    """Boxes with plenty of overlap, scores and five classes."""
    corner = torch.rand(n, 2, dtype=torch.float64) * 100
    boxes = torch.cat([corner, corner + torch.rand(n, 2, dtype=torch.float64) * side], 1).to(dtype)
    return boxes, torch.rand(n, dtype=dtype), torch.randint(0, 5, (n,))


def test_hand_case(device: str) -> None:
    boxes = torch.tensor(
        [[0, 0, 10, 10], [5, 0, 15, 10], [0, 0, 10, 9], [20, 20, 30, 30]], device=device
    ).float()  # IoU of 0 with 1 is 50/150, with 2 is 0.9
    scores = torch.tensor([0.8, 0.7, 0.9, 0.1], device=device)
    assert ops.nms(boxes, scores, 0.5).tolist() == [2, 1, 3]
    assert ops.nms(boxes, scores, 0.9).tolist() == [2, 0, 1, 3]
    assert ops.nms(boxes, scores, 0.3).tolist() == [2, 3]
    idxs = torch.tensor([1, 1, 0, 0], device=device)
    assert ops.batched_nms(boxes, scores, idxs, 0.3).tolist() == [2, 0, 3]


@pytest.mark.parametrize("n", [0, 1, 2, 33, 64, 65, 200, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_reference(device: str, n: int, dtype: torch.dtype) -> None:
    boxes, scores, idxs = (t.to(device) for t in candidates(n, dtype))
    scores = (scores * 50).round()  # ties, whose order must be stable
    for t in THRESHOLDS:
        assert torch.equal(ops.nms(boxes, scores, t), reference.nms(boxes, scores, t))
        expected = reference.batched_nms(boxes, scores, idxs, t)
        assert torch.equal(ops.batched_nms(boxes, scores, idxs, t), expected)


@pytest.mark.parametrize("n", [0, 1, 100, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_what_torchvision_keeps(tv, n: int, dtype: torch.dtype) -> None:
    for side in (5.0, 30.0, 80.0):
        boxes, scores, idxs = candidates(n, dtype, side)
        for t in THRESHOLDS:
            assert torch.equal(ops.nms(boxes, scores, t), tv.ops.nms(boxes, scores, t))
        for t in (0.3, 0.7):  # class by class, because the shift of its batched_nms rounds
            members = [(idxs == c).nonzero()[:, 0] for c in range(5)]
            kept = torch.cat([m[tv.ops.nms(boxes[m], scores[m], t)] for m in members])
            ours = ops.batched_nms(boxes, scores, idxs, t)
            assert torch.equal(ours, kept[scores[kept].argsort(descending=True, stable=True)])


grid_boxes = st.lists(
    st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(-3, 8)] * 2, st.integers(0, 1000)),
    max_size=120,
    unique_by=lambda row: row[4],
)


@given(grid_boxes, st.sampled_from([0.0, 0.2, 0.25, 1 / 3, 0.5, 0.6, 2 / 3, 0.75, 1.0]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_fuzz_against_torchvision(tv, rows: list[tuple[int, ...]], threshold: float) -> None:
    """Integer boxes put many IoUs exactly at the threshold; some are inverted or empty."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    boxes = torch.cat([table[:, :2], table[:, :2] + table[:, 2:4]], 1)
    scores = table[:, 4]
    assert torch.equal(ops.nms(boxes, scores, threshold), tv.ops.nms(boxes, scores, threshold))


def many_boxes(kind: str, n: int, g: torch.Generator) -> Tensor:
    """Boxes of which hundreds stay, so that the CPU kernel indexes them; float64."""
    place, sides = torch.rand(2, n, 2, generator=g, dtype=torch.float64)
    if kind == "integers":  # many IoUs exactly at the threshold
        place, sides = (place * 200).floor(), (sides * 30).floor()
    elif kind == "any size":
        place, sides = place * 1000, torch.exp(sides * 5) * 4
    elif kind == "one centre":
        sides = 1.02 ** (sides * 500).floor()
        place = 50 - sides / 2
    elif kind == "nested":
        sides = torch.exp2(sides * 2 + torch.rand(n, 1, generator=g) * 12)
        place = place * sides / 5
    elif kind == "far apart":  # a box is a millionth of the image
        place, sides = place * 1e7, torch.exp(sides * 18) / 100
    else:  # inverted and empty boxes and a few that are not finite
        place, sides = (place * 100).floor(), (sides * 20).floor() - 4
        odd = torch.rand(n, 2, generator=g) < 0.01
        place[odd] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])[
            torch.arange(int(odd.sum())) % 4
        ].double()
    return torch.cat([place, place + sides], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind", ["integers", "any size", "one centre", "nested", "far apart", "broken"]
)
def test_many_boxes_are_kept_as_by_torchvision(tv, kind: str, dtype: torch.dtype) -> None:
    """Places, sizes and offsets at which an index of the kept boxes could miss a pair."""
    g = torch.Generator().manual_seed(len(kind))
    most = 0
    for scale, offset in ((1.0, 0.0), (1e-3, -0.1), (1e-20, 0.0), (8.0, -1e5)):
        boxes = (many_boxes(kind, 1500, g) * scale + offset).to(dtype)
        scores = torch.randint(300, (1500,), generator=g).to(dtype)
        for t in (0.0, 0.05, 0.2, 0.5, 0.7, 0.9, 1.0):
            kept = ops.nms(boxes, scores, t)
            assert torch.equal(kept, tv.ops.nms(boxes, scores, t))
            most = max(most, len(kept))
    assert most > 600


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    1e-45,
    1e-30,
    5.0,
    3e38,
    -3e38,
    float("inf"),
    -float("inf"),
    float("nan"),
]
special_boxes = st.lists(st.tuples(*[st.sampled_from(SPECIAL)] * 5), max_size=40)


@given(special_boxes, st.sampled_from(THRESHOLDS), st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_fuzz_of_special_values(
    rows: list[tuple[float, ...]], threshold: float, double: bool
) -> None:
    """NaN, infinite, huge, subnormal and inverted boxes and scores decide as the reference does."""
    dtype = torch.float64 if double else torch.float32
    table = torch.tensor(rows, dtype=dtype).reshape(-1, 5)
    boxes, scores = table[:, :4], table[:, 4]  # not contiguous
    idxs = torch.arange(len(rows)) % 3
    assert torch.equal(ops.nms(boxes, scores, threshold), reference.nms(boxes, scores, threshold))
    expected = reference.batched_nms(boxes, scores, idxs, threshold)
    assert torch.equal(ops.batched_nms(boxes, scores, idxs, threshold), expected)


def test_a_nan_box_suppresses_nothing_and_stays(device: str) -> None:
    boxes, scores, idxs = candidates(50)
    for column in range(4):
        with_nan = boxes.clone()
        best = int(scores.argmax())
        with_nan[best, column] = float("nan")
        kept = ops.nms(with_nan.to(device), scores.to(device), 0.1).tolist()
        others = torch.arange(50)[torch.arange(50) != best]
        alone = others[ops.nms(boxes[others], scores[others], 0.1)]
        assert kept == [best, *alone.tolist()]


def test_nan_scores_come_first(device: str) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 3, device=device)
    scores = torch.tensor([1.0, float("nan"), float("inf")], device=device)
    assert ops.nms(boxes, scores, 0.5).tolist() == [1]


def test_classes_of_any_value_and_dtype(device: str) -> None:
    boxes, scores, idxs = (t.to(device) for t in candidates(300))
    expected = ops.batched_nms(boxes, scores, idxs, 0.3)
    assert torch.equal(ops.batched_nms(boxes, scores, idxs.to(torch.uint8), 0.3), expected)
    assert torch.equal(ops.batched_nms(boxes, scores, idxs.int() - 3, 0.3), expected)
    assert torch.equal(ops.batched_nms(boxes, scores, (idxs - 2) * 2**61, 0.3), expected)


def test_huge_coordinates_are_not_rounded_by_classes(device: str) -> None:
    """A class shift in float32 would merge these boxes; comparing class numbers does not."""
    boxes = torch.tensor([[2.0**23, 0, 2.0**23 + 4, 4], [2.0**23 + 1, 0, 2.0**23 + 5, 4]])
    scores = torch.tensor([2.0, 1.0])
    for classes, kept in (([7, 7], [0]), ([7, 10**9], [0, 1])):
        idxs = torch.tensor(classes, device=device)
        assert ops.batched_nms(boxes.to(device), scores.to(device), idxs, 0.5).tolist() == kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_compute_in_float32(device: str, dtype: torch.dtype) -> None:
    boxes, scores, _ = (t.to(device) for t in candidates(300))
    half = boxes.to(dtype)
    expected = ops.nms(half.float(), scores, 0.5)
    assert torch.equal(ops.nms(half, scores, 0.5), expected)
    ties = scores.to(dtype)
    assert torch.equal(ops.nms(half, ties, 0.5), ops.nms(half.float(), ties.float(), 0.5))
    with torch.autocast(device, dtype=dtype):
        assert torch.equal(ops.nms(half, scores, 0.5), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.rand(4)}, r"boxes must have shape \(N, 4\), got \(4,\)"),
        ({"boxes": torch.rand(3, 5)}, r"boxes must have shape \(N, 4\), got \(3, 5\)"),
        ({"boxes": torch.ones(3, 4, dtype=torch.int64)}, "boxes must be floating point"),
        ({"scores": torch.rand(2)}, r"scores must have shape \(3,\), got \(2,\)"),
        ({"scores": torch.ones(3, dtype=torch.int64)}, "scores must be floating point"),
        ({"iou_threshold": 1.5}, "iou_threshold must be in 0..1, got 1.5"),
        ({"iou_threshold": float("nan")}, "iou_threshold must be in 0..1, got nan"),
        ({"idxs": torch.rand(3)}, "idxs must be integers, got torch.float32"),
        ({"idxs": torch.ones(2, dtype=torch.int64)}, r"idxs must have shape \(3,\)"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments = {
        "boxes": torch.rand(3, 4),
        "scores": torch.rand(3),
        "idxs": torch.zeros(3, dtype=torch.int64),
        "iou_threshold": 0.5,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        ops.batched_nms(**arguments)
    if "idxs" not in change:
        del arguments["idxs"]
        with pytest.raises(ValueError, match=message):
            ops.nms(**arguments)


@pytest.mark.parametrize("n", [0, 40])
def test_opcheck(device: str, n: int) -> None:
    boxes, scores, idxs = (t.to(device) for t in candidates(n))
    for grad in (False, True):
        sample = (boxes.clone().requires_grad_(grad), scores)
        torch.library.opcheck(torch.ops.detkit.nms.default, (*sample, 0.5))
        torch.library.opcheck(torch.ops.detkit.batched_nms.default, (*sample, idxs, 0.5))


@pytest.mark.parametrize("limit", [0, 1, 20, 100])
def test_padded_is_the_beginning_of_nms(device: str, limit: int) -> None:
    boxes, scores, idxs = (t.to(device) for t in candidates(60))
    for of, wanted in (
        (None, ops.nms(boxes, scores, 0.5)),
        (idxs, ops.batched_nms(boxes, scores, idxs, 0.5)),
    ):
        native = ops.nms_padded(boxes, scores, 0.5, limit, of)
        plain = reference.nms_padded(boxes, scores, 0.5, limit, of)
        for kept, count in (native, plain):
            assert count.item() == min(limit, len(wanted))
            assert torch.equal(kept[: count.item()], wanted[:limit])
            assert kept.shape == (limit,) and (kept[count.item() :] == -1).all()
        torch.library.opcheck(torch.ops.detkit.nms_padded.default, (boxes, scores, of, 0.5, limit))


def test_padded_takes_boxes_that_must_not_count() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]])
    scores = torch.tensor([-torch.inf, 0.5, 0.9])
    kept, count = ops.nms_padded(boxes, scores, 0.5, 3)
    assert kept.tolist() == [2, 1, -1] and count.item() == 2


def test_padded_refuses_a_negative_limit() -> None:
    boxes, scores, _ = candidates(3)
    with pytest.raises(ValueError, match="nms_padded: limit must be at least 0, got -1"):
        ops.nms_padded(boxes, scores, 0.5, -1)


@pytest.mark.gpu
def test_padded_in_a_cuda_graph() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    boxes, scores, idxs = (t.cuda() for t in candidates(3000))
    run = lambda: ops.nms_padded(boxes, scores, 0.5, 100, idxs)  # noqa: E731
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # torch's sort prepares itself on its first call
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept, count = run()
    for seed in range(3):
        torch.manual_seed(seed)
        scores.copy_(torch.rand(3000))
        graph.replay()
        expected = ops.batched_nms(boxes, scores, idxs, 0.5)[:100]
        assert torch.equal(kept[: count.item()], expected)


class Suppress(torch.nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor, idxs: Tensor) -> Tensor:
        kept = ops.batched_nms(boxes, scores, idxs, 0.5)
        return boxes[kept][ops.nms(boxes[kept], scores[kept], 0.3)] * 2


def test_compiles_whole(device: str) -> None:
    compiled = torch.compile(Suppress().to(device), fullgraph=True, backend="aot_eager")
    for n in (50, 80):
        sample = tuple(t.to(device) for t in candidates(n))
        assert torch.equal(compiled(*sample), Suppress()(*sample))


def test_exports_with_any_number_of_boxes() -> None:
    boxes = torch.export.Dim("boxes", min=2)
    program = torch.export.export(
        Suppress(), candidates(50), dynamic_shapes=({0: boxes}, {0: boxes}, {0: boxes})
    )
    for n in (2, 80):
        sample = candidates(n)
        assert torch.equal(program.module()(*sample), Suppress()(*sample))
