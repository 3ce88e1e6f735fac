"""Large separable convolution of Light-Head R-CNN (arXiv 1711.07264, section 3.2, figure 3C)."""

from __future__ import annotations

from torch import Tensor, nn


class LargeSeparableConv(nn.Module):
    """A k x k view at the cost of two lines: k x 1 then 1 x k, plus 1 x k then k x 1.

    Two branches without a shared weight are summed; biases, no norm and no activation inside, and
    none after: the ReLU of the authors' code follows in the neck. Weights start at N(0, 0.01).

    Args:
        cin: Input channels.
        mid: Channels between the two parts of a branch.
        cout: Output channels.
        kernel: k, odd.
        lr_factor: Factor of these layers' learning rate.
    """

    def __init__(
        self, cin: int, mid: int, cout: int, kernel: int = 15, lr_factor: float = 3.0
    ) -> None:
        super().__init__()
        self.lr_factor = lr_factor
        tall, pad = (kernel, 1), kernel // 2
        wide = (1, kernel)
        self.tall1 = nn.Conv2d(cin, mid, tall, padding=(pad, 0))
        self.wide2 = nn.Conv2d(mid, cout, wide, padding=(0, pad))
        self.wide1 = nn.Conv2d(cin, mid, wide, padding=(0, pad))
        self.tall2 = nn.Conv2d(mid, cout, tall, padding=(pad, 0))
        init_small(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, cin, H, W) to (N, cout, H, W)."""
        out: Tensor = self.wide2(self.tall1(x)) + self.tall2(self.wide1(x))
        return out


def init_small(module: nn.Module) -> None:
    """Weights N(0, 0.01) and no bias in every convolution below, as R-FCN's and its successors'."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
