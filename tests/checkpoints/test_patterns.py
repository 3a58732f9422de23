"""Patterns of module names, against Python's own regular expressions as peft uses them."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.checkpoints.patterns import LONGEST, Pattern

_PIECES = [
    "a",
    "b",
    "q_proj",
    "0",
    "_",
    "-",
    "\\.",
    "\\d",
    "\\w",
    ".",
    "*",
    "+",
    "?",
    "*?",
    "|",
    "(",
    "(?:",
    ")",
]
_PIECES += [
    "[",
    "]",
    "[a-b0]",
    "[^a]",
    "^",
    "$",
    "layers",
    "\\",
    "{2}",
    "\\1",
    "(?=",
    "a*",
    "(a|b)*",
    "(ab?)+",
]


def by_peft(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@settings(max_examples=2000, deadline=None)
@given(
    st.lists(st.sampled_from(_PIECES), max_size=8).map("".join),
    st.lists(st.text("ab.0_q-", max_size=9), min_size=1, max_size=6),
)
def test_what_is_accepted_matches_what_peft_matches(pattern: str, names: list[str]) -> None:
    try:
        ours = Pattern(pattern)
    except ValueError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in [*names, "model.layers.0.q_proj", "a", ""]:
            assert ours.matches(name) == by_peft(pattern, name), (pattern, name)


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("q_proj", {0, 1, 2}),
        ("layers.1.self_attn.q_proj", {1}),
        (r"^model\.layers\.1\.self_attn\.q_proj", {1}),
        (r"layers\.[0-1]\..*(q|up)_proj", {0, 1, 4}),
        (r"model\.layers\.\d+\.mlp\.(up|down)_proj", {4}),
        (".*", {0, 1, 2, 3, 4}),
        ("proj", set()),
    ],
)
def test_patterns_that_people_write(pattern: str, matching: set[int]) -> None:
    names = [f"model.layers.{index}.self_attn.q_proj" for index in (0, 1, 12)] + ["lm_head"]
    names.append("model.layers.0.mlp.up_proj")
    found = {index for index, name in enumerate(names) if Pattern(pattern).matches(name)}
    assert found == matching == {index for index, name in enumerate(names) if by_peft(pattern, name)}


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", ")", "a)|(b", "[", "[a", "[z-a]", "*", "a**", "a{2}", r"\b", r"\1", "(?=a)", "(?P<n>a)", "^*"),
        *("(a*)*", "(a+b)+", "((a|b*))*", "a\n", "(" * 9 + ")" * 9, "a" * (LONGEST + 1), "\\", "[]a]", "a*+"),
    ],
)
def test_what_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        Pattern(pattern)


@pytest.mark.parametrize("pattern", ["(a|aa)" * 42 + "b", ".*" * 127 + "b", "a?" * 127 + "b", "(a?a?a?)*b"])
def test_no_pattern_takes_long(pattern: str) -> None:
    began = time.process_time()
    assert not Pattern(pattern).matches("a" * 200)
    assert time.process_time() - began < 1
