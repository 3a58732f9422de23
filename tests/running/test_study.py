"""The main path when things go wrong inside a trial."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from objectives.evaluation import Evaluation
from search.config.study_file import load_study_file
from search.errors import DiskError
from search.interrupt import Interrupted, interruptible
from search.merging.baselines import BASELINES
from search.results.status import read_status
from search.running.budget import expected_trials, set_budget, set_tokens
from search.running.launch import create
from search.running.observer import Observer
from search.running.problem import Problem
from search.samplers import Proposal
from search.storage.evidence import EvidenceFolder
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord, front_of
from search.storage.worker import Worker
from search.study import run
from tests.pico_study import write_study

FIRST = len(BASELINES)


@pytest.fixture
def opened(tmp_path: Path) -> tuple[StudyStore, Problem]:
    study = write_study(tmp_path, trials=6)
    return create(load_study_file(study), f"sqlite:///{tmp_path / 'study.db'}", "cpu")


def test_a_full_disk_gives_the_trial_back(
    opened: tuple[StudyStore, Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, problem = opened

    def full(self: EvidenceFolder, evaluation: Evaluation) -> str:
        raise DiskError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(EvidenceFolder, "save", full)
        for _ in range(7):
            with pytest.raises(DiskError):
                run(store, problem)
    assert [t.state for t in store.trials()] == ["waiting"]
    run(store, problem)
    assert [t.state for t in store.trials()] == ["complete"] * (FIRST + 6)


def test_a_recipe_proposed_twice_is_scored_once(
    opened: tuple[StudyStore, Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, problem = opened

    class Repeating:
        def baseline_tags(self, index: int) -> dict[str, Any]:
            return {}

        def propose(self, history: Any, draw: int) -> Proposal:
            return Proposal(dict.fromkeys(problem.space.names, 0.25 + 0.5 * (draw % 2)))

    monkeypatch.setattr("search.study.make_engine", lambda *_: Repeating())
    scored: list[str] = []
    evaluate = Problem.evaluate

    def counting(self: Problem, split: Any, progress: Any = None) -> Evaluation:
        scored.append(split)
        return evaluate(self, split, progress)

    monkeypatch.setattr(Problem, "evaluate", counting)
    run(store, problem, report=False)
    assert len(scored) == FIRST + 2
    trials = store.trials()
    assert [t.attributes.get("same_as") for t in trials[FIRST:]] == [None, None, 11, 12, 11, 12]
    assert trials[15].values == trials[11].values


def test_equal_recipes_give_equal_evidence(opened: tuple[StudyStore, Problem], tmp_path: Path) -> None:
    """Same recipe, same machine: the same bytes, whatever was merged in between."""
    _, problem = opened
    digests = []
    for coefficient in (0.3, 1.0, 0.3):
        problem.merge(problem.space.uniform(coefficient))
        digests.append(EvidenceFolder(f"sqlite:///{tmp_path / 'x.db'}", "x").save(problem.evaluate("search")))
    assert digests[0] == digests[2] != digests[1]


def test_no_search_trials_is_the_uniform_line(opened: tuple[StudyStore, Problem]) -> None:
    store, problem = opened
    assert set_budget(store, "0") == 0
    run(store, problem)
    assert [t.kind for t in store.trials()] == ["pre", "post", *["uniform"] * 9]
    assert front_of([], [True, False]) == set()


@pytest.mark.parametrize(
    "merge", [{"method": "slerp", "dtype": "float32"}, {"method": "linear", "dtype": "bfloat16"}]
)
def test_other_methods_and_dtypes(tmp_path: Path, merge: dict[str, str]) -> None:
    study = write_study(tmp_path, trials=2, merge=merge, parents={"dtype": "bfloat16"})
    store, problem = create(load_study_file(study), f"sqlite:///{tmp_path / 'study.db'}", "cpu")
    run(store, problem)
    assert all(t.state == "complete" for t in store.trials())


def test_a_budget_of_tokens_is_never_exceeded(opened: tuple[StudyStore, Problem]) -> None:
    store, problem = opened
    full = problem.evaluator("search").tokens
    set_tokens(store, (FIRST + 3) * full + full // 2)
    run(store, problem, report=False)
    assert [record.tokens for record in store.trials()] == [full] * (FIRST + 3)
    assert read_status(store).total == FIRST + 3
    assert expected_trials(store.trials()[:5], 100, (FIRST + 3) * full) == FIRST + 3
    assert expected_trials([], 100, 5) == expected_trials(store.trials(), 100, None) == 100
    set_tokens(store, (FIRST + 20) * full)
    run(store, problem, report=False)
    assert len(store.trials()) == FIRST + 6, "its six trials end it first"


def test_a_new_limit_of_tokens_stays_until_the_file_names_another(
    opened: tuple[StudyStore, Problem],
) -> None:
    store, problem = opened
    set_tokens(store, 1234)
    config = problem.config
    older = {key: value for key, value in config.to_json().items() if key != "trial_seconds"}
    for stored in (config.to_json(), older):  # as an earlier version wrote it, which did not know a key
        store.set_attribute("config", stored)
        create(config, store.url, "cpu", problem=problem)
        assert store.attribute("tokens") == 1234
        assert store.attribute("config") == config.to_json()
    create(config.model_copy(update={"tokens": 999}), store.url, "cpu", problem=problem)
    assert store.attribute("tokens") == 999


def test_a_budget_is_raised_to_what_a_file_says_and_never_lowered_by_it(
    opened: tuple[StudyStore, Problem],
) -> None:
    store, _ = opened
    assert [set_budget(store, None, at_least=n) for n in (8, 4)] == [8, 8]
    assert [set_budget(store, text, at_least=20) for text in ("+2", "5")] == [10, 5]


def test_baselines_are_scored_whatever_the_budget_of_tokens(opened: tuple[StudyStore, Problem]) -> None:
    store, problem = opened
    set_tokens(store, 1)
    run(store, problem, report=False)
    assert len(store.trials()) == FIRST


def test_idle_workers_leave_the_store_to_those_with_something_to_tell(
    opened: tuple[StudyStore, Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: how often the store is held while another worker has the last trial."""
    store, problem = opened
    set_budget(store, 1)
    other = Worker("elsewhere", "boot", "", 1, "1")
    holds, looks = 0, 0
    exclusive, all_taken = StudyStore.exclusive, StudyStore.all_taken

    def held(self: StudyStore) -> Any:
        nonlocal holds
        holds += 1
        assert holds < 200, "idle workers hold the store again and again"
        return exclusive(self)

    def acting(act: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr("search.storage.store.this_worker", lambda: other)
            return act()

    def look(self: StudyStore) -> bool:
        nonlocal looks
        looks += 1
        if looks == 30:
            assert acting(lambda: store.complete(last.number, [0.5, 0.5], {"tokens": 1}))
        return all_taken(self)

    class TakesLast(Observer):
        """When the last baseline is told, another worker claims the only search trial."""

        def finished(self, trial: TrialRecord, values: Sequence[float]) -> None:
            nonlocal last, holds
            if trial.number == FIRST - 1:
                recipe = problem.space.uniform(0.25)
                attributes = {"method": recipe.method, "recipe": recipe.key}
                last = acting(
                    lambda: store.claim("search", recipe.coefficients, problem.distributions, attributes, {})
                )
                holds = 0

    last: Any = None
    monkeypatch.setattr("search.study.POLL_SECONDS", 0.01)
    monkeypatch.setattr("search.study.LONGEST_POLL_SECONDS", 0.05)
    monkeypatch.setattr(StudyStore, "exclusive", held)
    monkeypatch.setattr(StudyStore, "all_taken", look)
    run(store, problem, TakesLast(), report=False)
    assert looks >= 30
    assert holds == 3  # an ask that finds nothing, the other's tell, and an ask that finds all told
    assert [t.state for t in store.trials()] == ["complete"] * (FIRST + 1)


def test_a_worker_draws_in_the_place_of_a_trial_that_fails_while_it_looks_whether_it_may_leave(
    opened: tuple[StudyStore, Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker's last trial fails the moment after this one asked in vain."""
    store, problem = opened
    set_budget(store, 1)
    other, exclusive, failed = Worker("elsewhere", "boot", "", 1, "1"), StudyStore.exclusive, []

    @contextmanager
    def failing(self: StudyStore) -> Iterator[None]:
        with exclusive(self):
            yield
        theirs = [t.number for t in self.trials() if t.attributes["worker"] == other.to_json()]
        if theirs and not failed:
            failed.append(theirs[0])
            self._set_state(theirs[0], TrialState.FAIL, error="out of memory")

    class TakesLast(Observer):
        def finished(self, trial: TrialRecord, values: Sequence[float]) -> None:
            if trial.number == FIRST - 1:
                recipe = problem.space.uniform(0.25)
                attributes = {"method": recipe.method, "recipe": recipe.key}
                with monkeypatch.context() as patched:
                    patched.setattr("search.storage.store.this_worker", lambda: other)
                    store.claim("search", recipe.coefficients, problem.distributions, attributes, {})

    monkeypatch.setattr("search.study.POLL_SECONDS", 0.01)
    monkeypatch.setattr(StudyStore, "exclusive", failing)
    run(store, problem, TakesLast(), report=False)
    assert failed == [FIRST]
    assert [t.state for t in store.trials()] == ["complete"] * FIRST + ["failed", "complete"]


@pytest.mark.fault(2)
def test_a_signal_between_a_claim_and_its_run_gives_the_trial_back(
    opened: tuple[StudyStore, Problem],
) -> None:
    store, problem = opened

    class Stopping(Observer):
        def step(self, step: str, trial: TrialRecord) -> None:
            if step == "asked" and trial.number == 3:
                raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(store, problem, Stopping())
    assert [t.state for t in store.trials()] == ["complete"] * 3 + ["waiting"]
    run(store, problem)
    assert [t.attributes["tries"] for t in store.trials()] == [1] * len(store.trials())


@pytest.mark.fault(2)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_arrives_in_a_finalizer_is_not_lost(opened: tuple[StudyStore, Problem]) -> None:
    """Python prints an exception there and drops it; once that trial is evaluated it is given back all the same."""
    store, problem = opened

    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # the handler raises here

    class Striking(Observer):
        def step(self, step: str, trial: TrialRecord) -> None:
            if step == "merged" and trial.number == 2:
                Finalized()

    with pytest.raises(Interrupted), interruptible():
        run(store, problem, Striking())
    assert [t.state for t in store.trials()] == ["complete"] * 2 + ["waiting"]
    run(store, problem)
    assert all(t.state == "complete" for t in store.trials())
