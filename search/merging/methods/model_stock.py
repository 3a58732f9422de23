"""Model Stock: how far to go from the base to the mean, from the angles (Jang et al. 2024, arXiv 2403.19522)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch

from search.errors import MergeError
from search.merging.methods.checks import check_tensors, per_expert

_TINY = 1e-6  # a product of norms has no angle below it; a denominator below it has no quotient


def merge_model_stock(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    rows: bool = False,
    ratio: torch.Tensor | None = None,
) -> torch.Tensor:
    """Point `t * mean + (1 - t) * base` on the line from the base to the experts' mean that is nearest to their centre.

    The method knows no weights: equal ones give it as published, whatever their value. Others weigh the mean, and
    leave t as it is. Equal weights equal mergekit 0.1.5 `model_stock` (`filter_wise`: `rows`) bit for bit in
    `dtype: float32` on one thread.

    Args:
        base, experts: tensors `(...)` of one shape and one dtype, float32, bfloat16 or float16; not changed. At
            least two experts.
        weights: one per expert, finite, with a sum other than zero.
        rows: a t for every row (the last dimension) instead of one for the tensor.
        ratio: `stock_ratio(base, experts, rows=rows)`, which depends on the tensors alone.

    Returns:
        float32 tensor `(...)`.

    Raises:
        MergeError: fewer than two experts, another number of weights, weights of sum zero, tensors that differ.
    """
    factors = per_expert(list(weights), experts, "weight")
    t = stock_ratio(base, experts, rows=rows) if ratio is None else ratio
    unit = max(factors, key=abs)
    # Relative weights: equal ones become exactly 1, and the weighted mean the plain one.
    parts = [factor / unit for factor in factors] if unit else factors
    if not abs(sum(parts)) > _TINY:
        raise MergeError(f"merge: the weights {factors} have no mean (wanted a sum other than zero).")
    mean = torch.zeros(base.shape, dtype=torch.float32, device=base.device)
    for expert, part in zip(experts, parts, strict=True):
        mean.add_(expert.float() if part == 1.0 else expert.float() * part)
    mean.div_(sum(parts))
    return mean.mul_(t).add_((1.0 - t) * base.float())


def stock_weights(ratio: float, weights: Sequence[float]) -> tuple[float, ...]:
    """Weights of the base and of every expert: the merge at ratio t as a weighted sum.

    They make it a mergekit `linear` merge without normalisation.

    >>> stock_weights(0.5, [1.0, 1.0])
    (0.5, 0.25, 0.25)

    Raises:
        MergeError: weights of sum zero.
    """
    total = sum(weights)
    if not abs(total) > _TINY:
        raise MergeError(f"merge: the weights {list(weights)} have no mean (wanted a sum other than zero).")
    return 1.0 - ratio, *(ratio * weight / total for weight in weights)


def stock_ratio(base: torch.Tensor, experts: Sequence[torch.Tensor], *, rows: bool = False) -> torch.Tensor:
    """The ratio `t = K cos / (1 + (K - 1) cos)` with the mean cosine of the angles between K task vectors.

    This is the paper's ratio for K experts, `2 cos / (1 + cos)` for two; 1 for experts that are equal. A zero
    task vector has the cosine 0 to every other; a product of norms below 1e-6 counts as 1e-6. Where the
    denominator is below 1e-6 the ratio is 0, which keeps the base.

    Returns:
        float32: `()`, or `(..., 1)` for rows.

    Raises:
        MergeError: fewer than two experts, or tensors that differ.
    """
    check_tensors(base, experts)
    if len(experts) < 2:
        raise MergeError("merge: one expert has no angle to another (model stock wants at least two).")
    if base.dim() < 2 or not rows:
        base, experts = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    vectors = [expert.float() - base.float() for expert in experts]
    norms = [torch.norm(vector, dim=-1) for vector in vectors]
    cosines = [
        ((vectors[i] * vectors[j]).sum(dim=-1) / (norms[i] * norms[j]).clamp(min=_TINY)).clamp(-1.0, 1.0)
        for i, j in combinations(range(len(vectors)), 2)
    ]
    cosine = torch.stack(cosines).mean(dim=0)
    below = 1.0 + (len(experts) - 1) * cosine
    ratio = torch.where(below.abs() < _TINY, 0.0, len(experts) * cosine / below)
    return ratio.unsqueeze(-1) if ratio.dim() else ratio
