"""From coefficients to the two weights of every tensor: the only place where merge methods differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from search.errors import MergeError
from search.merging.header import shown
from search.merging.methods.linear import linear_weights
from search.merging.methods.slerp import angle, slerp_weights
from search.merging.parents import Parents

METHODS = ("linear", "slerp")
_angles: WeakKeyDictionary[Parents, dict[str, float | None]] = WeakKeyDictionary()


def tensor_weights(
    parents: Parents, coefficients: Mapping[str, float], method: str
) -> dict[str, tuple[float, float]]:
    """(weight of pre, weight of post) for every stored tensor, in the order of `parents.names`.

    These are the numbers for a mergekit `linear` config with `normalize: false`, whatever the method.

    Args:
        coefficients: stored tensor name -> coefficient; exactly the names of `parents.names`.
        method: `linear` or `slerp`.

    Raises:
        MergeError: an unknown method, a name too many or too few, a coefficient that is not finite.
    """
    if method not in METHODS:
        raise MergeError(f"merge.method: '{shown(method)}' is not known. Use one of {', '.join(METHODS)}.")
    if coefficients.keys() != parents.parameter.keys():
        name = min(coefficients.keys() ^ parents.parameter.keys())
        fault = "has no coefficient" if name in parents.parameter else "is not a tensor of the parents"
        raise MergeError(f"recipe: {shown(name)} {fault}. Give one for each of {len(parents.names)} tensors.")
    weights = {}
    for name in parents.names:
        coefficient = float(coefficients[name])
        if not math.isfinite(coefficient):
            raise MergeError(
                f"recipe: coefficient of {shown(name)} is {coefficient} (wanted a finite number)."
            )
        if method == "linear":
            weights[name] = linear_weights(coefficient)
        else:
            weights[name] = slerp_weights(coefficient, _angle(parents, name))
    return weights


def _angle(parents: Parents, name: str) -> float | None:
    known = _angles.setdefault(parents, {})
    if name not in known:
        known[name] = angle(parents.pre.tensor(name), parents.post.tensor(name))
    return known[name]
