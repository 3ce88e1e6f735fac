"""Normalisation layers by name; the batch norms share their state-dict keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm as CudaSyncBatchNorm

from detkit.config import suggest
from detkit.errors import ConfigError
from detkit.ops import dilated_conv2d
from detkit.ops._autotune import may_choose

Norm = Callable[[int], nn.Module]
"""Makes the layer for a number of channels."""

_GROUPS = 32


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with fixed statistics, scale and shift, whatever ``train()`` says."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Stays in evaluation mode, whatever ``mode``."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (N, C, H, W) with the stored statistics."""
        mean, var = self._statistics()
        if not torch.is_grad_enabled() or x.dtype != mean.dtype:
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        # The same as one multiply-add: its gradient needs no copy of x, which halves what a
        # training step remembers.
        scale, shift = self.factors()
        return torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The scale and shift (C,) that statistics, weight and bias amount to."""
        mean, var = self._statistics()
        scale = self.weight * (var + self.eps).rsqrt()
        return scale, self.bias - mean * scale

    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            raise ValueError("FrozenBatchNorm2d: must hold running statistics, got none")
        return mean, var


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(conv(x))``; in training a convolution and its frozen norm are one convolution.

    A fixed scale and shift per channel go into the weights, whose gradient comes back through the
    same scale. So no map is passed over a second time, forward or backward. Layers of other kinds,
    layers with hooks and calls without gradients (``detkit.deploy.fold`` is for these) take the
    two steps.
    """
    plain = type(conv) is nn.Conv2d and type(norm) is FrozenBatchNorm2d
    if plain and torch.is_grad_enabled() and isinstance(x, Tensor) and not _hooked(conv, norm):
        return _scaled(cast(nn.Conv2d, conv), cast(FrozenBatchNorm2d, norm), x)
    out: Tensor = norm(conv(x))
    return out


def conv_norm_relu(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """``relu(norm(conv(x)))``; one operator where the norm has been folded into a convolution that
    can end with a ReLU: one of detkit's (``rectifies``), or on CUDA a dilated one.
    """
    if isinstance(norm, nn.Identity) and not _hooked(conv, norm):
        if getattr(conv, "rectifies", False):
            out: Tensor = conv(x, relu=True)
            return out
        if type(conv) is nn.Conv2d and _measured_on_cuda(conv, x):
            return dilated_conv2d(
                x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
                relu=True,
            )  # fmt: skip
    return F.relu_(conv_norm(conv, norm, x))


def _measured_on_cuda(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether the fastest way is chosen among torch's own convolution and ours."""
    return max(conv.dilation) > 1 and conv.padding_mode == "zeros" and may_choose(x)


def _scaled(conv: nn.Conv2d, norm: FrozenBatchNorm2d, x: Tensor) -> Tensor:
    scale, shift = norm.factors()
    bias = shift if conv.bias is None else torch.addcmul(shift, conv.bias, scale)
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    if _better_dilated(conv, x):
        return F.conv2d(x, weight, bias, conv.stride, 0, 2, conv.groups)
    out: Tensor = conv._conv_forward(x, weight, bias)
    return out


def _better_dilated(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether to call a 1x1 convolution dilated, which moves no tap.

    With one thread torch multiplies fp32 matrices itself for 1x1 kernels, image by image, unless
    they are dilated: those are oneDNN's, a tenth faster forward and backward on channels last maps.
    """
    pointwise = conv.kernel_size == (1, 1) and conv.padding == (0, 0)
    plain = not torch.compiler.is_compiling() and x.dtype == torch.float32 and not x.is_cuda
    return pointwise and plain and not x.is_contiguous() and torch.get_num_threads() == 1


def _hooked(*modules: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)


class ConvThenNorm(nn.Sequential):
    """A convolution and its norm, numbered as in ``nn.Sequential``."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, cin, H, W) to (N, cout, ...)."""
        conv, norm = self
        return conv_norm(conv, norm, x)


def has_trained_norms(module: nn.Module) -> bool:
    """Whether a batch norm inside takes statistics from what it sees, in training mode."""
    return any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and not isinstance(m, FrozenBatchNorm2d)
        for m in module.modules()
    )


class _AllReduceSum(torch.autograd.Function):
    """Sum over all processes whose gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on CPU too.

    On CUDA it computes what ``nn.SyncBatchNorm`` does. That class refuses CPU tensors, and a
    data-parallel wrapper refuses the class on CPU; so here the statistics are reduced in two
    passes, the mean and then the centred squares, because a difference of large sums would cancel.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (N, C, H, W) over N, H, W and the processes."""
        mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or var is None or batches is None or self.momentum is None:
            raise ValueError("SyncBatchNorm2d: must track running statistics with a momentum")
        if not (self.training and _many_processes()):
            return super().forward(x)
        batches.add_(1)
        if x.is_cuda:
            world = dist.group.WORLD, dist.get_world_size()
            args = (self.weight, self.bias, mean, var, self.eps, self.momentum, *world)
            out: Tensor = CudaSyncBatchNorm.apply(x, *args)
            return out
        return self._over_processes(x, mean, var, self.momentum)

    def _over_processes(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float
    ) -> Tensor:
        values = x.float()
        dims, shape = (0, 2, 3), (1, -1, 1, 1)
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count)
        count.clamp_(min=1)  # no process may have rows
        mean = _AllReduceSum.apply(values.sum(dims)) / count
        centred = values - mean.view(shape)
        var = _AllReduceSum.apply(centred.square().sum(dims)) / count
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * (count / (count - 1).clamp(min=1)), momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        out: Tensor = centred * scale.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


def _many_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rows_norm(name: str) -> Norm:
    """As :func:`norm_named` for rows (R, C, 1, 1), where small groups would be single numbers:
    group norm takes all channels together.
    """
    return one_group if name == "gn" else norm_named(name)


def normalise_rows(norm: nn.Module, rows: Tensor) -> Tensor:
    """``norm`` of rows (R, C); a single row has no deviation and takes the running statistics."""
    x = rows[..., None, None]
    together = isinstance(norm, SyncBatchNorm2d) and _many_processes()
    if isinstance(norm, nn.BatchNorm2d) and norm.training and len(rows) == 1 and not together:
        out = F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
        )
    else:
        out = norm(x)
    return out.flatten(1)


def one_group(channels: int) -> nn.GroupNorm:
    """Group norm of all channels together."""
    return nn.GroupNorm(1, channels)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with 32 groups, or the largest power of two below that divides ``channels``."""
    return nn.GroupNorm(math.gcd(_GROUPS, channels), channels)


NORMS: dict[str, Norm] = {
    "frozen_bn": FrozenBatchNorm2d,
    "bn": nn.BatchNorm2d,
    "sync_bn": SyncBatchNorm2d,
    "gn": group_norm,
    "none": nn.Identity,
}


def norm_named(name: str) -> Norm:
    """Maker of the layer; raises ConfigError for a name that is not in NORMS."""
    if name not in NORMS:
        raise ConfigError(
            f"norm: must be one of {', '.join(NORMS)}, got {name!r}{suggest(name, NORMS)}"
        )
    return NORMS[name]
