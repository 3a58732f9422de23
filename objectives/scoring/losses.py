"""Differentiable losses of option scores: what a gradient follows where a metric has none.

A loss takes scores `(n, k)` float64 (log-likelihood / divisor, -inf after a question's last option) and the indices of
the right options `(n,)` int64, and gives one number, a mean over the questions; lower is better. The probabilities are
the softmax of the scores, as everywhere. Accuracy and binned calibration error are constant almost everywhere, so
their place is taken by the losses that `stand_in` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from objectives.errors import ConfigError
from objectives.outcomes import N_BINS

# A question at the centre of a bin belongs to the next bin 1/80 as much.
NEIGHBOUR = 80.0


@dataclass(frozen=True)
class Loss:
    """A differentiable loss.

    Attributes:
        name: for messages.
        function: (scores `(n, k)`, right options `(n,)`) to a scalar tensor.
        coupled: whether a question's share depends on the other questions; if not, the loss of all questions is the
            mean of the losses of its parts, weighted by their numbers of questions.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    coupled: bool

    def __call__(self, score: Tensor, gold: Tensor) -> Tensor:
        return self.function(score, gold)


def cross_entropy(score: Tensor, gold: Tensor) -> Tensor:
    """Mean of -log p(right option), in nats; the stand-in for accuracy.

    >>> round(float(cross_entropy(torch.zeros(1, 4), torch.tensor([2]))), 4)
    1.3863
    """
    return torch.nn.functional.cross_entropy(score, gold)


def brier(score: Tensor, gold: Tensor) -> Tensor:
    """Brier score over all options (Brier 1950), in [0, 2]; equals the metric of that name.

    >>> float(brier(torch.zeros(1, 4), torch.tensor([2])))
    0.75
    """
    right = torch.nn.functional.one_hot(gold, score.shape[1])
    return (torch.softmax(score, dim=1) - right).square().sum(dim=1).mean()


def soft_binned_ece(score: Tensor, gold: Tensor, *, n_bins: int = N_BINS) -> Tensor:
    """Soft-binned expected calibration error with the l2 norm, in [0, 1] (Karandikar et al. 2021, eq. 11).

    Each confidence c belongs to all bins: to bin j with centre z_j by softmax_j(-(c - z_j)^2 / T). With the mass S_j,
    the mean confidence C_j and the accuracy A_j of each bin, all weighted so,

        SB-ECE = (sum_j S_j / n * (A_j - C_j)^2)^(1/2).

    The temperature is T = 1 / (n_bins^2 ln 80): 0.00101 for 15 bins. Whether an answer is right is a constant, as in
    the paper: the gradient moves confidences, not answers. In the limit T = 0 it is the l2 form of ECE, which is never
    less than ECE.
    """
    confidence, predicted = torch.softmax(score, dim=1).max(dim=1)
    excess = confidence - (predicted == gold).to(score.dtype)
    centre = (torch.arange(n_bins, dtype=score.dtype, device=score.device) + 0.5) / n_bins
    temperature = 1.0 / (n_bins**2 * math.log(NEIGHBOUR))
    member = torch.softmax(-(confidence[:, None] - centre).square() / temperature, dim=1)
    mass = member.sum(dim=0)
    gap = (member * excess[:, None]).sum(dim=0)  # S_j (C_j - A_j)
    # S_j / n * (gap_j / S_j)^2; the norm's gradient at zero is zero, that of a square root is not a number.
    root_mass = mass.clamp_min(torch.finfo(score.dtype).tiny).sqrt()
    norm: Tensor = torch.linalg.vector_norm(gap / root_mass)
    return norm / math.sqrt(len(score))


CROSS_ENTROPY = Loss("cross-entropy", cross_entropy, coupled=False)
BRIER = Loss("brier", brier, coupled=False)
SOFT_BINNED_ECE = Loss("soft-binned ece", soft_binned_ece, coupled=True)


def scalarized(losses: Sequence[Loss], weights: Sequence[float]) -> Loss:
    """The weighted sum of several losses; one of weight 0 is left out."""
    terms = [(float(w), loss) for w, loss in zip(weights, losses, strict=True) if w]

    def total(score: Tensor, gold: Tensor) -> Tensor:
        return sum((w * loss(score, gold) for w, loss in terms), start=score.new_zeros(()))

    name = " + ".join(f"{w:.3g} {loss.name}" for w, loss in terms)
    return Loss(name, total, coupled=any(loss.coupled for _, loss in terms))


def stand_in(objective: str) -> Loss:
    """The loss that a gradient follows for an objective of a study.

    `accuracy` and `nll`: cross-entropy; `brier`: itself; every form of `ece`: soft-binned ECE of as many bins.

    Raises:
        ConfigError: there is none for this objective.

    >>> stand_in("accuracy").name, stand_in("ece:10:debiased").name
    ('cross-entropy', 'soft-binned ece')
    """
    base, *options = objective.split(":")
    if objective in ("accuracy", "nll"):
        return CROSS_ENTROPY
    if objective == "brier":
        return BRIER
    if base != "ece" or "@" in objective:
        raise ConfigError(
            f"objectives: {objective}: the gradient engine has no differentiable stand-in for it. "
            "Use accuracy, nll, brier or ece, or another engine."
        )
    n_bins = next((int(option) for option in options if option.isdecimal()), N_BINS)
    return Loss(SOFT_BINNED_ECE.name, partial(soft_binned_ece, n_bins=n_bins), coupled=True)
