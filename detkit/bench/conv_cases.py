"""The convolutions, on the maps of ResNet's third to fifth stage for an image of 800x1344."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from detkit import ops
from detkit.bench.case import Case, Pass, Setting, backward, both, forward
from detkit.bench.peers import onnx_call, openvino_call, openvino_ops
from detkit.bench.timing import Call

Shape = tuple[int, int, int]

SHAPES: tuple[Shape, ...] = ((256, 50, 84), (128, 100, 168), (512, 25, 42))
SCALE = (2.37, 1.61)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
PLAIN = "F.conv2d"


def _name(shape: Shape) -> str:
    return "{}x{}x{}".format(*shape)


def _gflop(shape: Shape, d_h: float, d_w: float) -> float:
    """Of a 3x3 convolution; taps outside the image do not count."""
    c, h, w = shape
    rows, columns = h + 2 * max(0, h - int(d_h)), w + 2 * max(0, w - int(d_w))
    return 2e-9 * c * c * rows * columns


def _tensors(setting: Setting, shape: Shape, dtype: str, layout: str = "nchw") -> list[Tensor]:
    """Input (1, C, H, W), weight (C, C, 3, 3) and the output's gradient."""
    c, h, w = shape
    g = torch.Generator().manual_seed(0)
    sizes = ((1, c, h, w), (c, c, 3, 3), (1, c, h, w))
    made = [torch.randn(*size, generator=g) for size in sizes]
    made[1] /= 3 * c**0.5
    return [
        t.to(setting.device, DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout]) for t in made
    ]


def _case(
    op: str,
    size: str,
    part: Pass,
    dtype: str,
    gflop: float,
    calls: Callable[[Setting], dict[str, Call]],
) -> Case:
    work = {"forward": 1, "backward": 2, "forward+backward": 3}[part] * gflop
    # the reference's backward pass alone is torch's own, and in the table as that
    return Case(op, size, part, dtype, calls, gflop=work, reference=part != "backward")


def _cases(
    op: str,
    size: str,
    gflop: Callable[[Shape], float],
    calls: Callable[[Setting, Shape, str, Pass], dict[str, Call]],
) -> list[Case]:
    """One operator on every shape, in the passes and dtypes that it is trained and run in."""
    rows: tuple[tuple[str, Pass], ...] = (
        ("fp32", "forward"),
        ("fp32", "forward+backward"),
        ("bf16", "forward"),
    )
    return [
        _case(
            op,
            f"{_name(shape)} {size}",
            part,
            dtype,
            gflop(shape),
            lambda s, a=(shape, dtype, part): calls(s, *a),  # type: ignore[misc]
        )
        for shape in SHAPES
        for dtype, part in rows
    ]


def dilated_cases() -> list[Case]:
    """Against torch's own convolution: oneDNN on the CPU, cuDNN on CUDA."""
    cases = []
    for shape in SHAPES:
        rows = [(d, "fp32", "nchw") for d in (1, 2, 3, 9)]
        rows += [(d, "fp32", "nhwc") for d in (2, 9)] + [(2, "bf16", "nchw")]
        for d, dtype, layout in rows:
            size = f"{_name(shape)} d={d}" + (" nhwc" if layout == "nhwc" else "")
            passes: tuple[Pass, ...] = ("forward", "backward")
            for part in passes:
                cases.append(
                    _case(
                        "dilated_conv2d",
                        size,
                        part,
                        dtype,
                        _gflop(shape, d, d),
                        lambda s, a=(shape, d, dtype, layout, part): _dilated(s, *a),  # type: ignore[misc]
                    )
                )
    return cases


def _dilated(
    setting: Setting, shape: Shape, d: int, dtype: str, layout: str, part: Pass
) -> dict[str, Call]:
    x, weight, grad = _tensors(setting, shape, dtype, layout)
    functions: dict[str, Callable[..., Tensor]] = {
        "detkit": lambda x, w: ops.dilated_conv2d(x, w, padding=d, dilation=d),
        PLAIN: lambda x, w: F.conv2d(x, w, padding=d, dilation=d),
    }
    if part == "backward":
        return {name: backward(f, [x, weight], grad) for name, f in functions.items()}
    data = [(x, weight), (x.clone(memory_format=torch.preserve_format), weight)]
    return {name: forward(f, data) for name, f in functions.items()}


def scaled_cases() -> list[Case]:
    """Against deformable convolutions whose offsets make one scale, and a plain one at d = 2."""
    return _cases("scaled_conv2d", "d=2.37,1.61", lambda shape: _gflop(shape, *SCALE), _scaled)


