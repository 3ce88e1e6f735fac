"""Every setting of a run as frozen dataclasses, read from TOML; unknown keys name the nearest.

Order of precedence, last wins: defaults (the detector's own above the general ones), recipe,
checkpoint to start from, config file, command-line flags (``--seed`` is one), ``--set key=value``.
Imports no torch.
"""

from detkit.config.by_detector import DETECTOR_DEFAULTS, UNUSED
from detkit.config.checks import suggest, suggest_path
from detkit.config.data import DataConfig
from detkit.config.files import read_toml, recipe_path, recipes, write_toml
from detkit.config.heads import BoxConfig, MaskConfig, RetinaConfig, ThinConfig
from detkit.config.layers import (
    Layer,
    merged,
    named_detector,
    origins,
    parse_override,
    resolve,
)
from detkit.config.model import (
    NORMS,
    SCALES,
    AnchorConfig,
    ModelConfig,
    RpnConfig,
    ScalesConfig,
)
from detkit.config.nas import SUPERNET, NasConfig, SearchConfig, SpaceConfig, is_supernet
from detkit.config.tables import Config, from_plain, to_plain
from detkit.config.training import EvalConfig, OptimConfig, TrainConfig

__all__ = [
    "DETECTOR_DEFAULTS",
    "NORMS",
    "SCALES",
    "SUPERNET",
    "UNUSED",
    "AnchorConfig",
    "BoxConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "Layer",
    "MaskConfig",
    "ModelConfig",
    "NasConfig",
    "OptimConfig",
    "RetinaConfig",
    "RpnConfig",
    "ScalesConfig",
    "SearchConfig",
    "SpaceConfig",
    "ThinConfig",
    "TrainConfig",
    "from_plain",
    "is_supernet",
    "merged",
    "named_detector",
    "origins",
    "parse_override",
    "read_toml",
    "recipe_path",
    "recipes",
    "resolve",
    "suggest",
    "suggest_path",
    "to_plain",
    "write_toml",
]
