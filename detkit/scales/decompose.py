"""From learnt scales to plain convolutions (POD, Peng et al., ICCV 2019, section 3.2): arithmetic
alone, no weights and no model.

A scale that is not whole along an axis becomes two whole ones, the lower on the first output
channels and the upper on the last, in the proportion of the fraction. One pair of convolutions
serves both axes, so with two fractions their mean decides; three or four ways to split, beyond the
paper, keep more of the density of connection at the same cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from detkit.errors import CheckpointError, ConfigError
from detkit.scales.density import split_distance
from detkit.scales.insert import ScaleLayer

EPSILON = 1e-6
"""Added to the tolerance: as a float, 1 - 0.95 is above 0.05."""

BOUNDARY = 0.01
"""Scales this near to the tolerance could fall to either side of it in another training."""

SPREAD = 0.03
"""Relative deviation over images from which a mean is flagged; the paper claims less."""

CASES = ("both near", "h near", "w near", "both split")
"""Which axes are within the tolerance of a whole number."""


@dataclass(frozen=True)
class Part:
    """One plain convolution of a layer.

    Attributes:
        reach: Dilations (D_h, D_w); along an axis of dilation 0 the taps fall together.
        channels: Output channels.
    """

    reach: tuple[int, int]
    channels: int

    @property
    def kernel(self) -> tuple[int, int]:
        """Sides, 1 where the dilation is 0."""
        return 3 if self.reach[0] else 1, 3 if self.reach[1] else 1

    @property
    def dilation(self) -> tuple[int, int]:
        """The convolution's attribute, 1 along a side of 1."""
        return max(self.reach[0], 1), max(self.reach[1], 1)

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros at each end."""
        return self.reach

    @property
    def taps(self) -> int:
        """Weights per input and output channel."""
        return self.kernel[0] * self.kernel[1]

    def to_plain(self) -> dict[str, Any]:
        """``{"kernel", "dilation", "padding", "channels"}``."""
        pairs = {"kernel": self.kernel, "dilation": self.dilation, "padding": self.padding}
        return {k: list(v) for k, v in pairs.items()} | {"channels": self.channels}


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        path: Where its module is in the model.
        label: Its short name.
        channels: Input and output channels.
        stride: (h, w).
        groups: Groups of the convolution.
        mean: Mean scale (d_h, d_w) in pixels.
        std: Deviation over images, None where it is not known.
        case: One of :data:`CASES`.
        parts: The convolutions, lower first; their channels add up.
        alpha: Share of the output channels that the scales give to the upper part, 0 for one part.
        alpha_realised: The same in whole channels.
        warnings: What to look at, without the layer's name.
    """

    path: str
    label: str
    channels: tuple[int, int]
    stride: tuple[int, int]
    groups: int
    mean: tuple[float, float]
    std: tuple[float, float] | None
    case: str
    parts: tuple[Part, ...]
    alpha: float
    alpha_realised: float
    warnings: tuple[str, ...] = ()

    @property
    def lower(self) -> Part:
        """The convolution of the first channels, or of all."""
        return self.parts[0]

    @property
    def upper(self) -> Part | None:
        """The convolution of the last channels, None where there is only one."""
        return self.parts[-1] if len(self.parts) > 1 else None

    @property
    def params(self) -> tuple[int, int]:
        """Weights of the 3x3 convolution and of the parts, biases aside."""
        each = self.channels[0] // self.groups
        return 9 * each * self.channels[1], sum(p.taps * p.channels for p in self.parts) * each

    @property
    def macs_ratio(self) -> float:
        """Multiply-adds over those of the 3x3 convolution."""
        before, after = self.params
        return after / before

    @property
    def density_distance(self) -> float:
        """Total variation between the densities of connection before and after, in 0..1."""
        shares = [(p.channels / self.channels[1], p.reach) for p in self.parts]
        return split_distance(self.mean, shares)

    def to_plain(self) -> dict[str, Any]:
        """Plain types: a row of ``detkit decompose --json``, enough to rebuild the layer."""
        return {
            "path": self.path,
            "label": self.label,
            "channels": list(self.channels),
            "stride": list(self.stride),
            "groups": self.groups,
            "mean": list(self.mean),
            "std": None if self.std is None else list(self.std),
            "case": self.case,
            "lower": self.lower.to_plain(),
            "upper": None if self.upper is None else self.upper.to_plain(),
            "parts": [part.to_plain() for part in self.parts],
            "alpha": self.alpha,
            "alpha_realised": self.alpha_realised,
            "macs_ratio": self.macs_ratio,
            "density_distance": self.density_distance,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Totals:
    """Sums over the layers of a plan.

    Attributes:
        params: Weights before and after, biases aside.
        macs: Multiply-adds before and after for one image, None where map sizes are not known.
        single: Layers of one convolution.
        split: Layers of several.
        largest: Largest dilation.
    """

    params: tuple[int, int]
    macs: tuple[int, int] | None
    single: int
    split: int
    largest: int

    def to_plain(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "params": list(self.params),
            "macs": None if self.macs is None else list(self.macs),
            "single": self.single,
            "split": self.split,
            "largest_dilation": self.largest,
        }


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer, in the network's order."""

    layers: tuple[LayerPlan, ...]
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def totals(self) -> Totals:
        """Sums over the layers."""
        params = [layer.params for layer in self.layers]
        return Totals(
            params=(sum(p[0] for p in params), sum(p[1] for p in params)),
            macs=self._macs(),
            single=sum(len(layer.parts) == 1 for layer in self.layers),
            split=sum(len(layer.parts) > 1 for layer in self.layers),
            largest=max(d for layer in self.layers for p in layer.parts for d in p.dilation),
        )

    def _macs(self) -> tuple[int, int] | None:
        if not all(layer.path in self.sizes for layer in self.layers):
            return None
        before = after = 0
        for layer in self.layers:
            sides = zip(self.sizes[layer.path], layer.stride, strict=True)
            points = math.prod((n - 1) // s + 1 for n, s in sides)
            before, after = before + points * layer.params[0], after + points * layer.params[1]
        return before, after

    @property
    def warnings(self) -> list[str]:
        """What to look at, each with its layer."""
        return [f"{layer.label}: {text}" for layer in self.layers for text in layer.warnings]

    def to_plain(self) -> dict[str, Any]:
        """``{"layers", "totals", "warnings"}`` in plain types."""
        return {
            "layers": [layer.to_plain() for layer in self.layers],
            "totals": self.totals.to_plain(),
            "warnings": self.warnings,
        }


def plan(
    layers: Sequence[ScaleLayer],
    means: Mapping[str, Sequence[float]],
    *,
    stds: Mapping[str, Sequence[float]] | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    tol: float = 0.05,
    align: int = 1,
    ways: int = 2,
) -> Plan:
    """Decompose each layer at its mean scale; the same input gives the same plan.

    Args:
        layers: The layers, in the network's order.
        means: Unrounded mean scale (d_h, d_w) in pixels of each layer by path.
        stds: Deviations over images by path, to flag scales that vary.
        sizes: Height and width of each layer's input map, to flag dilations beyond half of it.
        tol: Distance to a whole number up to which a scale counts as whole, 0 <= tol < 0.5.
        align: Upper parts have a multiple of so many channels; 1 as in the paper, 8 suits fp16.
        ways: Most convolutions per layer: 2 as in the paper; 3 keep both marginals of the density
            of connection, 4 all of it.

    Raises:
        ConfigError: ``tol``, ``align`` or ``ways`` is out of range.
        CheckpointError: A mean is missing, left over, not finite or not positive.
    """
    _check_options(tol, align, ways)
    paths = [layer.path for layer in layers]
    if not paths or set(paths) != means.keys():
        odd = sorted(set(paths) ^ means.keys())
        raise CheckpointError(
            f"scales: must hold one mean for each of {len(paths)} layers, got a difference at "
            f"{', '.join(odd) or 'none'}"
        )
    plans = []
    for layer in layers:
        std = None if stds is None else stds[layer.path]
        size = None if sizes is None else sizes.get(layer.path)
        plans.append(plan_layer(layer, means[layer.path], std, size, tol, align, ways))
    return Plan(tuple(plans), dict(sizes or {}))


def plan_layer(
    layer: ScaleLayer,
    mean: Sequence[float],
    std: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    tol: float = 0.05,
    align: int = 1,
    ways: int = 2,
) -> LayerPlan:
    """Decompose one layer; arguments and errors as for :func:`plan`."""
    _check_options(tol, align, ways)
    d = _two(layer, "mean scale", mean)
    if min(d) <= 0:
        raise CheckpointError(
            f"{layer.path}: mean scale must be positive along both axes, got {list(d)}; train with "
            "the map elu1 or softplus"
        )
    deviation = None if std is None else _two(layer, "deviation of the scale", std)
    outputs = layer.channels[1]
    case, wanted = _dilations(d, tol, ways)
    unit = math.lcm(align, whole_groups(outputs, layer.groups))
    counts = _channels([share for _, share in wanted], outputs, unit)
    pairs = zip(wanted, counts, strict=True)
    parts = tuple(Part(reach, count) for (reach, _), count in pairs if count)
    notes = [
        *_scale_warnings(d, deviation, tol),
        *_part_warnings(parts, sum(share > 0 for _, share in wanted), case, size),
    ]
    return LayerPlan(
        path=layer.path,
        label=layer.label,
        channels=layer.channels,
        stride=layer.stride,
        groups=layer.groups,
        mean=d,
        std=deviation,
        case=case,
        parts=parts,
        alpha=wanted[-1][1] if len(wanted) > 1 else 0.0,
        alpha_realised=counts[-1] / outputs if len(wanted) > 1 else 0.0,
        warnings=tuple(notes),
    )


def whole_groups(outputs: int, groups: int) -> int:
    """Channels that must stay together: those of a group, single ones where there is one group."""
    return outputs // groups if groups > 1 else 1


def _check_options(tol: float, align: int, ways: int) -> None:
    if not 0 <= tol < 0.5:
        raise ConfigError(f"tol: must be in 0 <= tol < 0.5, got {tol}")
    if align < 1:
        raise ConfigError(f"align: must be at least 1, got {align}")
    if ways not in (2, 3, 4):
        raise ConfigError(f"ways: must be 2, 3 or 4, got {ways}")


def _two(layer: ScaleLayer, what: str, values: Sequence[float]) -> tuple[float, float]:
    pair = tuple(float(v) for v in values)
    if len(pair) != 2 or not all(math.isfinite(v) for v in pair):
        raise CheckpointError(f"{layer.path}: {what} must be two finite numbers, got {list(pair)}")
    return pair[0], pair[1]


def _nearest(d: float) -> int:
    return math.floor(d + 0.5)


def _is_near(d: float, tol: float) -> bool:
    return abs(d - _nearest(d)) <= tol + EPSILON


def _case(d: tuple[float, float], tol: float) -> str:
    near = (_is_near(d[0], tol), _is_near(d[1], tol))
    return CASES[{(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}[near]]


def _dilations(
    d: tuple[float, float], tol: float, ways: int
) -> tuple[str, list[tuple[tuple[int, int], float]]]:
    """The case, and dilations with their share of the channels, lowest first."""
    case = _case(d, tol)
    (h, w), (nh, nw) = (_nearest(d[0]), _nearest(d[1])), (math.floor(d[0]), math.floor(d[1]))
    fh, fw = d[0] - nh, d[1] - nw
    if case == "both near":
        return case, [((h, w), 1.0)]
    if case == "h near":
        return case, [((h, nw), 1 - fw), ((h, nw + 1), fw)]
    if case == "w near":
        return case, [((nh, w), 1 - fh), ((nh + 1, w), fh)]
    low, high = (nh, nw), (nh + 1, nw + 1)
    if ways == 2:
        alpha = (fh + fw) / 2
        return case, [(low, 1 - alpha), (high, alpha)]
    only_w, only_h = (nh, nw + 1), (nh + 1, nw)
    if ways == 3:
        middle = only_h if fh > fw else only_w
        return case, [(low, 1 - max(fh, fw)), (middle, abs(fh - fw)), (high, min(fh, fw))]
    mixed = [(only_w, (1 - fh) * fw), (only_h, fh * (1 - fw))]
    return case, [(low, (1 - fh) * (1 - fw)), *mixed, (high, fh * fw)]


def _channels(shares: Sequence[float], outputs: int, unit: int) -> list[int]:
    """Whole channels for ``shares``: each boundary, counted from the last channel, is rounded half
    up to a multiple of ``unit``.
    """
    tails = [sum(shares[first:]) for first in range(1, len(shares))]
    rounded = [min(unit * math.floor(t * outputs / unit + 0.5), outputs) for t in tails]
    return [a - b for a, b in pairwise([outputs, *rounded, 0])]


def _scale_warnings(
    d: tuple[float, float], std: tuple[float, float] | None, tol: float
) -> Iterable[str]:
    for axis, value in zip("hw", d, strict=True):
        distance = abs(value - _nearest(value))
        if abs(distance - tol) <= BOUNDARY + EPSILON:
            yield (
                f"d_{axis} = {value:.4g} is near the boundary of tol = {tol:g} around "
                f"{_nearest(value)}: another training may decompose it otherwise"
            )
    if std is not None:
        for axis, value, deviation in zip("hw", d, std, strict=True):
            if deviation > SPREAD * value:
                yield (
                    f"d_{axis} varies by {deviation / value:.1%} over images, more than "
                    f"{SPREAD:.0%}"
                )


def _part_warnings(
    parts: Sequence[Part], wanted: int, case: str, size: tuple[int, int] | None
) -> Iterable[str]:
    if len(parts) < wanted:
        yield (
            f"{case}: {wanted - len(parts)} of {wanted} convolutions would have no channels, "
            f"{len(parts)} left"
        )
    for index, axis in enumerate("hw"):
        if all(part.reach[index] == 0 for part in parts):
            yield f"dilation 0 along {axis}: kernels of side 1 there"
        largest = max(part.reach[index] for part in parts)
        if size is not None and 2 * largest > size[index]:
            yield (
                f"dilation {largest} along {axis} is more than half of the map's {size[index]}: "
                "outer taps mostly read zeros"
            )
