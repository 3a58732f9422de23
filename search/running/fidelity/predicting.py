"""Fidelity by a model of answers: few questions are asked, the answers to the others are predicted.

A Gaussian process over the answers of the bank (`search.answers`) predicts what a candidate answers to every question;
the answers to the subset replace the predictions there, and every objective is computed from all of them. So an error
of calibration is estimated on as many questions as it is scored on, and not on a few, where noise alone raises it. A
candidate whose estimates are dominated by the front of the complete trials is stopped, the others are scored in full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from objectives.estimators.subset import choose_subset
from objectives.metrics.names import Metric
from objectives.outcomes import Floats, Integers, Outcomes
from search.config.sections import FidelityConfig
from search.running.fidelity.estimating import bank_of, verdict_on
from search.running.fidelity.stages import Answers, Judge, Verdict
from search.samplers.answers_model import AnswersModel, predicted_outcomes, relative_scores
from search.storage.trials import TrialRecord

LEAST = 16  # search trials in the bank before a prediction is believed, or fewer where there are fewer coefficients


class Predicting:
    """The rule of `fidelity: {estimator: answers}` (see `Rule`).

    Args:
        place: where a trial lies in the unit box, `(d,)`.
    """

    def __init__(
        self,
        config: FidelityConfig,
        metrics: Sequence[Metric],
        task: Integers,
        answers: Answers,
        place: Callable[[TrialRecord], Floats],
    ) -> None:
        self._metrics = tuple(metrics)
        self._answers = answers
        self._place = place
        subset = choose_subset(task.size, config.questions, config.seed, strata=task).index
        self.parts: tuple[Integers, ...] = (subset, np.setdiff1d(np.arange(task.size), subset))
        self._fitted: tuple[list[str], AnswersModel] | None = None

    def judge(self, trial: TrialRecord, complete: Sequence[TrialRecord]) -> Judge:
        """Promotes everybody while the bank is small."""
        bank = bank_of(complete)
        searched = sum(record.kind == "search" for record in bank)
        if searched < min(LEAST, len(trial.coefficients)):
            return lambda seen, places: None
        guess = self._predicted(trial, bank)

        def judged(seen: Outcomes, places: Integers) -> Verdict | None:
            probability = guess.probability.copy()
            probability[places] = seen.probability
            filled = Outcomes(probability, guess.options, guess.gold, guess.task)
            estimate = [metric.value(filled) for metric in self._metrics]
            how = f"with {len(places)} of {len(guess)} questions asked and the others predicted"
            return verdict_on(estimate, complete, self._metrics, how)

        return judged

    def _predicted(self, trial: TrialRecord, bank: Sequence[TrialRecord]) -> Outcomes:
        """What the model expects of a trial; the model is fitted anew where the bank is another."""
        key = [str(record.attributes["evidence"]) for record in bank]
        if self._fitted is None or self._fitted[0] != key:
            x = np.array([self._place(record) for record in bank])
            scores = np.array([relative_scores(self._answers(record)) for record in bank])
            self._fitted = key, AnswersModel(x, scores)
        here = self._place(trial)[None]
        return predicted_outcomes(self._fitted[1].predict(here)[0], like=self._answers(bank[0]))
