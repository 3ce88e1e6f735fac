"""The search spaces of DetNAS (arXiv 1903.10979) as data: which block every position may hold.

A gene is the index of a position's block in ``SearchSpace.ops``; one gene per position makes a net.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from detkit.config import SUPERNET, SpaceConfig, suggest
from detkit.errors import ConfigError

Genes = tuple[int, ...]
Shuffle = Literal[1, 2]


@dataclass(frozen=True)
class Op:
    """A kind of block: its kernel, and whether it is the deep one with three depthwise layers."""

    kernel: int
    xception: bool = False


OPS = {"shuffle3": Op(3), "shuffle5": Op(5), "shuffle7": Op(7), "xception": Op(3, xception=True)}
"""Blocks by name, in the order of the paper's genes 0 to 3."""


@dataclass(frozen=True)
class Position:
    """Where a block stands.

    Attributes:
        stage: Number of its stage: 2 gives the map ``c2``.
        index: Its place in the stage, from 0.
        cin: Channels it gets.
        cout: Channels it gives.
        stride: 2 for the first block of a stage, else 1.
    """

    stage: int
    index: int
    cin: int
    cout: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Stem, then stages of blocks that each are one of ``ops``; see DetNAS, table 1.

    Raises:
        ConfigError: The numbers do not make a network.
    """

    name: str
    """What messages and backbone names call it."""
    blocks: tuple[int, ...]
    """Blocks of each stage; the first one of a stage halves the map."""
    stem: int
    """Channels of the 3x3 stem of stride 2."""
    channels: tuple[int, ...]
    """Channels of each stage: even, and more than before."""
    last: int
    """Channels of a classifier's last 1x1 convolution; detectors have none."""
    ops: tuple[str, ...] = tuple(OPS)
    """Names of the blocks that genes 0, 1, ... stand for."""
    shuffle: Shuffle = 2
    """How channels are shuffled before a split: 1 (two groups interleaved, then halves) or 2 (even
    and odd channels). Weights fit one of the two."""

    def __post_init__(self) -> None:
        where = f"search space {self.name!r}"
        _require(bool(self.blocks), f"{where}: blocks", "one number per stage", self.blocks)
        same = len(self.blocks) == len(self.channels)
        _require(same, f"{where}: channels", f"{len(self.blocks)} numbers", self.channels)
        _require(min(self.blocks) > 0, f"{where}: blocks", "positive", self.blocks)
        widths = (self.stem, *self.channels)
        _require(self.stem > 0, f"{where}: stem", "positive", self.stem)
        _require(self.last > 0, f"{where}: last", "positive", self.last)
        grow = all(a < b for a, b in zip(widths, widths[1:], strict=False))
        _require(grow, f"{where}: channels", f"growing from the stem's {self.stem}", self.channels)
        even = all(c % 2 == 0 for c in self.channels)
        _require(even, f"{where}: channels", "even", self.channels)
        _require(bool(self.ops), f"{where}: ops", "at least one name", self.ops)
        for op in self.ops:
            if op not in OPS:
                near = suggest(op, OPS)
                raise ConfigError(f"{where}: ops must be of {', '.join(OPS)}, got {op!r}{near}")
        once = len(set(self.ops)) == len(self.ops)
        _require(once, f"{where}: ops", "named once each", self.ops)
        _require(self.shuffle in (1, 2), f"{where}: shuffle", "1 or 2", self.shuffle)

    def __len__(self) -> int:
        """Positions, that is genes of a network."""
        return sum(self.blocks)

    @property
    def size(self) -> int:
        """Number of networks."""
        count: int = len(self.ops) ** len(self)
        return count

    def positions(self) -> Iterator[Position]:
        """Every position, from the stem on."""
        cin = self.stem
        for stage, (blocks, cout) in enumerate(zip(self.blocks, self.channels, strict=True), 2):
            for index in range(blocks):
                yield Position(stage, index, cin, cout, 2 if index == 0 else 1)
                cin = cout

    def check(self, genes: Sequence[int]) -> Genes:
        """``genes`` as a tuple; raises ConfigError unless they are a network of this space."""
        found = tuple(genes)
        if len(found) != len(self) or not all(0 <= g < len(self.ops) for g in found):
            raise ConfigError(
                f"genes: must be {len(self)} numbers in 0..{len(self.ops) - 1} for the "
                f"{self.name} space, got {len(found)}: {' '.join(map(str, found))}"
            )
        return found

    def parse(self, text: str) -> Genes:
        """Genes from digits such as ``2120-2112-33130031-3132``; dashes between stages may lack.

        Raises:
            ConfigError: Not a network of this space.
        """
        stages = text.split("-")
        if not (text.replace("-", "").isascii() and text.replace("-", "").isdecimal()):
            raise ConfigError(f"genes: must be digits with dashes between stages, got {text!r}")
        if len(stages) > 1 and [len(s) for s in stages] != list(self.blocks):
            raise ConfigError(
                f"genes: must have {'-'.join(map(str, self.blocks))} digits in the stages of the "
                f"{self.name} space, got {text!r}"
            )
        return self.check([int(digit) for digit in "".join(stages)])

    def text(self, genes: Sequence[int]) -> str:
        """What :meth:`parse` reads, with dashes between stages."""
        digits = "".join(map(str, self.check(genes)))
        ends = [sum(self.blocks[: i + 1]) for i in range(len(self.blocks))]
        return "-".join(digits[e - n : e] for e, n in zip(ends, self.blocks, strict=True))

    def to_plain(self) -> dict[str, Any]:
        """Plain types, as TOML and checkpoints store them."""
        plain = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SearchSpace:
        """The space of a table, as :meth:`to_plain` or a user's TOML file gives it.

        Raises:
            ConfigError: An unknown or missing key, or a value of the wrong type or out of range.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in plain:
            if key not in fields:
                raise ConfigError(f"search space: unknown key {key!r}{suggest(key, fields)}")
        for key, field in fields.items():
            if field.default is dataclasses.MISSING and key not in plain:
                raise ConfigError(f"search space: must have {', '.join(fields)}, got no {key}")
        return cls(**{key: _typed(key, value) for key, value in plain.items()})


def _require(condition: bool, what: str, must: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{what} must be {must}, got {value!r}")


_ITEMS: dict[str, type] = {"blocks": int, "channels": int, "ops": str}
_TYPES: dict[str, type] = {"name": str}


def _typed(key: str, value: object) -> Any:
    if key in _ITEMS:
        kind = _ITEMS[key]
        if isinstance(value, list | tuple) and all(type(item) is kind for item in value):
            return tuple(value)
        raise ConfigError(f"search space: {key} must be a list of {kind.__name__}, got {value!r}")
    kind = _TYPES.get(key, int)
    if type(value) is not kind:
        raise ConfigError(f"search space: {key} must be {kind.__name__}, got {value!r}")
    return value


_LARGE = SearchSpace(
    name="large", blocks=(8, 8, 16, 8), stem=48, channels=(96, 240, 480, 960), last=1024
)
SPACES = {
    space.name: space
    for space in (
        SearchSpace(
            name="small", blocks=(4, 4, 8, 4), stem=16, channels=(64, 160, 320, 640), last=1024
        ),
        _LARGE,
        replace(_LARGE, name="wide", stem=72, channels=(172, 432, 864, 1728), last=1728),
        SearchSpace(name="tiny", blocks=(2, 2, 4, 2), stem=8, channels=(24, 48, 96, 192), last=256),
    )
}
"""The paper's spaces of 300 M, 1.3 G and (widened, never searched) 3.8 G multiply-adds, and a small
one for CPUs."""


@dataclass(frozen=True)
class Architecture:
    """One network of a space, genes as :meth:`SearchSpace.parse` reads them."""

    space: str
    genes: str


_FOUND_1300M = "00312102-03123320-2113202221310333-13333333"
ARCHITECTURES = {
    "detnas-300m": Architecture("small", "2120-2112-33130031-3132"),
    "detnas-300m-1019": Architecture("small", "0001-2033-12223331-3232"),
    "detnas-300m-retinanet": Architecture("small", "2311-3213-31113320-3333"),
    "detnas-300m-voc": Architecture("small", "2103-1303-20113333-3331"),
    "detnas-300m-voc-retinanet": Architecture("small", "1300-2333-23333220-2311"),
    "detnas-300m-spos": Architecture("small", "2101-2020-20230000-3233"),
    "detnas-300m-mmrazor": Architecture("small", "1000-3032-22330213-2221"),
    "detnas-1.3g": Architecture("large", _FOUND_1300M),
    "detnas-3.8g": Architecture("wide", _FOUND_1300M),
}
"""Published networks (DetNAS release; SPOS searched for ImageNet; MMRazor's own search)."""

SUPERNETS = {
    "detnas-supernet20": "small",
    "detnas-supernet40": "large",
    "detnas-supernet-tiny": "tiny",
}
"""Space of each named supernet."""

PREFIX = "detnas:"
_CONVENTIONS: dict[str, Shuffle] = {"shuffle1": 1, "shuffle2": 2}


def own_space(settings: SpaceConfig) -> SearchSpace | None:
    """The space of the table ``space`` of a configuration, None where there is none.

    Raises:
        ConfigError: It is not complete, makes no network, or has the name of a published space.
    """
    if settings == SpaceConfig():
        return None
    name = settings.name
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in SPACES:
        raise ConfigError(
            "space.name: must be letters, digits, dots and dashes, and none of "
            f"{', '.join(SPACES)}, got {name!r}"
        )
    return SearchSpace.from_plain(dataclasses.asdict(settings))


def parse_architecture(name: str, own: SearchSpace | None = None) -> tuple[SearchSpace, Genes]:
    """Space and genes of ``detnas:<space>:<genes>[:shuffle1|:shuffle2]``.

    Args:
        name: The name.
        own: A space beside the published ones.

    Raises:
        ConfigError: Not such a name, or not a network of the space.
    """
    parts = name.split(":")
    if parts[0] != "detnas" or len(parts) < 3:
        raise ConfigError(
            f"model.backbone: must read detnas:<space>:<genes>[:shuffle1|:shuffle2], got {name!r}"
        )
    spaces = SPACES if own is None else {**SPACES, own.name: own}
    if parts[1] not in spaces:
        raise ConfigError(
            f"model.backbone: the space must be one of {', '.join(spaces)}, got {parts[1]!r}"
            f"{suggest(parts[1], spaces)}; the table [space] defines others"
        )
    space = _shuffled(spaces[parts[1]], parts[3:], name)
    return space, space.parse(parts[2])


def parse_supernet(name: str, own: SearchSpace | None = None) -> SearchSpace | None:
    """Space of ``<supernet>[:shuffle1|:shuffle2]``, None where the name is not a supernet's.

    Args:
        name: The name; ``detnas-supernet`` is the supernet of ``own``.
        own: A space beside the published ones.

    Raises:
        ConfigError: Something else follows the supernet's name, or it needs a space of one's own.
    """
    first, *rest = name.split(":")
    if first == SUPERNET:
        if own is None:
            raise ConfigError(
                f"model.backbone: must be one of {', '.join(SUPERNETS)} where there is no table "
                f"[space], got {name!r}"
            )
        return _shuffled(own, rest, name)
    return _shuffled(SPACES[SUPERNETS[first]], rest, name) if first in SUPERNETS else None


def _shuffled(space: SearchSpace, rest: Sequence[str], name: str) -> SearchSpace:
    if not rest:
        return space
    if len(rest) > 1 or rest[0] not in _CONVENTIONS:
        raise ConfigError(
            f"model.backbone: must end with one of {', '.join(_CONVENTIONS)} or the name before, "
            f"got {name!r}{suggest(rest[0], _CONVENTIONS)}"
        )
    return replace(space, shuffle=_CONVENTIONS[rest[0]])


def architecture_name(space: SearchSpace, genes: Sequence[int]) -> str:
    """The name :func:`parse_architecture` reads, shuffle convention included.

    Raises:
        ConfigError: A space of the user's own has no such name, or the genes are not of it.
    """
    if not _published(space):
        raise ConfigError(f"space: must be one of {', '.join(SPACES)}, got {space.name!r}")
    return _name(space, genes)


def network_tables(space: SearchSpace, genes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Tables of settings that name one network: its backbone, and the space if it is one's own.

    Raises:
        ConfigError: The genes are not of the space.
    """
    tables: dict[str, dict[str, Any]] = {"model": {"backbone": _name(space, genes)}}
    return tables if _published(space) else tables | {"space": space.to_plain()}


def _published(space: SearchSpace) -> bool:
    known = SPACES.get(space.name)
    return known is not None and replace(known, shuffle=space.shuffle) == space


def _name(space: SearchSpace, genes: Sequence[int]) -> str:
    return f"{PREFIX}{space.name}:{space.text(genes)}:shuffle{space.shuffle}"
