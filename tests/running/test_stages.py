"""Candidates scored in parts: joining, stopping, what is stored; a resumed study equals an uninterrupted one."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.evaluation import Evaluation
from objectives.evaluator import Evaluator
from objectives.metrics.names import METRIC_NAMES, Metric, get_metric
from objectives.outcomes import Outcomes
from search.config.sections import FidelityConfig
from search.config.study_file import load_study_file
from search.errors import ConfigError, EvaluationError
from search.merging.baselines import BASELINES
from search.merging.space import UNIFORM_LINE
from search.results.status import read_status
from search.running.budget import set_budget, set_tokens
from search.running.fidelity.estimating import Estimating
from search.running.fidelity.predicting import Predicting
from search.running.fidelity.stages import Answers, as_learnt
from search.running.launch import create
from search.running.observer import Observer
from search.running.problem import Problem
from search.samplers import Proposal
from search.storage.evidence import EvidenceFolder
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord
from search.study import run
from tests.conftest import Cli
from tests.pico_study import write_study
from tests.results.test_dashboard import get
from tests.study_process import ended, start, whole

FIRST = len(BASELINES)
RACING = {"racing": {"error": 0.3, "looks": 4}}
FIDELITY = {"fidelity": {"estimator": "gmp-irt", "questions": 8}}
ESTIMATORS = ("mean", "weighted", "p-irt", "gp-irt", "mp-irt", "gmp-irt")


def write_staged(folder: Path, **keys: Any) -> Path:
    return write_study(folder, **{"trials": 12, "split": {"search": 0.7}, **keys})


def opened(folder: Path, **keys: Any) -> tuple[StudyStore, Problem]:
    study = write_staged(folder, **keys)
    return create(load_study_file(study), f"sqlite:///{folder / 'study.db'}", "cpu")


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    _, problem = opened(tmp_path_factory.mktemp("pico"))
    problem.merge(problem.space.uniform(0.5))
    return problem.evaluator("search")


@pytest.fixture(scope="module")
def in_one_go(evaluator: Evaluator) -> Evaluation:
    return evaluator.evaluate()


@pytest.fixture(scope="module", params=["racing", "fidelity"])
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, StudyStore]:
    folder = tmp_path_factory.mktemp(request.param)
    store, problem = opened(folder, **(RACING if request.param == "racing" else FIDELITY))
    run(store, problem)
    return folder, store


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_the_parts_joined_are_the_whole(
    evaluator: Evaluator, in_one_go: Evaluation, data: st.DataObject
) -> None:
    n = len(evaluator.questions)
    order = np.array(data.draw(st.permutations(range(n))))
    cuts = sorted(data.draw(st.lists(st.integers(1, n - 1), unique=True, max_size=3)))
    places = [each.astype(np.int64) for each in np.split(order, cuts)]
    parts = [evaluator.part(each).evaluate() for each in places]
    joined = Evaluation.join(parts, places, evaluator.digest)
    options = np.isfinite(in_one_go.loglikelihood)
    assert (np.isfinite(joined.loglikelihood) == options).all()
    np.testing.assert_allclose(joined.loglikelihood[options], in_one_go.loglikelihood[options], atol=1e-5)
    for name in ("options", "gold", "task"):
        assert (getattr(joined.outcomes, name) == getattr(in_one_go.outcomes, name)).all()
    assert (joined.divisor == in_one_go.divisor).all()
    assert joined.digest == in_one_go.digest
    assert joined.scored_tokens == sum(part.scored_tokens for part in parts) >= in_one_go.scored_tokens


def test_a_joined_evaluation_is_read_back_as_one_that_was_made_in_one_go(
    evaluator: Evaluator, tmp_path: Path
) -> None:
    places = [np.arange(0, 28, 2), np.arange(1, 28, 2)]
    joined = Evaluation.join([evaluator.part(each).evaluate() for each in places], places, evaluator.digest)
    sha = joined.save(tmp_path / "joined.safetensors")
    read = Evaluation.load(tmp_path / "joined.safetensors", sha256=sha, digest=evaluator.digest)
    assert (read.outcomes.probability == joined.outcomes.probability).all()


def test_parts_of_other_widths_are_padded(in_one_go: Evaluation) -> None:
    wide = in_one_go
    narrow = replace(
        wide,
        outcomes=replace(
            wide.outcomes,
            probability=np.full((28, 2), 0.5),
            options=np.full(28, 2),
            gold=np.zeros(28, dtype=np.int64),
        ),
        loglikelihood=wide.loglikelihood[:, :2],
        divisor=wide.divisor[:, :2],
    )
    joined = Evaluation.join([narrow, wide], [np.arange(28), np.arange(28, 56)], "both")
    assert joined.loglikelihood.shape == (56, 4)
    assert np.isneginf(joined.loglikelihood[:28, 2:]).all()
    assert (joined.divisor[:28, 2:] == 1.0).all()


@pytest.mark.parametrize("places", [[], [[0, 1]], [[0] * 28], [list(range(28)), list(range(28))]])
def test_parts_that_do_not_fit_are_not_joined(in_one_go: Evaluation, places: list[list[int]]) -> None:
    with pytest.raises(EvaluationError, match="wanted one place for each question"):
        Evaluation.join([in_one_go] * len(places), [np.array(each) for each in places], "x")


def test_a_mean_is_the_mean_of_its_terms(in_one_go: Evaluation) -> None:
    for name in METRIC_NAMES:
        metric = get_metric(name)
        if metric.terms is not None:
            assert metric.terms(in_one_go.outcomes).mean() == pytest.approx(metric.value(in_one_go.outcomes))
    assert {name for name in METRIC_NAMES if get_metric(name).terms is not None} == {
        "accuracy",
        "brier",
        "brier:top",
        "nll",
    }


def test_a_stopped_trial_says_what_it_came_to(finished: tuple[Path, StudyStore]) -> None:
    _, store = finished
    trials = store.trials()
    stopped = [t for t in trials if t.state == "stopped"]
    assert stopped, "otherwise this study tests nothing"
    complete = {t.number: t for t in trials if t.state == "complete"}
    assert len(stopped) + len(complete) == FIRST + 12, "both count towards the budget"
    evidence = EvidenceFolder(store.url, store.name)
    for trial in stopped:
        assert trial.kind == "search"
        assert trial.values is None
        assert trial.finished
        assert len(trial.attributes["estimate"]) == 2
        m, n = trial.attributes["scored"]
        part = evidence.load(trial.attributes["partial"])
        assert len(part.outcomes) == m < n == 28
        assert "\n" not in trial.attributes["reason"]
        assert "evidence" not in trial.attributes
        dominating = int(trial.attributes["reason"].partition(" trial ")[2].split()[0])
        assert dominating in complete
        assert dominating < trial.number


def test_stopped_trials_are_on_no_board(finished: tuple[Path, StudyStore], cli: Cli) -> None:
    _, store = finished
    stopped = {t.number for t in store.trials() if t.state == "stopped"}
    board, _ = whole(store.url)
    assert board["stopped"] == len(stopped)
    assert not stopped & {row["trial"] for row in board["trials"]}
    assert not any(f"report:{number}" in store.attributes() for number in stopped)
    code, out, _ = cli("front", "pico", "--storage", store.url)
    assert code == 0
    assert "stopped early" in out
    code, _, err = cli(
        "export", "pico", "--storage", store.url, "--select", f"trial:{min(stopped)}", "--out", "exported"
    )
    assert code == 2
    assert f"trial {min(stopped)}" in err


def test_the_dashboard_shows_them_as_pruned(finished: tuple[Path, StudyStore]) -> None:
    _, store = finished
    shown = get(store.url, "/api/studies/1")["trials"]
    expected = {"complete": "Complete", "stopped": "Pruned"}
    assert [t["state"] for t in shown] == [expected[t.state] for t in store.trials()]


def test_a_run_says_that_it_stops_a_trial(tmp_path: Path, cli: Cli) -> None:
    study = write_staged(tmp_path / "study", **FIDELITY, trials=6)
    code, out, _ = cli("check", study)
    assert code == 0
    assert "fidelity    8 questions first, estimates by gmp-irt" in out
    code, _, err = cli("launch", study)
    assert code == 0
    assert "stopped early: estimated by gmp-irt from 8 of 28 questions" in " ".join(err.split())
    assert "17/17" in err


def test_the_status_counts_them_and_what_they_saved(finished: tuple[Path, StudyStore]) -> None:
    _, store = finished
    trials = store.trials()
    found = read_status(store)
    assert found.to_go == 0
    assert f"{found.trials['stopped']} stopped early" in found.text()
    full = trials[0].tokens
    own = [t.tokens for t in trials if t.kind == "search" and "same_as" not in t.attributes]
    assert found.tokens_saved == len(own) * full - sum(own)
    assert found.tokens == sum(t.tokens for t in trials)
    assert "tokens_saved" in found.to_json()
    assert "by scoring candidates in parts" in found.text()


def test_tokens_are_those_that_were_fed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, problem = opened(tmp_path, **RACING)
    fed = []
    evaluate = Evaluator.evaluate

    def counting(self: Evaluator, progress: Any = None) -> Evaluation:
        found = evaluate(self, progress)
        fed.append(found.scored_tokens)
        return found

    monkeypatch.setattr(Evaluator, "evaluate", counting)
    run(store, problem, report=False)
    assert sum(t.tokens for t in store.trials()) == sum(fed)


def test_a_budget_of_tokens_counts_stopped_trials(tmp_path: Path) -> None:
    store, problem = opened(tmp_path, **FIDELITY, trials=200)
    limit = problem.evaluator("search").tokens * (FIRST + 6)
    set_tokens(store, limit)
    run(store, problem, report=False)
    trials = store.trials()
    stopped = [t for t in trials if t.state == "stopped"]
    assert stopped
    assert sum(t.tokens for t in trials) <= limit
    assert len(trials) > FIRST + 6


class Listening(Observer):
    """Nothing but a place to look at what a run told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, str]] = []

    def stopped(self, trial: TrialRecord, reason: str) -> None:
        self.told.append((trial.number, reason))


