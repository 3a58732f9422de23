"""objectives/outcomes.py: what is accepted, what is refused in which words, how answers are read."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from objectives.outcomes import Outcomes
from search.errors import EvaluationError

LAW = settings(deadline=None, max_examples=50)  # no deadline: the machine may be busy


def _good() -> dict[str, Any]:
    return {
        "probability": np.array([[0.2, 0.8, 0.0], [0.25, 0.25, 0.5]]),
        "options": np.array([2, 3]),
        "gold": np.array([1, 0]),
        "task": np.array([0, 1]),
    }


def test_reads_answers() -> None:
    outcomes = Outcomes(**_good())
    assert len(outcomes) == 2
    assert outcomes.predicted.tolist() == [1, 2]
    assert outcomes.confidence.tolist() == [0.8, 0.5]
    assert outcomes.correct.tolist() == [True, False]
    assert outcomes.predicted.dtype == np.int64
    assert outcomes.correct.dtype == np.bool_


def test_first_option_wins_a_tie() -> None:
    outcomes = Outcomes(np.array([[0.25, 0.375, 0.375]]), np.array([3]), np.array([2]), np.array([0]))
    assert outcomes.predicted.tolist() == [1]
    assert outcomes.correct.tolist() == [False]


def test_arrays_are_copies_and_read_only() -> None:
    given_arrays = _good()
    outcomes = Outcomes(**given_arrays)
    given_arrays["probability"][0, 0] = 9.0
    assert outcomes.probability[0, 0] == 0.2
    with pytest.raises(ValueError, match="read-only"):
        outcomes.gold[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        outcomes.gold = np.array([0, 0])  # type: ignore[misc]


def test_float32_probabilities_pass() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(5), size=500).astype(np.float32)
    zeros = np.zeros(500, dtype=np.int32)
    assert Outcomes(p, np.full(500, 5), zeros, zeros).probability.dtype == np.float64  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("probability", np.array([0.5, 0.5]), r"shape \(2,\), wanted floats of shape"),
        ("probability", np.array([[1, 0], [0, 1]]), "wanted floats"),
        ("probability", np.zeros((2, 0)), "wanted floats of shape"),
        ("probability", np.array([[0.2, 0.8, 0.0], [np.nan, 0.5, 0.5]]), "question 1: probability is .*nan"),
        ("probability", np.array([[0.2, 0.8, 0.0], [np.inf, 0.5, 0.5]]), "question 1: probability"),
        ("probability", np.array([[-0.2, 1.2, 0.0], [0.2, 0.3, 0.5]]), "question 0: probability .* 0 to 1"),
        ("probability", np.array([[0.2, 0.7, 0.0], [0.2, 0.3, 0.5]]), "question 0: sum of probabilities"),
        (
            "probability",
            np.array([[0.2, 0.7, 0.1], [0.2, 0.3, 0.5]]),
            "question 0: .*0 after the last option",
        ),
        ("options", np.array([2, 4]), r"question 1: options is 4 \(wanted 1 to 3\)"),
        ("options", np.array([0, 3]), "question 0: options is 0"),
        ("options", np.array([2.0, 3.0]), "options is float64"),
        ("options", np.array([2]), r"shape \(1,\), wanted integers of shape \(2,\)"),
        ("gold", np.array([2, 0]), r"question 0: gold is 2 \(wanted 0 to options - 1\)"),
        ("gold", np.array([-1, 0]), "question 0: gold is -1"),
        ("task", np.array([0, -1]), "question 1: task is -1"),
    ],
)
def test_refuses(field: str, value: Any, message: str) -> None:
    arrays = _good() | {field: value}
    with pytest.raises(EvaluationError, match=message) as caught:
        Outcomes(**arrays)
    assert "\n" not in str(caught.value)


def test_select_by_index_mask_and_slice() -> None:
    outcomes = Outcomes(**_good())
    assert outcomes.select([1, 1, 0]).gold.tolist() == [0, 0, 1]
    assert outcomes.select(np.array([False, True])).gold.tolist() == [0]
    assert outcomes.select(slice(0, 1)).gold.tolist() == [1]
    assert len(outcomes.select([])) == 0
    assert len(outcomes.select(np.zeros(2, dtype=bool))) == 0


def test_softmax_over_the_options_only() -> None:
    score = np.array([[-1.0, -2.0, -np.inf], [-1000.0, -1001.0, -1002.0]])
    outcomes = Outcomes.from_loglikelihoods(score, [2, 3], [0, 0], [0, 0])
    odds = np.exp([0.0, -1.0, -2.0])
    np.testing.assert_allclose(outcomes.probability[0], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0.0])
    np.testing.assert_allclose(outcomes.probability[1], odds / odds.sum())


def test_an_impossible_option_has_probability_zero() -> None:
    outcomes = Outcomes.from_loglikelihoods([[-np.inf, -3.0]], [2], [0], [0])
    assert outcomes.probability.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("score", "options", "message"),
    [
        ([[-1.0, np.nan]], [2], "question 0: log-likelihood .*finite or -inf"),
        ([[-1.0, np.inf]], [2], "finite or -inf"),
        ([[-np.inf, -np.inf]], [2], "at least one finite option"),
        ([[-1.0, -2.0]], [1], "-inf after the last option"),
        ([[-1.0, -2.0]], [3], "options is 3"),
        ([-1.0, -2.0], [2], r"shape \(2,\)"),
    ],
)
def test_refuses_scores(score: Any, options: list[int], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        Outcomes.from_loglikelihoods(score, options, [0], [0])


@LAW
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.floats(-1e4, 0.0)),
    st.floats(-1e3, 1e3),
)
def test_softmax_ignores_a_constant_per_question(score: np.ndarray[Any, Any], shift: float) -> None:
    n, k = score.shape
    zeros, full = np.zeros(n, dtype=int), np.full(n, k)
    one = Outcomes.from_loglikelihoods(score, full, zeros, zeros)
    other = Outcomes.from_loglikelihoods(score + shift, full, zeros, zeros)
    np.testing.assert_allclose(one.probability, other.probability, atol=1e-9)
