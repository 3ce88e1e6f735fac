"""Losses of boxes in fp32, per row or summed; callers divide by the number of samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def smooth_l1(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """Loss (S,) of rows (S, 4): ``d^2 / (2 beta)`` where d = |p - t| < beta, else ``d - beta / 2``.

    No rows keep the gradient graph.
    """
    loss = F.smooth_l1_loss(prediction.float(), target.float(), beta=beta, reduction="none")
    return loss.sum(1)


def objectness(logits: Tensor, positives: int) -> Tensor:
    """Sum of the binary cross entropy of logits (S,); the first ``positives`` should be 1."""
    truth = torch.zeros_like(logits, dtype=torch.float32)
    truth[:positives] = 1
    return F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="sum")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross entropy (S,) of logits (S, K + 1) and labels (S,)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def focal(logits: Tensor, truth: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss (..., ) of every logit: ``-alpha_t (1 - p_t)^gamma log(p_t)``.

    Source: Lin et al., Focal Loss for Dense Object Detection (2017), section 3.2.

    Args:
        logits: Any shape, before the sigmoid.
        truth: bool of the same shape.
        alpha: Weight of the true entries; the others weigh 1 - alpha.
        gamma: How fast easy entries fade; 0 gives the weighted cross entropy.
    """
    x = logits.float()
    towards = torch.where(truth, x, -x)
    log_right, log_wrong = F.logsigmoid(towards), F.logsigmoid(-towards)
    # In logarithms: the gradient of a power is not finite at 0 where gamma < 1.
    loss = torch.exp(gamma * log_wrong) * -log_right
    return loss * torch.where(truth, alpha, 1 - alpha)
