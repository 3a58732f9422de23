"""How the entrants of a comparison stand: fronts at equal tokens, over seeds, and beside what costs no search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search.errors import ConfigError
from search.results.alternatives import Scores
from search.results.compare.entrants import LINE, Entry
from search.results.compare.judge import Floats, Judge, Volume, gain, mean_volume, ratio
from search.results.intervals import Cell
from search.running.budget import within_tokens
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord, front_of

TEMPERATURE = "temperature"  # what a merge has to beat: it costs nothing


@dataclass(frozen=True)
class Outcome:
    """What one entry came to.

    Attributes:
        tokens: scored tokens up to each complete trial; volumes: hypervolume on the search split after it.
        report: hypervolume of the front of each checkpoint; the last is the whole budget's.
        with_temperature: of the last front and `post` + temperature together.
        search: hypervolume on the search split at each checkpoint.
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
    search: tuple[float, ...]
    points: Floats
    optimism: Mapping[str, float]


@dataclass(frozen=True)
class Standing:
    """One entrant over its seeds: means, with intervals.

    Attributes:
        search: hypervolume on the search split at each checkpoint. report: on the report split at the last one.
        at: on the report split at each.
        gain: over the uniform line at the same budget. over_line: times the line's. over_temperature: how many times
            the hypervolume of `post` + temperature is that of both together. None where there is no hypervolume, or
            none on a resample.
        spread: smallest and largest `report` of the seeds.
    """

    label: str
    seeds: int
    trials: float
    tokens: float
    search: tuple[float, ...]
    report: Cell
    at: tuple[float, ...]
    spread: tuple[float, float]
    gain: Cell
    over_line: Cell | None
    over_temperature: Cell | None
    optimism: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        cells = {
            name: None if cell is None else cell.to_json()
            for name, cell in (
                ("report", self.report),
                ("gain", self.gain),
                ("over_line", self.over_line),
                ("over_temperature", self.over_temperature),
            )
        }
        return {
            "engine": self.label,
            "seeds": self.seeds,
            "trials": self.trials,
            "tokens": self.tokens,
            "hypervolume": {
                "search": self.search[-1],
                "report": cells["report"],
                "spread": list(self.spread),
            },
            "at": list(self.at),
            "at_search": list(self.search),
            "gain": cells["gain"],
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
    judge = Judge(stores[0])
    outcomes = [
        _outcome(judge, entry, store, checkpoints) for entry, store in zip(entries, stores, strict=True)
    ]
    line = next(one for one in outcomes if one.label == LINE)
    row = judge.calibrated.get(TEMPERATURE)
    temperature = None if row is None else judge.volume([row])
    labels = list(dict.fromkeys(one.label for one in outcomes))
    standings = [
        _standing([one for one in outcomes if one.label == label], line, temperature) for label in labels
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
        rivals=tuple(_rivals(judge)),
        outcomes=tuple(outcomes),
    )


def _outcome(judge: Judge, entry: Entry, store: StudyStore, checkpoints: Sequence[int]) -> Outcome:
    records = store.trials()
    done = [record for record in records if record.state == "complete"]
    scores = Scores(store)
    reached = [within_tokens(records, tokens) for tokens in checkpoints]
    fronts = [front_of(there, judge.maximize) for there in reached]
    if any(scores.digest(number, "report") is None for front in fronts for number in front):
        raise ConfigError(f"study '{store.name}' is not complete. Run the comparison again to continue it.")
    rows = [[judge.row(scores, number) for number in sorted(front)] for front in fronts]
    last = rows[-1]
    beside = [row for label, row in judge.calibrated.items() if label == TEMPERATURE]
    # Trials that were stopped took tokens, too.
    spent = zip(records, np.cumsum([record.tokens for record in records]).tolist(), strict=True)
    volumes = [judge.searched(done[: i + 1]) for i in range(len(done))]
    return Outcome(
        label=entry.entrant.label,
        seed=entry.seed,
        trials=len(done),
        tokens=tuple(total for record, total in spent if record.state == "complete"),
        volumes=tuple(volumes),
        report=tuple(judge.volume(front) for front in rows),
        with_temperature=judge.volume([*last, *beside]),
        search=tuple(judge.searched(there) for there in reached),
        points=np.array([row.values for row in last]),
        optimism=_optimism(judge, done, fronts[-1], scores),
    )


def _optimism(judge: Judge, done: Sequence[TrialRecord], front: set[int], scores: Scores) -> dict[str, float]:
    sign = np.where(judge.maximize, 1.0, -1.0)

    def looked_better(records: Sequence[TrialRecord]) -> Floats:
        gaps = [np.array(r.values) - judge.row(scores, r.number).values for r in records]
        return np.asarray(sign * np.mean(gaps, axis=0))

    searched = [record for record in done if record.number in front and record.kind == "search"]
    if not searched:
        return {}
    found = looked_better(searched) - looked_better([r for r in done if r.kind != "search"])
    return dict(zip((name for name, _ in judge.objectives), found.tolist(), strict=True))


def _rivals(judge: Judge) -> Iterator[Rival]:
    line = judge.line
    yield Rival(f"uniform line, {judge.baselines} points", {}, line.cell)
    for method, row in judge.calibrated.items():
        yield Rival(f"post + {method}", row.cells, judge.volume([row]).cell)


def _standing(outcomes: Sequence[Outcome], line: Outcome, temperature: Volume | None) -> Standing:
    last = [one.report[-1] for one in outcomes]
    report = mean_volume(last)
    beside = mean_volume([one.with_temperature for one in outcomes])
    searched = [one.optimism for one in outcomes if one.optimism]
    return Standing(
        label=outcomes[0].label,
        seeds=len(outcomes),
        trials=float(np.mean([one.trials for one in outcomes])),
        tokens=float(np.mean([one.tokens[-1] for one in outcomes])),
        search=tuple(np.mean([one.search for one in outcomes], axis=0).tolist()),
        report=report.cell,
        at=tuple(np.mean([[v.value for v in one.report] for one in outcomes], axis=0).tolist()),
        spread=(min(one.value for one in last), max(one.value for one in last)),
        gain=gain(report, line.report[-1]),
        over_line=ratio(report, line.report[-1]),
        over_temperature=None if temperature is None else ratio(beside, temperature),
        optimism={
            name: float(np.mean([one[name] for one in searched]))
            for name in (searched[0] if searched else ())
        },
    )
