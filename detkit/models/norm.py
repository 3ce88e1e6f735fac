"""Normalisation layers by name; the batch norms share their state-dict keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from detkit.config import suggest
from detkit.errors import ConfigError

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
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
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


class SyncBatchNorm2d(nn.SyncBatchNorm):
    """Batch norm over the batches of all processes, on CPU too.

    ``nn.SyncBatchNorm`` refuses CPU tensors, so there the statistics are reduced here: the mean
    first and then the centred squares, because the difference of two large sums would cancel. On
    CUDA it is ``nn.SyncBatchNorm``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (N, C, H, W) over N, H, W and the processes."""
        if x.is_cuda:
            return super().forward(x)
        mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or var is None or count is None or self.momentum is None:
            raise ValueError("SyncBatchNorm2d: must track running statistics with a momentum")
        if self.training:
            count.add_(1)
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                return self._over_processes(x, mean, var, self.momentum)
        return F.batch_norm(
            x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def _over_processes(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float
    ) -> Tensor:
        values = x.float()
        dims, shape = (0, 2, 3), (1, -1, 1, 1)
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count)
        mean = _AllReduceSum.apply(values.sum(dims)) / count
        centred = values - mean.view(shape)
        var = _AllReduceSum.apply(centred.square().sum(dims)) / count
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * (count / (count - 1).clamp(min=1)), momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        out: Tensor = centred * scale.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


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
