"""Non-maximum suppression and the RoI operators, at the sizes of full detectors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from detkit import ops
from detkit.bench import boxes as made
from detkit.bench.case import Case, Setting, both, forward
from detkit.bench.peers import onnx_call, openvino_call, openvino_ops
from detkit.bench.timing import Call

Boxes = list[tuple[Tensor, ...]]

NMS = (
    ("proposals", 1000, made.proposals),
    ("proposals", 6000, made.proposals),
    ("proposals", 12000, made.proposals),
    ("proposals", 50000, made.proposals),
    ("mixed", 20000, made.mixed),
    ("sparse", 100000, made.sparse),
)
ROIS = 1000
LEVELS = 4


def nms_cases() -> list[Case]:
    """Threshold 0.7 on boxes of one class, 0.5 on those of 80 classes."""
    single = [
        Case(
            "nms",
            f"{kind} {n}",
            "forward",
            "fp32",
            lambda s, n=n, make=make: _nms_calls(s, n, make),  # type: ignore[misc]
            mbytes=20e-6 * n,
            reference=n <= 6000,
        )
        for kind, n, make in NMS
    ]
    return single + [
        Case(
            "batched_nms",
            f"80 classes {n}",
            "forward",
            "fp32",
            lambda s, n=n: _batched_calls(s, n),  # type: ignore[misc]
            mbytes=28e-6 * n,
            reference=n <= 6000,
        )
        for n in (1000, 6000, 20000)
    ]


def _sets(setting: Setting, n: int, make: Callable[[int, int], tuple[Tensor, Tensor]]) -> Boxes:
    """Several, since a processor learns the outcome of every branch on a small one."""
    count = 8 if n <= 12000 else 2
    return [tuple(t.to(setting.device) for t in make(n, seed)) for seed in range(count)]


def _nms_calls(
    setting: Setting, n: int, make: Callable[[int, int], tuple[Tensor, Tensor]]
) -> dict[str, Call]:
    data, peers = _sets(setting, n, make), setting.peers
    calls = {"detkit": forward(lambda b, s: ops.nms(b, s, 0.7), data)}
    if "torchvision" in peers:
        nms = peers["torchvision"].ops.nms
        calls["torchvision"] = forward(lambda b, s: nms(b, s, 0.7), data)
    if "mmcv" in peers:
        calls["mmcv"] = forward(lambda b, s: peers["mmcv"].nms(b, s, 0.7), data)
    if setting.has("onnxruntime") and n <= 50000:
        most, threshold = torch.tensor([n]), torch.tensor([0.7])
        feeds = [
            {"boxes": b[None], "scores": s[None, None], "most": most, "iou": threshold}
            for b, s in data
        ]
        calls["onnxruntime"] = onnx_call("NonMaxSuppression", feeds, 11, setting.threads)
    if setting.has("openvino"):
        op = openvino_ops()
        b, s = op.parameter([1, n, 4], np.float32), op.parameter([1, 1, n], np.float32)
        constants = (op.constant(v) for v in (np.int64(n), np.float32(0.7), np.float32(0)))
        node = op.non_max_suppression(
            b, s, *constants, box_encoding="corner", sort_result_descending=False
        )
        pairs = [(x[None], y[None, None]) for x, y in data]
        outputs = [node.output(0), node.output(2)]
        calls["openvino"] = openvino_call(outputs, [b, s], pairs, setting.threads)
    return calls


def _batched_calls(setting: Setting, n: int) -> dict[str, Call]:
    g = torch.Generator().manual_seed(9)
    data = [
        (*pair, torch.randint(80, (n,), generator=g).to(setting.device))
        for pair in _sets(setting, n, made.proposals)
    ]
    calls = {"detkit": forward(lambda b, s, i: ops.batched_nms(b, s, i, 0.5), data)}
    if "torchvision" in setting.peers:
        batched = setting.peers["torchvision"].ops.batched_nms
        calls["torchvision"] = forward(lambda b, s, i: batched(b, s, i, 0.5), data)
    return calls


def roi_cases() -> list[Case]:
    """7x7 bins of four points each: RoIAlign on one level and four, PS-RoIAlign on a thin map."""
    out = ROIS * 256 * 49
    one = 4e-6 * (256 * 200 * 272 + out)
    four = 4e-6 * (256 * sum((200 >> i) * (272 >> i) for i in range(LEVELS)) + out)
    thin = 4e-6 * (490 * 50 * 84 + ROIS * 490)
    size, levels, ps = "256x200x272", "4 levels 256", "490x50x84"
    return [
        _roi_case("roi_align", size, False, one, lambda s: _align_calls(s, "nchw")),
        _roi_case("roi_align", f"{size} nhwc", False, one, lambda s: _align_calls(s, "nhwc")),
        _roi_case("roi_align", size, True, 2 * one, _align_both),
        _roi_case("roi_align", levels, False, four, lambda s: _level_calls(s, False)),
        _roi_case("roi_align", levels, True, 2 * four, lambda s: _level_calls(s, True)),
        _roi_case("ps_roi_align", ps, False, thin, lambda s: _ps_calls(s, "nchw")),
        _roi_case("ps_roi_align", f"{ps} nhwc", False, thin, lambda s: _ps_calls(s, "nhwc")),
        _roi_case("ps_roi_align", ps, True, 2 * thin, _ps_both),
    ]


def _roi_case(
    op: str, size: str, grad: bool, mbytes: float, calls: Callable[[Setting], dict[str, Call]]
) -> Case:
    return Case(op, size, "forward+backward" if grad else "forward", "fp32", calls, mbytes=mbytes)


def _align(function: Callable[..., Tensor], scale: float = 0.25) -> Callable[..., Tensor]:
    return lambda x, rois: function(x, rois, 7, scale, 2, True)


def _aligners(setting: Setting) -> dict[str, Callable[..., Tensor]]:
    """Callables of (input, rois, size, scale, points, aligned)."""
    found: dict[str, Callable[..., Tensor]] = {"detkit": ops.roi_align}
    if "torchvision" in setting.peers:
        found["torchvision"] = setting.peers["torchvision"].ops.roi_align
    if "mmcv" in setting.peers:
        roi_align = setting.peers["mmcv"].roi_align
        found["mmcv"] = lambda x, r, size, scale, n, a: roi_align(x, r, size, scale, n, "avg", a)
    return found


def _level(setting: Setting, i: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(i)
    return torch.randn(1, 256, 200 >> i, 272 >> i, generator=g).to(setting.device)


def _align_calls(setting: Setting, layout: str) -> dict[str, Call]:
    x, rois = _level(setting), made.regions(ROIS, 1088, 800).to(setting.device)
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    data = [(x, rois), (x.clone(), rois)]
    calls = {name: forward(_align(f), data) for name, f in _aligners(setting).items()}
    if layout == "nhwc":
        return calls
    feed = {"x": x, "rois": rois[:, 1:].contiguous(), "images": torch.zeros(ROIS).long()}
    if setting.has("onnxruntime"):
        calls["onnxruntime"] = onnx_call(
            "RoiAlign", [feed], 16, setting.threads, output_height=7, output_width=7,
            sampling_ratio=2, spatial_scale=0.25, mode="avg",
            coordinate_transformation_mode="half_pixel",
        )  # fmt: skip
    if setting.has("openvino"):
        op = openvino_ops()
        inputs = [op.parameter(list(t.shape), np.float32) for t in (x, feed["rois"])]
        inputs.append(op.parameter([ROIS], np.int32))
        # the mode whose coordinates are torchvision's
        node = op.roi_align(*inputs, 7, 7, 2, 0.25, "avg", "half_pixel_for_nn")
        tensors = (x, feed["rois"], feed["images"].int())
        calls["openvino"] = openvino_call([node.output(0)], inputs, [tensors], setting.threads)
    return calls


def _align_both(setting: Setting) -> dict[str, Call]:
    x, rois = _level(setting), made.regions(ROIS, 1088, 800).to(setting.device)
    grad = torch.randn(ROIS, 256, 7, 7, device=setting.device)

    def call(function: Callable[..., Tensor]) -> Call:
        return both(lambda x: _align(function)(x, rois), [x], grad)

    return {name: call(function) for name, function in _aligners(setting).items()}


def _level_calls(setting: Setting, grad: bool) -> dict[str, Call]:
    """RoIs go to the level that fits their size, and the results to one tensor."""
    maps = [_level(setting, i) for i in range(LEVELS)]
    rois = made.regions(ROIS, 1088, 800).to(setting.device)
    sides = (rois[:, 3:] - rois[:, 1:3]).clamp(min=1).prod(1).sqrt()
    level = (sides / 56).log2().floor().clamp(0, LEVELS - 1)  # 224 pixels belong to the third
    groups = [(level == i).nonzero().flatten() for i in range(LEVELS)]
    upstream = torch.randn(ROIS, 256, 7, 7, device=setting.device)

    def pool(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*maps: Tensor) -> Tensor:
            found = [
                function(x, rois[group], 7, 0.25 / 2**i, 2, True)
                for i, (x, group) in enumerate(zip(maps, groups, strict=True))
            ]
            output = found[0].new_empty(ROIS, 256, 7, 7)
            for group, part in zip(groups, found, strict=True):
                output[group] = part
            return output

        return run

    aligners = _aligners(setting)
    if grad:
        return {name: both(pool(f), maps, upstream) for name, f in aligners.items()}
    return {name: forward(pool(f), [maps]) for name, f in aligners.items()}


def _ps_pools(setting: Setting) -> dict[str, Callable[..., Tensor]]:
    found: dict[str, Callable[..., Tensor]] = {"detkit": ops.ps_roi_align}
    if "torchvision" in setting.peers:
        found["torchvision"] = setting.peers["torchvision"].ops.ps_roi_align
    return found


def _thin(setting: Setting) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    rois = made.regions(ROIS, 1344, 800, seed=6).to(setting.device)
    return torch.randn(1, 490, 50, 84, generator=g).to(setting.device), rois


def _ps_calls(setting: Setting, layout: str) -> dict[str, Call]:
    x, rois = _thin(setting)
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    # where a map lies in memory changes torchvision's time threefold: take several
    data = [(x.clone(), rois) for _ in range(8)]
    pools = _ps_pools(setting)
    return {n: forward(lambda x, r, f=f: f(x, r, 7, 1 / 16, 2), data) for n, f in pools.items()}


def _ps_both(setting: Setting) -> dict[str, Call]:
    x, rois = _thin(setting)
    grad = torch.randn(ROIS, 10, 7, 7, device=setting.device)
    pools = _ps_pools(setting)
    return {n: both(lambda x, f=f: f(x, rois, 7, 1 / 16, 2), [x], grad) for n, f in pools.items()}
