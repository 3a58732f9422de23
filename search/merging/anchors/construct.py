"""Anchors of one block for one expert: inputs whose gradient at `pre` points along the expert's task vector (Eq. 1).

    g(X)  = - d/dtheta sum_j Dist(phi(theta, x_j), phi(theta_k, x_j))  at theta = theta_0      phi: the block
    X*    = argmin_X sum_p (1 - cos(g_p(X), tau_p))                    tau = theta_k - theta_0, p: a parameter tensor

The sign matters. The paper prints the gradient of the distance itself, which points away from the expert: maximising
its cosine with tau drives X into the null space of tau. What must point along tau is the direction of descent.

The cosine is taken for each tensor, not over all of them together, so a small norm counts as much as a large matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from search.errors import MergeError
from search.merging.anchors.functional import Weights, call, distances
from search.merging.anchors.options import AnchorOptions, Distance

Watch = Callable[[int, float], None]


@dataclass(frozen=True, eq=False)
class Constructed:
    """The anchors with the best alignment that was seen.

    Attributes:
        anchors: `(n, tokens, d)` in the dtype of the first anchors.
        alignment: `(steps + 1,)` float64: mean cosine over the tensors before each step and after the last; higher is
            better, 1 is perfect. Empty when the expert equals `pre` in this block: nothing can be aligned.
    """

    anchors: torch.Tensor
    alignment: torch.Tensor

    @property
    def best(self) -> float:
        """The alignment of `anchors`; NaN when there is none."""
        return float(self.alignment.max()) if len(self.alignment) else float("nan")


@torch.enable_grad()
def construct(
    block: torch.nn.Module,
    pre: Weights,
    expert: Weights,
    first: torch.Tensor,
    options: AnchorOptions,
    *,
    watch: Watch | None = None,
) -> Constructed:
    """Optimises all anchors of a block at once with AdamW; the best alignment is kept, not the last.

    Args:
        block: maps `(n, tokens, d)` to `(n, ...)`, twice differentiable, without dropout; its own weights are not used.
        pre, expert: every parameter of the block, float32.
        first: `(n, tokens, d)` float32, the first anchors; not changed.
        options: `steps`, `rate`, `decay` and `distance` are read.
        watch: called with each step and its alignment.

    Raises:
        MergeError: the alignment is not finite.
    """
    directions = unit_directions(pre, expert)
    if not directions:
        return Constructed(first.clone(), torch.empty(0, dtype=torch.float64))
    leaves = _leaves(pre, directions)
    anchors = first.clone().requires_grad_()
    optimiser = torch.optim.AdamW([anchors], lr=options.rate, weight_decay=options.decay)
    best, kept, history = -float("inf"), first, []
    for step in range(options.steps + 1):
        last = step == options.steps
        found = _cosines(
            block, leaves, expert, directions, anchors, options.distance, differentiable=not last
        )
        alignment = float(found.detach().mean())
        if math.isnan(alignment):
            raise MergeError(
                f"anchors: the alignment is not a number after {step} steps. "
                "Use a smaller rate, or another init or sigma."
            )
        history.append(alignment)
        if alignment > best:
            best, kept = alignment, anchors.detach().clone()
        if watch is not None:
            watch(step, alignment)
        if not last:
            # Not `backward()`: that would also compute gradients for the parameters, which nobody reads.
            (anchors.grad,) = torch.autograd.grad((1 - found).sum(), [anchors])
            optimiser.step()
    return Constructed(kept, torch.tensor(history, dtype=torch.float64))


@torch.enable_grad()
def cosines(
    block: torch.nn.Module,
    pre: Weights,
    expert: Weights,
    anchors: torch.Tensor,
    distance: Distance = "cosine",
) -> dict[str, torch.Tensor]:
    """Cosine between the direction of descent and the task vector, for each tensor that the expert changed.

    Returns:
        name -> scalar in [-1, 1], higher is better; 0 where the gradient vanishes. Differentiable in the anchors if
        they require a gradient.
    """
    directions = unit_directions(pre, expert)
    if not directions:
        return {}
    found = _cosines(
        block,
        _leaves(pre, directions),
        expert,
        directions,
        anchors,
        distance,
        differentiable=anchors.requires_grad,
    )
    return dict(zip(directions, found, strict=True))


def unit_directions(pre: Weights, expert: Weights) -> dict[str, torch.Tensor]:
    """The task vector of each tensor, scaled to length 1; tensors that the expert left as they were are not in it."""
    directions = {}
    for name, tensor in pre.items():
        tau = expert[name] - tensor
        length = float(torch.linalg.vector_norm(tau, dtype=torch.float64))
        if length != 0:  # a NaN goes on, to be reported
            directions[name] = tau.div_(length)
    return directions


def pick_sigma(
    align: Callable[[AnchorOptions], float], options: AnchorOptions
) -> tuple[float, dict[float, float]]:
    """The sigma of `options.sigmas` whose anchors align best after `sigma_steps`; the first of equal ones.

    Args:
        align: the alignment that construction in one block reaches with these options, from the same noise each time.

    Returns:
        the sigma, and the alignment of each.
    """
    found = {
        sigma: align(replace(options, sigma=sigma, sigmas=(), steps=options.sigma_steps))
        for sigma in options.sigmas or (options.sigma,)
    }
    return max(found, key=lambda sigma: found[sigma]), found


def weight_rows(expert: Weights, shape: Sequence[int], draw: torch.Generator) -> torch.Tensor:
    """First anchors `(n, tokens, d)`: random rows of the expert's matrices of width d, as long as there are any unused.

    Raises:
        MergeError: no matrix of the block has rows of width d.
    """
    n, tokens, width = shape
    matrices = [tensor for tensor in expert.values() if tensor.ndim == 2 and tensor.shape[1] == width]
    if not matrices:
        raise MergeError(f"anchors: no matrix of the block has rows of width {width}. Use init gauss.")
    counts = torch.tensor([len(matrix) for matrix in matrices])
    ends, total = counts.cumsum(0), int(counts.sum())
    rounds = -(-n * tokens // total)
    rows = torch.cat([torch.randperm(total, generator=draw) for _ in range(rounds)])[: n * tokens]
    owners = torch.searchsorted(ends, rows, right=True)
    picked = [
        matrices[owner][row - int(ends[owner] - counts[owner])]
        for row, owner in zip(rows.tolist(), owners.tolist(), strict=True)
    ]
    return torch.stack(picked).reshape(n, tokens, width).clone()


def gauss(shape: Sequence[int], sigma: float, draw: torch.Generator) -> torch.Tensor:
    """First anchors `(n, tokens, d)` float32: sigma * N(0, 1), the same noise for every sigma."""
    return sigma * torch.randn(tuple(shape), generator=draw)


def _leaves(pre: Weights, directions: Weights) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().requires_grad_(name in directions) for name, tensor in pre.items()}


def _cosines(
    block: torch.nn.Module,
    leaves: Weights,
    expert: Weights,
    directions: Weights,
    anchors: torch.Tensor,
    distance: Distance,
    *,
    differentiable: bool,
) -> torch.Tensor:
    """`(tensors,)` in the order of `directions`."""
    found = call(block, leaves, anchors)
    wanted = call(block, expert, anchors)
    descent = torch.autograd.grad(
        -distances(found, wanted, distance).sum(),
        [leaves[name] for name in directions],
        create_graph=differentiable,
        materialize_grads=True,  # a parameter that the block does not use has gradient 0, and cosine 0
    )
    products = [(g * tau).sum() for g, tau in zip(descent, directions.values(), strict=True)]
    lengths = [torch.linalg.vector_norm(g) for g in descent]
    # No eps of 1e-8: close to pre the outputs are almost equal, and gradients far below that still have a direction.
    return torch.stack(products) / torch.stack(lengths).clamp_min(1e-30)
