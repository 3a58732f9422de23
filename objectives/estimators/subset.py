"""Which questions to score when not all are: a seeded random choice, within tasks if wanted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from objectives.errors import ConfigError
from objectives.outcomes import Floats, Integers


@dataclass(frozen=True, eq=False)
class Subset:
    """Some of N questions.

    Attributes:
        index: `(n,)` int64, ascending, none twice.
        weights: `(n,)` float64, how many of the N questions each one stands for; they sum to N.
    """

    index: Integers
    weights: Floats

    def __len__(self) -> int:
        return int(self.index.size)


def choose_subset(total: int, size: int, seed: int, *, strata: npt.ArrayLike | None = None) -> Subset:
    """`size` of `total` questions, uniformly at random without replacement; equal arguments, equal subsets.

    Args:
        strata: `(total,)` labels, such as `outcomes.task`. Each stratum then gets its proportional share, rounded by
            largest remainders (the first stratum on ties), but at least one question; the weights make up for
            the rounding.

    Raises:
        ConfigError: size below 1 or above total, fewer questions than strata, or strata of another length.

    >>> chosen = choose_subset(6, 3, seed=0, strata=[0, 0, 0, 0, 1, 1])
    >>> (chosen.index >= 4).sum().item(), chosen.weights.tolist()
    (1, [2.0, 2.0, 2.0])
    """
    if not 1 <= size <= total:
        raise ConfigError(f"subset: {size} of {total} questions (wanted 1 to {total}).")
    label = np.zeros(total, dtype=np.int64) if strata is None else np.asarray(strata)
    if label.shape != (total,):
        raise ConfigError(f"subset: strata have shape {label.shape}, wanted ({total},).")
    _, member, sizes = np.unique(label, return_inverse=True, return_counts=True)
    if size < sizes.size:
        raise ConfigError(f"subset: {size} questions for {sizes.size} tasks (wanted at least one each).")
    random = np.random.default_rng(seed)
    index, weights = [], []
    for stratum, share in enumerate(_shares(sizes, size)):
        index.append(random.choice(np.flatnonzero(member == stratum), int(share), replace=False))
        weights.append(np.full(share, sizes[stratum] / share))
    chosen, weight = np.concatenate(index), np.concatenate(weights)
    order = np.argsort(chosen)
    return Subset(chosen[order].astype(np.int64), weight[order])


def _shares(sizes: Integers, size: int) -> Integers:
    """How many of `size` fall on strata of these sizes: proportional, at least one each, never more than there are."""
    wanted = sizes * (size / sizes.sum())
    share: Integers = np.maximum(np.floor(wanted).astype(np.int64), 1)
    while share.sum() < size:
        share[np.argmax(np.where(share < sizes, wanted - share, -np.inf))] += 1
    while share.sum() > size:  # many tiny strata were lifted to one
        share[np.argmax(np.where(share > 1, share - wanted, -np.inf))] -= 1
    return share
