"""Rules for written answers, and what agreement among them comes to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from objectives.generation.agreement import agreement
from objectives.metrics.names import get_metric
from objectives.questions.matching import RULE_NAMES, get_rule, last_number, normalized, token_f1
from search.errors import ConfigError, EvaluationError

words = st.lists(st.sampled_from(["red", "blue", "the", "old", "house"]), max_size=5).map(" ".join)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("#### 42", "42"),
        ("It costs $1,234,567.80 in all.", "1234567.8"),
        ("between 3-4", "4"),
        ("it is -7", "-7"),
        ("x = .5", "0.5"),
        ("5.", "5"),
        ("1,23", "23"),
        ("-0.0", "0"),
        ("1e5", "5"),
        ("room B12", "12"),
        ("", ""),
        ("no number, no luck...", ""),
        ("٣", "3"),
    ],
)
def test_the_last_number(text: str, wanted: str) -> None:
    assert last_number(text) == wanted


@given(st.text(max_size=60))
def test_any_text_has_a_key_and_a_key_is_its_own(text: str) -> None:
    for name in RULE_NAMES:
        rule = get_rule(name)
        key = rule.key(text)
        assert rule.key(key) == key
        assert rule.right(key, (text,)) == bool(key)


@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
def test_numbers_are_equal_however_they_are_written(whole: int, zeros: int) -> None:
    assert last_number(f"{whole:,}.{'0' * zeros}") == last_number(f"= {whole}") == str(whole)


@given(words, words)
def test_f1_is_symmetric_and_one_for_equal_texts(a: str, b: str) -> None:
    assert token_f1(a, b) == token_f1(b, a)
    assert 0.0 <= token_f1(a, b) <= 1.0
    assert token_f1(a, a) == 1.0
    assert (token_f1(a, b) == 1.0) == (sorted(normalized(a).split()) == sorted(normalized(b).split()))


def test_rules_by_name() -> None:
    assert get_rule("f1").right("red old house", ("blue door", "old house"))
    assert not get_rule("f1").right("red old house", ("blue door",))
    assert not get_rule("exact").right("", ("the",))
    assert get_rule("exact").right(normalized("A)"), ("A",))
    with pytest.raises(ConfigError, match=r"no rule called 'exat'\. Did you mean 'exact'"):
        get_rule("exat")


def test_the_answer_that_most_agree_on() -> None:
    exact = get_rule("exact")
    found = agreement(
        [["b", "a", "a."], ["x", "y", "y"], ["x", "y", "z"], ["", "", "a"]],
        [("a",), ("x",), ("w",), ("a",)],
        [exact] * 4,
        [0, 0, 1, 1],
    )
    assert found.correct.tolist() == [True, False, False, False]
    np.testing.assert_allclose(found.confidence, [2 / 3, 2 / 3, 1 / 3, 2 / 3])
    assert found.options.tolist() == [3, 3, 4, 3]  # any other answer is one
    assert found.probability[2, found.gold[2]] == 0.0
    assert get_metric("accuracy").value(found) == 0.25


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=4, max_size=4), min_size=1, max_size=6), st.data())
def test_one_sample_is_plain_accuracy(texts: list[list[str]], data: st.DataObject) -> None:
    golds = [(data.draw(st.sampled_from("abc")),) for _ in texts]
    rules = [get_rule("exact")] * len(texts)
    task = [0] * len(texts)
    one = agreement([answers[:1] for answers in texts], golds, rules, task)
    wanted = [answers[0] == gold[0] for answers, gold in zip(texts, golds, strict=True)]
    assert one.correct.tolist() == wanted
    assert (one.confidence == 1.0).all()
    several = agreement(texts, golds, rules, task)
    assert ((several.confidence >= 0.25) & (several.confidence <= 1.0)).all()


def test_answers_that_do_not_fit_together() -> None:
    exact = get_rule("exact")
    for texts, accepted in (([["a"], ["a", "b"]], [("a",)] * 2), ([[]], [("a",)]), ([["a"]], [])):
        with pytest.raises(EvaluationError, match="agreement: "):
            agreement(texts, accepted, [exact] * len(texts), [0] * len(texts))
