"""Options that every command has, the config they resolve to, and output as a table or as JSON."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from detkit import config as configs
from detkit.cli import logs
from detkit.errors import ConfigError

log = logging.getLogger("detkit")

Command = Callable[..., Any]
Tables = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Common:
    """The options every command shares."""

    json: bool = False
    seed: int | None = None
    device: str = "auto"
    out: Path | None = None
    overrides: tuple[str, ...] = ()
    config_file: Path | None = None
    recipe: str | None = None
    dry_run: bool = False
    debug: bool = False
    log_format: str | None = None
    flags: Tables = field(default_factory=dict)

    def layers(self) -> list[Mapping[str, Any]]:
        """Config file, flags (``--seed`` is one) and ``--set``, in the order they apply."""
        layers: list[Mapping[str, Any]] = []
        if self.config_file:
            tables = configs.read_toml(self.config_file)
            layers.append(configs.Layer(tables, f"config file {self.config_file}"))
        layers.append(configs.Layer(self._given(), flag_of))
        return layers + [configs.parse_override(text) for text in self.overrides]

    def _given(self) -> Tables:
        """Settings by flags."""
        if self.seed is None:
            return self.flags
        return {**self.flags, "train": {**self.flags.get("train", {}), "seed": self.seed}}

    def with_flags(self, table: str, values: Mapping[str, Any]) -> Common:
        """With flags of one command that write settings."""
        return replace(self, flags={**self.flags, table: {**self.flags.get(table, {}), **values}})

    def overridden(self) -> list[str]:
        """Flags that a ``--set`` of another value replaces, told in one sentence each."""
        flags = self._given()
        return [
            f"--set {table}.{key}={value} goes before {flag_of(table, key)} {flags[table][key]}"
            for layer in map(configs.parse_override, self.overrides)
            for table, values in layer.items()
            for key, value in values.items()
            if flags.get(table, {}).get(key, value) != value
        ]


def _recipes(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    return [name for name in configs.recipes() if name.startswith(begun)]


def _settings(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    keys = (
        f"{t}.{key}=" for t, table in configs.to_plain(configs.Config()).items() for key in table
    )
    return [key for key in keys if key.startswith(begun)]


def _detectors(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    return [name for name in configs.UNUSED if name.startswith(begun)]


_COMMON = (
    click.option(
        "--json", "as_json", is_flag=True, help="One JSON object on stdout, logs on stderr."
    ),
    click.option("--seed", type=int, help="Seed of weights, order and augmentation."),
    click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:<index>."
    ),
    click.option("--out", type=click.Path(path_type=Path), help="Folder for the results."),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        shell_complete=_settings,
        help="One setting; repeatable.",
    ),
    click.option(
        "--config", "config_file", type=click.Path(path_type=Path), help="TOML file of settings."
    ),
    click.option(
        "--recipe",
        shell_complete=_recipes,
        help="Settings that detkit ships (`detkit models` lists them), or a .toml file.",
    ),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Write nothing, show what would run; a training does two steps to say what it takes.",
    ),
    click.option(
        "--log-format",
        type=click.Choice(logs.FORMATS),
        help="Messages on stderr.  [default: rich on a terminal, else plain]",
    ),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)

# flag -> (config table, key, click's arguments): the only flags beside --set that write settings
_SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "--detector": (
        "model",
        "detector",
        {"help": "Detector; `detkit models` lists them.", "shell_complete": _detectors},
    ),
    "--backbone": ("model", "backbone", {"help": "Backbone; `detkit models` lists them."}),
    "--scales": (
        "model",
        "scales",
        {
            "type": click.Choice(["off", "learn"]),
            "help": "learn: each 3x3 convolution of conv3 to conv5 learns a global scale (POD).",
        },
    ),
    "--data": ("data", "path", {"help": "Data set in any layout detkit reads, or `synthetic`."}),
    "--split": ("data", "split", {"help": "Split to train on."}),
    "--images": (
        "data",
        "images",
        {"help": "Image folder, where an annotation file stands alone."},
    ),
    "--on-bad-image": ("data", "on_bad_image", {"help": "skip or fail."}),
    "--workers": ("data", "workers", {"type": int, "help": "Loader processes."}),
    "--steps": ("train", "steps", {"type": int, "help": "Length in optimiser steps."}),
    "--epochs": ("train", "epochs", {"type": float, "help": "Length in passes over the split."}),
    "--minutes": ("train", "minutes", {"type": float, "help": "Length in wall minutes."}),
    "--tensorboard": (
        "train",
        "tensorboard",
        {"is_flag": True, "help": "Event files for TensorBoard in the run folder too."},
    ),
    "--batch-size": (
        "train",
        "batch_size",
        {"type": int, "help": "Images per step, over all processes."},
    ),
}


_FLAGS = {(table, key): flag for flag, (table, key, _) in _SETTINGS.items()}
_FLAGS["search", "max_latency_ms"] = "--max-latency"


def flag_of(table: str, key: str) -> str:
    """The option that writes a setting, given that one does."""
    return _FLAGS.get((table, key), f"--{key.replace('_', '-')}")


def common_options(*flags: str) -> Callable[[Command], Command]:
    """Add the shared options and the named setting flags; the command gets all as ``common``."""

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def wrapper(**values: Any) -> Any:
            common = _collect(flags, values)
            logs.configure(common.log_format, debug=common.debug)
            for line in common.overridden():
                log.info("%s", line)
            return function(common=common, **values)

        decorated: Command = wrapper
        for option in reversed(_COMMON):
            decorated = option(decorated)
        for flag in reversed(flags):
            decorated = click.option(flag, default=None, **_SETTINGS[flag][2])(decorated)
        return decorated

    return decorate


_FORM = (
    click.option(
        "--fast",
        is_flag=True,
        help="Batch norms folded, weights channels last; the same but for rounding.",
    ),
    click.option("--bf16", is_flag=True, help="Layers in bfloat16: faster, scores a little off."),
    click.option(
        "--compile",
        is_flag=True,
        help="--fast through torch.compile: a minute or more for each new shape of a batch.",
    ),
    click.option(
        "--cuda-graph",
        is_flag=True,
        help="--fast by CUDA graphs, one for each shape of a batch; on a GPU.",
    ),
)


def form_options(function: Command) -> Command:
    """Add the flags that say in which form a detector runs; :func:`form_of` takes them out."""
    for option in reversed(_FORM):
        function = option(function)
    return function


def form_of(options: dict[str, Any]) -> dict[str, bool]:
    """The fields of a :class:`detkit.deploy.Form` that a command's ``options`` hold, taken out."""
    return {name: options.pop(name) for name in ("fast", "bf16", "compile", "cuda_graph")}


def _collect(flags: tuple[str, ...], values: dict[str, Any]) -> Common:
    tables: Tables = {}
    for flag in flags:
        value = values.pop(flag[2:].replace("-", "_"))
        if value is not None:
            table, key, _ = _SETTINGS[flag]
            tables.setdefault(table, {})[key] = value
    shared = (
        *("seed", "device", "out", "overrides", "config_file", "recipe", "dry_run", "debug"),
        "log_format",
    )
    return Common(json=values.pop("as_json"), flags=tables, **{k: values.pop(k) for k in shared})


def height_by_width(text: str | None) -> tuple[int, int] | None:
    """(height, width) of a ``--size``; raises ConfigError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or "0" in match.groups():
        raise ConfigError(
            f"--size: must read HEIGHTxWIDTH in pixels, got {text!r}; for example 800x1344"
        )
    return int(match[1]), int(match[2])


def emit(common: Common, result: Any, show: Callable[[], None]) -> None:
    """Print ``result`` as one JSON object, or call ``show`` to draw it for a person."""
    if common.json:
        click.echo(json.dumps(result))
    else:
        show()
