"""The board: all complete trials of a study with intervals on both splits, from storage and evidence alone.

`front --format json` is `Board.to_json()`; tables, plots, picks and model cards read the same object.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from objectives.metrics.bootstrap import interval
from objectives.metrics.diversity import DIVERSITY_NAMES, DiversityMetric, get_sampled_metric
from objectives.metrics.names import Metric, find_metric, get_metric
from objectives.outcomes import Outcomes
from objectives.questions.questions import Split
from search.config.methods import OPTIONS, get_method
from search.errors import ConfigError
from search.front import hypervolume, hypervolume_batch, worst_corner
from search.merging.baselines import PARENTS, UNCHOSEN, parent_count
from search.merging.space import METHOD
from search.results.alternatives import Alternative, Scores
from search.results.arms import SWITCH, Arm, cells_to_json, stored_arms
from search.results.intervals import RESAMPLES, Cell, CellComputer, Samples, cell_around
from search.storage.evidence import EvidenceFolder
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord, base_label, front_of

SPLITS: tuple[Split, ...] = ("search", "report")
# ECE alone can be gamed: the report never shows it alone.
BESIDE = ("accuracy", "ece", "brier", "nll", "auroc")


@dataclass(frozen=True)
class Row:
    """One trial, or an alternative: a trial with a calibrator, `kind` alternative.

    Attributes:
        search, report: metrics by name; `report` is empty if the trial was not scored there.
        against: paired differences on the report split: this row minus that parent, that alternative to `post`, or
            the trained switcher's arm.
        temperature: of an alternative, fitted on the search split; None for a trial (and for CAPE).
    """

    trial: int
    kind: str
    label: str
    front: bool
    method: str
    coefficients: Mapping[str, float]
    search: Mapping[str, Cell]
    report: Mapping[str, Cell]
    against: Mapping[str, Mapping[str, Cell]] = field(default_factory=dict)
    temperature: float | None = None

    def on(self, split: Split) -> Mapping[str, Cell]:
        return self.search if split == "search" else self.report

    def to_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "trial": self.trial,
            "kind": self.kind,
            "label": self.label,
            "front": self.front,
            "recipe": _recipe(self.method, self.coefficients),
            "search": cells_to_json(self.search),
            "report": cells_to_json(self.report),
        }
        if self.against:
            shown["against"] = {other: cells_to_json(cells) for other, cells in self.against.items()}
        if self.temperature is not None:
            shown["temperature"] = self.temperature
        return shown


@dataclass(frozen=True)
class Volume:
    """Hypervolume of the front and of the uniform line on one split, and the front's gain over it.

    `gain` is front minus uniform, with its paired interval. The reference point is that of the search split.
    """

    front: float
    uniform: float
    gain: Cell

    def to_json(self) -> dict[str, Any]:
        return {"front": self.front, "uniform": self.uniform, "gain": self.gain.to_json()}


@dataclass(frozen=True)
class Board:
    """All complete trials by number, what calibrators make of some of them, and what stands beside merging.

    Attributes:
        reference: the corner of the parents' worst values on the search split.
        alternatives: rows that are no trials; never on the front, whose weights they share.
        arms: other ways to use the checkpoints together; no trials, and without recipes.
        stopped: trials that were scored in part and stopped; they have no row.
        sampled: what is measured on sampled answers: diversities, then preferences.
    """

    study: str
    objectives: tuple[tuple[str, bool], ...]
    reference: Mapping[str, float]
    hypervolume: Mapping[Split, Volume]
    rows: tuple[Row, ...]
    questions: Mapping[str, int]
    alternatives: tuple[Row, ...] = ()
    stopped: int = 0
    sampled: tuple[DiversityMetric, ...] = ()
    arms: tuple[Arm, ...] = ()

    @property
    def front(self) -> tuple[Row, ...]:
        """Rows of the front, the best in the first objective first."""
        name, maximize = self.objectives[0]
        kept = [row for row in self.rows if row.front]
        return tuple(
            sorted(kept, key=lambda row: -row.search[name].value if maximize else row.search[name].value)
        )

    @property
    def maximize(self) -> tuple[bool, ...]:
        return tuple(maximize for _, maximize in self.objectives)

    @property
    def preferences(self) -> tuple[str, ...]:
        """Names of the study's preferences, objectives or not; higher is better."""
        return tuple(metric.name for metric in self.sampled if metric.name not in DIVERSITY_NAMES)

    def of_kind(self, *kinds: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.kind in kinds)

    def uniform_line(self) -> tuple[Row, ...]:
        """Parents and uniform merges, from `pre` to `post`; of several experts they come after `pre`."""
        line = self.of_kind("pre", "post", "uniform")
        ranked = sorted(line, key=lambda row: next(iter(row.coefficients.values())))
        return (*ranked[:1], *self.of_kind("expert"), *ranked[1:])

    @property
    def parents(self) -> tuple[Row, ...]:
        """`pre`, then `post` or the experts."""
        return self.of_kind(*PARENTS)

    def points(self, rows: Sequence[Row], split: Split) -> NDArray[np.float64]:
        """Objectives of some rows on one split: `(n, m)`."""
        values = [[row.on(split)[name].value for name, _ in self.objectives] for row in rows]
        return np.array(values, dtype=np.float64).reshape(len(rows), len(self.objectives))

    def row(self, trial: int) -> Row:
        for row in self.rows:
            if row.trial == trial:
                return row
        raise ConfigError(f"trial {trial}: study '{self.study}' has no complete trial of that number.")

    def to_json(self) -> dict[str, Any]:
        """The contract of `front --format json`."""
        return {
            "study": self.study,
            "objectives": [
                {"name": n, "direction": "maximize" if m else "minimize"} for n, m in self.objectives
            ],
            "reference": dict(self.reference),
            "hypervolume": {split: volume.to_json() for split, volume in self.hypervolume.items()},
            "questions": dict(self.questions),
            "stopped": self.stopped,
            "trials": [
                *(row.to_json() for row in (*self.rows, *self.alternatives)),
                *(arm.to_json() for arm in self.arms),
            ],
        }

    def to_csv(self) -> str:
        """One line a trial or alternative: scores with intervals on both splits, temperature, coefficients.

        Where there are arms, `tokens` stands before the coefficients, of which they have none.
        """
        metrics = {
            split: list(dict.fromkeys(n for row in self.rows for n in row.on(split))) for split in SPLITS
        }
        groups = list(self.rows[0].coefficients) if self.rows else []
        header = ["trial", "kind", "label", "front"]
        for split in SPLITS:
            header += [f"{split}.{name}{part}" for name in metrics[split] for part in ("", ".low", ".high")]
        beside = ["temperature", *(["tokens"] if self.arms else [])]
        lines: list[list[Any]] = [[*header, *beside, *groups]]
        rows: list[Row | Arm] = [*self.rows, *self.alternatives, *self.arms]
        for row in rows:
            line: list[Any] = ["" if row.trial is None else row.trial, row.kind, row.label, int(row.front)]
            for split in SPLITS:
                for name in metrics[split]:
                    cell = row.on(split).get(name)
                    line += ["", "", ""] if cell is None else [cell.value, cell.low, cell.high]
            line.append("" if row.temperature is None else row.temperature)
            if isinstance(row, Arm):
                line += [row.tokens, *[""] * len(groups)]
            else:
                line += [*([""] if self.arms else []), *(row.coefficients[group] for group in groups)]
            lines.append(line)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        return text.getvalue()


