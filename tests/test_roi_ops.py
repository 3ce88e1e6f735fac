"""RoIAlign and PS-RoIAlign: hand-made cases, the reference, torchvision, tracing, odd numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from detkit.ops import ps_roi_align, roi_align
from detkit.ops._library import BUILD_INFO
from detkit.ops._rois import as_rois
from detkit.ops.reference import roi as reference

needs_native = pytest.mark.skipif(not BUILD_INFO, reason="the extension is not built")

HUGE = [
    [0, -1e9, 2, 1e9, 9],
    [1, 1, -1e30, 9, 1e30],
    [0, 1e8, 1e8, 1e8 + 8, 2e8],
    [1, 0, 0, 3e38, 3],
]
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Variant:
    """One way to call one of the operators."""

    op: str = "roi_align"
    size: tuple[int, int] = (3, 2)
    scale: float = 0.5
    ratio: int = -1
    aligned: bool = False
    reduce: str = "avg"
    offset: float = 0.5

    def public(self, input: Tensor, boxes: Tensor | list[Tensor]) -> Tensor:
        """The public call."""
        if self.op == "roi_align":
            return roi_align(input, boxes, self.size, self.scale, self.ratio, self.aligned)
        return ps_roi_align(
            input, boxes, self.size, self.scale, self.ratio, reduce=self.reduce, offset=self.offset
        )

    def reference(self, input: Tensor, boxes: Tensor) -> Tensor:
        """The definition."""
        rois = as_rois(self.op, input, boxes)
        if self.op == "roi_align":
            return reference.roi_align(input, rois, self.size, self.scale, self.ratio, self.aligned)
        return reference.ps_roi_align(
            input, rois, self.size, self.scale, self.ratio, self.reduce, self.offset
        )

    def torchvision(self, tv: ModuleType, input: Tensor, boxes: Tensor | list[Tensor]) -> Tensor:
        """The peer's call, where it has one."""
        if self.op == "roi_align":
            return tv.ops.roi_align(input, boxes, self.size, self.scale, self.ratio, self.aligned)
        return tv.ops.ps_roi_align(input, boxes, self.size, self.scale, self.ratio)


ROI_ALIGN = [Variant(ratio=r, aligned=a) for r in (-1, 1, 2, 3) for a in (False, True)]
PS_AVG = [Variant("ps_roi_align", ratio=r) for r in (-1, 1, 2)]
PS_MAX = [
    Variant("ps_roi_align", ratio=-1, reduce="max", offset=0.0),
    Variant("ps_roi_align", ratio=3, reduce="max", offset=0.5),
]
SIXTEEN_BINS = Variant("ps_roi_align", size=(4, 4), ratio=2)
VARIANTS = [*ROI_ALIGN, *PS_AVG, *PS_MAX, Variant(size=(7, 7), scale=1 / 3, ratio=2), SIXTEEN_BINS]


def features(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype)


def boxes_on(height: int, width: int, count: int, scale: float, batch: int) -> Tensor:
    """(R, 5) float64 boxes that reach over the border of the map, some with sides swapped."""
    low = torch.rand(count, 2, dtype=torch.float64) * 1.4 - 0.3
    side = torch.rand(count, 2, dtype=torch.float64).square() * 1.2
    side[::7] *= -0.3
    size = torch.tensor([width, height])
    corners = torch.cat([low * size, (low + side) * size], 1) / scale
    return torch.cat([torch.randint(0, batch, (count, 1)).double(), corners], 1)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Same NaNs, and the rest within ``tolerance`` of the largest number (at least 1)."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.equal(actual.isnan(), expected.isnan())
    if actual.numel():
        largest = max(1.0, expected.nan_to_num(0, 0, 0).abs().max().item())
        worst = (actual - expected).nan_to_num(0, INF, INF).abs().max().item()
        assert worst <= tolerance * largest, f"{worst} > {tolerance} * {largest}"


