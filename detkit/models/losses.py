"""Losses of boxes, summed; their callers divide by the number of samples, which may be zero for one process."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def smooth_l1(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """Sum of the smooth L1 loss in fp32: ``d^2 / (2 beta)`` below ``beta``, ``d - beta / 2`` above, d = |p - t|.

    Zero with a gradient graph when there are no rows.
    """
    return F.smooth_l1_loss(prediction.float(), target.float(), beta=beta, reduction="sum")


def objectness(logits: Tensor, positives: int) -> Tensor:
    """Sum of the binary cross entropy in fp32 of logits (S,) of which the first ``positives`` should be 1."""
    truth = torch.zeros_like(logits, dtype=torch.float32)
    truth[:positives] = 1
    return F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="sum")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the softmax cross entropy in fp32 of logits (S, K + 1) and labels (S,)."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")
