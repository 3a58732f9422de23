"""The table of `switch compare`: all arms on the report split, with paired intervals over questions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from objectives.metrics.bootstrap import interval, resample_weights
from objectives.metrics.names import get_metric
from objectives.questions.questions import Split
from search.errors import ConfigError
from search.results.arms import RANDOM
from search.results.intervals import RESAMPLES, Cell, cell_around
from search.switching.arms import Arms, Written

logger = logging.getLogger("mergefront")

ORACLE, IN_TURN = "best candidate per question", "candidates in turn"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """One arm on one split.

    Attributes:
        accuracy: of one answer, the mean over samples; by the rule `f1` the mean overlap.
        voted: of the answer that most agree on.
        ece: of the agreement's shares, 15 bins; lower is better. None where there are no answers.
        any: share of questions that one of the s answers gets right: what a perfect judge of s answers would reach.
        against: paired differences in accuracy of one answer, this minus that arm.
        tokens: of all models, as a multiple of one model's that writes as much.
    """

    label: str
    accuracy: Cell
    voted: Cell | None
    ece: Cell | None
    any: Cell | None
    against: Mapping[str, Cell]
    tokens: float | None
    seconds: float | None


@dataclass(frozen=True)
class Standing:
    """All arms; `best` is the best candidate alone, found on the search split."""

    split: Split
    questions: int
    samples: int
    best: str
    lines: tuple[Line, ...]

    def line(self, label: str) -> Line:
        """The line of an arm."""
        return next(one for one in self.lines if one.label == label)

    def text(self) -> str:
        """A table for people."""
        header = ["", "one answer", "voted", "ECE", f"any of {self.samples}", f"minus {self.best}", "tokens"]
        rows = [header]
        for one in self.lines:
            difference = one.against.get(self.best)
            rows.append(
                [
                    one.label,
                    _interval(one.accuracy),
                    _plain(one.voted),
                    _plain(one.ece),
                    _plain(one.any),
                    "" if difference is None else _interval(difference, sign="+"),
                    "" if one.tokens is None else f"{one.tokens:.2f}x",
                ]
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    @property
    def caption(self) -> str:
        return (
            f"{self.questions} {self.split} questions, {self.samples} answers each; in brackets 95 % bootstrap "
            "intervals over questions, paired for differences. voted, ECE: of the answer that most agree on. any: one "
            "of them is right. tokens: read and written, of a single model's that writes as much. "
            f"{ORACLE}: chosen by its other answers, a lower bound of the ceiling of routing."
        )

    def to_json(self) -> dict[str, object]:
        """Plain JSON."""
        return {
            "split": self.split,
            "questions": self.questions,
            "samples": self.samples,
            "best": self.best,
            "arms": [
                {
                    "label": one.label,
                    "accuracy": one.accuracy.to_json(),
                    **{
                        name: cell.to_json()
                        for name, cell in (("voted", one.voted), ("ece", one.ece), ("any", one.any))
                        if cell is not None
                    },
                    "against": {name: cell.to_json() for name, cell in one.against.items()},
                    "tokens": one.tokens,
                    "seconds": one.seconds,
                }
                for one in self.lines
            ],
        }


def wanted_labels(arms: Arms, labels: Sequence[str] | None = None) -> list[str]:
    """Candidates, random switching, and what else was asked for: some of `arms.labels`, all without it."""
    return list(dict.fromkeys([*arms.names, RANDOM, *(arms.labels if labels is None else labels)]))


def feasible(arms: Arms, splits: Sequence[Split], labels: Sequence[str] | None = None) -> list[str]:
    """`wanted_labels` without those that cannot be here, such as a router where nobody is right alone; each is logged.

    Raises:
        ConfigError: one of those that were asked for by name cannot be.
    """
    found = []
    for label in wanted_labels(arms, labels):
        try:
            for split in splits:
                arms.written(label, split)
        except ConfigError as error:
            if labels is not None or label in arms.names:
                raise
            logger.warning("%s is left out: %s", label, error)
        else:
            found.append(label)
    return found


def stand(arms: Arms, split: Split, labels: Sequence[str] | None = None) -> Standing:
    """Scores arms on a split.

    Args:
        labels: see `feasible`.
    """
    wanted = feasible(arms, [split], labels)
    found = {label: arms.written(label, split) for label in wanted}
    first = found[wanted[0]]
    n, samples = first.score.shape
    weights = resample_weights(n, RESAMPLES, strata=first.evaluation.outcomes.task)
    means: dict[str, Floats] = {label: _per_question(one) for label, one in found.items()}
    lines = [_line(label, one, means, arms.best, weights) for label, one in found.items()]
    lines.append(
        replace(_line(IN_TURN, arms.in_turn(split), means, arms.best, weights), tokens=None, seconds=None)
    )
    if samples > 1:
        ceiling = arms.oracle(split)
        against = _against(ceiling, means, arms.best, weights)
        lines.append(Line(ORACLE, _mean(ceiling, weights), None, None, None, against, None, None))
    return Standing(split, n, samples, arms.best, tuple(lines))


def _line(label: str, one: Written, means: Mapping[str, Floats], best: str, weights: Floats) -> Line:
    cells = {}
    for name in ("accuracy", "ece"):
        metric = get_metric(name)
        value = metric.value(one.evaluation.outcomes)
        cells[name] = cell_around(value, metric.interval(value, metric(one.evaluation.outcomes, weights)))
    mean = _per_question(one)
    return Line(
        label,
        _mean(mean, weights),
        cells["accuracy"],
        cells["ece"],
        _mean(np.asarray(one.right.any(axis=1), dtype=np.float64), weights),
        _against(mean, means, best, weights, label),
        one.tokens / one.single,
        one.seconds,
    )


def _against(
    values: Floats, means: Mapping[str, Floats], best: str, weights: Floats, label: str = ""
) -> dict[str, Cell]:
    """Differences to the best candidate and to random switching."""
    return {other: _mean(values - means[other], weights) for other in (best, RANDOM) if other != label}


def _per_question(one: Written) -> Floats:
    return np.asarray(one.score.mean(axis=1))


def _mean(values: Floats, weights: Floats) -> Cell:
    drawn = weights @ values / weights.sum(axis=1)
    low, high = interval(drawn)
    return Cell(float(values.mean()), low, high)


def _plain(cell: Cell | None) -> str:
    return "" if cell is None else f"{cell.value:.3f}"


def _interval(cell: Cell, sign: str = "") -> str:
    return f"{cell.value:{sign}.3f} [{cell.low:{sign}.3f}, {cell.high:{sign}.3f}]"
