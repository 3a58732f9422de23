"""The estimators by name: c * (weighted mean of the answers) + (1 - c) * (the answers, and probabilities for the rest).

They differ in c and in where the ability behind the probabilities of the unseen questions comes from:

| name | c | ability |
|---|---|---|
| mean, weighted | 1 | none |
| p-irt, gp-irt | 0, 0.5 | of the recipe itself |
| mp-irt, gmp-irt | 0, 0.5 | a mixture of its parents' |

p-IRT and gp-IRT: Polo et al. 2024, "tinyBenchmarks", arXiv 2402.14992, which tunes gp-IRT's c per scenario; mp-IRT and
gmp-IRT: Mencattini et al. 2025, "MERGE3", arXiv 2502.10436, whose published code has c = 0.5. Here 0.5 is the default
of both.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from objectives.errors import ConfigError, EvaluationError
from objectives.estimators.irt import Items, fit_ability, fit_mixture, observed
from objectives.outcomes import Floats


@dataclass(frozen=True)
class Estimator:
    """Estimates a recipe's accuracy on all N items from its answers to n of them.

    Attributes:
        name: as in the table above.
        ability: where the ability behind the unseen items' probabilities comes from; None where none is needed.
        c: share of the weighted mean, 0 to 1.
        weighted: whether weights are heeded; the plain mean does not.

    Raises:
        ConfigError: c outside [0, 1].
    """

    name: str
    ability: Literal["own", "parents"] | None
    c: float
    weighted: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.c <= 1.0:
            raise ConfigError(f"{self.name}: c is {self.c} (wanted a number from 0 to 1).")

    def estimate(
        self,
        items: Items,
        parents_ability: npt.ArrayLike,
        observed_index: npt.ArrayLike,
        observed_correct: npt.ArrayLike,
        weights: npt.ArrayLike | None = None,
    ) -> float:
        """The estimated share of right answers on all items, in [0, 1]; higher is better.

        With all items observed, and weights that are alike, it is the mean of the answers, whatever the items'
        parameters. The order of the observed items does not matter.

        Args:
            items: fitted on a bank of scored recipes.
            parents_ability: `(m, d)` abilities from the same fit (rows of `items.ability`); read by mp-irt and
                gmp-irt only.
            observed_index: `(n,)` integers, the items S that were scored, none twice; at least one.
            observed_correct: `(n,)` of 0 and 1 (or bool), the recipe's answers to them.
            weights: `(n,)` numbers above 0, how many items each stands for (`Subset.weights`); None: all alike. Only
                their ratios matter.

        Raises:
            EvaluationError: no items, unknown or repeated ones, or answers or weights that do not belong to them.
            ConfigError: fewer than two parents for mp-irt and gmp-irt.
        """
        seen, y = observed(items, observed_index, observed_correct)
        if weights is None or not self.weighted:
            mean = float(y.mean())
        else:
            order = np.argsort(np.asarray(observed_index), kind="stable")
            w = _checked_weights(weights, y.size)[order]
            mean = float(w @ y / w.sum())
        if self.ability is None:
            return mean
        if self.ability == "own":
            ability = fit_ability(items, seen, y)
        else:
            parents = np.asarray(parents_ability, dtype=np.float64)
            ability = fit_mixture(items, parents, seen, y) @ parents
        filled = p_irt(
            items, ability, seen, float(y.mean())
        )  # what was seen counts as what it is: one item each
        return filled + self.c * (mean - filled)


def p_irt(items: Items, ability: npt.ArrayLike, observed_index: npt.ArrayLike, observed_mean: float) -> float:
    """n/N * observed mean + (1 - n/N) * mean probability of the unseen items, in [0, 1].  (p-IRT, tinyBenchmarks)

    What was seen is never replaced by a probability: that would bias the estimate.

    Args:
        ability: `(d,)`, from the fit of `items`.
        observed_index: `(n,)` integers, the items S that were scored, none twice.
        observed_mean: the share of right answers among them, in [0, 1].

    >>> items = Items(np.array([[1.0, 1.0]]), np.array([0.0, 0.0]), np.zeros((1, 1)))
    >>> p_irt(items, [0.0], [0], 1.0), p_irt(items, [0.0], [0, 1], 1.0)
    (0.75, 1.0)
    """
    unseen = np.ones(len(items), dtype=np.bool_)
    unseen[np.asarray(observed_index)] = False
    if not unseen.any():
        return observed_mean
    share = 1.0 - float(unseen.mean())
    return share * observed_mean + (1.0 - share) * float(items.probability(ability)[unseen].mean())


ESTIMATORS = {
    estimator.name: estimator
    for estimator in (
        Estimator("mean", None, 1.0, weighted=False),
        Estimator("weighted", None, 1.0),
        Estimator("p-irt", "own", 0.0),
        Estimator("gp-irt", "own", 0.5),
        Estimator("mp-irt", "parents", 0.0),
        Estimator("gmp-irt", "parents", 0.5),
    )
}


def get_estimator(name: str, *, c: float | None = None) -> Estimator:
    """The estimator called `name`; `c` replaces the 0.5 of gp-irt and gmp-irt.

    Raises:
        ConfigError: no such estimator (the nearest name is suggested), a c outside [0, 1], or one for an estimator
            that has none.

    >>> get_estimator("gmp-irt", c=0.25).c
    0.25
    """
    if name not in ESTIMATORS:
        near = difflib.get_close_matches(name.lower(), ESTIMATORS, n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"estimator: none is called '{name}'. {hint}They are: {', '.join(ESTIMATORS)}.")
    estimator = ESTIMATORS[name]
    if c is None:
        return estimator
    if estimator.c in (0.0, 1.0):
        raise ConfigError(f"estimator: {name} has no c. Leave it out, or use gp-irt or gmp-irt.")
    return replace(estimator, c=c)


def _checked_weights(weights: npt.ArrayLike, n: int) -> Floats:
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (n,) or not (np.isfinite(w) & (w > 0.0)).all():
        raise EvaluationError(f"weights: shape {w.shape} (wanted ({n},), every one finite and above 0).")
    return w
