"""What n questions can show: the formulas by hand, their promise by simulation, and what a user is told."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from objectives.metrics.bootstrap import resample_weights
from objectives.metrics.names import METRIC_NAMES, Metric, find_metric, get_metric
from objectives.metrics.power import (
    Power,
    assumed,
    differences,
    measured,
    note_on,
    powers,
    questions_for,
    smallest_difference,
)
from objectives.outcomes import Outcomes
from tests.conftest import Cli
from tests.pico_study import write_questions, write_study


def outcomes(confidence: np.ndarray, correct: np.ndarray, task: int | np.ndarray = 0) -> Outcomes:
    """Two-option answers of this confidence in (0.5, 1], right or wrong."""
    n = len(confidence)
    gold = np.where(correct, 0, 1)
    return Outcomes(np.column_stack([confidence, 1 - confidence]), np.full(n, 2), gold, np.full(n, 0) + task)


def trinomial(n: int, discordance: float, difference: float, rng: np.random.Generator) -> np.ndarray:
    """`(n,)` right minus right: -1, 0 or 1."""
    chances = [(discordance - difference) / 2, 1 - discordance, (discordance + difference) / 2]
    return rng.choice([-1, 0, 1], size=n, p=chances)


# -- formulas ---------------------------------------------------------------------------------------------------


def test_the_formula_by_hand() -> None:
    """(1.960 + 0.842)^2 * 0.1 / 0.02^2 questions, the textbook's number."""
    assert questions_for(math.sqrt(0.1), 0.02) == math.ceil(2.801585**2 * 0.1 / 0.0004) == 1963
    assert smallest_difference(math.sqrt(0.1), 1963, shares=True) == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("shares", [False, True])
def test_the_two_formulas_are_inverse(shares: bool) -> None:
    for spread in (0.1, 0.3, 0.5):
        for n in (30, 100, 320, 2000):
            delta = smallest_difference(spread, n, shares=shares)
            assert questions_for(spread, delta, shares=shares) in (n, n + 1)


def test_a_share_differs_by_no_more_than_the_discordance() -> None:
    for n in (8, 20, 78, 79, 1000):
        delta = smallest_difference(math.sqrt(0.1), n, shares=True)
        assert delta <= max(0.1, 2.801585**2 / n) + 1e-12
    assert smallest_difference(math.sqrt(0.1), 20, shares=True) == pytest.approx(7.849 / 20, rel=1e-3)
    assert math.isinf(smallest_difference(math.sqrt(0.1), 7, shares=True))


def test_every_metric_has_an_assumption_but_mce() -> None:
    assert [name for name in METRIC_NAMES if assumed(name) is None] == ["mce"]
    assert assumed("distinct-2") is None
    assert assumed("ece:7:debiased@arc") is assumed("ece:debiased")
    assert assumed("brier:top") is not assumed("brier")


# -- what is promised -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "discordance"), [(300, 0.1), (2000, 0.1), (1000, 0.25)])
def test_the_power_for_accuracy(n: int, discordance: float) -> None:
    """McNemar's test finds the smallest difference in 80 % of draws or more; half of it seldom, none in 5 %."""
    rng, draws = np.random.default_rng(0), 4000
    delta = smallest_difference(math.sqrt(discordance), n, shares=True)

    def found(difference: float) -> float:
        each = np.array([trinomial(n, discordance, difference, rng) for _ in range(draws)])
        statistic = each.sum(axis=1) / np.sqrt((each != 0).sum(axis=1))
        return float((np.abs(statistic) > 1.959964).mean())

    assert 0.78 < found(delta) < 0.85  # Monte Carlo error: 0.006
    assert found(0.5 * delta) == pytest.approx(0.288, abs=0.04)
    assert found(0.0) == pytest.approx(0.05, abs=0.012)


