"""The fast-deployment net: transferred weights, alignment, cost, rebuilding, plain PyTorch."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scale_layers import layer
from scale_nets import ThirdPartyNet, in_body
from torch import Tensor, nn
from torch.nn import functional as F

from detkit.errors import CheckpointError, ConfigError
from detkit.models import build_backbone
from detkit.models.count import count_classifier, macs_by_module
from detkit.scales import (
    FixedScaleConv2d,
    GlobalScaleConv2d,
    Plan,
    SplitConv2d,
    apply,
    freeze,
    insert,
    learners,
    plan,
    rebuild,
    to_plain,
)
from detkit.scales.decompose import Part, plan_layer
from detkit.scales.split import split


def learnt_net(means: Sequence[tuple[float, float]] | None = None) -> tuple[nn.Module, Plan]:
    """The foreign network with learners, and a plan for scales that take every case."""
    model = ThirdPartyNet().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
    layers = insert(model, in_body)
    means = means or [(1.7, 2.9), (0.46, 0.89), (0.8, 1.4), (2.0, 2.02), (1.4, 0.8)]
    return model, plan(layers, {e.path: d for e, d in zip(layers, means, strict=True)})


def by_hand(conv: nn.Conv2d | GlobalScaleConv2d, parts: Sequence[Part], x: Tensor) -> Tensor:
    """Dense output of the parts, channel by channel from the definition."""
    each, per_group = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    outputs, channel = [], 0
    for part in parts:
        for _ in range(part.channels):
            begin = channel // per_group * each
            weight = conv.weight[channel : channel + 1]
            if part.reach[0] == 0:
                weight = weight[:, :, 1:2]
            if part.reach[1] == 0:
                weight = weight[:, :, :, 1:2]
            bias = None if conv.bias is None else conv.bias[channel : channel + 1]
            dilation = [max(d, 1) for d in part.reach]
            used = x[:, begin : begin + each]
            outputs.append(F.conv2d(used, weight, bias, conv.stride, part.reach, dilation))
            channel += 1
    return torch.cat(outputs, 1)


@pytest.mark.parametrize(
    "scale",
    [(1.7, 2.9), (0.46, 0.89), (0.46, 1.01), (1.4, 0.8), (0.03, 1.7), (2.0, 3.0), (0.04, 1.0)],
)
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_transferred_weights(scale: tuple[float, float], groups: int, stride: int) -> None:
    """First channels at the lower dilations, last at the upper; middle taps where a side is 1."""
    conv = nn.Conv2d(8, 16, 3, stride, 1, groups=groups).double()
    learner = GlobalScaleConv2d(conv)
    x = torch.randn(2, 8, 11, 12, dtype=torch.float64)
    for ways in (2, 3, 4):
        parts = plan_layer(layer(16, groups=groups), scale, ways=ways).parts
        made = split(learner, parts)
        assert isinstance(made, SplitConv2d if len(parts) > 1 else nn.Conv2d)
        assert torch.allclose(made(x), by_hand(learner, parts, x), atol=1e-12)


def test_a_single_part_keeps_weights_and_names() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1)
    made = split(GlobalScaleConv2d(conv), [Part((2, 3), 6)])
    assert type(made) is nn.Conv2d and (made.dilation, made.padding) == ((2, 3), (2, 3))
    assert all(torch.equal(v, conv.state_dict()[k]) for k, v in made.state_dict().items())
    assert made.weight.data_ptr() != conv.weight.data_ptr()


def test_sums_of_taps_are_the_limit_of_sampling() -> None:
    """`zero_dilation="sum"` computes what the learner does at scale 0."""
    learner = GlobalScaleConv2d(nn.Conv2d(4, 6, 3, padding=1))
    x = torch.randn(1, 4, 9, 9)
    parts = [Part((0, 0), 2), Part((0, 1), 4)]
    summed = split(learner, parts, "sum")(x)
    assert torch.allclose(summed[:, :2], learner.freeze((0.0, 0.0))(x)[:, :2], atol=1e-5)
    assert torch.allclose(summed[:, 2:], learner.freeze((0.0, 1.0))(x)[:, 2:], atol=1e-5)
    assert not torch.allclose(summed, split(learner, parts)(x), atol=1e-2)


def test_whole_scales_keep_the_function() -> None:
    """Where every scale is whole nothing is lost: the net computes what the learners did."""
    means = [(1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (2.0, 2.0), (1.0, 1.0)]
    model, wanted = learnt_net(means)
    x = torch.randn(2, 3, 30, 31)
    before = model(x)  # fresh learners sample at their dilations
    assert apply(model, wanted) is model
    assert not [m for m in model.modules() if isinstance(m, GlobalScaleConv2d | SplitConv2d)]
    assert torch.allclose(model(x), before, atol=1e-5)


def test_apply_replaces_the_layers_alone() -> None:
    """Everything but the 3x3 weights and the predictors has the name and value it had."""
    model, wanted = learnt_net()
    before = copy.deepcopy(model.state_dict())
    apply(model, wanted)
    after = model.state_dict()
    kept = {k for k in before if ".conv." not in k}
    assert kept == {k for k in after if ".conv." not in k}
    assert all(torch.equal(after[k], before[k]) for k in kept)
    conv = "body.0.conv"
    assert torch.equal(
        torch.cat([after[f"{conv}.weights.0"], after[f"{conv}.weights.1"]]),
        before[f"{conv}.weight"],
    )
    assert [k for k in after if k.startswith("body.3.conv")] == ["body.3.conv.weight"]
    model.train()(torch.randn(2, 3, 30, 31)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_checkpoint_list_rebuilds_the_net() -> None:
    """From the plain network and the plan's plain rows, without the learners' checkpoint."""
    model, wanted = learnt_net()
    apply(model, wanted)
    rows = json.loads(json.dumps(wanted.to_plain()["layers"]))
    fresh = rebuild(ThirdPartyNet().eval(), rows)
    fresh.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, 3, 30, 31)
    assert torch.equal(fresh(x), model(x))
    bare = [{"path": row["path"], "parts": row["parts"]} for row in rows]
    assert rebuild(ThirdPartyNet(), bare).state_dict().keys() == model.state_dict().keys()


def test_rebuilding_from_a_plain_net_slices_its_weights() -> None:
    """The paper's FD without transfer: dilations from the learners, weights from elsewhere."""
    _, wanted = learnt_net()
    plain = ThirdPartyNet()
    weight = plain.body[0].conv.weight.detach().clone()
    apply(plain, wanted)
    assert torch.equal(torch.cat(list(plain.body[0].conv.weights)), weight)
    fresh = apply(copy.deepcopy(ThirdPartyNet()), wanted, weights="none")
    found = torch.cat([w.flatten() for w in fresh.body[2].conv.weights])
    assert 0.5 < float(found.detach().std()) / (2 / (3 * 9)) ** 0.5 < 2.5


