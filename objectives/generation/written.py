"""Written answers in, one `Evaluation` out: whoever wrote them, a model that is drawn from or any other source."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from objectives.errors import ConfigError, EvaluationError
from objectives.evaluation import Evaluation, shifted
from objectives.generation.agreement import agreement
from objectives.generation.sampler import AnswerSampler, Decoding, Progress
from objectives.questions.matching import get_rule
from objectives.questions.questions import WrittenQuestion

if TYPE_CHECKING:
    from objectives.questions.config import TaskConfig


def evaluate_texts(
    questions: Sequence[WrittenQuestion],
    texts: Sequence[Sequence[str]],
    tasks: Sequence[TaskConfig],
    *,
    tokens: int,
    digest: str,
) -> Evaluation:
    """What s answers to each of n questions come to: the share of each different answer (`agreement`).

    Args:
        texts: at least one answer to each question, as many for all questions of a task.
        tasks: the study's tasks; their rules say what is right.
        tokens: what writing the answers took: those read and those written.
        digest: which questions, in which order: `questions_digest`.

    Raises:
        EvaluationError: no questions, or answers that do not fit them.
    """
    if not questions or len(questions) != len(texts):
        raise EvaluationError(
            f"written answers: {len(texts)} lists of them for {len(questions)} questions (wanted one for each)."
        )
    task = np.array([question.task for question in questions], dtype=np.int64)
    places = [np.flatnonzero(task == each) for each in np.unique(task)]
    parts = []
    for chosen in (place.tolist() for place in places):
        outcomes = agreement(
            [texts[i] for i in chosen],
            [questions[i].accepted for i in chosen],
            [get_rule(tasks[questions[i].task].generation.match) for i in chosen],
            task[chosen],
        )
        parts.append(Evaluation.of_probabilities(outcomes, 0, ""))
    return replace(Evaluation.join(parts, places, digest), scored_tokens=tokens)


class WrittenEvaluator:
    """Has written questions answered, again and again, by whatever values the model holds at the moment.

    The random numbers of an answer depend on its prompt, its index and the task's seed: all merges have the same.

    Args:
        model: a transformers causal language model.
        questions: at least one, of any tasks.
        tasks: the study's tasks.
        digest: of the questions.

    Attributes:
        tokens: what an evaluation takes at most: those of the prompts, and all answers at full length.

    Raises:
        ConfigError: a prompt that does not fit, or a model that cannot be drawn from in batches; nothing is drawn then.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        questions: Sequence[WrittenQuestion],
        tasks: Sequence[TaskConfig],
        digest: str,
    ) -> None:
        self._questions, self._tasks, self._digest = tuple(questions), tuple(tasks), digest
        self._samplers: list[tuple[list[int], AnswerSampler]] = []
        self.tokens = 0
        for number in sorted({question.task for question in questions}):
            places = [i for i, question in enumerate(questions) if question.task == number]
            sampler = _sampler(
                model, tokenizer, [questions[i].context for i in places], tasks[number], number
            )
            self._samplers.append((places, sampler))
            drawn = len(places) * sampler.decoding.samples * sampler.decoding.max_new_tokens
            self.tokens += sum(map(len, sampler.prompts)) + drawn

    def evaluate(self, progress: Progress | None = None) -> Evaluation:
        """Draws the answers and says what they come to.

        Args:
            progress: called with (questions done, questions).

        Raises:
            EvaluationError: the model's values give probabilities that are not numbers.
        """
        start = time.perf_counter()
        texts: list[tuple[str, ...]] = [()] * len(self._questions)
        tokens = done = 0
        for places, sampler in self._samplers:
            found = sampler.generate(shifted(progress, done, len(self._questions)))
            for place, answers in zip(places, sampler.texts(found), strict=True):
                texts[place] = answers
            tokens += found.prompt_tokens + found.generated_tokens
            done += len(places)
        found_all = evaluate_texts(self._questions, texts, self._tasks, tokens=tokens, digest=self._digest)
        return replace(found_all, seconds=time.perf_counter() - start)


def _sampler(
    model: Any, tokenizer: Any, prompts: Sequence[str], task: TaskConfig, number: int
) -> AnswerSampler:
    drawn = task.generation
    decoding = Decoding(drawn.samples, drawn.temperature, drawn.top_p, drawn.max_new_tokens, drawn.seed)
    try:
        return AnswerSampler(
            model, tokenizer, prompts, decoding, chat_template=task.chat_template, until=task.until
        )
    except ConfigError as error:
        raise ConfigError(f"tasks.{number}: {error}") from error
