"""Anchors, matching, crowds, sampling, RoI levels, losses: hand-made cases and torchvision."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from detkit.models import losses, targets
from detkit.models.anchors import AnchorGrid, cell_anchors
from detkit.models.heads.roi import Align, RoiPooler, to_rois
from detkit.models.targets import IGNORED, NEGATIVE, POSITIVE
from detkit.ops.roi_align import roi_align
from detkit.types import FeatureSpec, Target

SIZES = (32.0, 64.0, 128.0, 256.0, 512.0)


def target(boxes: list[list[float]], crowd: list[bool] | None = None) -> Target:
    return Target(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.arange(1, len(boxes) + 1),
        torch.tensor(crowd or [False] * len(boxes), dtype=torch.bool),
    )


# --- anchors --------------------------------------------------------------------------------------


def test_detnet_anchors_at_800x1344() -> None:
    grid = AnchorGrid((4, 8, 16, 16, 16), [(s,) for s in SIZES], (0.5, 1, 2))
    shapes = [(200, 336), (100, 168), (50, 84), (50, 84), (50, 84)]
    levels = grid(shapes)
    assert [len(a) for a in levels] == [201_600, 50_400, 12_600, 12_600, 12_600]
    centres = (levels[4][:, :2] + levels[4][:, 2:]) / 2  # three anchors per cell
    assert torch.equal(centres[3] - centres[0], torch.tensor([16.0, 0.0]))
    assert torch.equal(centres[3 * 84] - centres[0], torch.tensor([0.0, 16.0]))
    assert torch.equal(levels[4][1], torch.tensor([-256.0, -256, 256, 256]))


def test_anchors_of_a_usual_pyramid_are_torchvisions(tv: ModuleType) -> None:
    peer = tv.models.detection.anchor_utils.AnchorGenerator(
        tuple((s,) for s in SIZES), ((0.5, 1.0, 2.0),) * 5
    )
    shapes = [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]
    images = tv.models.detection.image_list.ImageList(torch.zeros(1, 3, 64, 128), [(64, 128)])
    expected = peer(images, [torch.zeros(1, 1, *s) for s in shapes])[0]
    grid = AnchorGrid((4, 8, 16, 32, 64), [(s,) for s in SIZES], (0.5, 1.0, 2.0))
    assert torch.equal(torch.cat(grid(shapes)), expected)


def test_several_sizes_in_a_cell_go_ratio_by_ratio() -> None:
    cell = cell_anchors((32, 64), (1.0, 4.0))
    sides = (cell[:, 2:] - cell[:, :2]).tolist()
    assert sides == [[32, 32], [64, 64], [16, 64], [32, 128]]


def test_one_list_of_sizes_per_level() -> None:
    with pytest.raises(ValueError, match=r"one list of sizes per level \(2\), got 1"):
        AnchorGrid((4, 8), [(32,)], (1.0,))


# --- matching -------------------------------------------------------------------------------------

# IoU with the truth (0, 0, 10, 10): 1, .6, .5, .2, 0
BOXES = torch.tensor(
    [[0.0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 5], [0, 0, 10, 2], [20, 20, 30, 30]]
)


def test_thresholds_are_inclusive_above_and_exclusive_below() -> None:
    found = targets.match(BOXES, target([[0, 0, 10, 10]]), 0.5, 0.2)
    assert found.label.tolist() == [POSITIVE, POSITIVE, POSITIVE, IGNORED, NEGATIVE]


def test_each_truth_keeps_its_nearest_boxes_with_their_own_best_truth() -> None:
    truth = target([[0, 0, 10, 10], [0, 0, 10, 1], [20, 20, 30, 22], [90, 90, 99, 99]])
    boxes = torch.cat([BOXES, BOXES[4:]])
    found = targets.match(boxes, truth, 0.7, 0.3, keep_best=True)
    # the second truth is nearest to box 3 (.5), the third to boxes 4 and 5 alike (.2)
    positive = (found.label == POSITIVE).nonzero().flatten().tolist()
    assert positive == [0, 3, 4, 5]
    assert found.index[positive].tolist() == [0, 1, 2, 2]
    assert targets.match(boxes, truth, 0.7, 0.3).label.eq(
        POSITIVE
    ).nonzero().flatten().tolist() == [0]


def test_chunks_change_nothing() -> None:
    corner = torch.rand(300, 2) * 50
    boxes = torch.cat([corner, corner + 1 + torch.rand(300, 2) * 30], 1).round()  # many ties
    truth = target(boxes[::37].tolist(), [False, True] * 4 + [False])
    whole = targets.match(boxes, truth, 0.6, 0.3, keep_best=True)
    for chunk in (1, 17, 100):
        part = targets.match(boxes, truth, 0.6, 0.3, keep_best=True, chunk=chunk)
        assert torch.equal(whole.label, part.label) and torch.equal(whole.index, part.index)


def test_matching_equals_torchvisions(tv: ModuleType) -> None:
    corner = torch.rand(500, 2) * 80
    boxes = torch.cat([corner, corner + 5 + torch.rand(500, 2) * 40], 1)
    truth = target((boxes[:9] + torch.randn(9, 4)).tolist())
    peer = tv.models.detection._utils.Matcher(0.6, 0.3, allow_low_quality_matches=True)
    expected = peer(tv.ops.box_iou(truth.boxes, boxes))
    found = targets.match(boxes, truth, 0.6, 0.3, keep_best=True)
    assert torch.equal(found.label == POSITIVE, expected >= 0)
    assert torch.equal(found.label == NEGATIVE, expected == -1)
    assert torch.equal(found.index[expected >= 0], expected[expected >= 0])


def test_without_truth_all_is_background() -> None:
    found = targets.match(BOXES, target([]), 0.7, 0.3, keep_best=True)
    assert found.label.tolist() == [NEGATIVE] * 5


def test_crowds_are_no_truth_and_no_background_comes_from_inside_them() -> None:
    truth = target([[0, 0, 15, 10], [0, 0, 10, 10]], [True, False])
    inside = torch.tensor([[10.0, 0, 14, 4], [12, 0, 16, 10], [14, 0, 18, 10], [0, 0, 10, 10]])
    found = targets.match(inside, truth, 0.7, 0.3, keep_best=True)
    # shares in the crowd: 1, .75, .25, 1; the last one is the real box itself
    assert found.label.tolist() == [IGNORED, IGNORED, NEGATIVE, POSITIVE]
    assert found.index[3] == 1  # numbered among all boxes of the target
    alone = targets.match(inside, target([[0, 0, 15, 10]], [True]), 0.7, 0.3, keep_best=True)
    assert alone.label.tolist() == [IGNORED, IGNORED, NEGATIVE, IGNORED]


def test_nan_boxes_are_ignored() -> None:
    boxes = BOXES.clone()
    boxes[1, 2] = float("nan")
    found = targets.match(boxes, target([[0, 0, 10, 10]]), 0.5, 0.3, keep_best=True)
    assert found.label[1] == IGNORED
    assert found.label[0] == POSITIVE


def test_boxes_across_the_border() -> None:
    boxes = torch.tensor([[0.0, 0, 20, 10], [-1, 0, 5, 5], [0, 0, 21, 5], [0, 5, 5, 11]])
    assert targets.inside_image(boxes, 10, 20).tolist() == [True, False, False, False]


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [(50, 500, (8, 24)), (3, 500, (3, 29)), (0, 500, (0, 32)), (50, 10, (8, 10)), (0, 0, (0, 0))],
)
def test_sample_sizes(positives: int, negatives: int, expected: tuple[int, int]) -> None:
    label = torch.tensor([POSITIVE] * positives + [IGNORED] * 7 + [NEGATIVE] * negatives)
    label = label.to(torch.int8)[torch.randperm(len(label))]
    pos, neg = targets.sample(label, 32, 0.25)
    assert (len(pos), len(neg)) == expected
    assert (label[pos] == POSITIVE).all() and (label[neg] == NEGATIVE).all()
    assert len(set(pos.tolist())) == len(pos) and len(set(neg.tolist())) == len(neg)


def test_samples_repeat_with_the_seed_and_reach_all() -> None:
    label = torch.zeros(40, dtype=torch.int8)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(targets.sample(label, 10, 0.5)[1])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    seen = {int(i) for _ in range(60) for i in targets.sample(label, 10, 0.5)[1]}
    assert seen == set(range(40))


# --- RoI levels -----------------------------------------------------------------------------------


def pooler(strides: tuple[int, ...] = (4, 8, 16, 16, 16), max_level: int = 5) -> RoiPooler:
    specs = {f"p{i}": FeatureSpec(2, s) for i, s in enumerate(strides, 2) if i <= max_level}
    return RoiPooler(specs, Align(resolution=3, sampling_ratio=2, aligned=True))


def squares(*sides: float) -> Tensor:
    return torch.tensor([[7.0, 9.0, 7 + s, 9 + s] for s in sides])


def test_levels_come_from_box_size_alone() -> None:
    boxes = squares(111, 112, 223, 224, 447, 448, 2000)
    assert pooler().assign(boxes).tolist() == [2, 3, 3, 4, 4, 5, 5]
    assert pooler((4, 8, 16, 32, 64)).assign(boxes).tolist() == [2, 3, 3, 4, 4, 5, 5]
    assert pooler(max_level=6).assign(squares(448, 895, 896, 4000)).tolist() == [5, 5, 6, 6]
    assert pooler().assign(squares(0, 1e-3, float("nan"), float("inf"))).tolist() == [2, 2, 2, 5]


def test_p5_pools_at_its_declared_stride() -> None:
    assert pooler().scales == [1 / 4, 1 / 8, 1 / 16, 1 / 16]
    assert pooler(max_level=6).scales == [1 / 4, 1 / 8, 1 / 16, 1 / 16, 1 / 16]


def test_pooled_rows_stay_in_the_order_of_their_rois() -> None:
    pool = pooler()
    strides = {"p2": 4, "p3": 8, "p4": 16, "p5": 16}
    maps = {name: torch.randn(2, 2, 800 // s, 800 // s) for name, s in strides.items()}
    rois = to_rois([squares(500, 20, 230), squares(120, 30)])
    assert rois[:, 0].tolist() == [0, 0, 0, 1, 1]
    out = pool(maps, rois)
    for row, name in enumerate(("p5", "p2", "p4", "p3", "p2")):
        alone = roi_align(maps[name], rois[row : row + 1], 3, 1 / strides[name], 2, True)
        torch.testing.assert_close(out[row], alone[0])


def test_rois_sorted_by_level_are_pooled_without_a_second_order() -> None:
    """What the box head asks for: sorted rois give the rows of unsorted ones, sorted."""
    pool = pooler()
    maps = {f"p{i}": torch.randn(2, 2, 50, 50) for i in range(2, 6)}
    rois = to_rois([squares(500, 20, 230), squares(120, 30)])
    order = pool.order(rois)
    assert order is not None and order.tolist() == [1, 4, 3, 2, 0]
    assert torch.equal(pool(maps, rois[order], in_order=True), pool(maps, rois)[order])
    assert RoiPooler({"p4": FeatureSpec(2, 16)}, pool.pool).order(rois) is None


def test_no_rois_pool_to_nothing_with_gradients() -> None:
    maps = {f"p{i}": torch.randn(1, 2, 8, 8, requires_grad=True) for i in range(2, 6)}
    out = pooler()(maps, torch.zeros(0, 5))
    assert out.shape == (0, 2, 3, 3)
    out.sum().backward()
    assert all(m.grad is not None and not m.grad.any() for m in maps.values())


# --- losses ---------------------------------------------------------------------------------------


def test_smooth_l1_is_square_below_beta_and_linear_above() -> None:
    loss = losses.smooth_l1(torch.tensor([[0.5, 3.0]]), torch.tensor([[0.0, 0.0]]), 1.0)
    assert loss.item() == pytest.approx(0.125 + 2.5)
    loss = losses.smooth_l1(torch.tensor([[0.1]]), torch.tensor([[0.0]]), 1 / 9)
    assert loss.item() == pytest.approx(0.1**2 / (2 / 9))


def test_losses_of_nothing_are_zero_with_a_graph() -> None:
    empty = torch.zeros(0, 4, requires_grad=True)
    total = (
        losses.smooth_l1(empty, torch.zeros(0, 4), 1.0).sum()
        + losses.objectness(empty[:, 0], 0)
        + losses.cross_entropy(empty, torch.zeros(0, dtype=torch.int64)).sum()
    )
    total.backward()
    assert total.item() == 0 and empty.grad is not None


def test_losses_are_float32_whatever_comes_in() -> None:
    half = torch.randn(4, 4, dtype=torch.bfloat16)
    assert losses.smooth_l1(half, torch.zeros(4, 4), 1.0).dtype == torch.float32
    assert losses.objectness(half[:, 0], 2).dtype == torch.float32
    assert losses.cross_entropy(half, torch.zeros(4, dtype=torch.int64)).dtype == torch.float32
