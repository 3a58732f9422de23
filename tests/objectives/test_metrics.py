"""objectives/metrics/names.py: the registry, and the laws that every metric obeys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.metrics.bootstrap import resample_weights
from objectives.metrics.names import METRIC_NAMES, get_metric
from objectives.outcomes import Floats, Outcomes
from search.errors import ConfigError, EvaluationError

LAW = settings(deadline=None, max_examples=30)  # no deadline: the machine may be busy

ALL = (*METRIC_NAMES, "ece:10", "ece:7:mass", "ece:10:debiased")
TASKS = ("arc", "sciq")


@st.composite
def outcome_sets(draw: st.DrawFn) -> Outcomes:
    """1 to 12 questions with 2 to 4 options; scores from a coarse grid, so that ties and zeros are common."""
    n = draw(st.integers(1, 12))
    scores, options, gold = np.full((n, 4), -np.inf), [], []
    grid = st.sampled_from([0.0, -0.5, -1.0, -2.0, -40.0, -np.inf])
    for i in range(n):
        count = draw(st.integers(2, 4))
        row = draw(st.lists(grid, min_size=count, max_size=count).filter(lambda r: max(r) > -np.inf))
        scores[i, :count] = row
        options.append(count)
        gold.append(draw(st.integers(0, count - 1)))
    task = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    return Outcomes.from_loglikelihoods(scores, options, gold, task)


@pytest.mark.parametrize("name", ALL)
@LAW
@given(outcomes=outcome_sets(), data=st.data())
def test_integer_weights_are_repeated_questions(name: str, outcomes: Outcomes, data: st.DataObject) -> None:
    n = len(outcomes)
    counts = st.lists(st.integers(0, 3), min_size=n, max_size=n).filter(any)
    weights = np.array(data.draw(st.lists(counts, min_size=1, max_size=3)), dtype=np.float64)
    metric = get_metric(name)
    values = metric(outcomes, weights)
    assert values.shape == (weights.shape[0],)
    assert values.dtype == np.float64
    repeated = [metric.value(outcomes.select(np.repeat(np.arange(n), row.astype(int)))) for row in weights]
    np.testing.assert_allclose(values, repeated, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
@LAW
@given(outcomes=outcome_sets(), data=st.data())
def test_the_order_of_questions_does_not_matter(name: str, outcomes: Outcomes, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(outcomes))))
    metric = get_metric(name)
    assert metric.value(outcomes.select(order)) == pytest.approx(metric.value(outcomes), abs=1e-9)


@pytest.mark.parametrize("name", ALL)
@LAW
@given(outcomes=outcome_sets(), scale=st.floats(0.01, 100.0))
def test_scale_of_the_weights_and_range(name: str, outcomes: Outcomes, scale: float) -> None:
    metric = get_metric(name)
    ones = np.ones((1, len(outcomes)))
    value = metric.value(outcomes)
    assert metric(outcomes, ones)[0] == pytest.approx(value, abs=1e-12)
    if "debiased" not in name:  # its correction depends on the number of questions, and should
        assert metric(outcomes, scale * ones)[0] == pytest.approx(value, abs=1e-9)
    low, high = sorted((metric.worst, 1.0 if metric.maximize else 0.0))
    assert low - 1e-12 <= value <= high + 1e-12


@pytest.mark.parametrize("name", ALL)
@LAW
@given(outcomes=outcome_sets(), seed=st.integers(0, 99))
def test_the_order_of_options_does_not_matter(name: str, outcomes: Outcomes, seed: int) -> None:
    # Not where the top is tied: there the first option is the answer, by rule.
    top = outcomes.probability >= outcomes.confidence[:, None]
    outcomes = outcomes.select(top.sum(axis=1) == 1)
    if len(outcomes) == 0:
        return
    random = np.random.default_rng(seed)
    p, gold = outcomes.probability.copy(), outcomes.gold.copy()
    for i, count in enumerate(outcomes.options):
        order = random.permutation(count)
        p[i, :count] = p[i, order]
        gold[i] = int(np.flatnonzero(order == gold[i])[0])
    shuffled = Outcomes(p, outcomes.options, gold, outcomes.task)
    metric = get_metric(name)
    assert metric.value(shuffled) == pytest.approx(metric.value(outcomes), abs=1e-9)


@LAW
@given(outcomes=outcome_sets())
def test_mce_bounds_ece_and_fewer_bins_hide_error(outcomes: Outcomes) -> None:
    ece, mce = get_metric("ece").value(outcomes), get_metric("mce").value(outcomes)
    assert ece <= mce + 1e-12
    # Triangle inequality: 5 bins are unions of 15.
    assert get_metric("ece:5").value(outcomes) <= ece + 1e-12
    mean_gap = abs(float(np.mean(outcomes.confidence - outcomes.correct)))
    assert get_metric("ece:1").value(outcomes) == pytest.approx(mean_gap, abs=1e-12)
    assert get_metric("ece:1:mass").value(outcomes) == pytest.approx(mean_gap, abs=1e-12)


@LAW
@given(outcomes=outcome_sets(), scale=st.floats(0.5, 2.0))
def test_auroc_ignores_a_monotone_change_of_confidence(outcomes: Outcomes, scale: float) -> None:
    two = outcomes.select(outcomes.options == 2)  # only with two options does a temperature keep the order
    if len(two) == 0:
        return
    p = np.zeros_like(two.probability)
    p[:, :2] = two.probability[:, :2] ** scale / (two.probability[:, :2] ** scale).sum(axis=1, keepdims=True)
    if np.unique(p.max(axis=1)).size != np.unique(two.confidence).size:
        return  # rounding made or broke a tie
    other = Outcomes(p, two.options, two.gold, two.task)
    assert get_metric("auroc").value(other) == get_metric("auroc").value(two)


@pytest.mark.parametrize("name", ALL)
@LAW
@given(outcomes=outcome_sets())
def test_one_task_is_the_selection(name: str, outcomes: Outcomes) -> None:
    metric, whole = get_metric(f"{name}@sciq", tasks=TASKS), get_metric(name)
    inside = outcomes.task == 1
    if not inside.any():
        with pytest.raises(EvaluationError, match=r"@sciq: there are no questions"):
            metric(outcomes)
        return
    assert metric.value(outcomes) == whole.value(outcomes.select(inside))
    drawn = np.where(inside, 1.0, 0.0)
    values = metric(outcomes, np.stack([np.ones(len(outcomes)), drawn]))
    np.testing.assert_allclose(values, whole.value(outcomes.select(inside)), atol=1e-12)
    if not inside.all():  # a resample without any question of the task has no value
        missed = metric(outcomes, np.stack([drawn, 1.0 - drawn]))
        assert np.isfinite(missed[0])
        assert np.isnan(missed[1])


def _three() -> Outcomes:
    return Outcomes(np.array([[0.9, 0.1]] * 3), np.full(3, 2), np.array([0, 0, 1]), np.array([0, 0, 1]))


@pytest.mark.parametrize("name", ALL)
def test_no_questions_is_an_error(name: str) -> None:
    with pytest.raises(EvaluationError, match=r"there are no questions"):
        get_metric(name)(_three().select([]))


@pytest.mark.parametrize(
    "weights",
    [
        np.ones((2, 4)),
        np.ones((0, 3)),
        np.ones((1, 1, 3)),
        np.array([[1.0, -1.0, 1.0]]),
        np.array([[1.0, np.nan, 1.0]]),
        np.array([[1.0, np.inf, 1.0]]),
        np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
    ],
)
def test_bad_weights_are_refused(weights: Floats) -> None:
    with pytest.raises(EvaluationError, match=r"^weights: "):
        get_metric("ece")(_three(), weights)


@pytest.mark.parametrize("name", ALL)
def test_inputs_stay_as_they_are(name: str) -> None:
    weights = np.array([[1.0, 0.0, 2.0]])
    before = weights.copy()
    get_metric(name)(_three(), weights)
    np.testing.assert_array_equal(weights, before)


def test_an_interval_stays_in_the_range_of_its_metric() -> None:
    random = np.random.default_rng(0)
    p = random.dirichlet([2.0, 1.0, 1.0], size=200)
    one = Outcomes(p, np.full(200, 3), random.integers(0, 3, 200), np.zeros(200, dtype=int))
    weights = resample_weights(200, b=200, seed=0)
    for name in METRIC_NAMES:
        metric = get_metric(name)
        value = metric.value(one)
        low, high = metric.interval(value, metric(one, weights))
        assert (
            min(metric.worst, float(metric.maximize))
            <= low
            <= high
            <= max(metric.worst, float(metric.maximize))
        )
        assert metric.interval(value, np.full(9, value)) == (value, value)


def test_directions() -> None:
    assert {name for name in ALL if get_metric(name).maximize} == {"accuracy", "auroc"}
    assert get_metric("accuracy").worst == 0.0
    assert get_metric("brier").worst == 2.0
    assert get_metric("nll").worst == pytest.approx(27.631021)


def test_default_bins_are_fifteen() -> None:
    random = np.random.default_rng(0)
    p = random.dirichlet([2.0, 1.0, 1.0], size=300)
    o = Outcomes(p, np.full(300, 3), random.integers(0, 3, 300), np.zeros(300, dtype=int))
    assert get_metric("ece").value(o) == get_metric("ece:15").value(o) != get_metric("ece:10").value(o)
    assert get_metric("ece:mass").value(o) == get_metric("ece:15:mass").value(o) != get_metric("ece").value(o)
    assert get_metric("ece:debiased").value(o) == get_metric("ece:15:debiased").value(o)


def test_task_names_may_hold_any_character() -> None:
    assert get_metric("ece:10@my@task:1", tasks=["my@task:1"]).task == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", "no metric called 'acuracy'. Did you mean 'accuracy'?"),
        ("ECE", "Did you mean 'ece'?"),
        ("ece:masss", "Did you mean 'ece:mass'?"),
        ("ece:0", "no metric called 'ece:0'"),
        ("ece:-3", "no metric called"),
        ("ece:1e3", "no metric called"),
        ("ece:015", "no metric called"),
        ("ece:1001", "1001 bins"),
        ("ece:٣", "no metric called"),
        ("ece:10\n", "no metric called"),
        ("", "no metric called ''"),
        ("@arc", "no metric called ''"),
        ("accuracy@", "no task called ''"),
        ("accuracy@arcc", "no task called 'arcc'. Did you mean 'arc'? The tasks are: arc, sciq."),
    ],
)
def test_unknown_names_are_refused_with_a_hint(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        get_metric(name, tasks=TASKS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_without_tasks() -> None:
    with pytest.raises(ConfigError, match="The tasks are: none"):
        get_metric("accuracy@arc")


@LAW
@given(st.text(max_size=20))
def test_any_text_is_a_metric_or_a_config_error(name: str) -> None:
    try:
        metric = get_metric(name, tasks=TASKS)
    except ConfigError:
        return
    assert metric.name == name
