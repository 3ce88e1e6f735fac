"""What the three convolutions share: argument checks, rules of layout, autocast and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

IntPair = int | Sequence[int]


def require(condition: bool, what: str, must: str, got: object) -> None:
    """Raise ValueError ``<what>: <must hold>, got <value>`` unless ``condition``."""
    if not condition:
        raise ValueError(f"{what}: {must}, got {got}")


def pair(op: str, name: str, value: IntPair, least: int) -> list[int]:
    """``[h, w]`` of an int or a pair of ints, each at least ``least``."""
    values = [value, value] if isinstance(value, int) else list(value)
    if len(values) == 1:
        values *= 2
    ok = len(values) == 2 and all(isinstance(v, int) and v >= least for v in values)
    require(ok, op, f"{name} must be an int or two ints of at least {least}", value)
    return values


def check_tensors(
    op: str, input: Tensor, weights: Sequence[Tensor], bias: Tensor | None, outputs: int
) -> None:
    """Check rank, dtype and device of the tensors of a convolution with ``outputs`` channels."""
    require(input.dim() == 4, op, "input must be (N, C, H, W)", f"shape {tuple(input.shape)}")
    require(input.is_floating_point(), op, "input must be floating point", input.dtype)
    mixed = _autocasts(input)  # autocast makes the dtypes equal later
    for weight in weights:
        shape = f"shape {tuple(weight.shape)}"
        require(weight.dim() == 4, op, "weight must be (O, C/groups, kh, kw)", shape)
    for tensor in (*weights, bias):
        if tensor is None:
            continue
        name = "bias" if tensor is bias else "weight"
        require(
            tensor.device == input.device, op, f"{name} must be on {input.device}", tensor.device
        )
        same = tensor.dtype == input.dtype or (mixed and tensor.is_floating_point())
        require(same, op, f"{name} must be {input.dtype} like the input", tensor.dtype)
    if bias is not None:
        require(bias.shape == (outputs,), op, f"bias must be ({outputs},)", tuple(bias.shape))


def check_groups(
    op: str, channels: int, weight: Tensor, groups: int, *, whole: bool = True
) -> None:
    """Check that ``channels`` inputs, and with ``whole`` the outputs, divide into ``groups``."""
    require(groups >= 1, op, "groups must be at least 1", groups)
    wanted, outputs = weight.shape[1] * groups, weight.shape[0]
    must = f"input channels must be groups * weight.shape[1] = {wanted}"
    require(channels == wanted, op, must, channels)
    divides = not whole or outputs % groups == 0
    require(divides, op, f"output channels must be a multiple of groups={groups}", outputs)


def memory_format(input: Tensor) -> torch.memory_format:
    """Layout of an output: channels_last if the input is just that, else contiguous."""
    if not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty_output(input: Tensor, channels: int, size: Sequence[int | torch.SymInt]) -> Tensor:
    """What the kernels allocate: (N, channels, *size) in the input's layout."""
    shape = (input.shape[0], channels, *size)
    return torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input)
    )


def empty_grad(tensor: Tensor, needed: bool) -> Tensor:
    """What the backward kernels return for one tensor: its gradient, alike, or an empty tensor."""
    if not needed:
        return tensor.new_empty(0)
    format = memory_format(tensor) if tensor.dim() == 4 else torch.contiguous_format
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=format)


def save_input(
    ctx: Any, input: Tensor, needed: bool, *others: Tensor, rectified: Tensor | None = None
) -> None:
    """Save ``others`` for backward, and ``input``, or just its shape if that is all it needs; the
    output where it was ``rectified``.
    """
    last = () if rectified is None else (rectified,)
    ctx.save_for_backward(*((input,) if needed else ()), *others, *last)
    ctx.input_saved, ctx.rectified = needed, rectified is not None
    ctx.input_shape, ctx.input_format = input.shape, memory_format(input)


def saved_input(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    """The tensors of :func:`save_input`; an input that was not needed is one element, expanded."""
    saved = ctx.saved_tensors[:-1] if ctx.rectified else ctx.saved_tensors
    if ctx.input_saved:
        return tuple(saved)
    return (grad.new_zeros(()).expand(ctx.input_shape), *saved)


def before_relu(ctx: Any, grad: Tensor) -> Tensor:
    """The gradient of the sums that a call with ``relu`` cut at 0; otherwise ``grad`` itself."""
    if not ctx.rectified:
        return grad
    cut: Tensor = torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[-1], 0)
    return cut


def input_grad(ctx: Any, grad: Tensor) -> Tensor | None:
    """Gradient of the first argument in its layout, None where nobody asked for it."""
    return grad.contiguous(memory_format=ctx.input_format) if ctx.needs_input_grad[0] else None


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype autocast gives a convolution of ``tensor``, or None where it leaves it alone."""
    if tensor.dtype == torch.float64 or not _autocasts(tensor):
        return None
    return torch.get_autocast_dtype(tensor.device.type)


def _autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; asking about meta tensors is an error."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def register_autocast(
    library: torch.library.Library, name: str, apply: Callable[..., Tensor], casts: Sequence[int]
) -> None:
    """Let autocast cast the arguments of ``detkit::name`` at positions ``casts``.

    ``torch.library.register_autocast`` casts every tensor (scales must stay float32), and to a
    dtype that is fixed at registration.
    """

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, list | tuple):
            return [cast(v, dtype) for v in value]
        return value if value is None or value.dtype == torch.float64 else value.to(dtype)

    for device in ("cpu", "cuda"):

        def rule(*args: Any, device: str = device) -> Tensor:
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return apply(*(cast(a, dtype) if i in casts else a for i, a in enumerate(args)))

        library.impl(name, rule, f"Autocast{device.upper()}")


def no_double_backward(ctx: Any, *grads: Any) -> NoReturn:
    """Backward of the backward operators."""
    raise RuntimeError("detkit convolutions: double backward is not supported")
