"""Fitting one block to what the experts put out on their own anchors.

    from pre    (Eq. 5)  min over theta      sum_k sum_j Dist(phi(theta, x_kj), phi(theta_k, x_kj))
    refinement  (Eq. 6)  the same loss, but  theta = theta_0 + sum_k f_k * tau_k      f_k: a factor for every element

A refinement is computed as `start + sum_k (f_k - initial f_k) * tau_k`, which is the same theta: an element whose
factors did not move keeps the value it has in the merge that is refined, without rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from search.errors import MergeError
from search.merging.anchors.functional import Weights, call, distances
from search.merging.anchors.options import RATE_FROM_PRE, RATE_OF_FACTORS, AdaptOptions


@dataclass(frozen=True, eq=False)
class Adapted:
    """A fitted block.

    Attributes:
        weights: every parameter of the block, float32.
        losses: `(epochs,)` float64: mean distance of an anchor during each epoch; lower is better. Empty if there was
            nothing to fit.
        before, after: mean distance of an anchor at the start and at the end; NaN without anchors.
    """

    weights: dict[str, torch.Tensor]
    losses: torch.Tensor
    before: float
    after: float


@torch.enable_grad()
def adapt(
    block: torch.nn.Module,
    start: Weights,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    options: AdaptOptions,
    *,
    task_vectors: Sequence[Weights] | None = None,
    watch: Callable[[int, float], None] | None = None,
) -> Adapted:
    """Adam on batches of the pooled anchors; the last weights are kept, as in the paper.

    Args:
        block: as for `construct`.
        start: every parameter of the block, float32; not changed.
        pairs: for each expert its anchors `(n, tokens, d)` and its outputs on them `(n, ...)`.
        options: see there.
        task_vectors: None fits the tensors themselves (Eq. 5), else the factors of these (Eq. 6): parameter -> tau.
            Parameters that are missing or zero in all of them stay as they are.
        watch: called with each epoch and its loss.

    Raises:
        MergeError: loss or weights are not finite.
    """
    inputs = torch.cat([anchors for anchors, _ in pairs])
    targets = torch.cat([outputs for _, outputs in pairs])
    own = {name: tensor.detach() for name, tensor in start.items()}
    moving = _Tensors(own) if task_vectors is None else _Factors(own, task_vectors)
    trained = moving.trained
    rate = options.rate or (RATE_FROM_PRE if task_vectors is None else RATE_OF_FACTORS)
    before = _mean_distance(block, own, inputs, targets, options)
    losses = []
    if trained and options.epochs:
        optimiser = torch.optim.Adam(trained, lr=rate)
        draw = torch.Generator().manual_seed(options.seed)
        for epoch in range(options.epochs):
            total = 0.0
            for batch in torch.split(torch.randperm(len(inputs), generator=draw), options.batch):
                batch = batch.to(inputs.device)
                found = call(block, moving.theta(), inputs[batch])
                loss = distances(found, targets[batch], options.distance).sum()
                gradients = torch.autograd.grad(loss, trained, materialize_grads=True)
                for tensor, gradient in zip(trained, gradients, strict=True):
                    tensor.grad = gradient
                optimiser.step()
                total += float(loss.detach())
            losses.append(total / len(inputs))
            if watch is not None:
                watch(epoch, losses[-1])
        with torch.no_grad():
            weights = {name: tensor.detach().clone() for name, tensor in moving.theta().items()}
    else:
        weights = {name: tensor.clone() for name, tensor in own.items()}
    after = _mean_distance(block, weights, inputs, targets, options)
    if not (abs(after) < float("inf") and all(bool(t.isfinite().all()) for t in weights.values())):
        raise MergeError(
            f"adapt: the loss went from {before:.3g} to {after:.3g}, or a weight is not finite. Use a smaller rate."
        )
    return Adapted(weights, torch.tensor(losses, dtype=torch.float64), before, after)


class _Tensors:
    """theta itself."""

    def __init__(self, start: Weights) -> None:
        self._theta = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        self.trained = list(self._theta.values())

    def theta(self) -> dict[str, torch.Tensor]:
        return self._theta


class _Factors:
    """theta = start + sum_k (f_k - initial f_k) * tau_k, in terms of what is added to each factor."""

    def __init__(self, start: Weights, task_vectors: Sequence[Weights]) -> None:
        self._start = start
        self._terms: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.trained: list[torch.Tensor] = []
        for vector in task_vectors:
            for name, tau in vector.items():
                if not bool(tau.any()):
                    continue
                move = torch.zeros_like(tau).requires_grad_()
                self.trained.append(move)
                self._terms.setdefault(name, []).append((move, tau))

    def theta(self) -> dict[str, torch.Tensor]:
        return {name: self._theta(name, tensor) for name, tensor in self._start.items()}

    def _theta(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        for move, tau in self._terms.get(name, ()):
            tensor = torch.addcmul(tensor, move, tau)
        return tensor


def _mean_distance(
    block: torch.nn.Module,
    weights: Weights,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    options: AdaptOptions,
) -> float:
    if not len(inputs):
        return float("nan")
    with torch.no_grad():
        parts = [
            distances(call(block, weights, x), y, options.distance).sum()
            for x, y in zip(
                torch.split(inputs, options.batch), torch.split(targets, options.batch), strict=True
            )
        ]
    return float(torch.stack(parts).sum()) / len(inputs)
