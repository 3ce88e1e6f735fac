"""All settings of a run, and the plain tables that files and checkpoints hold."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from detkit.config.checks import suggest
from detkit.config.data import DataConfig
from detkit.config.heads import BoxConfig, MaskConfig, RetinaConfig, ThinConfig
from detkit.config.model import AnchorConfig, ModelConfig, RpnConfig, ScalesConfig
from detkit.config.nas import NasConfig, SearchConfig, SpaceConfig
from detkit.config.training import LENGTHS, EvalConfig, OptimConfig, TrainConfig
from detkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run; stored resolved in the run folder and in each checkpoint."""

    model: ModelConfig = field(default_factory=ModelConfig)
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    rpn: RpnConfig = field(default_factory=RpnConfig)
    box: BoxConfig = field(default_factory=BoxConfig)
    thin: ThinConfig = field(default_factory=ThinConfig)
    retina: RetinaConfig = field(default_factory=RetinaConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    scales: ScalesConfig = field(default_factory=ScalesConfig)
    space: SpaceConfig = field(default_factory=SpaceConfig)
    nas: NasConfig = field(default_factory=NasConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    search: SearchConfig = field(default_factory=SearchConfig)


def to_plain(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain types (tuples become lists), as TOML and checkpoints store them."""
    return {
        section: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        for section, values in dataclasses.asdict(config).items()
    }


def from_plain(plain: Mapping[str, Mapping[str, Any]], base: Config | None = None) -> Config:
    """``base`` (or the defaults) with the values of ``plain``.

    Raises:
        ConfigError: an unknown table or key, or a value of the wrong type or out of range.
    """
    base = base or Config()
    sections = {f.name: getattr(base, f.name) for f in dataclasses.fields(Config)}
    for section, values in plain.items():
        if section not in sections:
            raise ConfigError(f"config: unknown table {section!r}{suggest(section, sections)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"config: {section} must be a table of settings, got {values!r}")
        current = sections[section]
        sections[section] = _replace(section, current, values)
    return Config(**sections)


def _replace(section: str, current: Any, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(type(current))
    for key in values:
        if key not in hints:
            known = [f"{section}.{k}" for k in hints]
            raise ConfigError(
                f"config: unknown key {section}.{key}{suggest(f'{section}.{key}', known)}"
            )
    typed = {k: _typed(f"{section}.{k}", v, hints[k]) for k, v in values.items()}
    if section == "train" and any(typed.get(k) for k in LENGTHS):
        typed = {**dict.fromkeys(LENGTHS, 0), **typed}  # replaces an earlier layer's
    return dataclasses.replace(current, **typed)


def _typed(key: str, value: Any, hint: Any) -> Any:
    """``value`` as the annotated type; ints pass for floats, nothing else is converted."""
    if isinstance(hint, types.GenericAlias):  # tuple[item, ...]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}: must be a list, got {value!r}")
        item = typing.get_args(hint)[0]
        return tuple(_typed(key, v, item) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{key}: must be {hint.__name__}, got {value!r}")
    return value
