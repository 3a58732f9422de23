"""WUDI: the task vector that disturbs each expert least on its own inputs (Cheng et al. 2025, arXiv 2503.08099)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from search.errors import MergeError
from search.merging.methods.checks import check_tensors, per_expert
from search.merging.methods.consensus import add_directions
from search.merging.methods.sparsify import task_vector


def merge_wudi(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    scaling: float = 1.0,
    steps: int = 300,
    rate: float = 1e-5,
    direction: torch.Tensor | None = None,
) -> torch.Tensor:
    """Base plus `scaling` times the direction of `wudi_direction`.

    Weights of 1 and a scaling of 1 give the method as published. No mergekit method.

    Args:
        base, experts, weights, steps, rate: as for `wudi_direction`.
        scaling: any finite number.
        direction: `wudi_direction(base, experts, weights)`, which takes seconds; the scaling is then free to vary.

    Returns:
        float32 tensor `(...)`.

    Raises:
        MergeError: as `wudi_direction`, or a scaling that is not finite.
    """
    if direction is None:
        direction = wudi_direction(base, experts, weights, steps=steps, rate=rate)
    return add_directions(base, [direction], per_expert(scaling, [direction], "scaling"))


@torch.no_grad()
def wudi_direction(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    steps: int = 300,
    rate: float = 1e-5,
) -> torch.Tensor:
    """Merged task vector M with the least `sum_k |(M - t_k) t_k'|_F^2 / |t_k|_F^2`, as far as Adam goes from their sum.

    The rows of a task vector t_k lie in the span of the inputs it was trained on, so `(M - t_k) t_k'` is what
    M does to those inputs beyond t_k itself. M starts at `sum_k t_k` and takes `steps` steps of Adam; as each
    changes an element by about `rate`, both are part of the definition.

    A step costs one product: the gradient is `2 (M G - sum_k t_k G_k)` with `G_k = t_k' t_k / |t_k|_F^2` and
    `G = sum_k G_k`, written for the distance from the start so that nothing cancels. It equals the plain loss
    under torch's Adam within a thousandth of the way that M goes.

    Args:
        base, experts: tensors `(out, in)` of a linear layer, of one dtype, float32, bfloat16 or float16; not
            changed. Any number of dimensions other than two gives zero, so that the merge is the base;
            embeddings are no linear layers and are not for this method.
        weights: one per expert, finite: `t_k = w_k (e_k - base)`. A zero t_k is no expert, so one expert alone
            gives t_k.
        steps: at least 0; 0 gives the sum.
        rate: learning rate, above 0.

    Returns:
        float32 tensor of that shape.

    Raises:
        MergeError: no experts, another number of weights, tensors that differ, a number out of its range.
    """
    check_tensors(base, experts)
    factors = per_expert(list(weights), experts, "weight")
    if steps < 0 or not 0.0 < rate < math.inf:
        raise MergeError(f"merge: {steps} steps at rate {rate} (wanted at least 0, and above 0).")
    start = torch.zeros(base.shape, dtype=torch.float32, device=base.device)
    if base.dim() != 2:
        return start
    scaled = [(task_vector(base, expert)) * factor for expert, factor in zip(experts, factors, strict=True)]
    vectors = [vector for vector in scaled if vector.count_nonzero()]
    for vector in vectors:
        start += vector
    pull = torch.zeros_like(start)
    total = torch.zeros(base.shape[1], base.shape[1], device=base.device)
    for vector in vectors:
        unit = (
            vector / vector.double().norm()
        ).float()  # the square of a tiny norm would not fit into float32
        own = unit.T @ unit
        total += own
        pull += (start - vector) @ own
    moved = torch.zeros_like(start)
    optimizer = torch.optim.Adam([moved], lr=rate)
    for _ in range(steps if len(vectors) > 1 else 0):
        moved.grad = torch.addmm(pull, moved, total).mul_(2.0)
        optimizer.step()
    return start + moved
