"""What one model answered, as it is kept: Evaluation."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from objectives.errors import EvaluationError
from objectives.evidence_file import checked_array, read_evidence, write_evidence
from objectives.outcomes import Outcomes
from objectives.questions.questions import AnyQuestion, Question

if TYPE_CHECKING:
    from objectives.questions.config import TaskConfig


FORMAT = "mergefront-evaluation-1"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one model answered to n questions with at most k options.

    Attributes:
        outcomes: probabilities, computed from `loglikelihood / divisor` as float64 softmax.
        loglikelihood: `(n, k)` float32, natural log, summed over the option's tokens; -inf after the last option.
        divisor: `(n, k)` float32, what `normalize` divides by: 1 (none), the option's tokens, or its characters
            or UTF-8 bytes without the leading space; 1 after the last option.
        mass: `(n,)` float32, probability of all options' texts together (letter format: of the letters).
        scored_tokens: tokens that went through the model, padding not counted.
        digest: which questions, in which order: `questions_digest`.
        seconds: wall time of the scoring; not saved, 0.0 after `load`.
    """

    outcomes: Outcomes
    loglikelihood: npt.NDArray[np.float32]
    divisor: npt.NDArray[np.float32]
    mass: npt.NDArray[np.float32]
    scored_tokens: int
    digest: str
    seconds: float = 0.0

    @classmethod
    def of_probabilities(cls, outcomes: Outcomes, scored_tokens: int, digest: str) -> Evaluation:
        """An evaluation whose scores are the logarithms of given probabilities, such as means over several prompts.

        Its outcomes are the given ones to float32's precision; `mass` is 1, since nothing else is known.
        """
        with np.errstate(divide="ignore"):
            score = np.log(outcomes.probability).astype(np.float32)
        padding = np.arange(score.shape[1]) >= outcomes.options[:, None]
        score = np.where(padding, -np.inf, np.maximum(score, np.log(np.finfo(np.float32).tiny))).astype(
            np.float32
        )
        divisor, mass = np.ones_like(score), np.ones(len(outcomes), dtype=np.float32)
        same = _outcomes(score, divisor, outcomes.options, outcomes.gold, outcomes.task)
        return cls(same, score, divisor, mass, scored_tokens, digest)

    @classmethod
    def join(
        cls, parts: Sequence[Evaluation], places: Sequence[npt.NDArray[np.int64]], digest: str
    ) -> Evaluation:
        """The evaluation of all questions that some parts of a list of n are about, in the list's order.

        Tokens and seconds are the parts' sums: what several parts compute again (a few-shot prefix) counts each time.

        Args:
            parts: evaluations of disjoint parts (`Evaluator.part`).
            places: for each part the `(m,)` places of its questions in the list.
            digest: of the joined questions, `Evaluator.digest` of the list where the parts are all of it.

        Raises:
            EvaluationError: no parts, or places that do not belong to them or overlap.
        """
        every = np.concatenate([np.asarray(place, dtype=np.int64) for place in (*places, [])])
        sizes = [len(part.outcomes) for part in parts]
        if not parts or sizes != [len(place) for place in places] or np.unique(every).size != every.size:
            raise EvaluationError(
                f"join: parts of {sizes} questions at {every.size} places, {np.unique(every).size} of them distinct "
                "(wanted one place for each question, at least one part)."
            )
        order = np.argsort(every)
        widest = max(part.loglikelihood.shape[1] for part in parts)

        def stacked(arrays: Sequence[npt.NDArray[Any]], padding: float = 0.0) -> npt.NDArray[Any]:
            if arrays[0].ndim == 2:
                arrays = [
                    np.pad(a, ((0, 0), (0, widest - a.shape[1])), constant_values=padding) for a in arrays
                ]
            return np.concatenate(arrays)[order]

        score = stacked([part.loglikelihood for part in parts], -np.inf)
        divisor = stacked([part.divisor for part in parts], 1.0)
        options, gold, task = (
            stacked([getattr(part.outcomes, name) for part in parts]) for name in ("options", "gold", "task")
        )
        return cls(
            outcomes=_outcomes(score, divisor, options, gold, task),
            loglikelihood=score,
            divisor=divisor,
            mass=stacked([part.mass for part in parts]),
            scored_tokens=sum(part.scored_tokens for part in parts),
            digest=digest,
            seconds=sum(part.seconds for part in parts),
        )

    def save(self, path: str | os.PathLike[str]) -> str:
        """Writes a safetensors file: staged beside, synced, renamed. Equal evaluations give equal bytes.

        Returns:
            SHA-256 of the file, in hex.

        Raises:
            DiskError: the file cannot be written; an earlier one stays as it was.
        """
        arrays: dict[str, npt.NDArray[Any]] = {
            "divisor": self.divisor,
            "gold": self.outcomes.gold,
            "loglikelihood": self.loglikelihood,
            "mass": self.mass,
            "options": self.outcomes.options,
            "task": self.outcomes.task,
        }
        metadata = {"format": FORMAT, "questions": self.digest, "scored_tokens": str(self.scored_tokens)}
        return write_evidence(path, arrays, metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, sha256: str | None = None, digest: str | None = None
    ) -> Evaluation:
        """Reads what `save` wrote and checks it.

        Args:
            sha256: what `save` returned; None skips the comparison.
            digest: the questions it must be about; None skips the comparison.

        Raises:
            EvaluationError: no such file, another content, other questions, or arrays that do not fit together.
        """
        where = Path(path)
        arrays, metadata = read_evidence(where, FORMAT, sha256=sha256, about=digest)
        floats, integers = ("loglikelihood", "divisor", "mass"), ("options", "gold", "task")
        score, divisor, mass = (checked_array(where, arrays, name, np.float32) for name in floats)
        options, gold, task = (checked_array(where, arrays, name, np.int64) for name in integers)
        n = len(options)
        columns = (score[:, 0] if score.ndim == 2 else score, mass, gold, task)
        if score.ndim != 2 or divisor.shape != score.shape or any(array.shape != (n,) for array in columns):
            shapes = {name: array.shape for name, array in arrays.items()}
            raise EvaluationError(f"{where}: shapes do not fit together: {shapes}.")
        if not (np.isfinite(divisor) & (divisor > 0)).all():
            raise EvaluationError(f"{where}: a divisor is not a positive number.")
        tokens = metadata.get("scored_tokens", "")
        if not tokens.isdecimal():
            raise EvaluationError(f"{where}: scored_tokens is {tokens!r}, wanted a number.")
        try:
            outcomes = _outcomes(score, divisor, options, gold, task)
        except EvaluationError as error:
            raise EvaluationError(f"{where}: {error}") from error
        return cls(outcomes, score, divisor, mass, int(tokens), metadata.get("questions", ""))


def shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of a part as that of the whole: `before` questions of `total` came earlier."""
    return None if progress is None else lambda done, _: progress(before + done, total)


def divisors(
    questions: Sequence[Question], tokens: npt.NDArray[np.int64], tasks: Sequence[TaskConfig]
) -> npt.NDArray[np.float32]:
    """What `normalize` divides log-likelihoods by: see `Evaluation.divisor`.

    Args:
        tokens: `(n, k)`, tokens of each option.
    """
    divisor = np.ones(tokens.shape, dtype=np.float32)
    for i, question in enumerate(questions):
        n = len(question.options)
        if question.normalizer is not None:
            divisor[i, :n] = question.normalizer
        elif tasks[question.task].normalize == "tokens":
            divisor[i, :n] = tokens[i, :n]
    return divisor


def questions_digest(questions: Sequence[AnyQuestion], tasks: Sequence[TaskConfig]) -> str:
    """SHA-256 over the questions' keys in order and their tasks' normalisation."""
    content = "\n".join(f"{question.key} {tasks[question.task].normalize}" for question in questions)
    return hashlib.sha256(content.encode()).hexdigest()


def _outcomes(
    score: npt.NDArray[np.float32],
    divisor: npt.NDArray[np.float32],
    options: npt.NDArray[np.int64],
    gold: npt.NDArray[np.int64],
    task: npt.NDArray[np.int64],
) -> Outcomes:
    return Outcomes.from_loglikelihoods(
        score.astype(np.float64) / divisor.astype(np.float64), options, gold, task
    )


Progress = Callable[[int, int], None]