def _scaled(setting: Setting, shape: Shape, dtype: str, part: Pass) -> dict[str, Call]:
    x, weight, grad = _tensors(setting, shape, dtype)
    scales = torch.tensor([SCALE], device=setting.device)
    if part == "forward+backward":
        calls = {"detkit": both(ops.scaled_conv2d, [x, weight, scales], grad)}
        if "torchvision" in setting.peers:
            inputs = [x, weight, _offsets(x)]
            calls["torchvision"] = both(_deformable(setting), inputs, grad)
        plain = both(lambda x, w: F.conv2d(x, w, padding=2, dilation=2), [x, weight], grad)
        return calls | {PLAIN: plain}
    calls = {"detkit": forward(ops.scaled_conv2d, [(x, weight, scales)])}
    if dtype == "bf16":
        wide = (x.float(), weight.float(), scales)
        calls["detkit fp32"] = forward(ops.scaled_conv2d, [wide])
    else:
        calls |= _deformable_peers(setting, x, weight)
    plain = forward(lambda x, w: F.conv2d(x, w, padding=2, dilation=2), [(x, weight)])
    return calls | {PLAIN: plain}


def _offsets(x: Tensor) -> Tensor:
    """(1, 18, H, W) that put the taps of an undilated 3x3 kernel where `SCALE` has them."""
    tap = torch.arange(9, device=x.device)
    grid = torch.stack([tap // 3 - 1, tap % 3 - 1], 1)  # (9, 2)
    moved = grid * (torch.tensor(SCALE, device=x.device) - 1)
    return moved.reshape(1, 18, 1, 1).expand(1, 18, *x.shape[2:]).to(x.dtype).contiguous()


def _deformable(setting: Setting) -> Callable[..., Tensor]:
    convolve = setting.peers["torchvision"].ops.deform_conv2d
    return lambda x, w, offset: convolve(x, offset, w, padding=1)


def _deformable_peers(setting: Setting, x: Tensor, weight: Tensor) -> dict[str, Call]:
    offset, calls = _offsets(x), {}
    if "torchvision" in setting.peers:
        calls["torchvision"] = forward(_deformable(setting), [(x, weight, offset)])
    if "mmcv" in setting.peers:
        convolve = setting.peers["mmcv"].deform_conv2d
        calls["mmcv"] = forward(lambda x, w, o: convolve(x, o, w, 1, 1), [(x, weight, offset)])
    if setting.has("onnxruntime"):
        feed = {"x": x, "weight": weight, "offset": offset}
        shape: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
        calls["onnxruntime"] = onnx_call("DeformConv", [feed], 19, setting.threads, **shape)
    if setting.has("openvino"):
        op = openvino_ops()
        inputs = [op.parameter(list(t.shape), np.float32) for t in (x, offset)]
        node = op.deformable_convolution(
            *inputs, op.constant(weight.numpy()), [1, 1], [1, 1], [1, 1], [1, 1],
            auto_pad="explicit", group=1, deformable_group=1, bilinear_interpolation_pad=True,
        )  # fmt: skip
        outputs = [node.output(0)]
        calls["openvino"] = openvino_call(outputs, inputs, [(x, offset)], setting.threads)
    return calls


def split_cases() -> list[Case]:
    """Half the channels at d = 1 and half at 2, against one plain convolution of all at d = 2."""

    def gflop(shape: Shape) -> float:
        return (_gflop(shape, 1, 1) + _gflop(shape, 2, 2)) / 2

    return _cases("split_conv2d", "d=1 and 2", gflop, _split)


def _split(setting: Setting, shape: Shape, dtype: str, part: Pass) -> dict[str, Call]:
    x, weight, grad = _tensors(setting, shape, dtype)
    half = shape[0] // 2
    inputs = [x, weight[:half].contiguous(), weight[half:].contiguous()]

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=2, dilation=2)

    functions: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "detkit": (lambda x, *w: ops.split_conv2d(x, w, None, [(1, 1), (2, 2)]), inputs),
        PLAIN: (plain, [x, weight]),
        f"2 {PLAIN}, cat": (
            lambda x, a, b: torch.cat([F.conv2d(x, a, padding=1), plain(x, b)], 1),
            inputs,
        ),
    }
    if part == "forward":
        return {name: forward(f, [tensors]) for name, (f, tensors) in functions.items()}
    return {name: both(f, tensors, grad) for name, (f, tensors) in functions.items()}
