"""Parents and uniform line: the trials that every study scores first, and that seed its search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search.merging.space import UNIFORM_LINE, CoefficientSpace
from search.recipe import Recipe
from search.storage.trials import TrialRecord

PARENTS = ("pre", "post", "expert")  # kinds of trials that are a parent
UNCHOSEN = (*PARENTS, "uniform")  # kinds that no search chose

# Those of a study with one expert: the parents, then what lies between them.
BASELINES: tuple[tuple[str, float], ...] = (
    ("pre", 0.0),
    ("post", 1.0),
    *(("uniform", c) for c in UNIFORM_LINE if c not in (0.0, 1.0)),
)


@dataclass(frozen=True)
class Baseline:
    """A trial that every study scores first; `label` is what people call it."""

    kind: str
    label: str
    recipe: Recipe


def baselines(space: CoefficientSpace) -> list[Baseline]:
    """All baselines in order: `pre`, `post` or each expert, and the uniform line.

    The line of a single expert ends at it; that of several goes on to 1, which is none of them.
    """
    single = len(space.experts) == 1
    line = UNIFORM_LINE[1:-1] if single else UNIFORM_LINE[1:]
    return [
        Baseline("pre", "pre", space.alone(None)),
        *(Baseline("post" if single else "expert", one, space.alone(one)) for one in space.experts),
        *(Baseline("uniform", f"uniform {c:g}", space.uniform(c)) for c in line),
    ]


def parent_count(config: Mapping[str, Any]) -> int:
    """How many parents a stored study file names."""
    return 1 + len(config["parents"].get("experts") or ["post"])


def missing_baseline(history: Sequence[TrialRecord], every: Sequence[Baseline]) -> int | None:
    """Index of the first of `baselines` that is neither scored nor on its way; one that failed is drawn again."""
    there = {
        record.attributes["recipe"]
        for record in history
        if record.state != "failed" and record.kind != "search"
    }
    return next((index for index, one in enumerate(every) if one.recipe.key not in there), None)
