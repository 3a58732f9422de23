"""The trials of a study as the product sees them, read from the storage's tables.

Optuna's own reading builds an object for every coefficient and every attribute, which takes minutes for a study of
10,000 trials with 64 coefficients. Here rows are read as they are, and a finished trial, which never changes, is read
once. The tables are those of Optuna's schema, whose version is checked when a storage is opened.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from sys import intern
from typing import Any, Literal

import numpy as np
from sqlalchemy import Connection, DateTime, Engine, TableClause, column, select, table

from search.front import non_dominated
from search.recipe import Recipe


def base_label(record: TrialRecord) -> str:
    """What a trial is called on the board."""
    if "label" in record.attributes:
        return str(record.attributes["label"])
    coefficient = next(iter(record.coefficients.values()))
    labels = {"uniform": f"uniform {coefficient:g}", "search": f"trial {record.number}"}
    return labels.get(record.kind, record.kind)


def front_of(records: Sequence[TrialRecord], maximize: Sequence[bool]) -> set[int]:
    """Numbers of the non-dominated ones among complete trials, on the search split."""
    if not records:
        return set()
    kept = non_dominated(np.array([record.values for record in records]), maximise=tuple(maximize))
    return {record.number for record, on_front in zip(records, kept, strict=True) if on_front}


State = Literal["complete", "stopped", "failed", "running", "waiting"]

PROPOSAL_TOKENS = "mergefront:proposal_tokens"  # tag of a trial: what its engine spent on the proposal
BATCH = 500  # trials a statement: databases limit the values in one

_STATES: dict[str, State] = {
    "COMPLETE": "complete",
    "FAIL": "failed",
    "PRUNED": "stopped",
    "RUNNING": "running",
    "WAITING": "waiting",
}
_INFINITE = {"INF_POS": math.inf, "INF_NEG": -math.inf}

_TRIALS = table(
    "trials",
    column("trial_id"),
    column("study_id"),
    column("number"),
    column("state"),
    column("datetime_start", DateTime()),
    column("datetime_complete", DateTime()),
)
_PARAMS = table(
    "trial_params", column("param_id"), column("trial_id"), column("param_name"), column("param_value")
)
_VALUES = table(
    "trial_values", column("trial_id"), column("objective"), column("value"), column("value_type")
)
_USER, _SYSTEM = (
    table(name, column("trial_id"), column("key"), column("value_json"))
    for name in ("trial_user_attributes", "trial_system_attributes")
)


@dataclass(frozen=True)
class TrialRecord:
    """One trial as the product sees it; `values` in the order of the study's objectives, None until complete.

    A stopped one has none: a part of its questions was scored, and what it came to is its attribute `estimate`.
    """

    number: int
    kind: str
    state: State
    coefficients: Mapping[str, float]
    values: tuple[float, ...] | None
    attributes: Mapping[str, Any]
    tags: Mapping[str, Any]  # what the engine that proposed it wants to find again
    seconds: float | None

    @property
    def recipe(self) -> Recipe:
        """What was merged."""
        return Recipe(str(self.attributes["method"]), self.coefficients)

    @property
    def tokens(self) -> int:
        """Scored tokens that this trial took: its evaluation on the search split, and what proposing it cost."""
        return int(self.attributes.get("tokens", 0)) + int(self.tags.get(PROPOSAL_TOKENS, 0))

    @property
    def finished(self) -> bool:
        """A finished trial never changes again."""
        return self.state in ("complete", "stopped", "failed")


class TrialTables:
    """Reads trials of one study. Trials without a `kind` were put into the study by hand and are left out."""

    def __init__(self, engine: Engine, study_id: int) -> None:
        self._engine = engine
        self._study_id = study_id

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """A connection for several readings."""
        with self._engine.connect() as connection:
            yield connection

    def ids_after(self, trial_id: int, connection: Connection) -> list[int]:
        """Ids of the study's trials above this one, ascending; so are their numbers."""
        ids = select(_TRIALS.c.trial_id).where(
            _TRIALS.c.study_id == self._study_id, _TRIALS.c.trial_id > trial_id
        )
        return list(connection.scalars(ids.order_by(_TRIALS.c.trial_id)))

    def read(self, ids: Sequence[int], connection: Connection) -> list[tuple[int, TrialRecord]]:
        """Id and record of every trial of ours among `ids`, which ascend."""
        batches = (ids[begin : begin + BATCH] for begin in range(0, len(ids), BATCH))
        return [read for batch in batches for read in _read(connection, batch)]


