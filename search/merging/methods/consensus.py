"""Base plus a weighted sum of task vectors, the last step that most methods share.

The methods differ in which elements of a task vector they keep (`sparsify.py`) and in whether the experts must
agree on a sign. Everything here is elementwise, so it works in chunks that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from search.errors import MergeError
from search.merging.methods.checks import check_pair, check_tensors, per_expert, rounded
from search.merging.methods.sparsify import Kept

CHUNK = 2**15  # elements; a multiple of every vector length, so that a sum over experts has the same bits
_NO_WEIGHT = 1e-8  # a sum of weights below this does not normalise


def combine(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    kept: Sequence[Kept | None],
    *,
    elect: bool,
    normalize: bool,
    scaling: float,
) -> torch.Tensor:
    """`base + scaling * sum_k w_k s_k m_k (e_k - base)`, in float32, each factor a rounding of its own.

    Args:
        base, experts: tensors `(...)` of one shape and one dtype, float32, bfloat16 or float16; not changed.
        weights: one per expert, finite, rounded to float32; not normalised here.
        kept: mask m_k and scale s_k of each expert; None keeps all as it is.
        elect: TIES: in each element only those summands count whose sign is that of their sum. A sum of zero
            counts as positive; a summand of zero never counts.
        normalize: divide each element by the sum of the weights that count in it; where that is zero (without
            election: below 1e-8), by one.
        scaling: factor of the whole sum; finite. 0 gives `base` (a negative zero becomes positive).

    Returns:
        float32 tensor `(...)`.

    Raises:
        MergeError: no experts, another number of weights, shapes or dtypes that differ, a number not finite.
    """
    check_tensors(base, experts)
    factors = torch.tensor(
        per_expert(list(weights), experts, "weight"), dtype=torch.float32, device=base.device
    )
    scaling = rounded(scaling, "scaling")
    merged = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    out, start, ends = merged.view(-1), base.reshape(-1), [expert.reshape(-1) for expert in experts]
    step = CHUNK if out.device.type == "cpu" else max(1, out.numel())
    for at in range(0, out.numel(), step):
        part = slice(at, at + step)
        origin = start[part].float()
        summands = torch.empty((len(ends), origin.numel()), device=out.device)
        for row, end, one in zip(summands, ends, kept, strict=True):
            torch.sub(end[part].float(), origin, out=row)
            if one is not None:
                row.mul_(one.mask.reshape(-1)[part])
                if one.scale != 1.0:
                    row.mul_(one.scale)
        summands.mul_(factors[:, None])
        total = _elected(summands, factors, normalize) if elect else summands.sum(0)
        if normalize and not elect:
            total.div_(_divisor(factors))
        if scaling != 1.0:
            total.mul_(scaling)
        torch.add(origin, total, out=out[part])
    return merged


def _elected(summands: torch.Tensor, factors: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Sum over the experts `(n,)` of those summands `(K, n)`, overwritten, that have the elected sign.

    Everything stays in float32, where torch is several times faster than with truth values. Turning all signs so
    that the elected one is positive changes no rounding.
    """
    votes = summands.sum(0).add_(0.0)  # which makes a negative zero positive
    signs = torch.copysign(torch.ones_like(votes), votes)
    turned = summands.mul_(signs)
    agree = torch.gt(turned, 0.0, out=torch.empty_like(turned)) if normalize else None
    total = turned.clamp_min_(0.0).sum(0).mul_(signs)
    if agree is not None:
        share = agree.mul_(factors[:, None]).sum(0)
        total.div_(share.add_(torch.eq(share, 0.0, out=torch.empty_like(share))))
    return total


def _divisor(factors: torch.Tensor) -> torch.Tensor:
    total = factors.sum()
    return total if abs(float(total)) >= _NO_WEIGHT else torch.ones_like(total)


def add_directions(
    base: torch.Tensor, directions: Sequence[torch.Tensor], weights: Sequence[float]
) -> torch.Tensor:
    """`base + sum_k w_k D_k` in float32, for directions D_k that are known."""
    if len(directions) != len(weights):
        raise MergeError(
            f"merge: {len(directions)} directions for {len(weights)} experts. Give one for each."
        )
    total = torch.zeros(base.shape, dtype=torch.float32, device=base.device)
    for direction, weight in zip(directions, weights, strict=True):
        check_pair(total, direction)
        total.add_(direction, alpha=rounded(weight))
    return total.add_(base.float())