def read_board(store: StudyStore) -> Board:
    """Computes the board of a study.

    Intervals resample questions, the same resamples for every trial, so differences are paired.

    Raises:
        ConfigError: no trial is complete yet. StorageError: the evidence of a trial is missing.
    """
    attributes = store.attributes()
    tasks = attributes["facts"]["tasks"]
    objectives = tuple((str(name), bool(maximize)) for name, maximize in attributes["objectives"])
    preferences = tuple(attributes["config"].get("preferences") or ())
    wanted = [find_metric(name, tasks=tasks, preferences=preferences) for name, _ in objectives]
    metrics = [metric for metric in wanted if isinstance(metric, Metric)]
    records = store.trials()
    done = [record for record in records if record.state == "complete"]
    parents = [record for record in done if record.kind in PARENTS]
    if len(parents) < parent_count(attributes["config"]):
        raise ConfigError(
            f"study '{store.name}' has not scored its parents yet. Resume it: mergefront resume {store.name}"
        )
    on_front = front_of(done, [maximize for _, maximize in objectives])
    evidence = EvidenceFolder(store.url, store.name)
    computer = CellComputer(evidence)
    beside = [*metrics, *(get_metric(name) for name in BESIDE if name not in dict(objectives))]

    scores = Scores(store)
    rows: list[Row] = []
    samples: dict[Split, dict[str, Samples]] = {"search": {}, "report": {}}
    for record in done:
        cells: dict[Split, dict[str, Cell]] = {"search": {}, "report": {}}
        for split in SPLITS:
            digest = scores.digest(record.number, split)
            if digest is None:
                continue
            shown = metrics if split == "search" else beside
            found = computer.cells(split, digest, partial(scores.outcomes, record.number, split), shown)
            sampled = computer.sampled(split, scores.diversity(record.number, split))
            cells[split], samples[split][base_label(record)] = found[0] | sampled[0], found[1] | sampled[1]
        rows.append(_row(record, record.number in on_front, cells))
    alternatives = []
    for one in scores.alternatives():
        cells = {"search": {}, "report": {}}
        for split in SPLITS:
            if scores.has(one, split):
                found = computer.cells(split, one.label, partial(scores.tempered, one, split), beside)
                sampled = computer.sampled(split, scores.diversity(one.trial, split, one.method))
                cells[split], samples[split][one.label] = found[0] | sampled[0], found[1] | sampled[1]
        alternatives.append(_alternative(one, next(r for r in rows if r.trial == one.trial), cells))
    arms = []
    for arm in stored_arms(attributes):
        cells = {"search": {}, "report": {}}
        for split, digest in arm.evidence.items():
            read = partial(_outcomes, evidence, digest)
            cells[split], samples[split][arm.label] = computer.cells(split, digest, read, beside)
        tokens = arm.tokens.get("report", arm.tokens.get("search", 1.0))
        arms.append(Arm(arm.label, cells["search"], cells["report"], tokens))
    reference = _reference(objectives, parents)
    # What a merge has to beat: both parents, what a temperature alone makes of `post`, and taking turns.
    both = [row for row in rows if row.kind in PARENTS]
    rivals: list[Row | Arm] = [
        *both,
        *(row for row in alternatives if row.trial in {p.number for p in parents if p.kind == "post"}),
        *(arm for arm in arms if arm.label == SWITCH),
    ]
    seen = samples["report"]
    return Board(
        study=store.name,
        objectives=objectives,
        reference=reference,
        hypervolume={split: _volume(rows, samples[split], split, objectives, reference) for split in SPLITS},
        rows=tuple(
            replace(row, against=_differences(row, seen, rivals))
            if row.kind not in PARENTS and (row.front or row.kind == "uniform")
            else row
            for row in rows
        ),
        questions=attributes["facts"]["questions"],
        alternatives=tuple(alternatives),
        stopped=sum(record.state == "stopped" for record in records),
        sampled=tuple(
            get_sampled_metric(name, preferences)
            for name in (*DIVERSITY_NAMES, *preferences)
            if any(name in row.search for row in rows)
        ),
        arms=tuple(replace(arm, against=_differences(arm, seen, both)) for arm in arms),
    )


