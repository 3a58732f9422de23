"""Multi-SLERP: several task vectors mixed on the sphere (goddard.blog/posts/multislerp-wow-what-a-cool-idea)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from search.errors import MergeError
from search.merging.methods.checks import check_tensors
from search.merging.methods.linear import merge_linear
from search.merging.methods.sphere import Array, gram, shares, sized
from search.merging.methods.task_arithmetic import merge_task_arithmetic

_TINY = 1e-8  # mergekit's default `eps`


def merge_multislerp(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    normalize: bool = True,
    around_base: bool = True,
    table: Array | None = None,
) -> torch.Tensor:
    """The mean direction of the task vectors, of the weighted mean of their norms, on top of the base.

    The method maps the unit vectors u_k onto the tangent plane at the direction m of `sum_k w_k u_k`,
    averages there, and maps back. That average, `sum_k w_k (u_k - (u_k m) m)`, is zero for every choice of
    weights: what remains is `sum_k w_k |v_k|` times m, and this is what is computed.

    Equals mergekit 0.1.5 `multislerp` (`weight`, `normalize_weights`: `normalize`, default `eps`;
    `base_model` set or not: `around_base`) within 1e-5 of the largest value: mergekit sums norms and angles
    in float32, and its zero is one only but for rounding.

    Args:
        base, experts: tensors `(...)` of one shape and one dtype, float32, bfloat16 or float16; not changed.
        weights: one per expert, finite.
        normalize: divide the weights by their sum, which is then not zero.
        around_base: mix task vectors; else the experts themselves, and `base` does not enter.
        table: `gram(experts, base)`, without `base` if not around it; it leaves a weighted sum to do.

    Returns:
        float32 tensor `(...)`; the expert if there is one, the base if every task vector with a weight is
        zero (mergekit stops).

    Raises:
        MergeError: no experts, another number of weights, tensors that differ, or three and more vectors
            whose weighted unit vectors cancel (two are then mixed linearly).
    """
    check_tensors(base, experts)
    if table is None:
        table = gram(experts, base if around_base else None)
    factors = multislerp_weights(table, weights, normalize=normalize)
    if len(experts) == 1:
        return experts[0].to(torch.float32, copy=True)
    if around_base:
        return merge_task_arithmetic(base, experts, factors)
    return merge_linear([expert.float() for expert in experts], factors)


def multislerp_weights(table: Array, weights: Sequence[float], *, normalize: bool = True) -> list[float]:
    """Factors a_k with which `sum_k a_k v_k` is the mixture; arguments and errors as for `merge_multislerp`.

    They make it a mergekit `task_arithmetic` merge, or, not around the base, a `linear` one without normalisation.

    >>> [round(a, 4) for a in multislerp_weights(np.eye(2), [0.5, 0.5])]
    [0.7071, 0.7071]
    """
    part = shares(weights, table) if normalize else sized(weights, table)
    if len(part) == 1:
        return [1.0]
    norms = np.sqrt(np.diag(table))
    per_unit = part / (norms + _TINY)
    length = math.sqrt(max(0.0, float(per_unit @ table @ per_unit)))
    if not (part * norms).any():
        return [0.0] * len(part)
    if length < _TINY:
        if len(part) == 2:
            return [float(factor) for factor in part]
        raise MergeError(
            f"merge: task vectors with weights {part.tolist()} cancel each other. Change the weights."
        )
    return [float(factor) for factor in float(part @ norms) / length * per_unit]
