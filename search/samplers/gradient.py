"""The gradient of a loss by the coefficients of a linear merge: one backward pass gives all groups at once.

    T_g(c) = pre_g + sum_k c_gk (expert_gk - pre_g)
    dLoss/dc_gk = sum over the group's tensors of <dLoss/dT, expert_k - pre>

A parameter's gradient is multiplied with these differences as soon as it is complete, and freed: beside the activations
of one batch the pass needs the memory of the largest gradient, not of all. (A tied embedding's gradient is complete
only at the end of a pass, since the head is at its beginning.) The parents stay on disk, mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from objectives.scoring.backward import backpropagate
from objectives.scoring.losses import Loss, scalarized
from search.checkpoints.checkpoint import Checkpoint
from search.errors import ConfigError, EvaluationError
from search.merging.blend import make_blend
from search.merging.live import LiveModel
from search.merging.methods.linear import coefficient_derivative
from search.merging.space import CoefficientSpace
from search.recipe import Recipe

if TYPE_CHECKING:
    from objectives.questions.config import TaskConfig
    from objectives.questions.questions import Question
    from objectives.scoring.scorer import Scorer


Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LossGradient:
    """A loss at one recipe, and where it rises.

    Attributes:
        loss: mean over the questions; lower is better.
        gradient: `(groups,)` float64, derivative by each coefficient, in the order of the space.
        tokens: scored tokens it cost: each token forward counts one, backward two more.
    """

    loss: float
    gradient: Floats
    tokens: int


class CoefficientGradient:
    """Losses and gradients of recipes on one list of questions.

    Args:
        live: takes on the weights of every recipe that is asked for.
        space: groups and their order.
        scorer: of the live model.
        questions: at least one, all of them used for every gradient.
        tasks: the study's tasks; `normalize` is read from them.

    Raises:
        ConfigError: the space's method is not linear, the model does not take token trees, or a tensor that differs
            between the parents is no parameter.
    """

    def __init__(
        self,
        live: LiveModel,
        space: CoefficientSpace,
        scorer: Scorer,
        questions: Sequence[Question],
        tasks: Sequence[TaskConfig],
    ) -> None:
        if space.methods != ("linear",):
            raise ConfigError(
                f"merge.method: found {', '.join(space.methods)}: a gradient needs merge.method linear."
            )
        self.space = space
        self._live, self._scorer = live, scorer
        self._questions, self._tasks = questions, tasks
        scorer.packing(questions)
        self._moving = self._differing()

    def at(self, recipe: Recipe, loss: Loss, questions: Sequence[Question] | None = None) -> LossGradient:
        """The loss and its gradient at a recipe; the live model holds that recipe afterwards.

        Args:
            questions: others than all; the same object finds its tokens again.

        A group whose tensors are equal in both parents has a gradient of exactly 0.

        Raises:
            MergeError: the recipe does not fit the space, or a value into the dtype.
            EvaluationError: scores or gradient are not finite, or do not fit into memory.
        """
        asked = questions or self._questions
        self._live.apply(make_blend(self._live.parents, self.space.by_tensor(recipe)))
        gradient = np.zeros(self.space.dim)
        try:
            with torch.enable_grad(), self._collecting(gradient):
                found = backpropagate(self._scorer, asked, self._tasks, loss)
        except torch.OutOfMemoryError as error:
            raise EvaluationError(
                "gradient: does not fit into memory. Begin another study with a smaller batch_tokens."
            ) from error
        gradient /= len(asked)
        if not np.isfinite(gradient).all():
            group = self.space.names[int(np.flatnonzero(~np.isfinite(gradient))[0])]
            raise EvaluationError(
                f"gradient: not finite in group {group}. Use merge.dtype float32 or bfloat16."
            )
        return LossGradient(found.loss, gradient, found.tokens)

    def _differing(self) -> list[tuple[str, list[tuple[int, Checkpoint]], torch.nn.Parameter]]:
        """(tensor, [(coefficient, its expert)], parameter) of every tensor that depends on a coefficient.

        The others need no gradient: fine-tuning often leaves the embeddings, the largest of all, as they were.
        """
        pre, *experts = self._live.parents.everybody
        parameters = self._live.parameters()
        found = []
        for place, group in enumerate(self.space.groups):
            for name in group.tensors:
                base = pre.tensor(name)
                differing = [
                    (place + index * len(self.space.groups), expert)
                    for index, expert in enumerate(experts)
                    if not torch.equal(base, expert.tensor(name))
                ]
                if not differing:
                    continue
                if name not in parameters:
                    raise ConfigError(f"gradient: tensor {name} is a buffer of this model, not a parameter.")
                found.append((name, differing, parameters[name]))
        return found

    @contextmanager
    def _collecting(self, gradient: Floats) -> Iterator[None]:
        """Adds every parameter's part to its group while the block runs."""
        hooks = []
        try:
            for name, differing, parameter in self._moving:
                parameter.requires_grad_(True)
                hook = self._hook(name, differing, gradient)
                hooks.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
            yield
        finally:
            for handle in hooks:
                handle.remove()
            for _, _, parameter in self._moving:
                parameter.requires_grad_(False)
                parameter.grad = None

    def _hook(
        self, name: str, differing: Sequence[tuple[int, Checkpoint]], gradient: Floats
    ) -> Callable[[torch.Tensor], None]:
        pre = self._live.parents.pre

        def collect(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None, "the hook runs once it is there"
            for place, expert in differing:
                gradient[place] += coefficient_derivative(
                    parameter.grad, pre.tensor(name), expert.tensor(name)
                )
            parameter.grad = None

        return collect


class StepGradient:
    """Gradients for the steps of a descent, each on one of the parts that the questions are dealt out to.

    Args:
        of: gives the gradients. losses: one for each objective.
        parts: of the questions of the search split, read in turn.
        tokens: that a step takes at most.
    """

    def __init__(
        self,
        of: CoefficientGradient,
        losses: Sequence[Loss],
        parts: Sequence[Sequence[Question]],
        tokens: int,
    ) -> None:
        self._of = of
        self._losses = tuple(losses)
        self._parts = parts
        self.tokens = tokens

    def __call__(self, coefficients: Floats, weights: Floats, step: int, /) -> LossGradient:
        """See `WeightedGradient`."""
        recipe = self._of.space.from_vector(coefficients)
        return self._of.at(
            recipe, scalarized(self._losses, weights.tolist()), self._parts[step % len(self._parts)]
        )


def dealt(questions: Sequence[Question], size: int, seed: int) -> list[tuple[Question, ...]]:
    """The questions dealt out at random to parts of `size` or a little more, each in the split's order."""
    count = max(1, len(questions) // size)
    order = np.random.default_rng(seed).permutation(len(questions))
    return [tuple(questions[i] for i in sorted(part)) for part in np.array_split(order, count)]