def _outcomes(evidence: EvidenceFolder, digest: str) -> Outcomes:
    return evidence.load(digest).outcomes


def _row(record: TrialRecord, on_front: bool, cells: Mapping[Split, Mapping[str, Cell]]) -> Row:
    return Row(
        trial=record.number,
        kind=record.kind,
        label=base_label(record),
        front=on_front,
        method=str(record.attributes["method"]),
        coefficients=record.coefficients,
        search=cells["search"],
        report=cells["report"],
    )


def _recipe(method: str, numbers: Mapping[str, float]) -> dict[str, Any]:
    """Method, coefficients, and where they are searched the method's hyper-parameters."""
    beside = {*OPTIONS, METHOD}
    found: dict[str, Any] = {
        "method": method,
        "coefficients": {name: value for name, value in numbers.items() if name not in beside},
    }
    used = get_method(method).options
    if options := {name: value for name, value in numbers.items() if name in used}:
        found["options"] = options
    return found


def _alternative(one: Alternative, base: Row, cells: Mapping[Split, Mapping[str, Cell]]) -> Row:
    return Row(
        trial=base.trial,
        kind="alternative",
        label=one.label,
        front=False,
        method=base.method,
        coefficients=base.coefficients,
        search=cells["search"],
        report=cells["report"],
        temperature=None if one.fitted is None else one.fitted.temperature,
    )