def gradient(call: Callable[[Tensor, Tensor], Tensor], input: Tensor, boxes: Tensor) -> Tensor:
    """Gradient to ``input`` of a fixed, uneven weighting of the outputs."""
    leaf = input.detach().clone().requires_grad_()
    output = call(leaf, boxes)
    weights = torch.linspace(-1, 2, output.numel(), dtype=torch.float64)
    output.backward(weights.to(output).view_as(output))
    assert leaf.grad is not None
    return leaf.grad


def compare(variant: Variant, input: Tensor, boxes: Tensor) -> None:
    """Native against reference, outputs and gradients, in the input's precision."""
    tolerance = 1e-10 if input.dtype == torch.float64 else 1e-4
    assert_near(variant.public(input, boxes), variant.reference(input, boxes), tolerance)
    grads = [gradient(call, input, boxes) for call in (variant.public, variant.reference)]
    assert_near(*grads, tolerance)


# --- by hand


def test_roi_align_of_a_ramp_is_the_ramp_at_bin_centres(device: str) -> None:
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    ramp = (3 * x + 2 * y + torch.tensor([0.0, 100.0]).view(2, 1, 1)).unsqueeze(0).to(device)
    boxes = torch.tensor([[0, 16.0, 8, 72, 36]], device=device)  # (4, 2) .. (18, 9) on the map
    for ratio in (-1, 1, 2, 5):
        for aligned in (False, True):
            pooled = roi_align(ramp, boxes, (2, 7), 0.25, ratio, aligned).cpu()
            shift = 0.5 if aligned else 0.0
            column = 4 - shift + 2.0 * (torch.arange(7) + 0.5)
            row = 2 - shift + 3.5 * (torch.arange(2) + 0.5)
            expected = 3 * column + 2 * row.view(2, 1)
            assert torch.allclose(pooled[0, 0], expected, rtol=1e-6)
            assert torch.allclose(pooled[0, 1], expected + 100, rtol=1e-6)


@pytest.mark.parametrize("reduce", ["avg", "max"])
def test_ps_roi_align_of_a_ramp(reduce: str, device: str) -> None:
    bins, depth, m = 3, 2, 7.0
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    channel = torch.arange(depth * bins * bins).view(-1, 1, 1)
    ramp = (3 * x + 2 * y + m * channel).unsqueeze(0).to(device)
    boxes = torch.tensor([[0, 64.0, 80, 256, 224]], device=device)  # (4, 5) .. (16, 14)
    offset = 0.5 if reduce == "avg" else 0.0
    pooled = ps_roi_align(ramp, boxes, bins, 1 / 16, 2, reduce=reduce, offset=offset).cpu()
    part = 0.5 if reduce == "avg" else 0.75  # where in the bin the mean, or the largest, lies
    row = 5 - offset + 3.0 * (torch.arange(3).view(1, 3, 1) + part)
    column = 4 - offset + 4.0 * (torch.arange(3).view(1, 1, 3) + part)
    expected = 3 * column + 2 * row + m * torch.arange(depth * bins * bins).view(depth, bins, bins)
    assert torch.allclose(pooled[0], expected, rtol=1e-6)


def test_ps_roi_align_reads_channel_d_i_j(device: str) -> None:
    planes = torch.arange(3.0 * 2 * 4, device=device).view(1, 24, 1, 1).expand(1, 24, 9, 9)
    boxes = torch.tensor([[0, 1.0, 1, 7, 7]], device=device)
    for reduce in ("avg", "max"):
        pooled = ps_roi_align(planes, boxes, (2, 4), reduce=reduce)
        assert torch.equal(pooled.cpu()[0], torch.arange(24.0).view(3, 2, 4))


def test_max_counts_corners_off_the_map_as_zero(device: str) -> None:
    ones = torch.full((1, 1, 4, 4), -8.0, device=device)
    # one bin, one sample at (-0.25, 1): a quarter of its weight is off the map
    boxes = torch.tensor([[0, 0.5, -0.75, 1.5, 0.25], [0, -9, -9, -7, -7]], device=device)
    pooled = ps_roi_align(ones, boxes, 1, 1.0, 1, reduce="max", offset=0.0).flatten()
    assert pooled.tolist() == [-6.0, 0.0]


