"""A backward pass over questions: the gradient of a loss of their option scores, left on the model's parameters.

The forward pass is the scorer's: token trees after shared prefixes, in batches. A loss that couples questions needs
all scores before the gradient of any: they are scored first, without a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from objectives.errors import EvaluationError
from objectives.evaluation import divisors
from objectives.scoring.losses import Loss
from objectives.scoring.scorer import empty_scores
from objectives.scoring.tree_attention import Batch, pack

if TYPE_CHECKING:
    from objectives.questions.config import TaskConfig
    from objectives.questions.questions import Question
    from objectives.scoring.scorer import Scorer


# Part of the scorer's batch that has room with its graph: the activations of every layer instead of one.
GRAPH_SHARE = 4


def passes(loss: Loss) -> int:
    """How many scored tokens one token of a question counts: one forward, two backward, one more in a coupled loss."""
    return 4 if loss.coupled else 3


@dataclass(frozen=True)
class BackwardPass:
    """What a pass cost and found.

    Attributes:
        loss: mean over the questions.
        tokens: scored tokens it counts for, `passes` for each token of the questions.
    """

    loss: float
    tokens: int


def backpropagate(
    scorer: Scorer, questions: Sequence[Question], tasks: Sequence[TaskConfig], loss: Loss
) -> BackwardPass:
    """Runs forward and backward over all questions, with the values that the model holds.

    Every parameter that requires a gradient accumulates n times the derivative of the loss in its `grad`, for n
    questions, in one backward pass a batch and one a shared prefix; hooks on the parameters may take it from there each
    time. Not of the mean itself: in float16 a thousandth of a question's share is lost in the last digits.

    Args:
        questions: at least one.
        tasks: the study's tasks; `normalize` is read from them.

    Raises:
        ConfigError: the model does not take token trees. EvaluationError: a log-likelihood or the loss is not finite.
    """
    packed, encoded, groups = scorer.packing(questions)
    empty, option_tokens = empty_scores(encoded)
    n, k = empty.shape
    divisor = torch.from_numpy(divisors(questions, option_tokens, tasks).astype(np.float64))
    padding = torch.from_numpy(option_tokens == 0)
    gold = torch.tensor([question.gold for question in questions])
    value, pull = 0.0, None  # pull: n times the derivative by each score
    if loss.coupled:
        total = torch.from_numpy(scorer.loglikelihoods(questions).total)
        value, of_mean = _differentiated(loss, total / divisor, gold)
        pull = n * of_mean
    for group in groups:
        prefix = packed.prefix_in_graph(group.prefix)
        for batch in pack(group, max(1, scorer.batch_tokens // GRAPH_SHARE)):
            index = torch.tensor([row.question for row in batch.rows])
            totals = _option_totals(batch, packed.read_in_graph(batch, prefix), k)
            if pull is None:
                score = (totals.detach() / divisor[index]).masked_fill(padding[index], -torch.inf)
                part, of_score = _differentiated(loss, score, gold[index])
                value += len(index) / n * part
                of_score = len(index) * of_score
            else:
                of_score = pull[index]
            # A padded option reads nothing, so whatever reaches it from the loss goes nowhere.
            if totals.requires_grad:
                totals.backward(of_score / divisor[index])  # type: ignore[no-untyped-call]
        if prefix is not None:
            prefix.backward()
    if not math.isfinite(value):
        raise EvaluationError(
            f"{loss.name} is {value}, wanted a finite number. The model's values are out of range; narrow the space's "
            "bounds or use float32."
        )
    return BackwardPass(value, passes(loss) * sum(group.tokens for group in groups))


def _differentiated(loss: Loss, score: Tensor, gold: Tensor) -> tuple[float, Tensor]:
    """The loss and its derivative by each score, `(n, k)`."""
    with torch.enable_grad():
        leaf = score.detach().requires_grad_()
        value = loss(leaf, gold)
        (derivative,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), derivative


def _option_totals(batch: Batch, log_probability: Tensor, k: int) -> Tensor:
    """`(rows, k)` float64 on the CPU: log-likelihood of each option of a batch's questions, 0 after the last."""
    row_of = {row.question: i for i, row in enumerate(batch.rows)}
    rows: npt.NDArray[np.int64] = np.array([row_of[int(q)] for q in batch.reads[:, 2]], dtype=np.int64)
    place = torch.from_numpy(rows * k + batch.reads[:, 3])
    totals = torch.zeros(len(batch.rows) * k, dtype=torch.float64)
    return totals.index_add(0, place, log_probability.double().cpu()).view(-1, k)
