"""CAPE: the mean of a model's answers over orders of the options, a baseline that costs k passes.

Calibration via augmented prompt ensembles (Jiang et al. 2023), by option permutation, as DACA's authors compare
against it. It is no temperature: it removes the preference for a letter, and **may change answers**.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from objectives.errors import ConfigError, EvaluationError
from objectives.outcomes import Integers, Outcomes
from objectives.questions.presets import LETTERS
from objectives.questions.questions import Question


@dataclass(frozen=True, eq=False)
class PermutedQuestions:
    """Every question with its lettered options in each of their rotations: each option once behind each letter.

    Attributes:
        questions: m questions to score, the k rotations of the first one, then those of the second; the first
            rotation is the question itself.
        source: `(m,)` int64, index of the original. shift: `(m,)` int64: letter j stands for option (j + shift) mod k.
    """

    questions: tuple[Question, ...]
    source: Integers
    shift: Integers

    def average(self, outcomes: Outcomes) -> Outcomes:
        """Outcomes of the originals: each option's probability, averaged over the rotations.

        Args:
            outcomes: of `questions`, in their order.

        Raises:
            EvaluationError: outcomes of another number of questions, or of options.
        """
        k = np.array([len(question.options) for question in self.questions], dtype=np.int64)
        if not np.array_equal(outcomes.options, k):
            raise EvaluationError(
                f"cape: outcomes of {len(outcomes)} questions (wanted those of the {len(k)} permuted questions)."
            )
        first = np.flatnonzero(self.shift == 0)
        probability = np.zeros((len(first), outcomes.probability.shape[1]))
        for letter in range(probability.shape[1]):
            there = np.flatnonzero(letter < k)
            option = (letter + self.shift[there]) % k[there]
            np.add.at(
                probability, (self.source[there], option), outcomes.probability[there, letter] / k[there]
            )
        return Outcomes(probability, outcomes.options[first], outcomes.gold[first], outcomes.task[first])


def permuted_questions(questions: Sequence[Question]) -> PermutedQuestions:
    """The rotations of questions in the letter format; few-shot examples stay as they are.

    Raises:
        ConfigError: a question whose prompt does not list its options by letter.
    """
    permuted, source, shift = [], [], []
    for i, question in enumerate(questions):
        start, choices, rest = _listed(i, question)
        k = len(choices)
        for turn in range(k):
            lines = [f"{LETTERS[j]}. {choices[(j + turn) % k]}" for j in range(k)]
            key = question.key if turn == 0 else hashlib.sha256(f"{question.key} {turn}".encode()).hexdigest()
            context = start + "\n".join(lines) + rest
            permuted.append(replace(question, key=key, context=context, gold=(question.gold - turn) % k))
            source.append(i)
            shift.append(turn)
    return PermutedQuestions(
        tuple(permuted), np.array(source, dtype=np.int64), np.array(shift, dtype=np.int64)
    )


def _listed(number: int, question: Question) -> tuple[str, list[str], str]:
    """The context before the listed options, their texts, and the context after them."""
    context, letters = question.context, LETTERS[: len(question.options)]
    end = context.rfind("\nAnswer:")
    marks = [
        context.rfind("\nA. ", 0, max(end, 0))
    ]  # the last list: few-shot examples have lists of their own
    for letter in letters[1:]:
        marks.append(context.find(f"\n{letter}. ", marks[-1] + 1, max(end, 0)))
    if [option.strip() for option in question.options] != list(letters) or min(end, *marks) < 0:
        raise ConfigError(
            f"cape: question {number} (task {question.task}) does not list its {len(letters)} options by letter. "
            "Only tasks with `format: letter` can be permuted."
        )
    choices = [context[start + 4 : stop] for start, stop in pairwise([*marks, end])]
    return context[: marks[0] + 1], choices, context[end:]
