"""Density of connection: by chain and by differentiation, what splitting keeps and what not."""

from __future__ import annotations

import copy

import pytest
import torch
from scale_layers import layer
from torch import Tensor, nn

from detkit.models.backbones.resnet import Bottleneck
from detkit.models.norm import norm_named
from detkit.scales import density
from detkit.scales.decompose import plan_layer
from detkit.scales.split import split


def shares(scale: tuple[float, float], outputs: int, ways: int = 2) -> density.Parts:
    found = plan_layer(layer(outputs), scale, ways=ways)
    return [(part.channels / outputs, part.reach) for part in found.parts]


@pytest.mark.parametrize("scale", [(1.0, 1.0), (1.7, 2.9), (0.46, 0.89), (2.5, 1.0), (3.0, 0.3)])
def test_one_layer_by_differentiation(scale: tuple[float, float]) -> None:
    """Sampled and split layer of ones: the gradient of one output is the stated kernel."""
    conv = nn.Conv2d(3, 20, 3, padding=1)
    sampled = density.direct(density.fixed(conv, scale), 3, 15)
    assert torch.allclose(sampled, padded(3 * density.scaled_kernel(scale), 15), atol=1e-12)

    found = plan_layer(layer(20), scale)
    plain = density.direct(split(conv, found.parts), 3, 15)
    counted = density.split_kernel(shares(scale, 20), merged=False)
    assert torch.allclose(plain, padded(3 * counted, 15), atol=1e-12)


def padded(kernel: Tensor, side: int) -> Tensor:
    h, w = ((side - n) // 2 for n in kernel.shape)
    return nn.functional.pad(kernel, (w, w, h, h))


@pytest.mark.parametrize("kind", ["sampled", "split"])
def test_a_network_by_chain_and_by_differentiation(kind: str) -> None:
    """Stem with max pooling, a strided projecting block and an identity one: both ways agree."""
    torch.manual_seed(0)
    scales = ((0.7, 1.2), (2.3, 1.6))
    blocks = [
        Bottleneck(4, 10, 8, 2, 1, True, norm_named("bn"), stride_in_1x1=False),
        Bottleneck(8, 10, 8, 1, 1, False, norm_named("bn"), stride_in_1x1=False),
    ]
    kernels = []
    for block, scale in zip(blocks, scales, strict=True):
        if kind == "sampled":
            block.conv2 = density.fixed(block.conv2, scale)
            kernels.append(density.scaled_kernel(scale))
        else:
            parts = [part for part in plan_layer(layer(10), scale).parts]
            block.conv2 = split(block.conv2, parts)
            kernels.append(
                density.split_kernel([(p.channels / 10, p.reach) for p in parts], merged=False)
            )
    stem = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    found = density.direct(nn.Sequential(*stem, *blocks), 2, 65)
    ones = torch.ones(3, 3, dtype=torch.float64)
    total = density.chain(
        [
            (2 * ones, 1),
            (ones, 2),
            (density.residual(kernels[0], 4, 10, project=True), 2),
            (density.residual(kernels[1], 8, 10), 1),
        ]
    )
    assert torch.allclose(padded(total, 65), found / found.sum(), atol=1e-14)


@pytest.mark.parametrize("scale", [(2.0, 1.7), (3.3, 1.0), (1.0, 5.9)])
def test_one_fraction_keeps_the_density(scale: tuple[float, float]) -> None:
    """The paper's case: one axis whole, the channels divide exactly."""
    sampled, plain = density.scaled_kernel(scale), density.split_kernel(shares(scale, 1000))
    assert density.total_variation(sampled, plain) < 1e-15
    stacked = [density.chain([(k, 2), (k, 1), (k, 1)]) for k in (sampled, plain)]
    assert density.total_variation(*stacked) < 1e-14


@pytest.mark.parametrize("scale", [(1.7, 2.9), (8.49, 9.34), (2.5, 2.5), (0.46, 0.89), (0.3, 1.6)])
def test_mass_and_reach_are_kept(scale: tuple[float, float]) -> None:
    """Mass 9 exactly, taps that fall together counted apart; mean reach up to whole channels."""
    sampled, plain = density.scaled_kernel(scale), density.split_kernel(shares(scale, 1000))
    assert float(sampled.sum()) == pytest.approx(9, abs=1e-12)
    assert float(plain.sum()) == pytest.approx(9, abs=1e-12)
    reach = [density.mean_reach(k) for k in (sampled, plain)]
    assert sum(reach[0]) == pytest.approx(sum(reach[1]), abs=2 / 3 * 0.5 / 1000 * 2 + 1e-12)
    shift = abs((scale[0] % 1) - (scale[1] % 1)) / 2 * 2 / 3
    assert abs(reach[0][0] - reach[1][0]) == pytest.approx(shift, abs=1e-3)


def test_plain_small_kernels_lose_mass() -> None:
    lost = density.split_kernel(shares((0.46, 0.89), 256), merged=False)
    assert float(lost.sum()) == pytest.approx(6.4, abs=0.01)


@pytest.mark.parametrize(
    ("scale", "expected", "ways"),
    [
        ((2.5, 2.5), 0.22, 2),
        ((1.7, 2.9), 0.196, 2),
        ((8.49, 9.34), 0.254, 2),
        ((0.46, 0.89), 0.261, 2),
        ((1.7, 2.9), 0.06, 3),
        ((1.7, 2.9), 0.0, 4),
        ((8.49, 9.34), 0.0, 4),
    ],
)
@pytest.mark.parametrize("outputs", [100, 256])
def test_distance_of_two_fractions(
    scale: tuple[float, float], expected: float, ways: int, outputs: int
) -> None:
    """Not small, as the paper's footnote has it; three ways keep the marginals, four all."""
    found = density.split_distance(scale, shares(scale, outputs, ways))
    half_unit = 0.005 if expected == round(expected, 2) else 0.0005
    rounding = (0.5 if ways == 2 else 1.5) / outputs
    assert found == pytest.approx(expected, abs=rounding + (half_unit if expected else 0))


@pytest.mark.parametrize(("scale", "ways"), [((2.5, 2.5), 2), ((1.7, 2.9), 3)])
def test_marginals_that_are_kept(scale: tuple[float, float], ways: int) -> None:
    sampled, plain = density.scaled_kernel(scale), density.split_kernel(shares(scale, 1000, ways))
    for axis in (0, 1):
        line = [k.sum(axis) for k in (sampled, plain)]
        size = max(len(part) for part in line)
        both = [nn.functional.pad(part, [(size - len(part)) // 2] * 2) for part in line]
        assert torch.allclose(*both, atol=1e-12)


def test_refusals_and_the_copy() -> None:
    conv = nn.Conv2d(1, 2, 3, padding=1)
    before = copy.deepcopy(conv.state_dict())
    density.direct(conv, 1, 5)
    assert all(torch.equal(before[k], v) for k, v in conv.state_dict().items())
    with pytest.raises(ValueError, match="side must hold"):
        density.direct(conv, 1, 3)
    with pytest.raises(ValueError, match="not negative"):
        density.scaled_kernel((-1.0, 1.0))
