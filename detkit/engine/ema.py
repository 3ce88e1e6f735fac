"""Exponential moving average of a model's weights and buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Averaged copy of a model's state dict.

    The decay warms up, ``min(decay, (1 + n) / (10 + n))`` after n updates, so that the random
    weights of the first steps are forgotten soon. Buffers of floats (batch-norm statistics) are
    averaged as weights are; other buffers (counters) are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def decay_at(self, updates: int) -> float:
        """The decay of the update that follows ``updates`` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Move the average towards ``model``; ``updates`` earlier updates set the decay."""
        average, live = [], []
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                average.append(self.state[name])
                live.append(tensor)
            else:
                self.state[name].copy_(tensor)
        torch._foreach_lerp_(average, live, 1 - self.decay_at(updates))

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the average from a checkpoint; names and shapes must be the same."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let ``model`` carry the averaged weights meanwhile; its own come back bit by bit."""
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        _copy(model, self.state)
        try:
            yield
        finally:
            _copy(model, own)


@torch.no_grad()
def _copy(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        tensor.copy_(state[name])