def test_max_raises_a_negative_size_to_zero_and_does_not_double_integers(device: str) -> None:
    ramp = torch.arange(25.0, device=device).view(1, 1, 5, 5)
    boxes = torch.tensor([[0, 3.0, 2, 1, 2]], device=device)  # from x = 3 back to 1
    pooled = ps_roi_align(ramp, boxes, 1, reduce="max", offset=0.0)
    assert pooled.item() == 13.0


def test_max_gives_the_gradient_to_the_first_maximum(device: str) -> None:
    flat = torch.ones(1, 1, 5, 5, device=device, requires_grad=True)
    boxes = torch.tensor([[0, 0.0, 0, 4, 4]], device=device)  # samples at 1 and 3
    ps_roi_align(flat, boxes, 1, reduce="max", offset=0.0).sum().backward()
    expected = torch.zeros(5, 5)
    expected[1, 1] = 1
    assert flat.grad is not None
    assert torch.equal(flat.grad.cpu()[0, 0], expected)


def test_gradients_of_boxes_inside_sum_to_one_per_output(device: str) -> None:
    boxes = torch.tensor([[0, 3.0, 4, 20, 21], [1, 5, 2, 9, 30]], device=device)
    for variant in VARIANTS:
        input = features(2, 48, 20, 20, device=device).requires_grad_()
        pooled = variant.public(input, boxes)
        pooled.sum().backward()
        assert input.grad is not None
        assert abs(input.grad.sum().item() - pooled.numel()) < 1e-9 * pooled.numel()


def test_an_empty_bin_is_zero() -> None:
    input = features(1, 4, 6, 6)
    empty = torch.tensor([[0, 2.0, 2, 2, 2], [0, 4, 4, 2, 2]])
    assert ps_roi_align(input, empty, 2).abs().max() == 0
    assert roi_align(input, empty, 2, aligned=True).abs().max() == 0
    # without `aligned` the box is raised to one map pixel
    assert roi_align(input, empty[:1], 1, 1.0, 1)[0, 0].item() == pytest.approx(
        input[0, 0, 2:4, 2:4].mean().item()
    )


# --- native against the reference


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_equals_reference(variant: Variant, dtype: torch.dtype, device: str) -> None:
    for channels, height, width in ((48, 9, 13), (96, 17, 6), (144, 1, 1), (48, 1, 20)):
        input = features(2, channels, height, width, dtype=dtype, device=device)
        boxes = boxes_on(height, width, 30, variant.scale, 2).to(device)
        compare(variant, input, boxes)


@needs_native
@pytest.mark.parametrize("variant", [ROI_ALIGN[0], ROI_ALIGN[5], PS_AVG[0], PS_MAX[0]], ids=str)
def test_empty_and_odd_layouts_equal_reference(variant: Variant, device: str) -> None:
    boxes = boxes_on(11, 12, 20, variant.scale, 2).to(device)
    input = features(2, 12, 11, 12, device=device)
    layouts = {
        "channels_last": input.contiguous(memory_format=torch.channels_last),
        "transposed": input.transpose(2, 3).contiguous().transpose(2, 3),
        "slice": features(3, 13, 12, 14, device=device)[1:, 1:, 1:, 1:13],
        "expanded": input[:1, :1].expand(2, 12, 11, 12),
        "every other": features(2, 24, 11, 24, device=device)[:, ::2, :, ::2],
    }
    for layout in layouts.values():
        compare(variant, layout, boxes)
        assert variant.public(layout, boxes).is_contiguous()
    compare(variant, input, boxes[:0])
    compare(variant, input[:0], boxes[:0])
    compare(variant, input[:, :0], boxes)
    compare(variant, input[:, :, :0], boxes)
    compare(variant, input, boxes.t().contiguous().t())


