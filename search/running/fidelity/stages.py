"""The protocol of a candidate that is scored in parts: after each part but the last a rule may stop it.

    rule    which parts, and what is known before the first one   (`racing`, `estimating`)
    judge   one trial's: a verdict on what was answered so far
    Stages  scores part after part and joins them

A study with a rule scores its baselines and its report split in one go; candidates that are not stopped are scored on
the same questions in parts. The two differ as batches of another composition do, in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from objectives.evaluation import Evaluation, questions_digest, shifted
from objectives.evaluator import Evaluator
from objectives.outcomes import Integers, Outcomes
from search.storage.evidence import EvidenceFolder
from search.storage.trials import TrialRecord

if TYPE_CHECKING:
    pass


OUTCOMES_KEPT = 64  # of earlier trials, in memory


@dataclass(frozen=True)
class Verdict:
    """Why a candidate is stopped.

    Attributes:
        estimate: of its values on all questions, in the order of the objectives; engines learn from it.
        reason: one line.
    """

    estimate: tuple[float, ...]
    reason: str


class Judge(Protocol):
    """Judges one candidate; what it compares with was chosen before the first answer."""

    def __call__(self, seen: Outcomes, places: Integers) -> Verdict | None:
        """None lets it go on.

        Args:
            seen: the answers so far. places: `(m,)` where their questions stand among all n, ascending.
        """
        ...


class Rule(Protocol):
    """When candidates of a study are stopped.

    Attributes:
        parts: places of the questions of each part, ascending; disjoint, all n together.
    """

    parts: tuple[Integers, ...]

    def judge(self, trial: TrialRecord, complete: Sequence[TrialRecord]) -> Judge:
        """The judge of one candidate, given the complete trials with smaller numbers; a function of these alone."""
        ...


@dataclass(frozen=True)
class Scored:
    """What was answered, of how many questions, and the verdict if that ended it."""

    evaluation: Evaluation
    questions: int
    verdict: Verdict | None = None


class Stages:
    """Scores candidates part by part with whatever values the model holds at the moment.

    Attributes:
        tokens: all parts together, padding not counted.
    """

    def __init__(self, evaluator: Evaluator, rule: Rule) -> None:
        self._rule = rule
        self._whole = evaluator
        self._parts = [evaluator.part(places) for places in rule.parts]
        self.tokens = sum(part.tokens for part in self._parts)

    def score(
        self,
        trial: TrialRecord,
        history: Sequence[TrialRecord],
        progress: Callable[[int, int], None] | None = None,
    ) -> Scored:
        """Scores the candidate that the model holds until it is complete or stopped.

        Args:
            history: trials of the study; complete ones with a smaller number than this one are heard.
            progress: called with (questions done, questions).
        """
        complete = [r for r in history if r.number < trial.number and r.state == "complete"]
        judge = self._rule.judge(trial, complete)
        done: list[Evaluation] = []
        total = len(self._whole.questions)
        for index, part in enumerate(self._parts):
            before = sum(map(len, self._rule.parts[:index]))
            done.append(part.evaluate(shifted(progress, before, total)))
            seen, places = self._joined(done)
            if len(places) < total and (verdict := judge(seen.outcomes, places)) is not None:
                return Scored(seen, total, verdict)
        return Scored(seen, total)

    def _joined(self, done: Sequence[Evaluation]) -> tuple[Evaluation, Integers]:
        places = self._rule.parts[: len(done)]
        every = np.sort(np.concatenate(places))
        digest = self._whole.digest
        if len(every) < len(self._whole.questions):
            digest = questions_digest([self._whole.questions[i] for i in every], self._whole.tasks)
        return Evaluation.join(done, places, digest), every


class Answers:
    """The stored answers of complete trials, those read last kept in memory."""

    def __init__(self, evidence: EvidenceFolder) -> None:
        self._read = lru_cache(OUTCOMES_KEPT)(lambda digest: evidence.load(digest).outcomes)

    def __call__(self, record: TrialRecord) -> Outcomes:
        return self._read(str(record.attributes["evidence"]))


def as_learnt(history: Sequence[TrialRecord]) -> Sequence[TrialRecord]:
    """The history as engines see it: a stopped trial is complete with the values that were estimated for it."""
    if not any(record.state == "stopped" for record in history):
        return history
    return [
        replace(record, state="complete", values=tuple(map(float, record.attributes["estimate"])))
        if record.state == "stopped"
        else record
        for record in history
    ]
