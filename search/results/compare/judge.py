"""Fronts of several studies on the same questions, by hypervolume, from storage and evidence alone.

A front is chosen on the search split and judged on the report split. A hypervolume is taken over the corner of the
parents' worst values on the same questions: on those of its split, and on every resample of them. What makes all
models look better or worse at once moves the corner, too, and cancels. (`front` keeps to one corner for both splits,
the search split's, so its hypervolumes on the report split are others.) Intervals are 95 % basic bootstrap intervals
over questions, the same resamples for everybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from objectives.metrics.bootstrap import interval
from objectives.metrics.names import Metric, get_metric
from search.front import hypervolume, hypervolume_batch, worst_corner
from search.merging.baselines import PARENTS
from search.results.alternatives import Scores
from search.results.intervals import RESAMPLES, Cell, CellComputer, Samples, cell_around
from search.storage.evidence import EvidenceFolder
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Volume:
    """A hypervolume on the report split and its `(resamples,)` bootstrap samples; higher is better."""

    value: float
    samples: Floats

    @property
    def cell(self) -> Cell:
        return cell_around(self.value, interval(self.samples, value=self.value, bounds=(0.0, np.inf)))


@dataclass(frozen=True)
class Row:
    """A model on the report split: `(m,)` objectives and their `(resamples, m)` bootstrap samples."""

    cells: Mapping[str, Cell]
    values: Floats
    samples: Floats


class Judge:
    """Judges studies of the same parents, questions and objectives; every metric is computed once.

    Attributes:
        objectives: (name, whether it is maximised). maximize: the latter.
        evaluation: scored tokens of one evaluation of the search split.
        reference: the corner of the parents' worst values on the report split, by objective.
        line: of parents and uniform line. baselines: their number.
        calibrated: `post` with a calibrator, by the calibrator's name; empty with several experts.
    """

    def __init__(self, first: StudyStore) -> None:
        """Args: first: any of the studies, its report split scored."""
        attributes = first.attributes()
        tasks = attributes["facts"]["tasks"]
        self.objectives = tuple((str(name), bool(maximize)) for name, maximize in attributes["objectives"])
        self.maximize = tuple(maximize for _, maximize in self.objectives)
        self._names = [name for name, _ in self.objectives]
        self._metrics: list[Metric] = [get_metric(name, tasks=tasks) for name in self._names]
        self._computer = CellComputer(EvidenceFolder(first.url, first.name))
        done = [record for record in first.trials() if record.state == "complete"]
        self.evaluation = done[0].tokens
        scores = Scores(first)
        parents = [record for record in done if record.kind in PARENTS]
        self._corner = worst_corner(np.array([r.values for r in parents]), maximise=self.maximize)
        rows = [self.row(scores, record.number) for record in parents]
        self._report_corner = worst_corner(np.array([row.values for row in rows]), maximise=self.maximize)
        drawn = np.stack([row.samples for row in rows])
        self._drawn_corners = np.where(self.maximize, drawn.min(axis=0), drawn.max(axis=0))
        self.reference = dict(zip(self._names, self._report_corner.tolist(), strict=True))
        baselines = [record.number for record in done if record.kind != "search"]
        self.baselines = len(baselines)
        self.line = self.volume([self.row(scores, number) for number in baselines])
        self.calibrated: dict[str, Row] = {}
        for one in scores.alternatives():
            if one.base == "post" and scores.has(one, "report"):
                read = partial(scores.tempered, one, "report")
                found = self._computer.cells("report", one.label, read, self._metrics)
                self.calibrated[one.method] = self._stacked(*found)

    def row(self, scores: Scores, number: int) -> Row:
        """A trial that was scored on the report split."""
        digest = scores.digest(number, "report")
        assert digest is not None, "it was scored there"
        read = partial(scores.outcomes, number, "report")
        return self._stacked(*self._computer.cells("report", digest, read, self._metrics))

    def volume(self, rows: Sequence[Row]) -> Volume:
        """Hypervolume of a front on the report split; a shift of points and corner together changes none."""
        values = np.array([row.values for row in rows]) - self._report_corner
        stacked = np.stack([row.samples for row in rows], axis=1) - self._drawn_corners[:, None]
        origin = np.zeros(len(self.objectives))
        return Volume(
            hypervolume(values, origin, maximise=self.maximize),
            hypervolume_batch(stacked, origin, maximise=self.maximize),
        )

    def searched(self, records: Sequence[TrialRecord]) -> float:
        """Hypervolume of complete trials on the search split."""
        return hypervolume(np.array([r.values for r in records]), self._corner, maximise=self.maximize)

    def _stacked(self, cells: Mapping[str, Cell], samples: Samples) -> Row:
        return Row(
            cells,
            np.array([cells[name].value for name in self._names]),
            np.stack([samples[name] for name in self._names], axis=-1),
        )


def mean_volume(volumes: Sequence[Volume]) -> Volume:
    """Mean over seeds; its samples are over questions and, with replacement, over seeds."""
    chosen = np.random.default_rng(0).integers(0, len(volumes), (RESAMPLES, len(volumes)))
    stacked = np.stack([one.samples for one in volumes], axis=1)
    return Volume(
        float(np.mean([one.value for one in volumes])),
        stacked[np.arange(RESAMPLES)[:, None], chosen].mean(axis=1),
    )


def gain(volume: Volume, base: Volume) -> Cell:
    """How much more than the base, with the paired interval."""
    value = volume.value - base.value
    return cell_around(value, interval(volume.samples - base.samples, value=value))


def ratio(volume: Volume, base: Volume) -> Cell | None:
    """How many times the base; the interval is taken of the logarithm. None where one of them is 0, once resampled."""
    if min(base.value, base.samples.min(), volume.value, volume.samples.min()) <= 0.0:
        return None
    logarithm = float(np.log(volume.value / base.value))
    low, high = interval(np.log(volume.samples / base.samples), value=logarithm)
    return cell_around(float(np.exp(logarithm)), (float(np.exp(low)), float(np.exp(high))))
