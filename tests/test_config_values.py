"""Settings: values out of range, and recipes under another detector."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest

from detkit import api
from detkit import config as configs
from detkit.errors import ConfigError


@pytest.mark.parametrize(
    ("table", "key", "value", "must"),
    [
        ("rpn", "channels", -1, "zero or more"),
        ("rpn", "min_size", -5.0, "zero or more"),
        ("rpn", "smooth_l1_beta", -1.0, "zero or more"),
        ("box", "smooth_l1_beta", -1.0, "zero or more"),
        ("box", "sampling_ratio", -1, "zero or more"),
        ("box", "canonical_size", 0.0, "positive"),
        ("mask", "sampling_ratio", -2, "zero or more"),
        ("data", "short_side", 0, "positive"),
    ],
)
def test_values_out_of_range_are_refused_by_name(
    table: str, key: str, value: float, must: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{table}\.{key}: must be {must}, got {value}$"):
        configs.resolve([{table: {key: value}}])


@pytest.mark.parametrize("recipe", ["tiny/rfcn", None])
def test_a_recipe_of_another_detector_is_told(
    recipe: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    layers = [{"model": {"detector": "retinanet"}}]
    told = recipe is not None  # without one the detector's own is taken
    refused = pytest.raises(ConfigError, match="for retinanet, which does not use it")
    with caplog.at_level(logging.WARNING, "detkit"), refused if told else nullcontext():
        api.resolve_config("finetune", layers, recipe=recipe)
    hint = (
        "recipe tiny/rfcn is of rfcn, and its settings go to retinanet; `--recipe tiny/retinanet`"
    )
    assert any(hint in message for message in caplog.messages) is told
