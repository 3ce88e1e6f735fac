"""Optimisers: groups for weights, norms and biases, and the learning rate per 16 images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from detkit.config import OptimConfig
from detkit.errors import ConfigError

LR_IMAGES = 16
"""Images per step that ``optim.lr`` is stated for."""


def build_optimizer(model: nn.Module, optim: OptimConfig, batch_size: int) -> Optimizer:
    """The optimiser of a run over the parameters that need gradients.

    Each group carries ``lr_factor``; :func:`set_factor` sets its rate. A module's own attribute
    ``lr_factor`` (3 of Light-Head's large separable convolution) multiplies that of all below it.

    Args:
        model: The model; parameters without ``requires_grad`` stay out.
        optim: Name, learning rate per 16 images, decay and factors.
        batch_size: Images per step over all processes.

    Raises:
        ConfigError: The model has nothing to train.
    """
    groups = _groups(model, optim)
    if not groups:
        raise ConfigError("model: at least one parameter must be trainable, got none")
    lr = base_lr(optim, batch_size)
    settings: dict[str, Any] = {"lr": lr, "fused": True}  # one pass over the weights
    if optim.name == "adamw":
        return AdamW(groups, betas=(optim.momentum, 0.999), **settings)
    optimizer = SGD(groups, momentum=optim.momentum, nesterov=optim.nesterov, **settings)
    if optim.momentum:
        _start_momentum(optimizer)
    return optimizer


def _start_momentum(optimizer: SGD) -> None:
    """Give every parameter its momentum, 0.

    torch's fused step fails where a parameter's first gradient comes later than those of others,
    as a supernet's does. The first step is the same: a momentum of 0 becomes the gradient.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def base_lr(optim: OptimConfig, batch_size: int) -> float:
    """The learning rate for ``batch_size`` images per step."""
    return optim.lr * batch_size / LR_IMAGES


def set_factor(optimizer: Optimizer, lr: float, factor: float) -> float:
    """Set every group to ``lr * factor`` times its own factor; returns ``lr * factor``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * factor * group["lr_factor"]
    return lr * factor


def _groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    small_decay = optim.weight_decay if optim.norm_decay else 0.0
    bias_decay = small_decay if optim.bias_decay else 0.0
    settings = {
        "weight": {"weight_decay": optim.weight_decay, "lr_factor": 1.0},
        "norm": {"weight_decay": small_decay, "lr_factor": 1.0},
        "bias": {"weight_decay": bias_decay, "lr_factor": optim.bias_lr_factor},
        "shift": {"weight_decay": bias_decay, "lr_factor": 1.0},
    }
    members: dict[tuple[str, float], list[Tensor]] = {(role, 1.0): [] for role in settings}
    for role, factor, parameter in _roles(model):
        if role == "shift" and optim.bias_decay:
            role = "norm"
        members.setdefault((role, factor), []).append(parameter)
    groups = []
    for (role, factor), params in members.items():
        if params:
            lr_factor = settings[role]["lr_factor"] * factor
            groups.append({"params": params, **settings[role], "lr_factor": lr_factor})
    return groups


def _roles(model: nn.Module) -> Iterator[tuple[str, float, nn.Parameter]]:
    """Each trainable parameter once: ``weight``, ``norm``, ``shift`` (a norm's bias) or ``bias``,
    and its modules' factor.
    """
    seen: set[nn.Parameter] = set()
    factors = {"": 1.0}
    for path, module in model.named_modules():
        parent = factors[path.rpartition(".")[0]]
        factors[path] = parent * float(getattr(module, "lr_factor", 1.0))
        own = dict(module.named_parameters(recurse=False))
        # A norm of any kind, ours or torch's, is told by its weight: one number per channel.
        norm = "weight" in own and own["weight"].ndim == 1
        for name, parameter in own.items():
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                bias = name.endswith("bias")
                role = ("shift" if bias else "norm") if norm else "bias" if bias else "weight"
                yield role, factors[path], parameter
