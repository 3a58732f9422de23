"""Labels from scores, and the router that learns them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from objectives.questions.matching import get_rule
from search.errors import ConfigError, EvaluationError, MergefrontError
from search.switching.labels import label
from search.switching.router import scored, train_router

LAW = settings(deadline=None, max_examples=60)
PROMPTS = ("Who wrote it?", "n", "Tell me a long story about a fox and a hen. " * 2, "What?", "2 + 2 = ")
TENTHS = st.integers(0, 10).map(lambda tenth: tenth / 10)


@LAW
@given(
    scores=arrays(np.float64, st.tuples(st.integers(1, 8), st.integers(2, 4)), elements=TENTHS),
    margin=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
)
def test_labels_follow_their_rule(scores: NDArray[Any], margin: float) -> None:
    found = label(scores, margin)
    for i, row in enumerate(scores):
        first, second = sorted((round(10 * score) for score in row), reverse=True)[:2]
        kept = first > second and first - second >= round(10 * margin)
        assert found.kept[i] == kept
        assert found.label[i] == (int(np.argmax(row)) if kept else -1)
        assert found.margin[i] == pytest.approx((first - second) / 10)
    counts = [int((found.label == place).sum()) for place in range(scores.shape[1])]
    shares = [count / sum(counts) for count in counts if count]
    assert found.entropy == pytest.approx(-sum(share * np.log(share) for share in shares))
    order = np.arange(scores.shape[1])[::-1]
    turned = label(scores[:, order], margin)
    assert (turned.kept == found.kept).all()
    assert (order[turned.label[turned.kept]] == found.label[found.kept]).all()


def test_entropy_of_labels_that_are_all_alike_or_none_is_zero() -> None:
    assert str(label([[1.0, 0.0]] * 3).entropy) == "0.0"
    assert str(label([[0.5, 0.5]] * 3).entropy) == "0.0"
    assert label(np.eye(4)).entropy == pytest.approx(np.log(4))


@pytest.mark.parametrize(
    ("scores", "margin", "error"),
    [
        ([[1.0]], 0.0, ConfigError),
        ([[1.0, 0.0]], -0.1, ConfigError),
        ([[1.0, 0.0]], np.nan, ConfigError),
        ([[1.0, np.nan]], 0.0, EvaluationError),
        ([1.0, 0.0], 0.0, EvaluationError),
    ],
)
def test_scores_that_have_no_labels(scores: Any, margin: float, error: type[MergefrontError]) -> None:
    with pytest.raises(error, match=r"^labels: "):
        label(scores, margin)


def skills(n: int = 60, seed: int = 0) -> tuple[dict[str, NDArray[Any]], NDArray[Any], NDArray[Any]]:
    """Three candidates, each good at its own kind of question; the kind shows in the features."""
    random = np.random.default_rng(seed)
    kind = random.integers(0, 3, n)
    features = np.eye(3)[kind] * 2 + random.normal(size=(n, 3)) * 0.3
    right = {
        name: random.binomial(1, np.where(kind == place, 0.9, 0.2)[:, None], (n, 16)).astype(np.float64)
        for place, name in enumerate(("pre", "sft", "post"))
    }
    return right, features, kind


def test_the_router_sends_each_kind_of_question_to_its_candidate() -> None:
    right, features, _ = skills()
    router = train_router(right, features, margin=0.25)
    assert router.candidates == ("pre", "sft", "post")
    assert router.labels.entropy > 1.0
    _, unseen, kind = skills(seed=1)
    assert (router.choose(unseen) == kind).mean() > 0.95
    single = max(np.mean(kind == place) for place in range(3))
    assert single < 0.6  # what the best single candidate would get


def test_questions_that_are_too_close_to_call_teach_nothing() -> None:
    right, features, _ = skills()
    undecided = {name: np.vstack([scores, np.full((20, 16), 0.5)]) for name, scores in right.items()}
    noise = np.vstack([features, 100 * np.random.default_rng(2).normal(size=(20, 3))])
    one, other = train_router(right, features), train_router(undecided, noise)
    assert other.labels.kept[60:].sum() == 0
    np.testing.assert_array_equal(one.classifier.weight, other.classifier.weight)


def test_equal_candidates_go_to_the_first() -> None:
    right, features, _ = skills()
    right["late"] = np.zeros_like(right["pre"])
    router = train_router(right, features)
    assert 3 not in router.choose(features)
    classifier = router.classifier
    for array in (classifier.weight, classifier.bias):
        array.flags.writeable = True
        array[:] = 0.0
    assert router.choose(features).tolist() == [0] * 60


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda right, x: ({"pre": right["pre"]}, x), ConfigError, "1 candidates"),
        (lambda right, x: (dict.fromkeys(right, right["pre"]), x), ConfigError, "no rows"),
        (lambda right, x: ({**right, "pre": np.ones((60, 16))}, x), ConfigError, "class 0"),
        (lambda right, x: ({**right, "pre": right["pre"] + 1}, x), EvaluationError, "pre is not in"),
        (lambda right, x: ({**right, "pre": right["pre"][1:]}, x), EvaluationError, "scores of pre"),
        (lambda right, x: (right, x[1:]), EvaluationError, "scores of pre"),
    ],
)
def test_outcomes_that_no_router_can_learn(change: Any, error: type[MergefrontError], words: str) -> None:
    right, features, _ = skills()
    with pytest.raises(error, match=words):
        train_router(*change(right, features))


def test_answers_are_scored_by_the_rule_of_their_question() -> None:
    rules = [get_rule("number"), get_rule("exact")]
    found = scored([["so 4.0", "5"], ["4.0", " The cat"]], [("4",), ("cat",)], rules)
    assert found.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert scored([["red house"]], [("the red door",)], [get_rule("f1")]).tolist() == [[0.5]]
    with pytest.raises(EvaluationError, match="answers to 2 questions"):
        scored([["a"], ["a", "b"]], [("a",), ("a",)], rules)
