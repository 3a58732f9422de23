"""Merges that stand beside switching: greedy soup and DARE-TIES, the weight level of the baselines.

A soup is a mean of checkpoints, pre among them, so it is a linear merge of a study's parents and is made as every
other one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from search.checkpoints.parents import Parents
from search.errors import ConfigError, EvaluationError, MergeError
from search.merging.blend import Blend, make_blend

DENSITY = 0.5

_ROUNDING = 1e-9  # of a sum of weights

Score = Callable[[Mapping[str, float]], float]


@dataclass(frozen=True)
class Step:
    """One candidate that was tried: the soup with it, how that scored, and whether it stayed."""

    candidate: str
    ingredients: tuple[str, ...]
    score: float
    kept: bool


@dataclass(frozen=True)
class Soup:
    """A greedy soup.

    Attributes:
        weights: candidate -> its share, in the candidates' order; equal for all ingredients, 0 for the others.
        ingredients: in the order in which they were added, the best one first.
        score: of the soup.
        alone: candidate -> score by itself.
        steps: all that was tried after the first ingredient.
    """

    weights: Mapping[str, float]
    ingredients: tuple[str, ...]
    score: float
    alone: Mapping[str, float]
    steps: tuple[Step, ...]


def greedy_soup(candidates: Sequence[str], score: Score) -> Soup:
    """Adds candidates to a mean, the best first, and keeps each one with which the score does not fall.

    (Wortsman et al. 2022, arXiv 2203.05482, recipe 1.) 2K - 1 merges of K candidates are scored: each one alone, then
    each but the best as an addition. The result scores no worse than the best candidate on what it was chosen by, so
    score search questions, never those that the soup is judged by.

    Args:
        candidates: different names, at least one; of equal scores the earlier one goes first.
        score: weights, 0 or more and 1 together, of all candidates -> a finite number, higher is better.

    Raises:
        ConfigError: no candidates, or one named twice.
        EvaluationError: a score that is not finite.

    >>> soup = greedy_soup(["a", "b", "c"], lambda w: w["a"] + 0.9 * w["b"] + 2 * w["a"] * w["b"] - w["c"])
    >>> soup.ingredients, soup.weights["a"], [step.kept for step in soup.steps]
    (('a', 'b'), 0.5, [True, False])
    """
    if not candidates or len(set(candidates)) < len(candidates):
        raise ConfigError(
            f"soup: candidates are {', '.join(candidates) or 'none'} (wanted one or more, each once)."
        )

    def mean(ingredients: Sequence[str]) -> dict[str, float]:
        return {name: (name in ingredients) / len(ingredients) for name in candidates}

    def scored(ingredients: Sequence[str]) -> float:
        value = float(score(mean(ingredients)))
        if not math.isfinite(value):
            raise EvaluationError(f"soup: the mean of {', '.join(ingredients)} has score {value}.")
        return value

    alone = {name: scored([name]) for name in candidates}
    best, *others = sorted(candidates, key=lambda name: -alone[name])  # stable: equals stay in order
    chosen, reached, steps = [best], alone[best], []
    for name in others:
        value = scored([*chosen, name])
        steps.append(Step(name, (*chosen, name), value, value >= reached))
        if value >= reached:
            chosen, reached = [*chosen, name], value
    return Soup(mean(chosen), tuple(chosen), reached, alone, tuple(steps))


def soup_blend(parents: Parents, weights: Mapping[str, float]) -> Blend:
    """The linear merge in which every tensor has these shares of the parents.

    Args:
        weights: of `pre` and of experts by name, 0 or more, 1 together; a parent that is not named has none. The
            coefficients are those of the experts; what they leave is pre's.

    Raises:
        MergeError: an unknown name, a negative share, or another sum.
    """
    shares = _shares(weights, parents.labels)
    return make_blend(parents, dict.fromkeys(parents.names, shares[1:]))


def dare_ties_blend(parents: Parents, density: float = DENSITY, seed: int = 0) -> Blend:
    """DARE-TIES of all experts with equal weights that add up to one, nothing searched.

    Shares of 1 / K: with them dense, agreeing task vectors give the experts' mean, the uniform soup, and a merge moves
    no further from pre than its experts did. A density of 0.5: at 1 nothing is dropped and only the sign election of
    TIES is left, and far below it the noise of what is dropped grows as sqrt(1 / density - 1). (Yu et al. 2024, arXiv
    2311.03099; the same as the method `dare_ties` of a study, mergekit's defaults for the rest.) With one expert it is
    DARE alone.

    Args:
        density: share of the elements that are kept, above 0, at most 1. seed: of the random masks.

    Raises:
        MergeError: a density out of its range.
    """
    shares = (1.0 / len(parents.experts),) * len(parents.experts)
    return make_blend(parents, dict.fromkeys(parents.names, shares), "dare_ties", {"density": density}, seed)


def _shares(weights: Mapping[str, float], labels: Sequence[str]) -> tuple[float, ...]:
    """The share of each parent, in order."""
    unknown = sorted(weights.keys() - set(labels))
    if unknown:
        raise MergeError(f"soup: no parent is called '{unknown[0]}' (wanted {', '.join(labels)}).")
    shares = tuple(float(weights.get(label, 0.0)) for label in labels)
    if not all(share >= 0.0 for share in shares) or not abs(math.fsum(shares) - 1.0) <= _ROUNDING:
        raise MergeError(f"soup: shares are {list(shares)} (wanted 0 or more, 1 together).")
    return shares