def test_a_recipe_that_was_stopped_is_not_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, problem = opened(tmp_path, **FIDELITY, trials=6)

    class Repeating:
        def baseline_tags(self, index: int) -> dict[str, Any]:
            return {}

        def propose(self, history: Any, draw: int) -> Proposal:
            seen = [t for t in history if t.kind == "search"]
            assert all(t.state == "complete" and t.values is not None for t in seen)
            return Proposal(dict.fromkeys(problem.space.names, -0.19 + 0.001 * (draw % 2)))

    monkeypatch.setattr("search.study.make_engine", lambda *_: Repeating())
    # Whatever it is: it is dominated.
    monkeypatch.setattr(Estimating, "_estimate", lambda *_: [0.0, 1.0])
    observer = Listening()
    run(store, problem, observer, report=False)
    trials = store.trials()[FIRST:]
    assert [t.state for t in trials] == ["stopped"] * 6
    assert [t.attributes.get("same_as") for t in trials] == [None, None, 11, 12, 11, 12]
    assert [t.tokens > 0 for t in trials] == [True, True, False, False, False, False]
    assert trials[4].attributes["estimate"] == trials[0].attributes["estimate"]
    assert trials[4].attributes["partial"] == trials[0].attributes["partial"]
    assert [number for number, _ in observer.told] == list(range(11, 17))
    assert set_budget(store, "0") == 6, "what was stopped was tried"


