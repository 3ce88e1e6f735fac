"""One-shot supernet of DetNAS (arXiv 1903.10979, section 3.1): every block of every position.

A forward pass runs one path, set by :meth:`ShuffleSupernet.set_path`; the blocks off it take no
part, so they get no gradient (``None`` after ``zero_grad(set_to_none=True)``) and their norms no
statistics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from detkit.errors import ConfigError
from detkit.models.backbones.shuffle import ShuffleBackbone, ShuffleBlock
from detkit.models.norm import Norm, norm_named
from detkit.models.search_space import OPS, Genes, Position, SearchSpace

_BLOCK_KEY = re.compile(r"((?:.*\.)?stage(\d+)\.(\d+)\.)(\d+)\.(.+)")


class ChoiceBlock(nn.ModuleList):
    """All blocks a position may hold, sharing nothing; ``gene`` says which one runs."""

    def __init__(self, position: Position, space: SearchSpace, norm: Norm) -> None:
        super().__init__(ShuffleBlock(position, OPS[op], space.shuffle, norm) for op in space.ops)
        self.gene: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The chosen block of ``x`` (N, cin, H, W)."""
        if self.gene is None:
            raise ValueError("supernet: a path must be set before a forward pass, got none")
        out: Tensor = self[self.gene](x)
        return out


class ShuffleSupernet(ShuffleBackbone):
    """All networks of a space in one set of weights.

    Args:
        space: The space.
        norm: Name of the norms.
    """

    def __init__(self, space: SearchSpace, norm: str = "bn") -> None:
        make = norm_named(norm)
        choices = [ChoiceBlock(position, space, make) for position in space.positions()]
        super().__init__(space, choices, norm)

    def take_stages_after(self, name: str) -> dict[str, nn.Module]:
        """Refused with ConfigError: a path goes through all stages."""
        raise ConfigError(
            f"model.backbone: must be one network where the stages after {name} are the head's, "
            "got a supernet"
        )

    @property
    def path(self) -> Genes | None:
        """Genes of the path that forward passes run, or None before the first one is set."""
        genes = [choice.gene for choice in self._choices()]
        return tuple(g for g in genes if g is not None) if None not in genes else None

    def set_path(self, genes: Sequence[int]) -> None:
        """Run these blocks from now on.

        Raises:
            ConfigError: Genes that are not of the space.
        """
        for choice, gene in zip(self._choices(), self.space.check(genes), strict=True):
            choice.gene = gene

    def _choices(self) -> list[ChoiceBlock]:
        return [module for module in self.modules() if isinstance(module, ChoiceBlock)]


def find_supernet(model: nn.Module) -> ShuffleSupernet:
    """The supernet inside a classifier, a detector or a wrapper of one.

    Raises:
        ValueError: There is not exactly one.
    """
    found = [module for module in model.modules() if isinstance(module, ShuffleSupernet)]
    if len(found) != 1:
        raise ValueError(f"model: must hold one supernet, got {len(found)}")
    return found[0]


def extract(
    state: Mapping[str, Tensor], space: SearchSpace, genes: Sequence[int]
) -> dict[str, Tensor]:
    """Weights of one network out of those of a supernet, or of a model with one inside.

    The keys of the chosen blocks lose their gene (``stage2.0.3.main.0.weight`` becomes
    ``stage2.0.main.0.weight``), those of the others are left out, and all else stays.

    Args:
        state: State dict; its tensors are given on, not copied.
        space: The supernet's space.
        genes: The network.

    Raises:
        ConfigError: Genes that are not of the space.
        ValueError: The state dict lacks blocks of the network.
    """
    places = [(p.stage, p.index) for p in space.positions()]
    chosen = dict(zip(places, space.check(genes), strict=True))
    found: dict[str, Tensor] = {}
    seen = set()
    for key, value in state.items():
        match = _BLOCK_KEY.fullmatch(key)
        if match is None:
            found[key] = value
            continue
        place = int(match[2]), int(match[3])
        if chosen.get(place) == int(match[4]):
            seen.add(place)
            found[match[1] + match[5]] = value
    missing = [f"stage{stage}.{index}" for stage, index in places if (stage, index) not in seen]
    if missing:
        raise ValueError(
            f"state dict: must hold the blocks of a {space.name} supernet, got none for "
            f"{', '.join(missing[:3])}"
        )
    return found
