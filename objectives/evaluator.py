"""A model in, one frozen `Evaluation` out; saved as evidence, from which every metric can be computed again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from objectives.evaluation import Evaluation, _outcomes, divisors, questions_digest, shifted
from objectives.questions.questions import AnyQuestion, Question, closed, written

if TYPE_CHECKING:
    from objectives.evaluation import Progress
    from objectives.generation.written import WrittenEvaluator
    from objectives.questions.config import TaskConfig
    from objectives.scoring.scorer import Scorer


class Evaluator:
    """Scores one list of questions, again and again, with whatever values the model holds at the moment.

    Options are scored by their likelihoods, written answers are drawn and judged (`written.py`).

    Args:
        model: a transformers causal language model, or a `Scorer` to share its set-up between evaluators.
        tokenizer: ignored when a `Scorer` is given.
        questions: all of one split, in the order of the evidence.
        tasks: the study's tasks; `normalize` is read from them, and how written answers are drawn.

    Attributes:
        tokens: what an evaluation takes, padding not counted; with written answers at most.

    Raises:
        ConfigError: a question that cannot be tokenised; nothing has been scored then.
    """

    def __init__(
        self, model: Any, tokenizer: Any, questions: Sequence[AnyQuestion], tasks: Sequence[TaskConfig]
    ) -> None:
        from objectives.generation.written import WrittenEvaluator  # it imports this module
        from objectives.scoring.scorer import Scorer

        self.scorer: Scorer = model if isinstance(model, Scorer) else Scorer(model, tokenizer)
        self.questions = tuple(questions)
        self.digest = questions_digest(self.questions, tasks)
        self.tasks = tuple(tasks)
        self._closed, asked = closed(self.questions), written(self.questions)
        self.tokens = self.scorer.prepare(self._closed) if self._closed else 0
        self._written: WrittenEvaluator | None = None
        if asked:
            digest = questions_digest(asked, tasks)
            self._written = WrittenEvaluator(self.scorer.model, self.scorer.tokenizer, asked, tasks, digest)
            self.tokens += self._written.tokens

    @property
    def notes(self) -> list[str]:
        """How the model is scored where that is not the default; complete after the first evaluation."""
        return self.scorer.notes

    def part(self, places: npt.NDArray[np.int64]) -> Evaluator:
        """An evaluator of the questions at these places, in that order, with the same scorer.

        Other questions share its batches, so its last bits may differ from those of the whole. `tokens` of parts may
        sum to more than the whole's: each part computes its few-shot prefixes again.
        """
        chosen = [self.questions[place] for place in places]
        return Evaluator(self.scorer, None, chosen, self.tasks)

    def evaluate(self, progress: Progress | None = None) -> Evaluation:
        """Scores every question.

        Args:
            progress: called with (questions done, questions).

        Raises:
            EvaluationError: a log-likelihood is not finite; the question is named.
        """
        total, n = len(self.questions), len(self._closed)
        if self._written is None:
            return self._scored(self._closed, progress)
        if not n:
            return self._written.evaluate(progress)
        parts = [
            self._scored(self._closed, shifted(progress, 0, total)),
            self._written.evaluate(shifted(progress, n, total)),
        ]
        options = np.array([isinstance(question, Question) for question in self.questions])
        return Evaluation.join(parts, [np.flatnonzero(options), np.flatnonzero(~options)], self.digest)

    def _scored(self, questions: tuple[Question, ...], progress: Progress | None) -> Evaluation:
        """The likelihoods of all options."""
        start = time.perf_counter()
        scores = self.scorer.loglikelihoods(questions, progress)
        seconds = time.perf_counter() - start

        # Rounded first, so that outcomes computed now and outcomes computed from the file are the same numbers.
        score = scores.total.astype(np.float32)
        divisor = divisors(questions, scores.tokens, self.tasks)
        options = np.array([len(question.options) for question in questions], dtype=np.int64)
        gold = np.array([question.gold for question in questions], dtype=np.int64)
        task = np.array([question.task for question in questions], dtype=np.int64)
        outcomes = _outcomes(score, divisor, options, gold, task)
        mass = scores.mass.astype(np.float32)
        return Evaluation(outcomes, score, divisor, mass, scores.fed, self.digest, seconds)
