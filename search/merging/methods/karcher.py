"""Karcher mean: the point of the unit sphere with the least squared arcs to all experts (Karcher 1977)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from search.errors import MergeError
from search.merging.methods.checks import check_tensors
from search.merging.methods.linear import merge_linear
from search.merging.methods.sphere import Array, gram, shares


def merge_karcher(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    steps: int = 10,
    tolerance: float = 1e-5,
    table: Array | None = None,
) -> torch.Tensor:
    """Weighted Karcher mean of the experts' directions, of the weighted mean of their norms.

    The experts themselves are averaged, not their task vectors: `base` does not enter, and takes part only if
    it is given among the experts. Equal weights equal mergekit 0.1.5 `karcher` (`max_iter`: `steps`, `tol`:
    `tolerance`) within 1e-5 of the largest value: mergekit iterates on whole float32 tensors, here on their
    inner products in float64.

    Args:
        base, experts: tensors `(...)` of one shape and one dtype, float32, bfloat16 or float16; not changed.
        weights: one per expert, finite, divided by their sum, which is not zero.
        steps: at most so many steps of gradient descent along arcs, at least 0; after none it is the chord's middle.
        tolerance: a step or an angle (radians) below this counts as none; an expert of a norm below it has no
            direction.
        table: `gram(experts)`, which leaves a weighted sum to do.

    Returns:
        float32 tensor `(...)`; zero if no expert has a direction, the expert if there is one.

    Raises:
        MergeError: no experts, another number of weights, weights of sum zero, tensors that differ, or an expert
            opposite to the mean.
    """
    check_tensors(base, experts)
    found = karcher_weights(
        gram(experts) if table is None else table, weights, steps=steps, tolerance=tolerance
    )
    return merge_linear([expert.float() for expert in experts], found)


def karcher_weights(
    table: Array, weights: Sequence[float], *, steps: int = 10, tolerance: float = 1e-5
) -> list[float]:
    """Factors a_k with which `sum_k a_k e_k` is the Karcher mean; arguments and errors as for `merge_karcher`.

    They make the mean a mergekit `linear` merge without normalisation.

    >>> [round(a, 4) for a in karcher_weights(np.eye(2), [1.0, 1.0])]
    [0.7071, 0.7071]
    """
    if steps < 0 or not 0.0 < tolerance < math.inf:
        raise MergeError(f"merge: {steps} steps to tolerance {tolerance} (wanted at least 0, and above 0).")
    all_shares = shares(weights, table)
    norms = np.sqrt(np.diag(table))
    if len(norms) == 1:
        return [1.0]
    known = np.flatnonzero(norms > tolerance)
    factors = np.zeros(len(norms))
    if known.size:
        part = all_shares[known]
        if not abs(part.sum()) > 1e-8:
            raise MergeError("merge: the weights of the experts that are not zero have a sum of zero.")
        cosines = table[np.ix_(known, known)] / np.outer(norms[known], norms[known])
        mean = _mean(cosines, part / part.sum(), steps, tolerance)
        factors[known] = float(all_shares @ norms) * mean / norms[known]
    return [float(factor) for factor in factors]


def _mean(cosines: Array, part: Array, steps: int, tolerance: float) -> Array:
    """Coordinates `(K,)` of the mean in unit vectors of which `cosines` are the inner products."""
    mean, length = part, _length(part, cosines)
    mean = np.eye(len(part))[0] if length < tolerance else mean / length
    for _ in range(steps):
        dots = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(dots)
        near = angles < tolerance
        if np.any(angles[part != 0] > math.pi - tolerance):
            raise MergeError("merge: an expert is opposite to the mean (wanted one shortest arc to it).")
        # The logarithm map: towards u along u - cos(angle) m, as long as the angle.
        pull = np.where(near, 0.0, part * angles / np.sin(np.where(near, 1.0, angles)))
        tangent = pull - float(pull @ dots) * mean
        length = _length(tangent, cosines)
        if length < tolerance:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent  # the exponential map
        mean = mean / _length(mean, cosines)
    return mean


def _length(coordinates: Array, cosines: Array) -> float:
    return math.sqrt(max(0.0, float(coordinates @ cosines @ coordinates)))
