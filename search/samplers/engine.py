"""What every engine promises, whatever library stands behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from search.storage import TrialRecord

if TYPE_CHECKING:
    from search.gradient import LossGradient


@dataclass(frozen=True)
class Proposal:
    """Coefficients to try next, and what the engine wants to find again on that trial."""

    coefficients: Mapping[str, float]
    tags: Mapping[str, Any] = field(default_factory=dict)


class WeightedGradient(Protocol):
    """Gradients of weighted sums of losses, one loss for each objective of a study."""

    def __call__(self, coefficients: NDArray[np.float64], weights: NDArray[np.float64], /) -> LossGradient:
        """At coefficients `(groups,)`, for weights `(objectives,)`; a function of the two and nothing else."""
        ...


class Engine(Protocol):
    """Proposes recipes from the history of a study and nothing else.

    `propose` is a function of (seed, history): two engines given the same history propose the same, whatever was
    asked of them before. That is what makes a resumed study equal to an uninterrupted one.
    """

    def baseline_tags(self, index: int) -> Mapping[str, Any]:
        """Tags that make the `index`-th baseline (parents and uniform line, scored first) seed the search."""
        ...

    def propose(self, history: Sequence[TrialRecord], draw: int) -> Proposal:
        """The recipe of draw number `draw` (counted from 0 over all trials, baselines included).

        Args:
            history: all trials with a smaller number, by number; running ones have no values yet. One that was
                stopped early appears as complete, its estimates as its values (`fidelity.stages.as_learnt`).
        """
        ...


def seed_of(study_seed: int, draw: int, purpose: int = 0) -> int:
    """A 32-bit seed for one draw: independent streams for all draws (and purposes) of all studies."""
    return int(np.random.SeedSequence([study_seed, draw, purpose]).generate_state(1)[0])
