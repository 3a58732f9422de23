"""The law of racing: a recipe that belongs on the front is stopped with a probability of at most `error`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.metrics.names import get_metric
from objectives.outcomes import Integers, Outcomes
from search.config.sections import RacingConfig
from search.front import non_dominated
from search.running.fidelity.racing import Comparison, Racing, looks
from search.running.fidelity.stages import Verdict
from search.storage.trials import TrialRecord


class World:
    """Recipes whose answers are alike, as those of merges of one pair are; the first one is the candidate."""

    def __init__(self, seed: int, n: int, names: Sequence[str], recipes: int = 6, tasks: int = 1) -> None:
        random = np.random.default_rng(seed)
        self.task = random.integers(0, tasks, n)
        self.task[:tasks] = np.arange(tasks)
        gold = random.integers(0, 4, n)
        shared = random.normal(size=(n, 4))
        shared[np.arange(n), gold] += random.exponential(1.2, n)
        self.metrics = [get_metric(name, [f"t{index}" for index in range(tasks)]) for name in names]
        self.answers = [
            self._answered(shared + 0.4 * random.normal(size=(n, 4)), gold, random.uniform(1.0, 2.0))
            for _ in range(recipes)
        ]
        self.records = [
            TrialRecord(
                number,
                "search",
                "complete",
                {"a": float(random.random())},
                tuple(metric.value(outcomes) for metric in self.metrics),
                {},
                {},
                None,
            )
            for number, outcomes in enumerate(self.answers)
        ]

    def _answered(self, logits: np.ndarray, gold: Integers, sharpness: float) -> Outcomes:  # type: ignore[type-arg]
        scores = sharpness * logits
        n = len(gold)
        return Outcomes.from_loglikelihoods(scores, np.full(n, 4), gold, self.task)

    def __call__(self, record: TrialRecord) -> Outcomes:
        return self.answers[record.number]

    @property
    def candidate_belongs(self) -> bool:
        values = np.array([record.values for record in self.records])
        return bool(non_dominated(values, maximise=[metric.maximize for metric in self.metrics])[0])

    def race(self, config: RacingConfig) -> Verdict | None:
        rule = Racing(config, self.metrics, self.task, self)  # type: ignore[arg-type]
        judge = rule.judge(self.records[0], self.records[1:])
        for look in range(1, len(rule.parts)):
            places = np.sort(np.concatenate(rule.parts[:look]))
            verdict = judge(self.answers[0].select(places), places)
            if verdict is not None:
                return verdict
        return None


@pytest.mark.parametrize(
    ("names", "n", "worlds"),
    [
        (["accuracy"], 200, 80),
        (["accuracy", "brier"], 200, 80),
        (["accuracy", "ece"], 200, 40),
        (["nll", "auroc"], 200, 30),
    ],
    ids=["one mean", "two means", "ece", "auroc"],
)
@pytest.mark.parametrize("error", [0.05, 0.2])
def test_who_belongs_on_the_front_is_rarely_stopped(
    names: list[str], n: int, worlds: int, error: float
) -> None:
    """Over worlds and orders; the standard error of the share is allowed for, three times."""
    stopped = belonging = 0
    others = [0, 0]
    for seed in range(worlds):
        world = World(seed, n, names)
        belongs = world.candidate_belongs
        for order in range(4 if belongs else 1):
            verdict = world.race(RacingConfig(error=error, looks=5, seed=order))
            if belongs:
                belonging += 1
                stopped += verdict is not None
            else:
                others[verdict is not None] += 1
    assert belonging > 20
    assert stopped / belonging <= error + 3.0 * (error * (1.0 - error) / belonging) ** 0.5
    assert others[1] > 0, "nobody is ever stopped: the law would hold for nothing"


@pytest.mark.parametrize("name", ["accuracy", "nll", "accuracy@t1"])
def test_the_bound_of_a_mean_holds_as_often_as_it_says(name: str) -> None:
    """Where it is tight: one look, one objective, the worst case of the rule."""
    level, failed, drawn = 0.1, 0, 0
    for seed in range(60):
        world = World(seed, 300, [name], recipes=4, tasks=2)
        metric = world.metrics[0]
        for order in range(5):
            places = looks(world.task, 3, order)[0]
            comparison = Comparison(world.answers[0].select(places), world.answers[1:], places, world.task)
            _, best = comparison.reach(metric, level)
            true = world.records[0].values[0]  # type: ignore[index]
            failed += true > best if metric.maximize else true < best
            drawn += 1
    assert 0.02 < failed / drawn < level + 3.0 * (level * (1.0 - level) / drawn) ** 0.5


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(8, 200), count=st.integers(2, 8), tasks=st.integers(1, 4), seed=st.integers(0, 2**32 - 1)
)
def test_looks_part_the_questions_and_keep_the_tasks_shares(
    n: int, count: int, tasks: int, seed: int
) -> None:
    task = np.arange(n) % tasks
    parts = looks(task, count, seed)
    assert len(parts) == count
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all((np.diff(part) > 0).all() for part in parts)
    seen = np.concatenate(parts[:-1])
    for value in range(tasks):
        assert abs((task[seen] == value).sum() - (task == value).sum() * len(seen) / n) < tasks + 1
    assert all(np.array_equal(a, b) for a, b in zip(parts, looks(task, count, seed), strict=True))


def test_the_whole_split_has_no_margin() -> None:
    world = World(0, 60, ["accuracy", "nll"])
    comparison = Comparison(world.answers[0], world.answers[1:4], np.arange(60), world.task)
    for metric in world.metrics:
        value, best = comparison.reach(metric, 0.01)
        assert value == pytest.approx(metric.value(world.answers[0]))
        assert best == pytest.approx(value)


def test_answers_that_agree_so_far_prove_nothing() -> None:
    """Eight of sixty questions answered like the reference: the others may differ."""
    world = World(0, 60, ["accuracy"])
    places = np.arange(8)
    comparison = Comparison(world.answers[0].select(places), [world.answers[0]], places, world.task)
    value, best = comparison.reach(world.metrics[0], 0.01)
    assert value == pytest.approx(world.metrics[0].value(world.answers[0]))
    assert best > value + 0.1


def test_a_task_seen_once_proves_nothing() -> None:
    world = World(0, 60, ["accuracy"], tasks=2)
    places = np.concatenate([np.flatnonzero(world.task == 0)[:9], np.flatnonzero(world.task == 1)[:1]])
    comparison = Comparison(world.answers[0].select(places), [world.answers[1]], places, world.task)
    assert comparison.reach(world.metrics[0], 0.1)[1] == np.inf


@pytest.mark.parametrize("name", ["ece", "ece@t1", "auroc", "auroc@t1"])
@pytest.mark.parametrize("m", [1, 9])
def test_a_bootstrap_of_few_questions_proves_nothing(name: str, m: int) -> None:
    world = World(0, 60, [name], tasks=2)
    places = np.flatnonzero(world.task == 0)[:m]
    comparison = Comparison(world.answers[0].select(places), [world.answers[1]], places, world.task)
    assert np.isinf(comparison.reach(world.metrics[0], 0.1)[1])


def test_an_auroc_without_a_wrong_answer_proves_nothing() -> None:
    world = World(0, 200, ["auroc"])
    places = np.flatnonzero(world.answers[0].correct & world.answers[1].correct)[:30]
    comparison = Comparison(world.answers[0].select(places), [world.answers[1]], places, world.task)
    assert comparison.reach(world.metrics[0], 0.1)[1] == np.inf


def test_nobody_is_stopped_before_the_first_trial_is_complete() -> None:
    world = World(0, 60, ["accuracy", "ece"])
    rule = Racing(RacingConfig(), world.metrics, world.task, world)  # type: ignore[arg-type]
    places = rule.parts[0]
    assert rule.judge(world.records[0], [])(world.answers[0].select(places), places) is None