def test_the_power_with_the_board_s_interval() -> None:
    """The paired basic interval of the bootstrap excludes 0 as often."""
    rng, n, metric = np.random.default_rng(1), 500, get_metric("accuracy")
    delta, weights = smallest_difference(math.sqrt(0.1), n, shares=True), resample_weights(n, 400)
    shown = []
    for _ in range(300):
        difference = trinomial(n, 0.1, delta, rng)
        other = np.where(difference == 0, rng.random(n) < 0.5, difference < 0)
        pair = [outcomes(np.full(n, 0.8), right) for right in (other + difference > 0, other)]
        a, b = (metric(one, weights) for one in pair)
        value = metric.value(pair[0]) - metric.value(pair[1])
        low = 2 * value - np.quantile(a - b, 0.975)
        shown.append(low > 0)
    assert np.mean(shown) == pytest.approx(0.8, abs=0.08)  # Monte Carlo error: 0.023


def calibrated_pair(
    n: int, gap: float, other_gap: float, rng: np.random.Generator
) -> tuple[Outcomes, Outcomes]:
    """Two models over-confident by these gaps at every confidence, with a discordance of about 0.1."""
    confidence = rng.uniform(0.55, 0.99, n)
    luck = rng.random(n)
    other_luck = np.where(rng.random(n) < 0.8, luck, rng.random(n))
    other_confidence = np.clip(confidence + rng.normal(0, 0.05, n), 0.5, 1)
    return (
        outcomes(confidence, luck < confidence - gap),
        outcomes(other_confidence, other_luck < other_confidence - other_gap),
    )


def test_the_spread_of_ece_by_bootstrap_and_over_fresh_questions() -> None:
    """What one set of questions says of the error equals what fresh sets show; the assumption is near it."""
    rng, n, metric = np.random.default_rng(2), 1000, get_metric("ece")
    fresh, guesses = [], []
    for draw in range(300):
        one, other = calibrated_pair(n, 0.15, 0.1, rng)
        fresh.append(metric.value(one) - metric.value(other))
        if draw < 20:
            guess = measured(metric, one, other)
            assert guess is not None
            guesses.append(guess.paired)
    spread = math.sqrt(n) * np.std(fresh)
    assert np.mean(guesses) == pytest.approx(spread, rel=0.15)
    known = assumed("ece")
    assert known is not None
    assert 0.6 * known.paired < spread < 1.25 * known.paired


def test_the_power_for_ece() -> None:
    """Roughly: a z-test with the bootstrap's standard error, at the smallest difference of the measured spread."""
    rng, n, metric = np.random.default_rng(3), 1000, get_metric("ece")
    spread = measured(metric, *calibrated_pair(20_000, 0.2, 0.16, rng))
    assert spread is not None
    delta = smallest_difference(spread.paired, n)
    weights, shown = resample_weights(n, 200), []
    for _ in range(200):
        one, other = calibrated_pair(n, 0.2, 0.2 - delta, rng)
        error = np.std(metric(one, weights) - metric(other, weights))
        shown.append(abs(metric.value(one) - metric.value(other)) > 1.959964 * error)
    assert np.mean(shown) == pytest.approx(0.8, abs=0.12)


def test_measured_spreads() -> None:
    """Of accuracy: discordance less the squared difference; of a mean: the standard deviation of its differences."""
    rng = np.random.default_rng(4)
    one, other = calibrated_pair(4000, 0.15, 0.1, rng)
    difference = one.correct.astype(float) - other.correct
    found = measured(get_metric("accuracy"), one, other)
    assert found is not None
    assert found.paired == pytest.approx(difference.std(), rel=0.1)
    assert found.single == pytest.approx(one.correct.std(), rel=0.1)
    each = [(o.confidence - o.correct) ** 2 for o in (one, other)]
    found = measured(get_metric("brier:top"), one, other)
    assert found is not None
    assert found.paired == pytest.approx((each[0] - each[1]).std(), rel=0.1)
    assert measured(get_metric("accuracy"), one, one) is None
    assert measured(get_metric("mce"), one, other) is None


