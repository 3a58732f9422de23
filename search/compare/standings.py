"""How the entrants of a comparison stand, from storage and evidence alone.

A front is chosen on the search split and judged on the report split. A hypervolume is taken over the corner of the
parents' worst values on the same questions: on those of its split, and on every resample of them. What makes all
models look better or worse at once moves the corner, too, and cancels. (`front` keeps to one corner for both splits,
the search split's, so its hypervolumes on the report split are others.) Intervals are 95 % basic bootstrap intervals
over questions, the same resamples for everybody, and over seeds; those of ratios are taken of their logarithms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from objectives.bootstrap import interval
from objectives.metrics import Metric, get_metric
from search.alternatives import Scores
from search.budget import within_tokens
from search.cells import RESAMPLES, Cell, CellComputer, cell_around
from search.compare.entrants import LINE, Entry
from search.errors import ConfigError
from search.evidence import EvidenceFolder
from search.front import hypervolume, hypervolume_batch, worst_corner
from search.storage import StudyStore, TrialRecord
from search.study import front_of

TEMPERATURE = "temperature"  # what a merge has to beat: it costs nothing

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Volume:
    """A hypervolume on the report split and its `(resamples,)` bootstrap samples; higher is better."""

    value: float
    samples: Floats


@dataclass(frozen=True)
class Outcome:
    """What one entry came to.

    Attributes:
        tokens: scored tokens up to each complete trial; volumes: hypervolume on the search split after it.
        report: hypervolume of the front of each checkpoint; the last is the whole budget's.
        with_temperature: of the last front and `post` + temperature together.
        search: hypervolume of the last front on the search split.
        points: `(f, m)` objectives of the last front on the report split.
        optimism: by objective, how much better the front's search trials looked on the search split than on the
            report split, beyond what parents and uniform line did; above 0 is the winner's curse. Empty if the front
            has no search trial.
    """

    label: str
    seed: int
    trials: int
    tokens: tuple[int, ...]
    volumes: tuple[float, ...]
    report: tuple[Volume, ...]
    with_temperature: Volume
    search: float
    points: Floats
    optimism: Mapping[str, float]


@dataclass(frozen=True)
class Standing:
    """One entrant over its seeds: means, with intervals.

    Attributes:
        report: hypervolume on the report split. at: its mean at each checkpoint.
        over_line: times that of the uniform line at the same budget. over_temperature: how many times the hypervolume
            of `post` + temperature is that of both together. None where there is no hypervolume, or none on a resample.
        spread: smallest and largest `report` of the seeds.
    """

    label: str
    seeds: int
    trials: float
    tokens: float
    search: float
    report: Cell
    at: tuple[float, ...]
    spread: tuple[float, float]
    over_line: Cell | None
    over_temperature: Cell | None
    optimism: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        cells = {
            name: None if cell is None else cell.to_json()
            for name, cell in (
                ("report", self.report),
                ("over_line", self.over_line),
                ("over_temperature", self.over_temperature),
            )
        }
        return {
            "engine": self.label,
            "seeds": self.seeds,
            "trials": self.trials,
            "tokens": self.tokens,
            "hypervolume": {"search": self.search, "report": cells["report"], "spread": list(self.spread)},
            "at": list(self.at),
            "over_line": cells["over_line"],
            "over_temperature": cells["over_temperature"],
            "optimism": dict(self.optimism),
        }


@dataclass(frozen=True)
class Rival:
    """What costs no search: `post` with a calibrator, or the uniform line's eleven points."""

    label: str
    values: Mapping[str, Cell]
    report: Cell


