"""Multiply-adds and parameters of every network of a search space, from a table.

Costs add up over positions, so none needs a forward pass. One multiply-add of a convolution or
linear layer is 1; norms, activations, biases and shuffles are not counted, their parameters are.

*Body* is stem and blocks, what a detector holds and what a search limits; *full* adds the last
convolution and the linear layer of a classifier.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from detkit.models.search_space import OPS, Op, Position, SearchSpace

SIDE = 224
"""Side in pixels of the image that published costs are for."""


@dataclass(frozen=True)
class Cost:
    """Multiply-adds for one image, and parameters (scales and shifts of norms included)."""

    macs: int
    params: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.params + other.params)


@dataclass(frozen=True)
class CostTable:
    """Costs of the parts of a space's networks.

    Attributes:
        space: The space.
        stem: The stem.
        blocks: Each position's blocks, by gene.
        tail: A classifier's last convolution and linear layer.
    """

    space: SearchSpace
    stem: Cost
    blocks: tuple[tuple[Cost, ...], ...]
    tail: Cost

    def body(self, genes: Sequence[int]) -> Cost:
        """Stem and blocks of a network; raises ConfigError for genes not of the space."""
        chosen = zip(self.blocks, self.space.check(genes), strict=True)
        return _total([self.stem, *(costs[gene] for costs, gene in chosen)])

    def full(self, genes: Sequence[int]) -> Cost:
        """A network as a classifier; raises ConfigError for genes not of the space."""
        return self.body(genes) + self.tail

    def body_macs_range(self) -> tuple[int, int]:
        """Multiply-adds of the lightest and of the heaviest body."""
        macs = [[cost.macs for cost in costs] for costs in self.blocks]
        return self.stem.macs + sum(map(min, macs)), self.stem.macs + sum(map(max, macs))

    def supernet_params(self) -> int:
        """Parameters of the body of the supernet."""
        blocks = [cost for costs in self.blocks for cost in costs]
        return _total([self.stem, *blocks]).params


def cost_table(
    space: SearchSpace, height: int = SIDE, width: int = SIDE, num_classes: int = 1000
) -> CostTable:
    """The costs of a space.

    Args:
        space: The space.
        height: Height of the image in pixels.
        width: Its width.
        num_classes: Classes of the classifier.
    """
    height, width = _halved(height, width)
    stem = Cost(height * width * 27 * space.stem, 28 * space.stem + 2 * space.stem)
    blocks = []
    for position in space.positions():
        before = height * width
        if position.stride == 2:
            height, width = _halved(height, width)
        blocks.append(tuple(_block(position, OPS[op], before, height * width) for op in space.ops))
    cin, last = space.channels[-1], space.last
    tail = _pointwise(cin, last, height * width) + Cost(0, last)  # it has a bias
    tail += Cost(last * num_classes, (last + 1) * num_classes)
    return CostTable(space, stem, tuple(blocks), tail)


def _total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost(0, 0))


def _halved(height: int, width: int) -> tuple[int, int]:
    return -(-height // 2), -(-width // 2)


def _pointwise(cin: int, cout: int, pixels: int) -> Cost:
    return Cost(cin * cout * pixels, cin * cout + 2 * cout)


def _depthwise(channels: int, kernel: int, pixels: int) -> Cost:
    return Cost(channels * kernel**2 * pixels, channels * kernel**2 + 2 * channels)


def _block(position: Position, op: Op, before: int, after: int) -> Cost:
    """Cost of a block between maps of ``before`` and ``after`` pixels."""
    mid = position.cout // 2
    parts = []
    if position.stride == 2:
        cin, cout = position.cin, position.cout - position.cin
        parts += [_depthwise(cin, op.kernel, after), _pointwise(cin, cin, after)]
    else:
        cin, cout = position.cin // 2, position.cout // 2
    if op.xception:
        parts += [_depthwise(cin, op.kernel, after), _pointwise(cin, mid, after)]
        parts += [_depthwise(mid, op.kernel, after), _pointwise(mid, mid, after)]
    else:
        parts.append(_pointwise(cin, mid, before))
    parts += [_depthwise(mid, op.kernel, after), _pointwise(mid, cout, after)]
    return _total(parts)
