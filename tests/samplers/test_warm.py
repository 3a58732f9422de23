"""A warm start: the first proposals are a descent's, and the engine behind them learns from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search.config.sampler import SamplerConfig
from search.config.study_file import load_study_file
from search.errors import ConfigError
from search.merging.baselines import BASELINES
from search.running.launch import create
from search.samplers import Engine, make_engine
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord
from search.study import run
from tests.pico_study import write_study
from tests.samplers.test_samplers import BOUNDS, GROUPS, LINE, config, record, sources

FIRST = len(LINE)
WARM = 3
BEHIND = [
    ("optuna", "tpe"),
    ("optuna", "nsga2"),
    ("pymoo", "nsga2"),
    ("pymoo", "sms-emoa"),
    ("composite", "gp"),
]


def maker(engine: str, name: str, **keys: Any) -> Callable[[], Engine]:
    chosen = SamplerConfig.model_validate(
        {**config(engine, name).model_dump(), "steps": 2, "warm": WARM, **keys}
    )
    return lambda: make_engine(chosen, GROUPS, BOUNDS, sources())


def played(make: Callable[[], Engine], trials: int, *, fresh: bool = False) -> list[TrialRecord]:
    one, history = make(), list[TrialRecord]()
    for number in range(trials):
        one = make() if fresh else one
        history.append(record(one, number, "complete", history))
    return history


@pytest.mark.parametrize(("engine", "name"), BEHIND)
def test_the_first_proposals_are_the_descents(engine: str, name: str) -> None:
    descents = make_engine(SamplerConfig(engine="gradient", name="adam", steps=2), GROUPS, BOUNDS, sources())
    alone = played(lambda: descents, FIRST + WARM)
    warm = played(maker(engine, name), FIRST + WARM + 3)
    coefficients = [trial.coefficients for trial in warm]
    assert coefficients[FIRST : FIRST + WARM] == [trial.coefficients for trial in alone[FIRST:]]
    assert [trial.tokens for trial in warm[FIRST:]] == [2 * 30] * WARM + [0] * 3


@pytest.mark.parametrize(("engine", "name"), BEHIND)
def test_a_resumed_search_proposes_what_an_uninterrupted_one_does(engine: str, name: str) -> None:
    trials = FIRST + 22 if name != "gp" else FIRST + 8
    through = played(maker(engine, name), trials)
    assert played(maker(engine, name), trials, fresh=True) == through
    assert len({tuple(trial.coefficients.values()) for trial in through}) > trials - 4


@pytest.mark.parametrize(("engine", "name"), [("optuna", "nsga2"), ("pymoo", "nsga2")])
def test_genetic_algorithms_breed_from_them(engine: str, name: str) -> None:
    """The warm trials are made better than all others: the next generations must lie near them."""

    def near(best: bool) -> float:
        one, history = maker(engine, name, population=8)(), list[TrialRecord]()
        for number in range(FIRST + 40):
            trial = record(one, number, "complete", history)
            if FIRST <= number < FIRST + WARM:
                trial = replace(trial, values=(9.0, -9.0) if best else (-9.0, 9.0))
            history.append(trial)
        warm = [trial.coefficients for trial in history[FIRST : FIRST + WARM]]
        children = [trial.coefficients for trial in history[FIRST + 25 :]]
        nearest = [min(sum(abs(child[g] - w[g]) for g in GROUPS) for w in warm) for child in children]
        return sum(nearest) / len(nearest)

    assert near(best=True) < near(best=False)


def test_what_a_proposal_costs_is_known_before() -> None:
    one = maker("optuna", "tpe")()
    history = played(lambda: one, FIRST)
    costs = []
    for number in range(FIRST, FIRST + WARM + 2):
        costs.append(one.cost(history))
        history.append(record(one, number, "complete", history))
    assert costs == [60] * WARM + [0, 0]


@pytest.mark.parametrize(
    ("sampler", "reason"),
    [
        ({"engine": "gradient", "warm": 2}, "warm: does not go with gradient"),
        ({"engine": "line", "warm": 2}, "warm: does not go with line"),
        ({"name": "tpe", "batch": 8}, "batch: does not go with optuna tpe"),
    ],
)
def test_where_there_is_no_start_to_warm(tmp_path: Path, sampler: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_study_file(write_study(tmp_path, sampler=sampler))


def test_a_whole_study(tmp_path: Path) -> None:
    sampler = {"engine": "composite", "startup": 2, "warm": 2, "steps": 1, "batch": 7}
    store, problem = create(
        load_study_file(write_study(tmp_path, trials=4, sampler=sampler)),
        f"sqlite:///{tmp_path / 'study.db'}",
        "cpu",
    )
    run(store, problem)
    trials = StudyStore.open(store.url, "pico").trials()[len(BASELINES) :]
    full = problem.evaluator("search").tokens
    assert all(trial.tokens > full for trial in trials[:2])
    assert [trial.tokens for trial in trials[2:]] == [full] * 2