@dataclass(frozen=True)
class Standings:
    """A whole comparison.

    Attributes:
        standings: best hypervolume on the report split first. outcomes: one an entry.
        checkpoints: scored tokens. evaluation: tokens of one evaluation of the search split.
        reference: the corner of the parents' worst values on the report split.
    """

    study: str
    objectives: tuple[tuple[str, bool], ...]
    reference: Mapping[str, float]
    questions: Mapping[str, int]
    budget: int
    checkpoints: tuple[int, ...]
    evaluation: int
    standings: tuple[Standing, ...]
    rivals: tuple[Rival, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def temperature(self) -> Rival | None:
        """`post` with a fitted temperature."""
        return next((one for one in self.rivals if one.label == f"post + {TEMPERATURE}"), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "study": self.study,
            "objectives": [
                {"name": n, "direction": "maximize" if m else "minimize"} for n, m in self.objectives
            ],
            "reference": dict(self.reference),
            "questions": dict(self.questions),
            "budget": self.budget,
            "checkpoints": list(self.checkpoints),
            "evaluation": self.evaluation,
            "engines": [one.to_json() for one in self.standings],
            "rivals": [
                {
                    "label": one.label,
                    "report": {name: cell.to_json() for name, cell in one.values.items()},
                    "hypervolume": one.report.to_json(),
                }
                for one in self.rivals
            ],
        }


def read_standings(
    study: str, entries: Sequence[Entry], stores: Sequence[StudyStore], checkpoints: Sequence[int]
) -> Standings:
    """Computes the comparison called `study` from its studies.

    Raises:
        ConfigError: a study is not complete yet. StorageError: evidence is missing.
    """
    judge = _Judge(stores[0])
    outcomes = [
        judge.outcome(entry, store, checkpoints) for entry, store in zip(entries, stores, strict=True)
    ]
    line = next(one for one in outcomes if one.label == LINE)
    labels = list(dict.fromkeys(one.label for one in outcomes))
    standings = [
        _standing([one for one in outcomes if one.label == label], line, judge.temperature)
        for label in labels
    ]
    return Standings(
        study=study,
        objectives=judge.objectives,
        reference=judge.reference,
        questions=stores[0].attribute("facts")["questions"],
        budget=checkpoints[-1],
        checkpoints=tuple(checkpoints),
        evaluation=judge.evaluation,
        standings=tuple(sorted(standings, key=lambda one: -one.report.value)),
        rivals=judge.rivals,
        outcomes=tuple(outcomes),
    )


class _Judge:
    """Reads fronts of one comparison's studies; everything is computed once."""

    def __init__(self, first: StudyStore) -> None:
        attributes = first.attributes()
        tasks = attributes["facts"]["tasks"]
        self.objectives = tuple((str(name), bool(maximize)) for name, maximize in attributes["objectives"])
        self._metrics: list[Metric] = [get_metric(name, tasks=tasks) for name, _ in self.objectives]
        self._maximize = tuple(maximize for _, maximize in self.objectives)
        self._computer = CellComputer(EvidenceFolder(first.url, first.name))
        done = _complete(first)
        self.evaluation = done[0].tokens
        scores = Scores(first)
        parents = [record for record in done if record.kind in ("pre", "post")]
        self._corner = worst_corner(np.array([r.values for r in parents]), maximise=self._maximize)
        rows = [self._row(scores, record.number) for record in parents]
        self._report_corner = worst_corner(np.array([value for value, _ in rows]), maximise=self._maximize)
        drawn = np.stack([samples for _, samples in rows])
        self._drawn_corners = np.where(self._maximize, drawn.min(axis=0), drawn.max(axis=0))
        names = [name for name, _ in self.objectives]
        self.reference = dict(zip(names, self._report_corner.tolist(), strict=True))
        baselines = [record.number for record in done if record.kind != "search"]
        line = self._volume([self._row(scores, number) for number in baselines])
        self.rivals: tuple[Rival, ...] = (
            Rival(f"uniform line, {len(baselines)} points", {}, _cell(line.value, line.samples)),
        )
        self._temperature_row: tuple[Floats, Floats] | None = None
        self.temperature = Volume(0.0, np.zeros(RESAMPLES))
        for one in scores.alternatives():
            if one.base != "post" or not scores.has(one, "report"):
                continue
            read = partial(scores.tempered, one, "report")
            cells, samples = self._computer.cells("report", one.label, read, self._metrics)
            row = self._stacked(cells, samples)
            volume = self._volume([row])
            self.rivals += (Rival(one.label, cells, _cell(volume.value, volume.samples)),)
            if one.method == TEMPERATURE:
                self.temperature, self._temperature_row = volume, row

    def outcome(self, entry: Entry, store: StudyStore, checkpoints: Sequence[int]) -> Outcome:
        records, done = store.trials(), _complete(store)
        scores = Scores(store)
        fronts = [front_of(within_tokens(records, tokens), self._maximize) for tokens in checkpoints]
        if any(scores.digest(number, "report") is None for front in fronts for number in front):
            raise ConfigError(
                f"study '{store.name}' is not complete. Run the comparison again to continue it."
            )
        rows = [[self._row(scores, number) for number in sorted(front)] for front in fronts]
        last = rows[-1]
        beside = [] if self._temperature_row is None else [self._temperature_row]
        # Trials that were stopped took tokens, too.
        spent = zip(records, np.cumsum([record.tokens for record in records]).tolist(), strict=True)
        volumes = [
            hypervolume(np.array([r.values for r in done[: i + 1]]), self._corner, maximise=self._maximize)
            for i in range(len(done))
        ]
        return Outcome(
            label=entry.entrant.label,
            seed=entry.seed,
            trials=len(done),
            tokens=tuple(total for record, total in spent if record.state == "complete"),
            volumes=tuple(volumes),
            report=tuple(self._volume(front) for front in rows),
            with_temperature=self._volume([*last, *beside]),
            search=volumes[-1],
            points=np.array([values for values, _ in last]),
            optimism=self._optimism(done, fronts[-1], scores),
        )

    def _row(self, scores: Scores, number: int) -> tuple[Floats, Floats]:
        """`(m,)` objectives of a trial on the report split and their `(resamples, m)` samples."""
        digest = scores.digest(number, "report")
        assert digest is not None, "it was scored there"
        read = partial(scores.outcomes, number, "report")
        return self._stacked(*self._computer.cells("report", digest, read, self._metrics))

    def _stacked(self, cells: Mapping[str, Cell], samples: Mapping[str, Floats]) -> tuple[Floats, Floats]:
        names = [name for name, _ in self.objectives]
        return np.array([cells[n].value for n in names]), np.stack([samples[n] for n in names], axis=-1)

    def _volume(self, rows: Sequence[tuple[Floats, Floats]]) -> Volume:
        """Of a front's rows on the report split; a shift of points and corner together changes no volume."""
        values = np.array([value for value, _ in rows]) - self._report_corner
        stacked = np.stack([samples for _, samples in rows], axis=1) - self._drawn_corners[:, None]
        origin = np.zeros(len(self.objectives))
        return Volume(
            hypervolume(values, origin, maximise=self._maximize),
            hypervolume_batch(stacked, origin, maximise=self._maximize),
        )

    def _optimism(self, done: Sequence[TrialRecord], front: set[int], scores: Scores) -> dict[str, float]:
        sign = np.where(self._maximize, 1.0, -1.0)

        def looked_better(records: Sequence[TrialRecord]) -> Floats:
            gaps = [np.array(r.values) - self._row(scores, r.number)[0] for r in records]
            return np.asarray(sign * np.mean(gaps, axis=0))

        searched = [record for record in done if record.number in front and record.kind == "search"]
        if not searched:
            return {}
        found = looked_better(searched) - looked_better([r for r in done if r.kind != "search"])
        return dict(zip((name for name, _ in self.objectives), found.tolist(), strict=True))


def _standing(outcomes: Sequence[Outcome], line: Outcome, temperature: Volume) -> Standing:
    chosen = np.random.default_rng(0).integers(0, len(outcomes), (RESAMPLES, len(outcomes)))
    rows = np.arange(RESAMPLES)[:, None]

    def over_seeds(volumes: Sequence[Volume], base: Volume | None = None) -> Cell | None:
        """Mean over seeds, or the ratio of that mean to a base."""
        value = float(np.mean([one.value for one in volumes]))
        samples = np.stack([one.samples for one in volumes], axis=1)[rows, chosen].mean(axis=1)
        if base is None:
            return _cell(value, samples)
        if min(base.value, base.samples.min(), value, samples.min()) <= 0.0:
            return None
        logarithm = np.log(value / base.value)
        low, high = interval(np.log(samples / base.samples), value=float(logarithm))
        return cell_around(float(np.exp(logarithm)), (float(np.exp(low)), float(np.exp(high))))

    last = [one.report[-1] for one in outcomes]
    report = over_seeds(last)
    assert report is not None, "without a base there always is one"
    searched = [one.optimism for one in outcomes if one.optimism]
    return Standing(
        label=outcomes[0].label,
        seeds=len(outcomes),
        trials=float(np.mean([one.trials for one in outcomes])),
        tokens=float(np.mean([one.tokens[-1] for one in outcomes])),
        search=float(np.mean([one.search for one in outcomes])),
        report=report,
        at=tuple(np.mean([[v.value for v in one.report] for one in outcomes], axis=0).tolist()),
        spread=(min(one.value for one in last), max(one.value for one in last)),
        over_line=over_seeds(last, line.report[-1]),
        over_temperature=over_seeds([one.with_temperature for one in outcomes], temperature),
        optimism={
            name: float(np.mean([one[name] for one in searched]))
            for name in (searched[0] if searched else ())
        },
    )


def _cell(value: float, samples: Floats) -> Cell:
    return cell_around(value, interval(samples, value=value, bounds=(0.0, np.inf)))


def _complete(store: StudyStore) -> list[TrialRecord]:
    return [record for record in store.trials() if record.state == "complete"]
