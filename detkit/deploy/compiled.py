"""Detection through ``torch.compile``: a graph per shape of a batch; an error, no fallback."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from detkit.deploy.fixed import Found
from detkit.errors import ConfigError

SIZES = 64
"""Shapes of batches that one process compiles."""

Run = Callable[[Tensor, Tensor], Found]


def compiled(function: Run, backend: str = "inductor") -> Run:
    """``function`` of images and sizes through ``torch.compile``, each shape of images on its own.

    Its calls raise ConfigError where something cannot be compiled: nothing runs uncompiled instead.
    """
    from torch._dynamo import config  # two seconds, for those alone who compile
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    made = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    def run(images: Tensor, sizes: Tensor) -> Found:
        try:
            with config.patch(recompile_limit=SIZES):
                return made(images, sizes)
        except FailOnRecompileLimitHit as error:
            raise ConfigError(
                f"--compile: batches must be of at most {SIZES} shapes, got {tuple(images.shape)} "
                "as one more; leave it out"
            ) from error
        except TorchDynamoException as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"--compile: must be able to compile {tuple(images.shape)}, got {reason}; "
                "leave it out"
            ) from error

    return run
