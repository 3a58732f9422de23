"""Angles between tensors, taken as flat vectors, for the means on a sphere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from search.errors import MergeError
from search.merging.methods.checks import per_expert

Array = npt.NDArray[np.float64]
_CHUNK = 2**18


def gram(tensors: Sequence[torch.Tensor], origin: torch.Tensor | None = None) -> Array:
    """All inner products `(K, K)` of K tensors as flat vectors, less `origin`; float64 sums.

    A mean on the sphere lies in the span of its tensors, so these numbers are all that it needs to know of them. They
    depend on the tensors alone: computed once, they make every later mean a weighted sum.
    """
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    start = None if origin is None else origin.detach().reshape(-1)
    total = np.zeros((len(flat), len(flat)))
    for at in range(0, flat[0].numel(), _CHUNK):
        part = slice(at, at + _CHUNK)
        rows = torch.stack([one[part].double() for one in flat])
        if start is not None:
            rows -= start[part].double()
        total += (rows @ rows.T).cpu().numpy()
    return total


def shares(weights: Sequence[float], table: Array) -> Array:
    """The weights divided by their sum; refuses a wrong number of them and a sum of zero."""
    factors = sized(weights, table)
    if not abs(factors.sum()) > 1e-8:
        raise MergeError(
            f"merge: the weights {factors.tolist()} have no mean (wanted a sum other than zero)."
        )
    found: Array = factors / factors.sum()
    return found


def sized(weights: Sequence[float], table: Array) -> Array:
    """The weights as an array; refuses another number of them than the table has tensors."""
    if table.shape != (len(weights), len(weights)):
        raise MergeError(f"merge: {len(weights)} weights for {len(table)} experts. Give one for each.")
    return np.asarray(per_expert(list(weights), range(len(table)), "weight"), dtype=np.float64)