def test_a_task_s_spread_does_not_depend_on_the_others() -> None:
    one, other = calibrated_pair(3000, 0.15, 0.1, np.random.default_rng(5))
    task = np.repeat([0, 1], [1000, 2000])
    both = [Outcomes(o.probability, o.options, o.gold, task) for o in (one, other)]
    alone = measured(get_metric("ece"), *(o.select(task == 1) for o in both))
    within = measured(get_metric("ece@b", tasks=("a", "b")), both[0], both[1])
    assert alone is not None
    assert within is not None
    assert within.paired == pytest.approx(alone.paired, rel=0.12)


# -- what is said -----------------------------------------------------------------------------------------------


def said(search: int, report: int, *names: str) -> str | None:
    metrics = [find_metric(name) for name in names]
    return note_on(powers(metrics, [0] * search), powers(metrics, [0] * report))


def test_a_note_only_where_it_is_needed() -> None:
    assert said(2000, 2000, "accuracy", "ece", "brier", "nll", "auroc", "ece:10:debiased") is None
    assert said(2000, 2000, "mce", "distinct-2") is None
    assert said(320, 2000, "accuracy") == (
        "search split of 320 questions shows differences of 0.050 in accuracy and more (80 % power); "
        "for 0.03 take 880"
    )
    found = said(1000, 500, "accuracy", "ece", "nll")
    assert found is not None
    assert found.startswith(
        "report split of 500 questions shows differences of 0.040 in accuracy, 0.050 in ece and"
    )
    assert found.endswith("for 0.03 take 1,400")
    assert "nll" not in found
    found = said(5, 5, "accuracy")
    assert found is not None
    assert "of no size in accuracy" in found
    assert said(880, 880, "accuracy") is None
    assert said(870, 870, "accuracy") is not None


def test_a_task_s_objective_counts_its_own_questions() -> None:
    metrics = [get_metric("accuracy@b", tasks=("a", "b")), get_metric("accuracy")]
    (own, all_of_them) = powers(metrics, [0] * 900 + [1] * 100)
    assert (own.questions, all_of_them.questions) == (100, 1000)
    assert isinstance(metrics[0], Metric)
    assert own.standard_error == pytest.approx(0.05)
    assert (own.too_few, all_of_them.too_few) == (True, False)
    assert differences([own]) == "of 0.089 in accuracy@b"
    assert powers([get_metric("ece@a", tasks=("a",))], [1, 1]) == []
    assert own == Power("accuracy@b", 100, 0.05, own.difference, 0.03, 880)


def test_check_and_launch_say_it(cli: Cli, tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", trials=0)
    code, out, _ = cli("check", study)
    assert code == 0
    assert "power       differences of 0.392 in accuracy, 0.251 in ece show on 20 report questions" in out
    assert "standard errors 0.112, 0.101; spreads assumed" in out
    note = "split of 20 questions shows differences of"
    assert out.count(note) == 1
    code, _, err = cli("launch", study)
    assert (code, err.count(f"note       search {note}")) == (0, 1)
    code, out, _ = cli("check", study)
    assert "from the stored answers of post and uniform 0.5" in out
    assert cli("check", study, "--storage", f"sqlite:///{tmp_path / 'none.db'}")[1].count("assumed") == 1
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "broken.db").write_text("no database")
    code, out, _ = cli("check", study, "--storage", f"sqlite:///{tmp_path / 'broken.db'}")
    assert (code, "spreads assumed" in out) == (0, True)


def test_a_study_of_enough_questions_is_not_told(cli: Cli, tmp_path: Path) -> None:
    study = write_study(tmp_path / "study")
    write_questions(tmp_path / "study" / "questions.jsonl", 2900)
    code, out, _ = cli("check", study)
    assert code == 0
    assert "show on 1450 report questions" in out
    assert "note " not in out
    assert "power" not in cli("check", study, "--set", "objectives=[mce]")[1]
