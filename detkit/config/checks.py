"""What checks of settings say, and the nearest known word or file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from detkit.errors import ConfigError


def require(condition: bool, key: str, must: str, value: object) -> None:
    """Raise ConfigError unless ``condition``: ``key`` must be ``must``, got ``value``."""
    if not condition:
        raise ConfigError(f"{key}: must be {must}, got {value!r}")


def one_of(key: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a word that is none of ``choices``, with the nearest of them."""
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(
            f"{key}: must be one of {', '.join(choices)}, got {value!r}{suggest(value, choices)}"
        )


def positive(section: object, table: str, *names: str) -> None:
    """Refuse settings of a section, which is ``table`` in files, that are not above 0."""
    for name in names:
        value = getattr(section, name)
        require(value > 0, f"{table}.{name}", "positive", value)


def zero_or_more(section: object, table: str, *names: str) -> None:
    """As :func:`positive`, for those below 0."""
    for name in names:
        value = getattr(section, name)
        require(value >= 0, f"{table}.{name}", "zero or more", value)


def share(section: object, table: str, *names: str) -> None:
    """As :func:`positive`, for those outside 0..1."""
    for name in names:
        value = getattr(section, name)
        require(0 <= value <= 1, f"{table}.{name}", "in 0..1", value)


def suggest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known word nearest to ``word``, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def suggest_path(path: str | Path) -> str:
    """As :func:`suggest`, of what lies where ``path`` does not, without its hidden files."""
    path = Path(path)
    if path.exists():
        return ""
    try:
        near = [str(path.with_name(p.name)) for p in path.parent.iterdir() if p.name[0] != "."]
    except OSError:
        return ""
    return suggest(str(path), sorted(near)) if path.name else ""
