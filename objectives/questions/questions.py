"""Questions in the texts that a model reads: with options whose likelihoods are scored, or answered in writing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["search", "report"]


@dataclass(frozen=True)
class Question:
    """One question in the exact texts that are scored.

    Attributes:
        key: SHA-256 of the texts and the answer; the same in every run.
        task: index into the study's tasks.
        context: text before every option.
        options: the continuations, as scored, with their leading space.
        gold: index of the right option.
        normalizer: what each option's log-likelihood is divided by when `normalize` is `characters` or
            `bytes`; else None.
        contexts: one context per option instead of `context` (WinoGrande); None otherwise.
    """

    key: str
    task: int
    context: str
    options: tuple[str, ...]
    gold: int
    normalizer: tuple[float, ...] | None = None
    contexts: tuple[str, ...] | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """(context, continuation) of each option."""
        contexts = self.contexts or (self.context,) * len(self.options)
        return list(zip(contexts, self.options, strict=True))


@dataclass(frozen=True)
class WrittenQuestion:
    """One question that a model answers in its own words.

    Attributes:
        key: SHA-256 of the prompt as the model reads it, the accepted answers and how answers are drawn and judged.
        task: index into the study's tasks.
        context: the prompt; with the task's `chat_template` what the user's message says.
        accepted: right answers, at least one.
    """

    key: str
    task: int
    context: str
    accepted: tuple[str, ...]


AnyQuestion = Question | WrittenQuestion


@dataclass(frozen=True)
class QuestionSet:
    """All questions of a study; `search` and `report` are disjoint.

    Attributes:
        digest: SHA-256 over the task names, normalisations and every key in order: what a score depends on.
        notes: what a reader should know: duplicates dropped, a `test` split used to search, ...
    """

    task_names: tuple[str, ...]
    search: tuple[AnyQuestion, ...]
    report: tuple[AnyQuestion, ...]
    digest: str
    notes: tuple[str, ...] = ()

    def of(self, split: Literal["search", "report"]) -> tuple[AnyQuestion, ...]:
        """The questions of one split."""
        return self.search if split == "search" else self.report


def closed(questions: Sequence[AnyQuestion]) -> tuple[Question, ...]:
    """Those with options, in their order."""
    return tuple(question for question in questions if isinstance(question, Question))


def written(questions: Sequence[AnyQuestion]) -> tuple[WrittenQuestion, ...]:
    """Those with a written answer, in their order."""
    return tuple(question for question in questions if isinstance(question, WrittenQuestion))
