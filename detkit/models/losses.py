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
