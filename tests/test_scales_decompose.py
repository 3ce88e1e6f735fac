"""Decomposition arithmetic: the worked rows and the paper's own layers, channels, refusals."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scale_layers import layer

from detkit.errors import CheckpointError, ConfigError
from detkit.scales.decompose import LayerPlan, Part, plan, plan_layer


def parts(found: LayerPlan) -> list[tuple[tuple[int, int], int]]:
    return [(part.reach, part.channels) for part in found.parts]


# Scale (d_h, d_w), case, dilations and channels of 256, share of the upper part, cost over the 3x3.
WORKED = [
    ((1.7, 2.9), "both split", [((1, 2), 51), ((2, 3), 205)], 0.80, 1.0),
    ((2.02, 1.7), "h near", [((2, 1), 77), ((2, 2), 179)], 0.70, 1.0),
    ((2.98, 1.7), "h near", [((3, 1), 77), ((3, 2), 179)], 0.70, 1.0),
    ((1.96, 2.97), "both near", [((2, 3), 256)], 0.0, 1.0),
    ((0.97, 1.02), "both near", [((1, 1), 256)], 0.0, 1.0),
    ((1.0, 1.0), "both near", [((1, 1), 256)], 0.0, 1.0),
    ((0.46, 0.89), "both split", [((0, 0), 83), ((1, 1), 173)], 0.675, 0.712),
    ((0.46, 1.01), "w near", [((0, 1), 138), ((1, 1), 118)], 0.46, 0.641),
    ((0.88, 0.95), "w near", [((0, 1), 31), ((1, 1), 225)], 0.88, 0.919),
    ((0.8, 1.4), "both split", [((0, 1), 102), ((1, 2), 154)], 0.60, 0.734),
    ((1.4, 0.8), "both split", [((1, 0), 102), ((2, 1), 154)], 0.60, 0.734),
    ((8.49, 9.34), "both split", [((8, 9), 150), ((9, 10), 106)], 0.415, 1.0),
    ((0.77, 0.82), "both split", [((0, 0), 52), ((1, 1), 204)], 0.795, 0.819),
    ((0.03, 1.7), "h near", [((0, 1), 77), ((0, 2), 179)], 0.70, 0.333),
    ((2.5, 2.5), "both split", [((2, 2), 128), ((3, 3), 128)], 0.50, 1.0),
]


@pytest.mark.parametrize(("scale", "case", "expected", "alpha", "ratio"), WORKED)
def test_worked_rows(
    scale: tuple[float, float],
    case: str,
    expected: list[tuple[tuple[int, int], int]],
    alpha: float,
    ratio: float,
) -> None:
    found = plan_layer(layer(stride=2 if scale == (0.77, 0.82) else 1), scale)
    assert (found.case, parts(found)) == (case, expected)
    assert found.alpha == pytest.approx(alpha, abs=1e-12)
    assert found.macs_ratio == pytest.approx(ratio, abs=5e-4)
    assert found.alpha_realised == (expected[-1][1] / 256 if len(expected) > 1 else 0.0)


def test_geometry_of_the_parts() -> None:
    """Dilation D pads D; D = 0 is a side of 1, whose dilation attribute is 1."""
    assert Part((0, 2), 5).to_plain() == {
        "kernel": [1, 3],
        "dilation": [1, 2],
        "padding": [0, 2],
        "channels": 5,
    }
    assert Part((0, 0), 5).to_plain()["kernel"] == [1, 1]
    assert Part((8, 9), 5).to_plain()["padding"] == [8, 9]


# Table 3 of the paper with ResNet-50's channels: label, channels, mean, dilations and channels.
TABLE_3 = {
    "c4": [
        ("R31", 128, (0.88, 0.95), [((0, 1), 15), ((1, 1), 113)]),
        ("R34", 128, (1.30, 1.28), [((1, 1), 91), ((2, 2), 37)]),
        ("R41", 256, (1.39, 1.41), [((1, 1), 154), ((2, 2), 102)]),
        ("R46", 256, (8.49, 9.34), [((8, 9), 150), ((9, 10), 106)]),
        ("R51", 512, (1.34, 1.20), [((1, 1), 374), ((2, 2), 138)]),
        ("R53", 512, (3.57, 3.45), [((3, 3), 251), ((4, 4), 261)]),
    ],
    "fpn": [
        ("R31", 128, (0.89, 0.93), [((0, 0), 12), ((1, 1), 116)]),
        ("R34", 128, (1.19, 1.15), [((1, 1), 106), ((2, 2), 22)]),
        ("R41", 256, (0.77, 0.82), [((0, 0), 52), ((1, 1), 204)]),
        ("R46", 256, (1.41, 1.39), [((1, 1), 154), ((2, 2), 102)]),
        ("R51", 512, (0.46, 0.89), [((0, 0), 166), ((1, 1), 346)]),
        ("R53", 512, (2.81, 3.68), [((2, 3), 131), ((3, 4), 381)]),
    ],
    "retina": [
        ("R31", 128, (0.94, 0.98), [((0, 1), 8), ((1, 1), 120)]),
        ("R34", 128, (1.19, 1.15), [((1, 1), 106), ((2, 2), 22)]),
        ("R41", 256, (0.80, 0.85), [((0, 0), 45), ((1, 1), 211)]),
        ("R46", 256, (1.46, 1.47), [((1, 1), 137), ((2, 2), 119)]),
        ("R51", 512, (0.65, 0.91), [((0, 0), 113), ((1, 1), 399)]),
        ("R53", 512, (1.75, 1.53), [((1, 1), 184), ((2, 2), 328)]),
    ],
}


@pytest.mark.parametrize("model", TABLE_3)
def test_the_papers_layers(model: str) -> None:
    rows = TABLE_3[model]
    layers = [layer(outputs, path=name) for name, outputs, _, _ in rows]
    found = plan(layers, {name: mean for name, _, mean, _ in rows})
    assert [parts(p) for p in found.layers] == [expected for *_, expected in rows]


scales = st.floats(0.01, 12.0)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(scales, scales),
    st.sampled_from([8, 24, 128, 256]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([2, 3, 4]),
)
def test_parts_make_up_the_layer(
    scale: tuple[float, float], outputs: int, align: int, groups: int, ways: int
) -> None:
    """Channels add up in whole aligned groups, each dilation is beside its scale, no cost added."""
    found = plan_layer(layer(outputs, groups=groups), scale, align=align, ways=ways)
    assert sum(part.channels for part in found.parts) == outputs
    group = outputs // groups if groups > 1 else 1
    unit = math.lcm(align, group)
    assert all(part.channels % unit == 0 for part in found.parts[1:])
    assert all(part.channels % group == 0 for part in found.parts)
    for part in found.parts:
        assert all(abs(n - d) <= 1 for n, d in zip(part.reach, scale, strict=True))
        assert part.reach[0] >= found.lower.reach[0] or part.reach[1] >= found.lower.reach[1]
    assert found.macs_ratio <= 1
    if len(found.parts) == 2 and ways == 2:
        assert abs(found.alpha_realised - found.alpha) <= unit / 2 / outputs + 1e-12


def test_rounding_is_half_up() -> None:
    """0.5 of 5 channels is 3 above; Python's round would give 2."""
    assert parts(plan_layer(layer(5), (2.5, 2.5))) == [((2, 2), 2), ((3, 3), 3)]