def test_engines_see_estimates_as_values() -> None:
    stopped = TrialRecord(3, "search", "stopped", {"a": 0.5}, None, {"estimate": [0.4, 0.1]}, {}, 1.0)
    failed = replace(stopped, number=4, state="failed")
    learnt = as_learnt([stopped, failed])
    assert learnt[0] == replace(stopped, state="complete", values=(0.4, 0.1))
    assert learnt[1] is failed
    assert stopped.values is None


@pytest.mark.parametrize(
    "sampler",
    [
        {"engine": "optuna", "name": "nsga3", "seed": 0, "population": 12},
        {"engine": "optuna", "name": "tpe", "seed": 0, "startup": 12},
        {"engine": "pymoo", "name": "nsga2", "seed": 0, "population": 12},
    ],
    ids=["nsga3", "tpe", "pymoo"],
)
def test_engines_go_on_over_stopped_trials(tmp_path: Path, sampler: dict[str, Any]) -> None:
    store, problem = opened(tmp_path, **FIDELITY, sampler=sampler, trials=26)
    run(store, problem, report=False)
    trials = store.trials()
    assert len(trials) == FIRST + 26
    assert {t.state for t in trials} == {"complete", "stopped"}


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "answers"])
def test_every_estimator_runs_a_study(tmp_path: Path, estimator: str) -> None:
    objectives = ["accuracy", "ece:5", "brier", "nll@made-up"]
    store, problem = opened(
        tmp_path, fidelity={"estimator": estimator, "questions": 8}, objectives=objectives, trials=4
    )
    run(store, problem, report=False)
    trials = store.trials()
    assert all(t.state in ("complete", "stopped") for t in trials)
    assert all(np.isfinite(t.attributes["estimate"]).all() for t in trials if t.state == "stopped")


