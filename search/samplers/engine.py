"""What every engine promises, whatever library stands behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from search.storage.trials import TrialRecord

if TYPE_CHECKING:
    from objectives.evaluation import Evaluation
    from objectives.metrics.diversity import DiversityMetric
    from objectives.metrics.names import Metric
    from search.samplers.gradient import LossGradient


@dataclass(frozen=True)
class Proposal:
    """Coefficients to try next, and what the engine wants to find again on that trial."""

    coefficients: Mapping[str, float]
    tags: Mapping[str, Any] = field(default_factory=dict)


class WeightedGradient(Protocol):
    """Gradients of weighted sums of losses, one loss for each objective of a study.

    Attributes:
        tokens: scored tokens that one takes at most, about.
    """

    @property
    def tokens(self) -> int: ...

    def __call__(
        self, coefficients: NDArray[np.float64], weights: NDArray[np.float64], step: int, /
    ) -> LossGradient:
        """At coefficients `(groups,)`, for weights `(objectives,)`, on the questions of the `step`-th step.

        A function of the three and nothing else.
        """
        ...


@dataclass(frozen=True)
class Sources:
    """What an engine may look at beside the history; all of it is a function of the study and its trials.

    Attributes:
        metrics: the objectives, in order.
        gradient: makes what gives gradients; called at the first proposal that needs it, since it needs the live model.
        answers: what a complete trial answered to the search split.
        losses: the losses `(objectives,)` of these answers by which gradients are followed.
    """

    metrics: tuple[Metric | DiversityMetric, ...]
    gradient: Callable[[], WeightedGradient]
    answers: Callable[[TrialRecord], Evaluation]
    losses: Callable[[TrialRecord], NDArray[np.float64]]


class Engine(Protocol):
    """Proposes recipes from the history of a study and nothing else.

    `propose` is a function of (seed, history): two engines given the same history propose the same, whatever was
    asked of them before. That is what makes a resumed study equal to an uninterrupted one.
    """

    def baseline_tags(self, index: int) -> Mapping[str, Any]:
        """Tags that make the `index`-th baseline (parents and uniform line, scored first) seed the search."""
        return {}

    def cost(self, history: Sequence[TrialRecord]) -> int:
        """Scored tokens that the next proposal takes; `history` as for `propose`."""
        return 0

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


def sobol_point(dim: int, seed: int, place: int) -> NDArray[np.float64]:
    """The `place`-th point, from 0 on, of a scrambled Sobol sequence in the unit box: `(dim,)`."""
    from scipy.stats import qmc

    engine = qmc.Sobol(dim, scramble=True, rng=seed)
    point: NDArray[np.float64] = (engine.fast_forward(place) if place else engine).random(1)[0]
    return point