def test_alignment_and_groups() -> None:
    assert parts(plan_layer(layer(128), (0.88, 0.95), align=8)) == [((0, 1), 16), ((1, 1), 112)]
    # 32 groups of 4: whole groups, 70 % of 32 is 22.4
    grouped = plan_layer(layer(128, groups=32), (2.02, 1.7))
    assert parts(grouped) == [((2, 1), 40), ((2, 2), 88)]
    depthwise = plan_layer(layer(116, groups=116), (1.5, 1.5))
    assert parts(depthwise) == [((1, 1), 58), ((2, 2), 58)]
    assert depthwise.params == (116 * 9, 116 * 9)


def test_more_ways_to_split() -> None:
    three = plan_layer(layer(1000), (1.7, 2.9), ways=3)
    assert parts(three) == [((1, 2), 100), ((1, 3), 200), ((2, 3), 700)]
    four = plan_layer(layer(1000), (1.7, 2.9), ways=4)
    assert parts(four) == [((1, 2), 30), ((1, 3), 270), ((2, 2), 70), ((2, 3), 630)]
    assert four.alpha == pytest.approx(0.63)
    assert four.macs_ratio == three.macs_ratio == 1
    one_axis = plan_layer(layer(1000), (2.0, 2.9), ways=4)
    assert parts(one_axis) == [((2, 2), 100), ((2, 3), 900)]
    assert not plan_layer(layer(), (2.5, 2.5), ways=3).warnings, "an empty middle is no collapse"