@needs_native
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nan_and_huge_numbers_equal_reference(variant: Variant, device: str) -> None:
    input = features(2, 48, 9, 12, device=device)
    input[0, 3, 2, 5] = NAN
    input[1, :, 8, 11] = NAN
    input[0, 1, 0, 0] = NAN
    odd = torch.tensor(HUGE, dtype=torch.float64, device=device)
    broken = boxes_on(9, 12, 10, variant.scale, 2).to(device)
    broken[torch.arange(7), torch.tensor([0, 1, 2, 3, 4, 1, 4])] = NAN
    broken[7, 2], broken[8, 3] = INF, -INF
    boxes = torch.cat([odd, broken, boxes_on(9, 12, 20, variant.scale, 2).to(device)])
    for dtype in (torch.float64, torch.float32):
        compare(variant, input.to(dtype), boxes)
    pooled = variant.public(input, boxes)
    assert pooled[4:13].isnan().all()
    assert not pooled[13].isnan().any() or input.isnan().any()
    assert not gradient(variant.public, input, broken[:9]).any()


def test_a_nan_feature_reaches_only_what_touches_it(device: str) -> None:
    boxes = torch.tensor([[0, 1.0, 1, 7, 7], [0, 9, 9, 15, 15], [0, -90, -90, -50, -50]])
    for variant in VARIANTS:
        variant = replace(variant, scale=1.0)
        clean = features(1, 48, 18, 18, device=device)
        dirty = clean.clone()
        dirty[:, :, 3, 3] = NAN
        dirty[:, :, 0, 0] = NAN  # what careless kernels read for samples off the map
        expected, pooled = (variant.public(t, boxes.to(device)) for t in (clean, dirty))
        assert pooled[0].isnan().any()
        assert torch.equal(pooled[1:], expected[1:])


@needs_native
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz_against_reference(data: st.DataObject) -> None:
    draw = data.draw
    size = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    variant = draw(st.sampled_from([*ROI_ALIGN, *PS_AVG, *PS_MAX]))
    scale = draw(st.sampled_from([1.0, 0.25, 1 / 3, 1e-3, 40.0]))
    variant = replace(variant, size=size, scale=scale)
    shape = [draw(st.integers(1, 3)), size[0] * size[1] * draw(st.integers(1, 18))]
    shape += [draw(st.integers(1, 9)), draw(st.integers(1, 9))]
    near = st.floats(-4, 14).map(lambda v: v / scale)
    whole = st.integers(-3, 12).map(float)
    any_number = st.floats(width=32)
    coordinate = st.one_of(near, whole, any_number)
    row = st.tuples(st.integers(0, shape[0] - 1), *([coordinate] * 4))
    rows = draw(st.lists(row, max_size=6))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    boxes = torch.tensor(rows, dtype=torch.float64).view(-1, 5)
    torch.manual_seed(draw(st.integers(0, 99)))
    compare(variant, features(*shape, dtype=dtype), boxes)


# --- against torchvision


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", [*ROI_ALIGN, *PS_AVG, VARIANTS[-2], SIXTEEN_BINS], ids=str)
def test_equals_torchvision(variant: Variant, dtype: torch.dtype, tv: ModuleType) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for height, width in ((9, 13), (1, 1), (30, 4)):
        input = features(2, 48, height, width, dtype=dtype)
        boxes = boxes_on(height, width, 40, variant.scale, 2).to(dtype)
        # the peer crashes or gives NaN for swapped sides under adaptive sampling
        boxes[:, 3:] = torch.maximum(boxes[:, 3:], boxes[:, 1:3] + 0.01)
        calls = (variant.public, lambda i, b: variant.torchvision(tv, i, b))
        assert_near(*(call(input, boxes) for call in calls), tolerance)
        assert_near(*(gradient(call, input, boxes) for call in calls), tolerance)


@pytest.mark.parametrize("variant", [ROI_ALIGN[4], ROI_ALIGN[5], PS_AVG[2]], ids=str)
def test_far_boxes_equal_torchvision(variant: Variant, tv: ModuleType) -> None:
    input = features(2, 48, 9, 12, dtype=torch.float32)
    boxes = torch.tensor(HUGE[:1] + HUGE[2:3] + [[1, -3e6, -2e6, 1e6, 3e6]])
    assert_near(variant.public(input, boxes), variant.torchvision(tv, input, boxes), 1e-5)
    adaptive = replace(variant, ratio=-1, scale=1.0)
    long = torch.tensor([[0, -6e4, 2, 5e4, 8], [1, 3, -9e3, 6, 9e4]])
    assert_near(adaptive.public(input, long), adaptive.torchvision(tv, input, long), 1e-5)


