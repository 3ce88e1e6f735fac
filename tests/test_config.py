"""Settings: values out of range, and recipes under another detector."""

from __future__ import annotations

import logging

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


@pytest.mark.parametrize(
    ("command", "recipe", "detector", "told"),
    [
        ("finetune", "tiny/rfcn", "retinanet", True),
        ("finetune", "tiny/rfcn", "rfcn", False),
        ("finetune", None, "retinanet", False),  # takes tiny/retinanet by itself
        ("pretrain", "tiny/pretrain", "rfcn", False),  # trains no detector
    ],
)
def test_a_recipe_of_another_detector_is_told(
    command: str, recipe: str | None, detector: str, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "detkit"):
        config = api.resolve_config(command, [{"model": {"detector": detector}}], recipe=recipe)
    assert config.model.detector == detector
    text = f"recipe {recipe} is of rfcn, and its settings go to {detector}"
    assert [text in message for message in caplog.messages] == ([True] if told else [])
