"""Task arithmetic: task vectors, weighted and added (Ilharco et al. 2023, arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from search.merging.methods.consensus import combine


def merge_task_arithmetic(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    normalize: bool = False,
    scaling: float = 1.0,
) -> torch.Tensor:
    """Base plus `scaling * sum_k w_k (e_k - base)`, the paper's learning by addition.

    Equals mergekit 0.1.5 `task_arithmetic` (`weight`, `normalize`, `lambda`) bit for bit, in `dtype: float32`.

    Args:
        base, experts: tensors `(...)` of one shape and one dtype, float32, bfloat16 or float16; not changed.
        weights: one per expert, any finite number.
        normalize: divide the sum by the sum of the weights, unless that is below 1e-8 in magnitude.
        scaling: mergekit's `lambda`, any finite number.

    Returns:
        float32 tensor `(...)`.

    Raises:
        MergeError: no experts, another number of weights, tensors that differ, a number that is not finite.
    """
    return combine(
        base, experts, weights, [None] * len(experts), elect=False, normalize=normalize, scaling=scaling
    )