def test_list_of_boxes_equals_torchvision(tv: ModuleType) -> None:
    input = features(3, 48, 9, 12, dtype=torch.float32)
    boxes = boxes_on(9, 12, 12, 0.5, 3).float()
    boxes[:, 3:] = torch.maximum(boxes[:, 3:], boxes[:, 1:3] + 0.01)
    parts = [boxes[:5, 1:], boxes[:0, 1:], boxes[5:, 1:]]
    for variant in (ROI_ALIGN[0], PS_AVG[0]):
        assert_near(variant.public(input, parts), variant.torchvision(tv, input, parts), 1e-5)


# --- gradients, dtypes, determinism


@pytest.mark.parametrize("variant", [ROI_ALIGN[0], ROI_ALIGN[5], *PS_AVG[:1], *PS_MAX], ids=str)
@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
def test_gradcheck(variant: Variant, native: bool, device: str) -> None:
    call = variant.public if native else variant.reference
    input = features(2, 12, 4, 5, device=device).requires_grad_()
    boxes = boxes_on(4, 5, 6, variant.scale, 2).to(device)
    # CUDA adds in no fixed order
    assert torch.autograd.gradcheck(call, (input, boxes), nondet_tol=1e-12, fast_mode=True)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_few_boxes_pool_as_among_many(dtype: torch.dtype, channels_last: bool) -> None:
    """Few boxes read the map as it lies, many read a copy; sums run in the same order."""
    variant = Variant("ps_roi_align", ratio=2)
    format = torch.channels_last if channels_last else torch.contiguous_format
    input = features(2, 18, 21, 23, dtype=dtype).contiguous(memory_format=format)
    boxes = boxes_on(21, 23, 60, variant.scale, 2)
    few, many = input.clone().requires_grad_(), input.clone().requires_grad_()
    alone, among = variant.public(few, boxes[:3]), variant.public(many, boxes)
    assert torch.equal(alone, among[:3])
    weights = torch.linspace(-1, 1, alone.numel()).reshape(alone.shape).to(dtype)
    (alone * weights).sum().backward()
    (among[:3] * weights).sum().backward()
    assert few.grad is not None and many.grad is not None
    assert few.grad.count_nonzero() > 0
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert_near(few.grad, many.grad, tolerance)


