"""What a calibrator returns: one temperature, and the evidence for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from objectives.calibrators.logits import OptionLogits
from objectives.calibrators.solver import Curve
from objectives.calibrators.tempering import tempered
from objectives.errors import EvaluationError
from objectives.outcomes import Outcomes


@dataclass(frozen=True)
class FittedTemperature:
    """One temperature for all questions. Above 1 it lowers confidences, below 1 it raises them.

    It divides an option's score (`OptionLogits.score`). With one scored token an option (the letter format) that is
    the same as dividing the model's next-token logits, as an inference engine's sampling temperature does. With
    options of several tokens it is not: a temperature in the engine changes each token's own normalisation. Of written
    answers it divides the logarithms of their shares (`OptionLogits.smoothed`), and is a number of its own.

    Attributes:
        method: name of the calibrator.
        temperature: positive and finite; 1.0 changes nothing.
        questions: number of questions in the calibration set.
        used: number of them that the loss depends on.
        agreement: on how many of them post and pre give the same answer; None without a reference.
        curve: (temperature, loss) in ascending order of temperature, the fitted one included; empty where nothing
            was minimised. The loss is the method's own, in nats; lower is better.
        divergence_layers: entry i is the number of questions whose divergence layer is i + 1; Dual-Align only.
        settings: the method's choices, by name.
        reason: why the temperature is no minimum (a fall-back to 1, an edge of the range); None where it is one.
        digest: the questions it was fitted on; empty when not known.
        written: the temperature of written answers, `temperature` itself if no question has options; None leaves their
            shares as they are.
    """

    method: str
    temperature: float
    questions: int
    used: int
    agreement: int | None = None
    curve: Curve = ()
    divergence_layers: tuple[int, ...] = ()
    settings: Mapping[str, str | float] = field(default_factory=dict)
    reason: str | None = None
    digest: str = ""
    written: float | None = None

    def apply(self, logits: OptionLogits) -> Outcomes:
        """The outcomes at this temperature: other confidences, the same answers.

        No answer changes, whatever the temperature: where two options are so close that rounding would let another
        one win, the old answer is put above it by one unit in the last place.

        Raises:
            EvaluationError: the logits have no labels, which outcomes need.

        >>> logits = OptionLogits(np.array([[np.log(4.0), 0.0]]), np.array([2]), np.array([0]), np.array([0]))
        >>> FittedTemperature("by hand", 2.0, 1, 1).apply(logits).probability.round(3).tolist()
        [[0.667, 0.333]]
        """
        if logits.gold is None:
            raise EvaluationError(
                f"{self.method}: the questions to apply it to have no labels; outcomes need them."
            )
        probability, _ = tempered(logits.score, self.temperature)
        if (rows := logits.written).any():
            score = logits.score if self.written is None else logits.smoothed.score
            probability[rows], _ = tempered(score[rows], self.written or 1.0)
        moved = np.flatnonzero(probability.argmax(axis=1) != logits.predicted)
        probability[moved, logits.predicted[moved]] = np.nextafter(probability[moved].max(axis=1), 2.0)
        return Outcomes(probability, logits.options, logits.gold, logits.task)

    def to_json(self) -> dict[str, Any]:
        """All attributes as plain JSON values, in the order above; every number is finite.

        `written` is there where written answers have a temperature.
        """
        found = {
            "method": self.method,
            "temperature": self.temperature,
            "questions": self.questions,
            "used": self.used,
            "agreement": self.agreement,
            "curve": [list(point) for point in self.curve],
            "divergence_layers": list(self.divergence_layers),
            "settings": dict(self.settings),
            "reason": self.reason,
            "digest": self.digest,
        }
        return found if self.written is None else {**found, "written": self.written}