@pytest.mark.parametrize(
    "keys", [RACING, pytest.param(FIDELITY, marks=pytest.mark.slow)], ids=["racing", "fidelity"]
)
def test_killed_at_every_step_it_ends_with_the_same_trials(tmp_path: Path, keys: dict[str, Any]) -> None:
    study = write_staged(tmp_path / "study", **keys)
    alone, killed = (f"sqlite:///{tmp_path / name}.db" for name in ("alone", "killed"))
    assert ended(start(study, alone)) == 0
    stopped = [t.number for t in StudyStore.open(alone, "pico").trials() if t.state == "stopped"]
    assert stopped
    for step, number in (
        ("evaluating", FIRST),
        ("evaluated", stopped[0]),
        ("evidence", stopped[0]),
        ("told", stopped[0]),
    ):
        assert ended(start(study, killed, step, number)) == -signal.SIGKILL, step
    assert ended(start(study, killed)) == 0
    assert whole(killed) == whole(alone)
    kept = ("estimate", "scored", "tokens", "partial", "reason", "evidence", "same_as")
    both = [
        [{key: t.attributes.get(key) for key in kept} for t in StudyStore.open(url, "pico").trials()]
        for url in (alone, killed)
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("keys", "refusal"),
    [
        (RACING | FIDELITY, "racing: does not go with fidelity"),
        ({"racing": {"looks": 1}}, "racing.looks: found 1"),
        ({"racing": {"error": 0.0}}, "racing.error: found 0.0"),
        ({"racing": {"eror": 0.1}}, "racing.eror: unknown key. Did you mean 'error'"),
        ({"racing": {"looks": 29}}, "racing.looks: 29 looks at the search split's 28 questions"),
        (
            {"fidelity": {"questions": 28}},
            r"fidelity.questions: 28 of the search split's 28 .*wanted 1 to 27",
        ),
        ({"fidelity": {"estimator": "mean"}}, "fidelity.questions: missing"),
        ({"fidelity": {"questions": 8, "estimator": "girt"}}, "fidelity: estimator: none is called 'girt'"),
        (
            {"fidelity": {"questions": 8, "estimator": "mean", "dimensions": 2}},
            "dimensions: do not go with mean",
        ),
        (
            RACING | {"objectives": ["accuracy", "distinct-1"], "diversity": {"prompts": "./p.jsonl"}},
            "racing: does not go with objective distinct-1",
        ),
        (
            FIDELITY | {"objectives": ["accuracy", "self-bleu"], "diversity": {"prompts": "./p.jsonl"}},
            "fidelity: does not go with objective self-bleu",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, keys: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ConfigError, match=refusal) as error:
        opened(tmp_path, **keys)
    assert "\n" not in str(error.value)


def test_a_running_study_keeps_its_rule(tmp_path: Path) -> None:
    store, _ = opened(tmp_path, **RACING)
    with pytest.raises(ConfigError, match=r"racing.looks: 4 -> 5"):
        create(load_study_file(tmp_path / "study.yaml", ["racing.looks=5"]), store.url, "cpu")


def test_all_questions_make_the_estimate_the_mean(tmp_path: Path, evaluator: Evaluator) -> None:
    """With n = N every estimator is the mean: nothing is left to guess."""
    store, problem = opened(tmp_path, **FIDELITY, trials=1)
    run(store, problem, report=False)
    answers = Answers(EvidenceFolder(store.url, store.name))
    baselines = store.trials()[:FIRST]
    task = np.zeros(28, dtype=np.int64)
    for name in ESTIMATORS:
        config = problem.config.fidelity
        assert config is not None
        metrics = [get_metric("accuracy"), get_metric("ece")]
        rule = Estimating(
            config.model_copy(update={"estimator": name, "questions": 28}), metrics, task, answers
        )
        items = rule._items(baselines)
        assert items is not None
        answered = answers(store.trials()[-1]) if store.trials()[-1].values else answers(baselines[3])
        found = rule._estimate(answered, items, baselines)
        assert found == pytest.approx([metric.value(answered) for metric in metrics])


# -- predicted answers ----------------------------------------------------------------------------------------------


def bent(coefficients: Sequence[float]) -> Outcomes:
    """Answers to 300 questions that follow the coefficients smoothly: the first one knows, the second one sharpens."""
    knows, sharpens, *_ = coefficients
    draw = np.random.default_rng(0)
    gold, noise = draw.integers(0, 4, 300), draw.normal(size=(300, 4))
    score = np.exp(sharpens) * (noise + (1.5 - 2.0 * (knows - 0.8) ** 2) * np.eye(4)[gold])
    zero = np.zeros(300, dtype=np.int64)
    return Outcomes.from_loglikelihoods(score, zero + 4, gold, zero)


def scored_at(number: int, coefficients: Sequence[float], metrics: Sequence[Metric]) -> TrialRecord:
    values = tuple(metric.value(bent(coefficients)) for metric in metrics)
    kind = {0: "pre", 10: "post"}.get(number, "uniform" if number < FIRST else "search")
    named = {"a": float(coefficients[0]), "b": float(coefficients[1])}
    return TrialRecord(
        number, kind, "complete", named, values, {"recipe": str(number), "evidence": str(number)}, {}, None
    )


def predicting(questions: int) -> tuple[Predicting, list[TrialRecord], list[Metric]]:
    metrics = [get_metric("accuracy"), get_metric("ece")]
    draw = np.random.default_rng(1)
    places = [*([c, c] for c in UNIFORM_LINE), *draw.random((16, 2)).tolist()]
    records = [scored_at(number, place, metrics) for number, place in enumerate(places)]
    config = FidelityConfig(estimator="answers", questions=questions)
    answers = lambda record: bent(list(record.coefficients.values()))  # noqa: E731
    place = lambda record: np.array(list(record.coefficients.values()))  # noqa: E731
    return Predicting(config, metrics, bent([0, 0]).task, answers, place), records, metrics  # type: ignore[arg-type]


def test_predicted_answers_tell_who_is_dominated() -> None:
    """Only who lies within the error of prediction of the front may be judged wrongly."""
    rule, records, metrics = predicting(20)
    stopped = 0
    for number, place in enumerate(np.random.default_rng(2).random((40, 2)).tolist(), start=len(records)):
        one = scored_at(number, place, metrics)
        verdict = rule.judge(one, records)(bent(place).select(rule.parts[0]), rule.parts[0])
        assert one.values is not None
        if verdict is None:
            continue
        stopped += 1
        assert np.abs(np.array(verdict.estimate) - one.values).max() < 0.03
        better = [r for r in records if r.values and r.values[0] >= one.values[0] - 0.03]
        assert any(r.values[1] <= one.values[1] + 0.03 for r in better if r.values)
    assert stopped > 10


def test_with_every_question_asked_nothing_is_predicted() -> None:
    rule, records, metrics = predicting(300)
    dominated = scored_at(99, [0.0, 1.0], metrics)
    verdict = rule.judge(dominated, records)(bent([0.0, 1.0]), rule.parts[0])
    assert verdict is not None
    assert verdict.estimate == pytest.approx(dominated.values)


def test_everybody_is_promoted_while_the_bank_is_small() -> None:
    rule, records, metrics = predicting(20)
    dominated = scored_at(99, [0.0, 1.0], metrics)
    for few in (records[:FIRST], records[: FIRST + 7]):  # a bank grows by eight
        assert rule.judge(dominated, few)(bent([0.0, 1.0]).select(rule.parts[0]), rule.parts[0]) is None
