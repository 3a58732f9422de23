"""Descents as a search: where they start, what they remember, what they cost, and whole studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from objectives.scoring.masks import Unmaskable
from search.config.sampler import SamplerConfig
from search.config.study_file import load_study_file
from search.errors import ConfigError
from search.merging.baselines import BASELINES
from search.running.budget import set_budget, set_tokens
from search.running.launch import create
from search.samplers import Engine, make_engine
from search.samplers.gradient_engine import spread
from search.storage.store import StudyStore
from search.storage.trials import PROPOSAL_TOKENS, TrialRecord
from search.study import run
from tests.conftest import Cli
from tests.pico_study import write_study
from tests.samplers.test_samplers import BEST, BOUNDS, GROUPS, LINE, losses, record, sources

FIRST = len(BASELINES)


def engine(**keys: Any) -> Engine:
    config = SamplerConfig(engine="gradient", name="adam", **keys)
    return make_engine(config, GROUPS, BOUNDS, sources())


def history_of(one: Engine, trials: int) -> list[TrialRecord]:
    history: list[TrialRecord] = []
    for number in range(trials):
        history.append(record(one, number, "complete", history))
    return history


def vector(trial: TrialRecord) -> np.ndarray[Any, Any]:
    return np.array([trial.coefficients[group] for group in GROUPS])


def test_each_descent_reaches_the_best_for_its_weights() -> None:
    history = history_of(engine(weights=3, steps=10, rate=0.05), FIRST + 3 * 12)
    reach = np.ptp([losses(trial)[:2] for trial in history[:FIRST]], axis=0)
    for turn, weights in enumerate(spread(3, 2, seed=0) / reach):
        best = weights @ BEST / weights.sum()
        np.testing.assert_allclose(vector(history[FIRST + 33 + turn]), best, atol=0.01)


def test_a_descent_starts_at_the_best_baseline_and_goes_on_where_it_was() -> None:
    slow = engine(weights=2, steps=1, rate=1e-6)
    history = history_of(slow, FIRST + 4)
    for turn, weights in enumerate(spread(2, 2, seed=0)):
        values = np.array([r.values for r in history[:FIRST]]) * [-1, 1]
        scaled = (values - values.min(axis=0)) / np.ptp(values, axis=0)
        start = LINE[int((scaled @ weights).argmin())]
        first, second = (vector(history[FIRST + turn + 2 * lap]) for lap in (0, 1))
        np.testing.assert_allclose(first, start, atol=1.1e-6)
        assert 0 < np.abs(second - start).max() <= 2.1e-6
        assert np.abs(second - start).max() > np.abs(first - start).max()


def test_the_split_of_steps_over_trials_does_not_matter() -> None:
    fine, coarse = (history_of(engine(weights=1, steps=s), FIRST + n) for s, n in ((1, 12), (4, 3)))
    assert fine[-1].coefficients == coarse[-1].coefficients
    assert (
        sum(r.tags[PROPOSAL_TOKENS] for r in fine[FIRST:])
        == sum(r.tags[PROPOSAL_TOKENS] for r in coarse[FIRST:])
        == 12 * 30
    )


def test_a_failed_end_is_left_and_an_unfinished_one_is_not_waited_for() -> None:
    one = engine(weights=1)
    history = history_of(one, FIRST + 2)
    after = one.propose(history, len(history))
    running = [*history[:-1], replace(history[-1], state="running", values=None)]
    assert one.propose(running, len(running)) == after
    failed = [*history[:-1], replace(history[-1], state="failed", values=None)]
    assert one.propose(failed, len(failed)).coefficients == history[FIRST].coefficients  # from the start
    nobody = [replace(r, state="running", values=None) for r in history[:FIRST]]
    assert set(one.propose(nobody, FIRST).coefficients) == set(GROUPS)


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_weights_are_spread(objectives: int) -> None:
    weights = spread(8, objectives, seed=3)
    assert weights.shape == ((1, 1) if objectives == 1 else (8, objectives))
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    if objectives == 2:
        assert sorted(np.floor(weights[:, 0] * 8)) == list(range(8))  # one in each eighth


def study(folder: Path, trials: int = 5, **keys: Any) -> Path:
    sampler = {"engine": "gradient", "seed": 1, "steps": 2, "weights": 2}
    return write_study(folder, trials=trials, **{"sampler": sampler, **keys})


def opened(path: Path, url: str) -> Any:
    return create(load_study_file(path), url, "cpu")


def essence(trials: Sequence[TrialRecord]) -> list[Any]:
    return [(t.number, t.kind, t.state, t.coefficients, t.values, t.tags) for t in trials]


def test_an_interrupted_study_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """In a new process nothing is left but the storage: here a new engine, model and scorer."""
    whole, parts = (f"sqlite:///{tmp_path / name}.db" for name in ("whole", "parts"))
    run(*opened(study(tmp_path), whole))
    for budget in (1, 3, 5):
        store, problem = opened(study(tmp_path), parts)
        set_budget(store, budget)
        run(store, problem)
    one, other = (StudyStore.open(url, "pico").trials() for url in (whole, parts))
    assert essence(one) == essence(other)
    assert [t.state for t in one] == ["complete"] * (FIRST + 5)


def test_cost_is_stored_with_the_trial(tmp_path: Path) -> None:
    store, problem = opened(study(tmp_path, 2), f"sqlite:///{tmp_path / 'study.db'}")
    run(store, problem, report=False)
    tokens = problem.scorer.prepare(problem.questions.search)
    # Two steps of four: scored, forward, backward twice.
    assert [t.tags.get(PROPOSAL_TOKENS) for t in store.trials()] == [None] * FIRST + [2 * 4 * tokens] * 2


def test_a_budget_of_tokens_counts_the_next_proposal(tmp_path: Path) -> None:
    """Baselines, two trials of one evaluation and two steps of four each; a third would not fit by one token."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    store, problem = opened(study(tmp_path, 9), url)
    tokens = problem.evaluator("search").tokens
    set_tokens(store, (FIRST + 3 * 9) * tokens - 1)
    run(store, problem, report=False)
    trials = store.trials()
    assert len(trials) == FIRST + 2
    assert sum(trial.tokens for trial in trials) == (FIRST + 2 * 9) * tokens
    set_tokens(store, (FIRST + 3 * 9) * tokens)
    run(store, problem, report=False)
    assert len(store.trials()) == FIRST + 3


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "gradient: not finite in group embeddings"),
        (RuntimeError("[enforce fail]\nDefaultCPUAllocator: can't allocate"), "can't allocate"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_gradient_that_fails_stops_the_study_cleanly(
    error: Exception | None, message: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, exit code 1, no half-made trial; without the cause the same command goes on."""

    def broken(*tensors: Any) -> float:
        if error is not None:
            raise error
        return float("nan")

    path = study(tmp_path / "study", 2)
    with monkeypatch.context() as patched:
        patched.setattr("search.samplers.gradient.coefficient_derivative", broken)
        code, out, err = cli("launch", path)
    assert (code, out) == (1, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"error: trial {FIRST} could not be proposed: ")
    assert message in last
    assert "Traceback" not in err
    assert "defect" not in err
    trials = StudyStore.open("sqlite:///runs/pico/study.db", "pico").trials()
    assert [trial.state for trial in trials] == ["complete"] * FIRST
    code, _, err = cli("launch", path)
    assert code == 0, err


def test_a_model_without_gradients_is_refused_before_anything_is_written(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any) -> None:
        raise Unmaskable("layers of type 'state space' are no plain attention")

    monkeypatch.setattr("objectives.scoring.scorer.PackedModel", refuse)
    code, out, err = cli("launch", study(tmp_path / "study"))
    assert (code, out) == (2, "")
    assert "needs a model that takes token trees" in err
    assert "state space" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_check_says_what_a_proposal_costs(tmp_path: Path, cli: Cli) -> None:
    code, out, _ = cli("check", study(tmp_path))
    assert code == 0
    assert "search      gradient, " in out
    assert "gradient    8 times that before each trial is proposed" in out  # two steps of four
    _, out, _ = cli("check", study(tmp_path, objectives=["accuracy", "brier"]))
    assert "gradient    6 times that" in out


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"merge": {"method": "slerp"}}, "sampler: gradients need merge.method linear"),
        (
            {"objectives": ["accuracy", "auroc"]},
            "objectives: auroc: the gradient engine has no differentiable",
        ),
        (
            {"sampler": {"engine": "gradient", "name": "sgd"}},
            "gradient has no 'sgd' here. Choose one of: adam",
        ),
        ({"sampler": {"engine": "gradient", "population": 9}}, "population: does not go with gradient adam"),
        ({"sampler": {"engine": "optuna", "steps": 9}}, "steps: does not go with optuna tpe"),
        (
            {"sampler": {"engine": "pymoo", "name": "nsga2", "rate": 0.1}},
            "rate: does not go with pymoo nsga2",
        ),
        ({"sampler": {"engine": "gradient", "rate": 0.0}}, "rate: found 0.0: .*greater than 0"),
    ],
)
def test_study_files_that_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study_file(study(tmp_path, **keys))
