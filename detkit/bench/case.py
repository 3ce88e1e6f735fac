"""One row of the operators' table: what runs, how much work it is, and who else can do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from detkit.bench.timing import Call

Pass = Literal["forward", "backward", "forward+backward"]


@dataclass(frozen=True)
class Setting:
    """Where a case runs.

    Attributes:
        device: The device.
        threads: CPU threads; peers with thread pools of their own must be told.
        peers: Modules by name.
    """

    device: torch.device
    threads: int
    peers: Mapping[str, Any]

    def has(self, name: str, cpu_only: bool = True) -> bool:
        """Whether the peer is here; those of their own runtimes are compared on the CPU alone."""
        return name in self.peers and not (cpu_only and self.device.type != "cpu")


@dataclass(frozen=True)
class Case:
    """One operator on one size.

    Attributes:
        op: Name in ``detkit.ops``.
        size: The size in words.
        part: What of it is timed.
        dtype: ``fp32`` or ``bf16``.
        calls: The contestants by name, ``detkit`` first, made when the case runs.
        gflop: Multiplications and additions it must do, 0 where it does other work.
        mbytes: Data that must be moved once.
        reference: Whether the PyTorch reference is quick enough to be timed.
    """

    op: str
    size: str
    part: Pass
    dtype: str
    calls: Callable[[Setting], dict[str, Call]]
    gflop: float = 0.0
    mbytes: float = 0.0
    reference: bool = True


def forward(function: Callable[..., object], data: Sequence[Sequence[Any]]) -> Call:
    """``function`` on the data sets in turn, without gradients."""

    def run(turn: int) -> object:
        with torch.no_grad():
            return function(*data[turn % len(data)])

    return run


def both(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Call:
    """Forward and backward, gradients of all ``inputs``."""

    def run(_: int) -> object:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad)

    return run


def backward(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Call:
    """The backward pass alone, of one forward pass made before."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return lambda _: torch.autograd.grad(output, leaves, grad, retain_graph=True)
