"""Which candidate is the best choice, given how each choice turned out; those too close to call teach nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from search.errors import ConfigError, EvaluationError

_ROUNDING = 1e-9  # of means of scores: 0.6 - 0.5 is below 0.1

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Labels:
    """What m rows of scores say.

    Attributes:
        kept: `(m,)` whether the row has a label.
        label: `(m,)` int64 index of the candidate that should write; -1 where the row is not kept.
        margin: `(m,)` float64, best score minus the second best, 0 or more.
        entropy: in nats, of how often each candidate is a label: 0 if it is always the same one or there is none, at
            most log n. Near 0 there is nothing to learn but the most frequent label.
    """

    kept: Booleans
    label: Integers
    margin: Floats
    entropy: float


def label(scores: npt.ArrayLike, margin: float = 0.0, preference: npt.ArrayLike | None = None) -> Labels:
    """The best of n candidates in each row, where it is ahead of the second best.

    A row is kept if its best score is above the second best and at least `margin` above it, both up to rounding (1e-9).
    Means of k random completions differ by luck alone: of scores of 0 or 1 the standard error of a difference is up to
    0.71 / sqrt(k).

    With a `preference`, candidates that are behind the best one by less than the margin count as equal to it, and the
    label is the preferred one of them; a row is dropped only if all are equal. So a row teaches who must not write even
    where two write equally well.

    Args:
        scores: `(m, n)` finite numbers, higher is better; n at least 2. margin: 0 or more.
        preference: `(m, n)` numbers, higher is preferred; of equal ones the first.

    Raises:
        ConfigError: fewer than two candidates, or a margin that is negative or not finite.
        EvaluationError: another shape, or a score that is not finite; the first bad row is named.

    >>> found = label([[0.6, 0.5, 0.1], [0.5, 0.5, 0.0], [0.0, 0.2, 1.0]], margin=0.1)
    >>> found.label.tolist(), found.margin.round(3).tolist(), round(found.entropy, 3)
    ([0, -1, 2], [0.1, 0.0, 0.8], 0.693)
    """
    found = np.asarray(scores, dtype=np.float64)
    if found.ndim != 2:
        raise EvaluationError(f"labels: scores have shape {found.shape}, wanted (rows, candidates).")
    if found.shape[1] < 2:
        raise ConfigError(f"labels: {found.shape[1]} candidates to choose from (wanted 2 or more).")
    if not 0.0 <= margin < math.inf:
        raise ConfigError(f"labels: margin is {margin} (wanted 0 or more).")
    broken = ~np.isfinite(found).all(axis=1)
    if broken.any():
        raise EvaluationError(f"labels: row {int(broken.argmax())} has a score that is not finite.")
    ordered = np.sort(found, axis=1)
    ahead = ordered[:, -1] - ordered[:, -2]
    behind = ordered[:, -1:] - found
    equal = (behind <= _ROUNDING) | (behind < margin - _ROUNDING)
    if preference is None:
        kept, chosen = equal.sum(axis=1) == 1, found.argmax(axis=1)
    else:
        kept = ~equal.all(axis=1)
        chosen = np.where(equal, np.asarray(preference, dtype=np.float64), -np.inf).argmax(axis=1)
    best = np.where(kept, chosen, -1)
    share = np.bincount(best[kept], minlength=found.shape[1]) / max(int(kept.sum()), 1)
    known = share[share > 0.0]
    return Labels(kept, best, ahead, float(-(known * np.log(known)).sum()) + 0.0)
