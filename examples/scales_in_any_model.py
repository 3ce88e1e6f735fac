"""Scale learners in a model that is not detkit's: learn, measure, decompose, ship plain PyTorch.

    python examples/scales_in_any_model.py 200

Each output pixel is the difference of the pixels three to its right and three to its left, which a
3x3 convolution cannot see until its scale grows: across, and not down.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from detkit import scales


def network() -> nn.Sequential:
    """Any module with 3x3 convolutions."""
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))


def examples(count: int) -> tuple[Tensor, Tensor]:
    """Smooth images (count, 1, 32, 32) and what the model should make of them."""
    images = 3 * nn.functional.avg_pool2d(torch.randn(count, 1, 32, 32), 5, 1, 2)
    return images, images.roll(-3, 3) - images.roll(3, 3)


def error(model: nn.Module, images: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error, away from the border."""
    return (model(images) - wanted)[..., 4:-4].square().mean()


def main(steps: int = 200) -> nn.Module:
    torch.manual_seed(0)
    model = network()
    scales.insert(model, select=lambda path, conv: conv.kernel_size == (3, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = error(model, *examples(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    statistics = scales.ScaleStatistics(list(scales.learners(model)))
    with torch.no_grad(), scales.recording(model) as recorder:
        for image in examples(50)[0]:  # one by one: each has its own scale
            model(image[None])
            statistics.add(recorder.take())
    means = {path: seen.mean for path, seen in statistics.layers.items()}
    plan = scales.plan(scales.layers_of(model), means)
    for layer in plan.layers:
        print(f"layer {layer.path}: scale {layer.mean[0]:.2f} x {layer.mean[1]:.2f} becomes")
        for part in layer.parts:
            print(f"  {part.channels} channels of {part.kernel} taps at dilation {part.dilation}")

    test = examples(50)
    with torch.no_grad():
        learnt = error(model, *test)
        plain = scales.to_plain(scales.apply(model, plan))  # nothing of detkit is left inside
        print(f"error {learnt:.3f}; decomposed {error(plain, *test):.3f}, before fine-tuning")
    return plain


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
