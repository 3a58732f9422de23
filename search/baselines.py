"""Parents and uniform line: the trials that every study scores first, and that seed its search."""

from __future__ import annotations

from collections.abc import Sequence

from search.space import UNIFORM_LINE, CoefficientSpace
from search.trials import TrialRecord

# The order of the baselines: the parents, then what lies between them.
BASELINES: tuple[tuple[str, float], ...] = (
    ("pre", 0.0),
    ("post", 1.0),
    *(("uniform", c) for c in UNIFORM_LINE if c not in (0.0, 1.0)),
)


def missing_baseline(history: Sequence[TrialRecord], space: CoefficientSpace) -> int | None:
    """Index of the first baseline that is neither scored nor on its way; one that failed is drawn again."""
    there = {
        record.attributes["recipe"]
        for record in history
        if record.state != "failed" and record.kind != "search"
    }
    for index, (_, coefficient) in enumerate(BASELINES):
        if space.uniform(coefficient).key not in there:
            return index
    return None
