"""Layers of settings in order: what comes out, where each value is from, what is refused."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from detkit.config.by_detector import DETECTOR_DEFAULTS, UNUSED
from detkit.config.model import ModelConfig
from detkit.config.nas import SUPERNET, NasConfig, SpaceConfig, is_supernet
from detkit.config.tables import Config, from_plain, to_plain
from detkit.config.training import LENGTHS
from detkit.errors import ConfigError


class Layer(dict[str, Any]):
    """Tables of settings that know where they come from, for :func:`origins`.

    Args:
        tables: The settings.
        origin: Where they come from, in words; or what says it, given table and key.
    """

    def __init__(self, tables: Mapping[str, Any], origin: str | Callable[[str, str], str]) -> None:
        super().__init__(tables)
        self.origin_of = origin if callable(origin) else lambda table, key: origin


def origins(
    layers: Iterable[Mapping[str, Mapping[str, Any]]], base: str = ""
) -> dict[str, dict[str, str]]:
    """Where each setting of :func:`resolve` comes from, by table and key.

    Args:
        layers: As of :func:`resolve`, without errors; those that are no :class:`Layer` are called
            ``settings``.
        base: Origin of what no layer gives; by default the detector's defaults and those of all.
    """
    layers = list(layers)
    found = {
        table: dict.fromkeys(values, base or "default")
        for table, values in to_plain(Config()).items()
    }
    if not base:
        detector = named_detector(layers)
        layers.insert(0, Layer(DETECTOR_DEFAULTS.get(detector, {}), f"default of {detector}"))
    for layer in layers:
        origin_of = layer.origin_of if isinstance(layer, Layer) else lambda table, key: "settings"
        for table, values in layer.items():
            found[table] |= {key: origin_of(table, key) for key in values}
            given = [key for key in LENGTHS if table == "train" and values.get(key)]
            if given:  # one of them unsets the others
                found[table] |= dict.fromkeys(LENGTHS, origin_of(table, given[0]))
    return found


def parse_override(text: str) -> Layer:
    """``{"optim": {"lr": 0.01}}`` from ``optim.lr=0.01``; the value is TOML or a bare word."""
    key, sign, raw = text.partition("=")
    parts = key.strip().split(".")
    if not sign or len(parts) != 2:
        plain = to_plain(Config())
        keys: dict[str, str] = {}
        for table, values in plain.items():
            for name in values:  # of two tables the first one's
                keys.setdefault(name, f"{table}.{name}")
        near = difflib.get_close_matches(key.strip(), keys, n=1, cutoff=0.6) if sign else []
        hint = f"did you mean {keys[near[0]]!r}?" if near else "for example --set optim.lr=0.01"
        raise ConfigError(f"--set: must read table.key=value, got {text!r}; {hint}")
    try:
        value = tomllib.loads(f"v = {raw.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    return Layer({parts[0]: {parts[1]: value}}, "--set")


def resolve(
    layers: Iterable[Mapping[str, Mapping[str, Any]]], base: Config | None = None
) -> Config:
    """Apply layers of plain tables in order, last wins.

    Without ``base`` they stand on what the paper of the chosen detector fixes
    (``DETECTOR_DEFAULTS``).

    Raises:
        ConfigError: an unknown key, an unusable value, or one that the detector would ignore.
    """
    layers = list(layers)
    start = _start(layers, base)
    config = merged(layers, base)
    _refuse_unused(to_plain(start), to_plain(config))
    _refuse_unused_nas(config)
    return config


def merged(layers: Iterable[Mapping[str, Mapping[str, Any]]], base: Config | None = None) -> Config:
    """As :func:`resolve`, without refusing what the model would ignore: layers are to follow."""
    layers = list(layers)
    config = _start(layers, base)
    for layer in layers:
        config = from_plain(layer, config)
    return config


def _start(layers: Iterable[Mapping[str, Mapping[str, Any]]], base: Config | None) -> Config:
    return base or from_plain(DETECTOR_DEFAULTS.get(named_detector(layers), {}))


def _refuse_unused_nas(config: Config) -> None:
    """Refuse the tables of DetNAS where the backbone has no use for them."""
    backbone = config.model.backbone
    if config.nas != NasConfig() and not is_supernet(backbone):
        changed = [k for k, v in to_plain(config)["nas"].items() if v != getattr(NasConfig(), k)]
        raise ConfigError(
            f"nas.{changed[0]}: must stay as it is for {backbone}, which is no supernet, "
            f"got {getattr(config.nas, changed[0])!r}"
        )
    own = backbone.split(":")[0] == SUPERNET or backbone.split(":")[:2] == [
        "detnas",
        config.space.name,
    ]
    if config.space != SpaceConfig() and not own:
        raise ConfigError(
            f"space: must be left out for {backbone}, which is not of it, got a space "
            f"{config.space.name!r}; its backbones are {SUPERNET} and detnas:<name>:<genes>"
        )


def _refuse_unused(start: dict[str, dict[str, Any]], config: dict[str, dict[str, Any]]) -> None:
    """Refuse settings that were changed from ``start`` though the detector has no use for them."""
    detector = config["model"]["detector"]
    unused = UNUSED.get(detector, ())
    changed = [
        f"{table}.{key}"
        for table, values in config.items()
        for key in values
        if (table in unused or f"{table}.{key}" in unused) and values[key] != start[table][key]
    ]
    if changed:
        table, key = changed[0].split(".")
        others = f"; neither does it use {', '.join(changed[1:])}" if changed[1:] else ""
        raise ConfigError(
            f"{changed[0]}: must stay {start[table][key]!r} for {detector}, which does not use it, "
            f"got {config[table][key]!r}{others}"
        )


def named_detector(layers: Iterable[Mapping[str, Mapping[str, Any]]]) -> str:
    """The detector of the last layer that names one, else the default one."""
    name = ModelConfig.detector
    for layer in layers:
        model = layer.get("model")
        if isinstance(model, Mapping):
            name = str(model.get("detector", name))
    return name
