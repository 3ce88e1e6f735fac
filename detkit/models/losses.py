"""Losses of boxes, summed in fp32; callers divide by the number of samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def smooth_l1(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """Sum of ``d^2 / (2 beta)`` where d = |p - t| is below ``beta``, else of ``d - beta / 2``.

    Zero with a gradient graph when there are no rows.
    """
    return F.smooth_l1_loss(prediction.float(), target.float(), beta=beta, reduction="sum")


def objectness(logits: Tensor, positives: int) -> Tensor:
    """Sum of the binary cross entropy of logits (S,); the first ``positives`` should be 1."""
    truth = torch.zeros_like(logits, dtype=torch.float32)
    truth[:positives] = 1
    return F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="sum")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the softmax cross entropy of logits (S, K + 1) and labels (S,)."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")
