"""CUDA graphs of a function of tensors: its kernels are launched together, with no Python between.

At batch 1 a detector is hundreds of kernels of a few microseconds each, and launching them one by
one takes longer than they do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Out = TypeVar("Out")

GRAPHS = 8
"""Graphs kept; of those the one longest not used goes first."""

WARM_UP = 3
"""Calls before a capture: they choose kernels and make what is cached for good."""


@dataclass(frozen=True)
class _Captured(Generic[Out]):
    """A graph, the tensors it reads, and what it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: Out


class CudaGraphs(Generic[Out]):
    """Calls ``function`` by replaying a CUDA graph, one for each shape of its inputs.

    A new shape is captured on its first call, which takes several times as long as a call. All
    graphs share a pool of memory, so what is returned is overwritten by the next call, of whatever
    shape: take or copy it before.

    Args:
        function: Of CUDA tensors of one device; no shape in it depends on values, and it neither
            waits for the device nor copies from the host.
        limit: Graphs kept.
    """

    def __init__(self, function: Callable[..., Out], limit: int = GRAPHS) -> None:
        self._function = function
        self._limit = limit
        self._kept: OrderedDict[tuple[object, ...], _Captured[Out]] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor) -> Out:
        """What ``function(*inputs)`` gives, until the next call."""
        key = tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in inputs)
        if key not in self._kept:
            while len(self._kept) >= self._limit:
                self._kept.popitem(last=False)
            self._kept[key] = self._capture(inputs)
        self._kept.move_to_end(key)
        captured = self._kept[key]
        for static, given in zip(captured.inputs, inputs, strict=True):
            static.copy_(given)
        captured.graph.replay()
        return captured.outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Captured[Out]:
        device = inputs[0].device
        static = tuple(x.clone() for x in inputs)
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self._function(*static)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = self._function(*static)
        return _Captured(graph, static, outputs)
