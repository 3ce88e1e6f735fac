"""Settings in files: TOML, and the recipes that detkit ships."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from detkit.config.checks import suggest
from detkit.config.tables import Config, to_plain
from detkit.errors import ConfigError


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file; raises ConfigError when it is missing or malformed."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: must be readable, got {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}: must be valid TOML, got {error}") from error


def recipes() -> dict[str, Path]:
    """Name (``tiny/pretrain``) to file of every recipe that detkit ships."""
    root = Path(str(resources.files("detkit"))) / "recipes"
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.rglob("*.toml"))}


def recipe_path(name: str) -> Path:
    """File of a shipped recipe, or of one's own where the name ends in ``.toml``.

    Raises:
        ConfigError: an unknown name; says the nearest one.
    """
    if name.endswith(".toml"):
        return Path(name)
    known = recipes()
    if name not in known:
        raise ConfigError(
            f"--recipe: unknown recipe {name!r}{suggest(name, known)}; `detkit models` lists them"
        )
    return known[name]


def write_toml(config: Config, path: str | Path) -> None:
    """Write the resolved config beside the results."""
    Path(path).write_text(tomli_w.dumps(to_plain(config)), encoding="utf-8")
