"""Density of connection (POD, Peng et al., ICCV 2019, section 3.2): how many paths lead from an
input at some offset to an output neuron, with every learned weight set to one.

Densities are float64 arrays of odd sides, the output neuron at the centre. :func:`scaled_kernel`
and :func:`split_kernel` give them for one layer per input channel, :func:`chain` for layers in a
row, :func:`direct` by differentiating a network of ones, which must agree.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detkit.scales.learner import FixedScaleConv2d, GlobalScaleConv2d

Parts = Sequence[tuple[float, tuple[int, int]]]
"""Share of the output channels and dilation (D_h, D_w) of each part; 0 is a kernel of side 1."""


def scaled_kernel(scales: Sequence[float]) -> Tensor:
    """Density (2 n_h + 3, 2 n_w + 3) of one 3x3 layer sampled at (d_h, d_w), n = floor(d).

    Raises:
        ValueError: A scale is negative or not finite.
    """
    if not all(0 <= d < math.inf for d in scales):
        raise ValueError(f"scaled_kernel: scales must be finite and not negative, got {scales}")
    h, w = (_axis(d) for d in scales)
    return torch.outer(h, w)


def _axis(d: float) -> Tensor:
    """Weights of the whole offsets -n-1..n+1 that taps at -d, 0 and d are interpolated from."""
    whole = math.floor(d)
    fraction = d - whole
    line = torch.zeros(2 * whole + 3, dtype=torch.float64)
    centre = whole + 1
    for offset, weight in ((0, 1.0), (whole, 1 - fraction), (-whole, 1 - fraction)):
        line[centre + offset] += weight
    line[0] += fraction
    line[-1] += fraction
    return line


def split_kernel(parts: Parts, *, merged: bool = True) -> Tensor:
    """Mean density over the output channels of a layer of plain convolutions.

    Args:
        parts: Shares and dilations.
        merged: Count a kernel of side 1 as the three paths that fall together at dilation 0, which
            keeps the mass 9; otherwise as the one weight it has.
    """
    reach = [max(d[axis] for _, d in parts) for axis in (0, 1)]
    density = torch.zeros(2 * reach[0] + 1, 2 * reach[1] + 1, dtype=torch.float64)
    for share, dilation in parts:
        h, w = (_taps(d, r, merged) for d, r in zip(dilation, reach, strict=True))
        density += share * torch.outer(h, w)
    return density


def _taps(dilation: int, reach: int, merged: bool) -> Tensor:
    line = torch.zeros(2 * reach + 1, dtype=torch.float64)
    for offset in (-dilation, 0, dilation):
        line[reach + offset] += 1.0
    return line if dilation or merged else line.clamp(max=1.0)


def chain(layers: Iterable[tuple[Tensor, int]]) -> Tensor:
    """Density of layers in a row, scaled to mass 1 as path counts of deep networks overflow.

    Args:
        layers: Density of each layer and its stride, first layer first.
    """
    total, step = torch.ones(1, 1, dtype=torch.float64), 1
    for density, stride in layers:
        spread = torch.zeros(*((n - 1) * step + 1 for n in density.shape), dtype=torch.float64)
        spread[::step, ::step] = density / density.sum()
        total = _convolve(total, spread)
        step *= stride
    return total


def _convolve(a: Tensor, b: Tensor) -> Tensor:
    """Full convolution of two symmetric densities."""
    pad = [n - 1 for n in b.shape]
    return F.conv2d(a[None, None], b.flip(0, 1)[None, None], padding=pad)[0, 0]


def residual(kernel: Tensor, channels: int, width: int, *, project: bool = False) -> Tensor:
    """Density of a bottleneck: ``channels * width**2 * kernel`` and 1 at the centre, ``channels``
    there with a convolved shortcut.

    Args:
        kernel: Density of its 3x3 layer per input channel.
        channels: Input channels.
        width: Channels of the 3x3 layer.
        project: Whether a convolution is on the shortcut.
    """
    density = channels * width**2 * kernel
    density[density.shape[0] // 2, density.shape[1] // 2] += channels if project else 1
    return density


def direct(model: nn.Module, channels: int, side: int) -> Tensor:
    """Density (side, side) of a network by differentiation, summed over its input channels, for the
    mean channel of the output at the centre of the map.

    The network is copied; convolutions and linear layers get weights of one and no bias, norms and
    activations become the identity, max pooling adds its window up.

    Args:
        model: Module from (1, channels, side, side) to a map; scale learners must be frozen.
        channels: Input channels.
        side: Side of the input in pixels, large enough that no path meets the border; ``side - 1``
            must be a multiple of twice the network's stride, so that an output is at the centre.

    Raises:
        ValueError: ``model`` holds scale learners, or ``side`` does not fit.
    """
    ones = _of_ones(model)
    x = torch.ones(1, channels, side, side, dtype=torch.float64, requires_grad=True)
    y = ones(x)
    size = [(n - 1) // 2 for n in y.shape[2:]]
    (grad,) = torch.autograd.grad(y[0, :, size[0], size[1]].mean(), x)
    density: Tensor = grad[0].sum(0)
    border = density.clone()
    border[1:-1, 1:-1] = 0
    if bool(border.any()) or not torch.allclose(density, density.flip(0, 1)):
        raise ValueError(
            "direct: side must hold all paths and, less 1, be a multiple of twice the network's "
            f"stride, got {side}"
        )
    return density


_IDENTITIES = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.SiLU,
    nn.GELU,
)


def _of_ones(model: nn.Module) -> nn.Module:
    holder = nn.Sequential(copy.deepcopy(model)).double()
    for parent in list(holder.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, GlobalScaleConv2d):
                raise ValueError("direct: scale learners must be frozen, got one at work")
            if isinstance(child, _IDENTITIES):
                setattr(parent, name, nn.Identity())
            elif isinstance(child, nn.MaxPool2d):
                pool = nn.AvgPool2d(
                    child.kernel_size,
                    child.stride,
                    child.padding,
                    child.ceil_mode,
                    divisor_override=1,
                )
                setattr(parent, name, pool)
    for path, parameter in holder.named_parameters():
        parameter.data.fill_(0.0 if path.endswith("bias") else 1.0)
        parameter.requires_grad_(False)
    return holder[0].eval()


def total_variation(a: Tensor, b: Tensor) -> float:
    """Half the sum of absolute differences of two densities scaled to mass 1, in 0..1."""
    side = [max(x, y) for x, y in zip(a.shape, b.shape, strict=True)]
    first, second = (_centred(k / k.sum(), side) for k in (a, b))
    return float((first - second).abs().sum() / 2)


def _centred(density: Tensor, size: Sequence[int]) -> Tensor:
    h, w = ((n - m) // 2 for n, m in zip(size, density.shape, strict=True))
    return F.pad(density, (w, w, h, h))


def mean_reach(density: Tensor) -> tuple[float, float]:
    """Mean distance to the centre along h and along w, weighted by the density."""
    mass = density / density.sum()
    reach = []
    for axis in (0, 1):
        side = mass.shape[axis]
        distance = (torch.arange(side, dtype=torch.float64) - side // 2).abs()
        reach.append(float(mass.sum(1 - axis) @ distance))
    return reach[0], reach[1]


def split_distance(scales: Sequence[float], parts: Parts) -> float:
    """Total variation between a layer sampled at ``scales`` and its plain convolutions."""
    with torch.device("cpu"):
        return total_variation(scaled_kernel(scales), split_kernel(parts))


def fixed(conv: nn.Conv2d, scales: Sequence[float]) -> nn.Module:
    """``conv`` at fixed scales (d_h, d_w) in pixels, to put into a network for :func:`direct`."""
    return FixedScaleConv2d(GlobalScaleConv2d(conv, max_scale=None), scales)