def change(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    rows = copy.deepcopy(rows)
    rows[0]["parts"][0] |= values
    return rows


def test_refusals() -> None:
    _, wanted = learnt_net()
    rows = wanted.to_plain()["layers"]
    for wrong in (
        change(rows, padding=[0, 2]),
        change(rows, kernel=[1, 3]),
        change(rows, kernel=[3, 5]),
        change(rows, channels=7),
        change(rows, channels=0),
        change(rows, dilation=[-1, 2], padding=[-1, 2]),
        [rows[0], rows[0]],
        [rows[0] | {"path": "body.9.conv"}],
        [rows[0] | {"path": "body.0.reduce"}],
        [
            rows[2]
            | {"parts": [p | {"channels": 2 + 8 * i} for i, p in enumerate(rows[2]["parts"])]}
        ],
    ):
        model = ThirdPartyNet()
        with pytest.raises(CheckpointError, match=r"^body\.\d\.\w+: "):
            rebuild(model, wrong)
        assert not [m for m in model.modules() if isinstance(m, SplitConv2d)]
    for option in ({"weights": "transfr"}, {"zero_dilation": "centre"}):
        with pytest.raises(ConfigError, match="did you mean"):
            apply(ThirdPartyNet(), wanted, **option)


def test_costs_no_more_than_the_plain_net() -> None:
    """Parameters and multiply-adds of ResNet-50 with Table 3's FPN scales, as planned."""
    scales = [(0.89, 0.93), *[(1.19, 1.15)] * 3, (0.77, 0.82), *[(1.41, 1.39)] * 5, (0.46, 0.89)]
    scales += [(1.75, 1.53), (2.81, 3.68)]
    with torch.device("meta"):
        plain, model = build_backbone("resnet50"), build_backbone("resnet50")
        layers = insert(model)
        wanted = plan(layers, {e.path: d for e, d in zip(layers, scales, strict=True)})
        apply(model, wanted)
    before, after = count_classifier(plain)["total"], count_classifier(model)["total"]
    planned = wanted.totals.params
    assert before.params - after.params == planned[0] - planned[1] > 0
    saved = sum(
        (1 - e.macs_ratio) * 9 * e.channels[0] * e.channels[1] * side * side
        for e, side in zip(wanted.layers, [28] * 4 + [14] * 6 + [7] * 3, strict=True)
    )
    assert before.macs - after.macs == pytest.approx(saved)
    assert after.convs == before.convs


def test_frozen_and_trainable_stay_so() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    made = split(conv, [Part((1, 1), 2), Part((2, 2), 4)])
    assert not any(p.requires_grad for p in made.parameters())


def test_freezing_a_model() -> None:
    """Each learner at its mean; the frozen net and its plain form compute the same."""
    model, _ = learnt_net()
    x = torch.randn(1, 3, 30, 31)
    means = {path: (1.3, 0.4 + i) for i, path in enumerate(learners(model))}
    expected = copy.deepcopy(model)
    for path, learner in learners(expected).items():
        learner.scales = lambda _, d=means[path]: torch.tensor([d])
    before = expected(x)
    with pytest.raises(CheckpointError, match=r"difference at body\.0\.conv"):
        freeze(model, {p: d for p, d in means.items() if p != "body.0.conv"})
    freeze(model, means)
    assert torch.allclose(model(x), before, atol=1e-5)
    assert torch.allclose(to_plain(model)(x), before, atol=1e-5)


# --- plain PyTorch ------------------------------------------------------------------------------


def test_to_plain_computes_the_same() -> None:
    """Grouped and depthwise parts included; the given model stays as it is."""
    model, wanted = learnt_net()
    apply(model, wanted)
    x = torch.randn(2, 3, 30, 31)
    plain = to_plain(model)
    assert torch.allclose(plain(x), model(x), atol=1e-5)
    assert [m for m in model.modules() if isinstance(m, SplitConv2d)]
    assert all("detkit" not in type(m).__module__ for m in plain.modules())
    convs = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    counted = macs_by_module(plain, lambda: plain(x))
    assert counted.keys() == set(convs)
    assert sum(counted.values()) == sum(macs_by_module(model, lambda: model(x)).values())


def test_to_plain_runs_without_detkit() -> None:
    """A pickled layer loads and runs in a process that cannot import detkit."""
    made = split(nn.Conv2d(4, 6, 3, padding=1), [Part((0, 1), 2), Part((2, 2), 4)])
    x = torch.randn(1, 4, 9, 9)
    file = io.BytesIO()
    torch.save({"model": to_plain(made), "x": x, "y": made(x)}, file)
    code = (
        "import io, sys, torch; sys.modules['detkit'] = None\n"
        "d = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)\n"
        "assert torch.allclose(d['model'](d['x']), d['y'], atol=1e-5)"
    )
    command = [sys.executable, "-I", "-c", code]
    subprocess.run(command, input=file.getvalue(), check=True, timeout=120)


@pytest.mark.parametrize("scale", [(1.3, 0.7), (8.49, 9.34), (0.4, 2.5), (2.5, 3.0), (0.5, 0.5)])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_fixed_scale_becomes_plain(scale: tuple[float, float], groups: int) -> None:
    """Interpolated samples are a mix of whole dilations, for parity checks of exports."""
    learner = GlobalScaleConv2d(nn.Conv2d(4, 8, 3, 2, 1, groups=groups)).double()
    model = nn.Sequential(FixedScaleConv2d(learner, scale))
    x = torch.randn(2, 4, 25, 26, dtype=torch.float64)
    plain = to_plain(model)
    assert torch.allclose(plain(x), model(x), atol=1e-12)
    assert all("detkit" not in type(m).__module__ for m in plain.modules())


def test_to_plain_refuses_learners() -> None:
    model, _ = learnt_net()
    with pytest.raises(CheckpointError, match=r"body\.0\.conv: must have fixed dilations"):
        to_plain(model)


def test_exports() -> None:
    """Both forms through torch.export; the plain one holds torch's operators alone."""
    model, wanted = learnt_net()
    apply(model, wanted)
    x = torch.randn(1, 3, 30, 31)
    for one in (model, to_plain(model)):
        exported = torch.export.export(one, (x,))
        assert torch.allclose(exported.module()(x), model(x), atol=1e-5)
    calls = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert calls and all(call.startswith("aten.") for call in calls)
