"""Optimisers: groups for weights, norms and biases, and the learning rate per 16 images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from detkit.config import OptimConfig
from detkit.errors import ConfigError

LR_IMAGES = 16
"""Images per step that ``optim.lr`` is stated for."""


def build_optimizer(model: nn.Module, optim: OptimConfig, batch_size: int) -> Optimizer:
    """The optimiser of a run over the parameters that need gradients.

    Each group carries ``lr_factor``; :func:`set_factor` sets its rate.

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
    if optim.name == "adamw":
        optimizer: Optimizer = AdamW(groups, lr=lr, betas=(optim.momentum, 0.999))
    else:
        optimizer = SGD(groups, lr=lr, momentum=optim.momentum, nesterov=optim.nesterov)
    return optimizer


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
    settings = {
        "weight": {"weight_decay": optim.weight_decay, "lr_factor": 1.0},
        "norm": {"weight_decay": small_decay, "lr_factor": 1.0},
        "bias": {"weight_decay": small_decay, "lr_factor": optim.bias_lr_factor},
    }
    members: dict[str, list[Tensor]] = {role: [] for role in settings}
    for role, parameter in _roles(model):
        members[role].append(parameter)
    return [{"params": members[role], **settings[role]} for role in settings if members[role]]


def _roles(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each trainable parameter once, as ``weight``, ``norm`` or ``bias``."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        # A norm of any kind, ours or torch's, is told by its weight: one number per channel.
        norm = "weight" in own and own["weight"].ndim == 1
        for name, parameter in own.items():
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                role = "norm" if norm else "bias" if name.endswith("bias") else "weight"
                yield role, parameter
