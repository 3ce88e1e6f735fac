"""Random search: the baseline every other search must beat at the same number of evaluations."""

from __future__ import annotations

import logging

from detkit.errors import ConfigError
from detkit.models.search_space import SearchSpace
from detkit.nas.candidates import Candidate, SearchResult
from detkit.nas.evolution import Allowed, EvaluateAll, Proposals, require_some
from detkit.nas.paths import PROPOSALS, generator

log = logging.getLogger("detkit")


def random_search(
    space: SearchSpace,
    evaluations: int,
    evaluate: EvaluateAll,
    allowed: Allowed,
    *,
    seed: int = 0,
    batch: int = 50,
) -> SearchResult:
    """Uniform networks that keep the limits, none twice.

    Args:
        space: The space.
        evaluations: Networks to evaluate; fewer where the space has no more.
        evaluate: Evaluates networks, ``batch`` at a time.
        allowed: Whether a network keeps the limits.
        seed: The first batch is that of an evolution with this seed and population.
        batch: Networks given to ``evaluate`` together.

    Raises:
        ConfigError: Numbers out of range, or not one network keeps the limits.
    """
    if evaluations < 1 or batch < 1:
        raise ConfigError(
            f"random search: evaluations and batch must be positive, got {evaluations}, {batch}"
        )
    proposals = Proposals(space, allowed)
    history: list[Candidate] = []
    for number, start in enumerate(range(0, evaluations, batch)):
        count = min(batch, evaluations - start)
        genes = proposals.random(count, generator(seed, PROPOSALS, number))
        if not genes:
            require_some(history, count)
            log.warning("search: no new network after %d evaluations, ending early", len(history))
            break
        history += evaluate(number, genes)
    return SearchResult(tuple(history))