def _read(connection: Connection, ids: Sequence[int]) -> Iterator[tuple[int, TrialRecord]]:
    def rows(source: TableClause, *names: str, order: str = "trial_id") -> Iterable[Any]:
        chosen = select(source.c.trial_id, *(source.c[name] for name in names))
        return connection.execute(chosen.where(source.c.trial_id.in_(ids)).order_by(source.c[order]))

    # The state first: what belongs to a finished trial was there before.
    trials = list(rows(_TRIALS, "number", "state", "datetime_start", "datetime_complete"))
    # Row by row: hundreds of thousands at once would keep the garbage collector busy longer than the reading takes.
    coefficients: dict[int, dict[str, float]] = defaultdict(dict)
    for trial_id, name, value in rows(_PARAMS, "param_name", "param_value", order="param_id"):
        coefficients[trial_id][intern(name)] = value
    values: dict[int, list[float]] = defaultdict(list)
    for trial_id, value, kind in rows(_VALUES, "value", "value_type", order="objective"):
        values[trial_id].append(_INFINITE.get(kind, value))
    attributes = _by_trial(rows(_USER, "key", "value_json"))
    tags = _by_trial(rows(_SYSTEM, "key", "value_json"))
    for trial_id, number, state, start, end in trials:
        if "kind" not in attributes[trial_id]:
            continue
        if state not in _STATES:
            raise ValueError(f"trial {number}: unknown state {state!r}")
        record = TrialRecord(
            number=number,
            kind=str(attributes[trial_id]["kind"]),
            state=_STATES[state] if state != "PRUNED" or "estimate" in attributes[trial_id] else "failed",
            coefficients=coefficients[trial_id],
            values=tuple(values[trial_id]) if state == "COMPLETE" else None,
            attributes=attributes[trial_id],
            tags=tags[trial_id],
            seconds=None if start is None or end is None else (end - start).total_seconds(),
        )
        yield trial_id, record


def _by_trial(rows: Iterable[Any]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for trial_id, key, value in rows:
        found[trial_id][intern(key)] = json.loads(value)
    return found


class History:
    """All trials of a study as the last `refresh` found them."""

    def __init__(self, tables: TrialTables) -> None:
        self.records: list[TrialRecord] = []  # by number
        self._tables = tables
        self._places: dict[int, int] = {}  # trial id -> index in `records`
        self._ids: dict[int, int] = {}  # number -> trial id
        self._open: list[int] = []  # ids of what may still change
        self._newest = -1
        self._scored: dict[object, TrialRecord] = {}

    def refresh(self) -> None:
        """Reads what is new, and again what was not finished when it was read last."""
        with self._tables.connected() as connection:
            new = self._tables.ids_after(self._newest, connection)
            read = self._tables.read(self._open + new, connection)
        for trial_id, record in read:
            self._put(trial_id, record)
        self._open = [trial_id for trial_id, record in read if not record.finished]
        self._newest = new[-1] if new else self._newest

    @property
    def open(self) -> list[TrialRecord]:
        """Running and waiting trials, by number."""
        return [self.records[self._places[trial_id]] for trial_id in self._open]

    def id_of(self, number: int) -> int:
        """The storage's id of a trial."""
        return self._ids[number]

    def of(self, trial_id: int) -> TrialRecord:
        """The trial with this id."""
        return self.records[self._places[trial_id]]

    def scored(self, recipe: str) -> TrialRecord | None:
        """The first complete trial whose attribute `recipe` is this, else the first stopped one."""
        return self._scored.get(recipe)

    def _put(self, trial_id: int, record: TrialRecord) -> None:
        place = self._places.get(trial_id)
        if place is None:
            self._places[trial_id] = len(self.records)
            self._ids[record.number] = trial_id
            self.records.append(record)
        else:
            self.records[place] = record
        if record.state in ("complete", "stopped"):
            recipe = record.attributes.get("recipe")
            both = (self._scored.get(recipe, record), record)
            self._scored[recipe] = min(both, key=lambda one: (one.state == "stopped", one.number))