def test_warnings() -> None:
    """Near the tolerance, no channels left, kernels of side 1, spread, half the map."""
    boundary = plan_layer(layer(), (0.945, 1.5)).warnings
    assert len(boundary) == 1 and "d_h" in boundary[0] and "tol" in boundary[0]
    assert not plan_layer(layer(), (0.93, 1.5)).warnings

    collapsed = plan_layer(layer(4), (1.07, 1.09))
    assert parts(collapsed) == [((1, 1), 4)]
    assert collapsed.upper is None and collapsed.alpha_realised == 0
    assert "no channels" in collapsed.warnings[0]
    upwards = plan_layer(layer(4), (1.93, 1.91))
    assert parts(upwards) == [((2, 2), 4)] and upwards.alpha_realised == 1

    assert "side 1" in plan_layer(layer(), (0.02, 1.5)).warnings[0]
    spread = plan_layer(layer(), (8.49, 9.34), (0.28, 0.20)).warnings
    assert len(spread) == 1 and "d_h varies by 3.3%" in spread[0]
    small = plan_layer(layer(), (3.6, 3.5), size=(7, 14)).warnings
    assert len(small) == 1 and "along h" in small[0]


@pytest.mark.parametrize("bad", [0.0, -0.5, math.nan, math.inf])
@pytest.mark.parametrize("axis", [0, 1])
def test_refuses_scales_without_a_dilation(bad: float, axis: int) -> None:
    scale = [1.5, 1.5]
    scale[axis] = bad
    with pytest.raises(CheckpointError, match=r"body\.conv: mean scale must be"):
        plan_layer(layer(), scale)


def test_refuses_options_out_of_range_and_wrong_means() -> None:
    for options in ({"tol": -0.1}, {"tol": 0.5}, {"align": 0}, {"ways": 5}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            plan([layer()], {"body.conv": (1.5, 1.5)}, **options)
    with pytest.raises(CheckpointError, match="other"):
        plan([layer()], {"other": (1.5, 1.5)})
    with pytest.raises(CheckpointError, match="mean"):
        plan([], {})
    with pytest.raises(CheckpointError, match="two finite numbers"):
        plan_layer(layer(), (1.5,))


def test_plain_form_and_totals() -> None:
    """The rows hold what `detkit decompose --json` promises; the same input gives the same text."""
    layers = [layer(128, "a"), layer(256, "b", stride=2)]
    means, stds = {"a": (1.0, 1.0), "b": (0.46, 0.89)}, {"a": (0.0, 0.0), "b": (0.1, 0.01)}

    def text() -> str:
        sizes = {"a": (20, 30), "b": (20, 31)}
        return json.dumps(plan(layers, means, stds=stds, sizes=sizes).to_plain(), allow_nan=False)

    found = json.loads(text())
    assert text() == text()
    row = found["layers"][1]
    wanted = "path label channels stride mean std case lower upper alpha alpha_realised macs_ratio"
    assert set(wanted.split()) <= row.keys()
    assert row["lower"] == {
        "kernel": [1, 1],
        "dilation": [1, 1],
        "padding": [0, 0],
        "channels": 83,
    }
    assert found["layers"][0]["upper"] is None
    plain_b, split_b = 9 * 256 * 256, (83 + 9 * 173) * 256
    points = 10 * 16
    assert found["totals"] == {
        "params": [9 * 128 * 128 + plain_b, 9 * 128 * 128 + split_b],
        "macs": [
            600 * 9 * 128 * 128 + points * plain_b,
            600 * 9 * 128 * 128 + points * split_b,
        ],
        "single": 1,
        "split": 1,
        "largest_dilation": 1,
    }
    assert found["warnings"] == ["R31: d_h varies by 21.7% over images, more than 3%"]
    assert plan(layers, means).totals.macs is None