@needs_native
@pytest.mark.parametrize("variant", [ROI_ALIGN[0], PS_AVG[0], PS_MAX[0]], ids=str)
def test_double_backward_is_refused(variant: Variant) -> None:
    input = features(1, 12, 6, 6).requires_grad_()
    pooled = variant.public(input, torch.tensor([[0, 1.0, 1, 8, 8]]))
    (grad,) = torch.autograd.grad(pooled.square().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", [ROI_ALIGN[5], PS_AVG[2], PS_MAX[0]], ids=str)
def test_half_features_keep_float32_coordinates(
    variant: Variant, dtype: torch.dtype, device: str
) -> None:
    input = features(2, 48, 20, 20, dtype=dtype, device=device)
    boxes = (boxes_on(20, 20, 20, variant.scale, 2) * 1.001).to(device, torch.float32)
    expected = variant.reference(input.float(), boxes)
    pooled = variant.public(input, boxes)
    assert pooled.dtype == dtype
    assert_near(pooled, expected.to(dtype), torch.finfo(dtype).eps)
    grad = gradient(variant.public, input, boxes)
    exact = gradient(variant.reference, input.float(), boxes)
    assert_near(grad, exact.to(dtype), 4 * torch.finfo(dtype).eps)
    with torch.autocast(device, dtype):
        assert torch.equal(variant.public(input, boxes), pooled)
        assert variant.public(input.float(), boxes).dtype == torch.float32
        assert_near(variant.reference(input, boxes), pooled, torch.finfo(dtype).eps)


@needs_native
@pytest.mark.parametrize("variant", [ROI_ALIGN[5], PS_AVG[0], PS_MAX[0]], ids=str)
def test_threads_do_not_change_the_numbers(variant: Variant) -> None:
    input = features(2, 144, 16, 16, dtype=torch.float32)
    boxes = boxes_on(16, 16, 200, variant.scale, 2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append((variant.public(input, boxes), gradient(variant.public, input, boxes)))
    finally:
        torch.set_num_threads(before)
    for pooled, grad in results[1:]:
        assert torch.equal(pooled, results[0][0])
        assert torch.equal(grad, results[0][1])


@needs_native
@pytest.mark.parametrize("variant", [ROI_ALIGN[5], PS_AVG[0], PS_MAX[0]], ids=str)
def test_deterministic_mode_gives_the_same_gradient(variant: Variant, device: str) -> None:
    input = features(2, 12, 19, 21, device=device)
    boxes = boxes_on(19, 21, 60, variant.scale, 2).to(device)
    usual = gradient(variant.public, input, boxes)
    torch.use_deterministic_algorithms(True)
    try:
        fixed, again = (gradient(variant.public, input, boxes) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(fixed, again)
    assert_near(fixed, usual, 1e-12)


@needs_native
@pytest.mark.gpu
@pytest.mark.parametrize("variant", [ROI_ALIGN[5], PS_AVG[0], PS_MAX[0]], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_cuda_graph_of_pooling(variant: Variant, last: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    input = features(2, 24, 19, 21, dtype=torch.float32, device="cuda")
    if last:
        input = input.contiguous(memory_format=torch.channels_last)
    boxes = boxes_on(19, 21, 60, variant.scale, 2).to("cuda", torch.float32)
    expected = variant.public(input, boxes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pooled = variant.public(input, boxes)
    graph.replay()
    assert torch.equal(pooled, expected)


# --- tracing


def roi_samples(device: str) -> list[tuple[object, ...]]:
    input = features(2, 8, 6, 7, device=device).requires_grad_()
    rois = boxes_on(6, 7, 5, 0.5, 2).to(device)
    return [(input, rois, 0.5, 2, 2, -1, True), (input, rois[:0], 0.5, 1, 4, 2, False)]


@needs_native
def test_opcheck(device: str) -> None:
    ops = torch.ops.detkit
    for args in roi_samples(device):
        torch.library.opcheck(ops.roi_align, args)
        grad = ops.roi_align(*args).detach()
        sizes = (2, 8, 6, 7)
        torch.library.opcheck(ops._roi_align_backward, (grad, *args[1:5], *sizes, *args[5:]))
        for maximum in (False, True):
            ps = (*args[:6], maximum, 0.5)
            torch.library.opcheck(ops.ps_roi_align, ps)
            pooled, argmax = ops.ps_roi_align(*ps)
            backward = (pooled.detach(), args[1], argmax, *ps[2:], *sizes)
            torch.library.opcheck(ops._ps_roi_align_backward, backward)


@needs_native
@pytest.mark.parametrize("variant", [ROI_ALIGN[5], PS_AVG[2], PS_MAX[0]], ids=str)
def test_compile_without_graph_breaks(variant: Variant) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(variant.public, fullgraph=True, backend="aot_eager", dynamic=True)
    for side in (6, 9):
        input = features(2, 12, side, side + 1)
        boxes = boxes_on(side, side, side, variant.scale, 2)
        assert_near(compiled(input, boxes), variant.public(input, boxes), 1e-12)
        grads = [gradient(call, input, boxes) for call in (compiled, variant.public)]
        assert_near(*grads, 1e-12)
    parts = [boxes[:2, 1:], boxes[2:, 1:]]
    assert_near(compiled(input, parts), variant.public(input, parts), 1e-12)


@needs_native
@pytest.mark.slow
def test_compile_with_inductor() -> None:
    def head(input: Tensor, boxes: Tensor) -> Tensor:
        first = roi_align(input * 2, boxes, 2, 0.5, 2, True).relu()
        second = ps_roi_align(input, boxes, 2, 0.5, 2, reduce="max", offset=0.0)
        return first.sum(1) + second.sum(1)

    input, boxes = features(2, 8, 6, 7, dtype=torch.float32), boxes_on(6, 7, 5, 0.5, 2)
    compiled = torch.compile(head, fullgraph=True)
    assert_near(compiled(input, boxes), head(input, boxes), 1e-5)
    assert_near(*(gradient(call, input, boxes) for call in (compiled, head)), 1e-5)


@needs_native
@pytest.mark.parametrize("variant", [ROI_ALIGN[0], PS_AVG[0], PS_MAX[0]], ids=str)
def test_export_with_dynamic_sizes(variant: Variant) -> None:
    class Pool(torch.nn.Module):
        def forward(self, input: Tensor, boxes: Tensor) -> Tensor:
            return variant.public(input, boxes)

    dim = torch.export.Dim
    sizes = ({0: dim("n"), 2: dim("h"), 3: dim("w")}, {0: dim("r")})
    example = (features(2, 12, 6, 7), boxes_on(6, 7, 5, variant.scale, 2))
    program = torch.export.export(Pool(), example, dynamic_shapes=sizes).module()
    input, boxes = features(3, 12, 9, 4), boxes_on(9, 4, 8, variant.scale, 3)
    assert_near(program(input, boxes), variant.public(input, boxes), 1e-12)


@needs_native
def test_reference_with_adaptive_sampling_says_that_it_cannot_be_traced() -> None:
    call = torch.compile(ROI_ALIGN[0].reference, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="sampling_ratio"):
        call(features(1, 4, 6, 6), torch.tensor([[0, 1.0, 1, 4, 4]]))


# --- bad arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(3, 4, 4)}, r"input must be \(N, C, H, W\)"),
        ({"input": torch.zeros(1, 4, 4, 4, dtype=torch.int64)}, "must be floating point"),
        ({"boxes": torch.zeros(2, 4)}, r"boxes must be \(R, 5\)"),
        ({"boxes": [torch.zeros(2, 4)] * 2}, "one tensor per image, got 2 for 1"),
        ({"boxes": [torch.zeros(2, 5)]}, r"must be \(L, 4\)"),
        ({"boxes": torch.tensor([[1, 0, 0, 2.0, 2]])}, r"batch indices must be in 0\.\.0, got 1"),
        ({"boxes": torch.tensor([[-1, 0, 0, 2.0, 2]])}, r"batch indices must be in 0\.\.0, got -1"),
        ({"output_size": 0}, "output_size must be"),
        ({"output_size": (2, 2, 2)}, "output_size must be"),
        ({"spatial_scale": NAN}, "spatial_scale must be positive"),
        ({"sampling_ratio": 4096}, "sampling_ratio must be at most"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], message: str) -> None:
    good = {"input": torch.zeros(1, 4, 4, 4), "boxes": torch.zeros(1, 5), "output_size": 2}
    for op in (roi_align, ps_roi_align):
        with pytest.raises(ValueError, match=message) as error:
            op(**{**good, **change})
        assert str(error.value).startswith(op.__name__)


def test_bad_arguments_of_ps_roi_align_are_refused() -> None:
    with pytest.raises(ValueError, match=r"channels must be a multiple of 7\*7=49, got 48"):
        ps_roi_align(torch.zeros(1, 48, 4, 4), torch.zeros(1, 5), 7)
    with pytest.raises(ValueError, match="reduce must be"):
        ps_roi_align(torch.zeros(1, 4, 4, 4), torch.zeros(1, 5), 2, reduce="min")  # type: ignore[arg-type]


@needs_native
def test_raw_operators_check_again() -> None:
    input, rois = torch.zeros(1, 4, 4, 4), torch.zeros(1, 5)
    ops = torch.ops.detkit
    with pytest.raises(RuntimeError, match="batch indices"):
        ops.roi_align(input, rois + 1, 1.0, 2, 2, 2, False)
    with pytest.raises(RuntimeError, match="float64 for float64"):
        ops.roi_align(input.double(), rois, 1.0, 2, 2, 2, False)
    with pytest.raises(RuntimeError, match="multiple of"):
        ops.ps_roi_align(input, rois, 1.0, 3, 3, 2, False, 0.5)
    with pytest.raises(RuntimeError, match="output's shape"):
        ops._roi_align_backward(input, rois, 1.0, 2, 2, 1, 4, 4, 4, 2, False)
