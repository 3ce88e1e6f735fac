"""One optimiser step over a batch given in parts, on one process or many."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from detkit.engine import distributed
from detkit.types import Batch, ClassificationBatch

Part = Batch | ClassificationBatch
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """Losses of one optimiser step and whether they and the gradients are finite.

    Attributes:
        losses: Name to () tensor, the mean over this process's images.
        grad_norm: () tensor, before clipping.
        finite: () bool tensor.
    """

    losses: dict[str, Tensor]
    grad_norm: Tensor
    finite: Tensor


def train_step(
    model: nn.Module,
    parts: Sequence[Part],
    optimizer: Optimizer,
    scaler: GradScaler,
    *,
    images: int,
    device: torch.device,
    amp: str = "off",
    clip: float = 0.0,
    layout: torch.memory_format = torch.contiguous_format,
) -> StepResult:
    """One optimiser step over a batch given in parts, as if they were one.

    On the CPU a loss or gradient that is not finite leaves the weights as they were. On CUDA the
    answer is not waited for, so the weights may be spoilt by the time the caller reads ``finite``.

    Args:
        model: ``model(part)`` gives a dict of scalar losses, means over the part's images.
        parts: This process's share of the batch.
        optimizer: Over the model's parameters.
        scaler: Loss scaler, enabled for fp16 only.
        images: Images of the whole batch over all processes.
        device: Where the model is.
        amp: ``off``, ``bf16`` or ``fp16``.
        clip: Largest gradient norm; 0 does not clip.
        layout: Memory format of the images.
    """
    optimizer.zero_grad(set_to_none=True)
    own = sum(len(part.images) for part in parts)
    losses: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        with _sync_gradients(model, i == len(parts) - 1):
            with torch.autocast(device.type, dtype=_AMP.get(amp), enabled=amp != "off"):
                found = model(_to_device(part, device, layout))
            total = torch.stack([loss.float() for loss in found.values()]).sum()
            # Processes average their gradients, hence the world size: each image counts 1 / images.
            share = len(part.images) * distributed.world_size() / images
            scaler.scale(total * share).backward()
        for name, loss in found.items():
            loss = loss.detach().float() * (len(part.images) / own)
            losses[name] = losses[name] + loss if name in losses else loss
    return _update(model, optimizer, scaler, losses, clip, device)


def _update(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler,
    losses: dict[str, Tensor],
    clip: float,
    device: torch.device,
) -> StepResult:
    scaler.unscale_(optimizer)
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    finite = torch.isfinite(torch.stack([*losses.values(), norm.to(device)])).all()
    if scaler.is_enabled() and scaler.get_scale() > 1:
        # Scaled fp16 gradients may overflow: the scaler skips that step and halves its scale.
        finite = torch.isfinite(torch.stack(list(losses.values()))).all()
    if device.type != "cpu" or bool(finite):
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        scaler.step(optimizer)
        scaler.update()
    return StepResult(losses, norm, finite)


def _sync_gradients(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Processes exchange gradients once per step, in the backward pass of the last part."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def resolve_amp(amp: str, device: torch.device) -> str:
    """What ``auto`` means on a device: bf16 where it has instructions for it, fp16 on old GPUs."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # Without these instructions bf16 is emulated and slower than fp32.
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_bf16 else "off"


def memory_format(model: nn.Module, device: torch.device, amp: str) -> torch.memory_format:
    """The memory format that trains faster.

    Tensor cores, bf16 kernels, 1x1 convolutions and the RoI operators read channels last. In fp32
    on the CPU that saves classifiers about a seventh of the time and two-stage detectors a
    twentieth; RetinaNet's head, 3x3 convolutions on large maps, loses a tenth, and so do layers
    that learn their scales.
    """
    gains = hasattr(model, "classify") or hasattr(model, "rpn")
    learns_scales = any(hasattr(module, "scale_group") for module in model.modules())
    last = amp != "off" or (device.type == "cpu" and gains and not learns_scales)
    return torch.channels_last if last else torch.contiguous_format


def _to_device(part: Part, device: torch.device, layout: torch.memory_format) -> Part:
    part = part.to(device)
    # A copy of the dataclass, not of the tensors: the caller's batch keeps its own layout.
    return replace(part, images=part.images.contiguous(memory_format=layout))