def _reference(objectives: Sequence[tuple[str, bool]], parents: Sequence[TrialRecord]) -> dict[str, float]:
    """The corner of the parents' worst values: what is worse than both parents adds no volume."""
    values = np.array([record.values for record in parents])
    worst = worst_corner(values, maximise=[maximize for _, maximize in objectives])
    return {name: float(value) for (name, _), value in zip(objectives, worst, strict=True)}


def _volume(
    rows: Sequence[Row],
    samples: Mapping[str, Samples],
    split: Split,
    objectives: Sequence[tuple[str, bool]],
    reference: Mapping[str, float],
) -> Volume:
    """Hypervolumes of one split; all zero until front and uniform line are scored on it."""
    names = [name for name, _ in objectives]
    maximise = tuple(maximize for _, maximize in objectives)
    corner = [reference[name] for name in names]
    point: list[float] = []
    drawn: list[NDArray[np.float64]] = []
    for wanted in (lambda row: row.front, lambda row: row.kind in UNCHOSEN):
        chosen = [row for row in rows if wanted(row)]
        if not all(row.label in samples for row in chosen):
            chosen = []  # half a split would be another comparison
        values = [[row.on(split)[name].value for name in names] for row in chosen]
        point.append(hypervolume(values, corner, maximise=maximise) if chosen else 0.0)
        stack = [np.stack([samples[row.label][name] for name in names], axis=-1) for row in chosen]
        drawn.append(
            hypervolume_batch(np.stack(stack, axis=1), corner, maximise=maximise)
            if stack
            else np.zeros(RESAMPLES)
        )
    gain = point[0] - point[1]
    return Volume(point[0], point[1], cell_around(gain, interval(drawn[0] - drawn[1], value=gain)))


def _differences(
    row: Row | Arm, samples: Mapping[str, Samples], rivals: Sequence[Row | Arm]
) -> dict[str, dict[str, Cell]]:
    """Paired differences of a row to the rivals; none where it was not scored on the report split."""
    found: dict[str, dict[str, Cell]] = {}
    for rival in rivals:
        if row.label not in samples or rival.label not in samples:
            continue
        found[rival.label] = {}
        for name, drawn in samples[row.label].items():
            if name not in rival.report:
                continue  # a calibrated trial whose answers were not sampled
            value = row.report[name].value - rival.report[name].value
            differences = drawn - samples[rival.label][name]
            found[rival.label][name] = cell_around(value, interval(differences, value=value))
    return found
