"""Head of R-FCN (arXiv 1605.06409): pooled score maps vote, no layer follows the RoIs."""

from __future__ import annotations

from torch import Tensor, nn


class Vote(nn.Module):
    """Class logits and box deltas as the means over the bins of pooled score maps.

    Args:
        num_classes: Classes without background.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, K + 1), background first, and deltas (R, 1 or K, 4) of (R, C, h, w)."""
        votes = pooled.mean((2, 3))
        classes = self.num_classes + 1
        return votes[:, :classes], votes[:, classes:].unflatten(1, (-1, 4))
