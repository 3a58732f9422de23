"""Greedy soup against brute force, and the tensors that it and DARE-TIES come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search.checkpoints.parents import Parents
from search.errors import ConfigError, EvaluationError, MergeError
from search.merging.live import LiveModel
from search.merging.methods.dare import merge_dare_ties
from search.switching.soup import dare_ties_blend, greedy_soup, soup_blend
from tests.pico import save_experts, save_pair

LAW = settings(deadline=None, max_examples=100)
NAMES = ("pre", "sft", "post", "code")


def subsets(names: Sequence[str]) -> list[frozenset[str]]:
    return [
        frozenset(some)
        for some in chain.from_iterable(combinations(names, k) for k in range(1, 1 + len(names)))
    ]


@LAW
@given(values=st.lists(st.integers(0, 6), min_size=15, max_size=15))
def test_the_soup_is_the_one_of_the_published_recipe(values: list[int]) -> None:
    table = dict(zip(subsets(NAMES), map(float, values), strict=True))
    asked: list[frozenset[str]] = []

    def score(weights: Mapping[str, float]) -> float:
        assert tuple(weights) == NAMES
        some = frozenset(name for name, share in weights.items() if share)
        assert all(share in (0.0, 1 / len(some)) for share in weights.values())
        asked.append(some)
        return table[some]

    soup = greedy_soup(NAMES, score)
    # The published recipe word for word: sort, then for each "if the score does not fall, add".
    ranked = sorted(NAMES, key=lambda name: table[frozenset([name])], reverse=True)
    wanted: list[str] = []
    for name in ranked:
        if not wanted or table[frozenset([*wanted, name])] >= table[frozenset(wanted)]:
            wanted.append(name)
    assert list(soup.ingredients) == wanted
    assert soup.score == table[frozenset(wanted)]
    assert [step.candidate for step in soup.steps if step.kept] == wanted[1:]
    assert soup.score >= max(table[frozenset([name])] for name in NAMES)
    assert soup.score <= max(table.values())
    assert {name for name, share in soup.weights.items() if share} == set(wanted)
    assert sum(soup.weights.values()) == pytest.approx(1)
    assert len(asked) == len(set(asked)) == 7
    assert [step.candidate for step in soup.steps] == ranked[1:]
    assert soup.alone == {name: table[frozenset([name])] for name in NAMES}


def test_a_score_that_only_grows_by_mixing_takes_all_and_one_that_falls_takes_the_best() -> None:
    # Of a score that depends on the number of ingredients alone, greedy is the best of all subsets, and all or one.
    more = greedy_soup(NAMES, lambda weights: -max(weights.values()))
    assert set(more.ingredients) == set(NAMES)
    fewer = greedy_soup(NAMES, lambda weights: max(weights.values()))
    assert fewer.ingredients == ("pre",)
    assert greedy_soup(["one"], lambda weights: 3.0).weights == {"one": 1.0}


def test_candidates_and_scores_that_make_no_soup() -> None:
    with pytest.raises(ConfigError, match="none"):
        greedy_soup([], lambda weights: 0.0)
    with pytest.raises(ConfigError, match="each once"):
        greedy_soup(["a", "a"], lambda weights: 0.0)
    with pytest.raises(EvaluationError, match="mean of a has score nan"):
        greedy_soup(["a", "b"], lambda weights: float("nan"))


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Parents:
    folders = save_experts(tmp_path_factory.mktemp("experts"), ["sft", "post"])
    return Parents.open(str(folders["pre"]), {name: str(folders[name]) for name in ("sft", "post")})


@pytest.mark.parametrize("some", subsets(("pre", "sft", "post")), ids=lambda some: "+".join(sorted(some)))
def test_the_merged_model_is_the_mean_of_the_parents_tensors(parents: Parents, some: frozenset[str]) -> None:
    live = LiveModel(parents)
    live.apply(soup_blend(parents, dict.fromkeys(some, 1 / len(some))))
    every = dict(zip(parents.labels, parents.everybody, strict=True))
    for name, parameter in live.parameters().items():
        mean = torch.stack([every[label].tensor(name).double() for label in some]).mean(dim=0)
        torch.testing.assert_close(parameter.detach().double(), mean, atol=1e-7, rtol=1e-6)
        if len(some) == 1:
            (label,) = some
            assert torch.equal(parameter, every[label].tensor(name))


def test_a_pair_has_soups_too(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    pair = Parents.pair(str(pre), str(post))
    weights = greedy_soup(pair.labels, lambda weights: -max(weights.values())).weights
    assert weights == {"pre": 0.5, "post": 0.5}
    assert set(soup_blend(pair, weights).weights.values()) == {(0.5, 0.5)}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"best": 1.0}, "'best'"),
        ({"pre": 0.5}, "1 together"),
        ({"pre": 1.5, "post": -0.5}, "0 or more"),
        ({"pre": float("nan"), "post": 1.0}, "0 or more"),
        ({}, "1 together"),
    ],
)
def test_weights_that_are_no_soup(parents: Parents, weights: dict[str, float], words: str) -> None:
    with pytest.raises(MergeError, match=words):
        soup_blend(parents, weights)


def test_dare_ties_is_the_kernel_with_equal_shares(parents: Parents) -> None:
    blend = dare_ties_blend(parents, seed=4)
    assert (blend.method.name, blend.options["density"], blend.seed) == ("dare_ties", 0.5, 4)
    assert set(blend.weights.values()) == {(0.5, 0.5)}
    dense = dare_ties_blend(parents, density=1.0)
    live = LiveModel(parents)
    live.apply(dense)
    for name, parameter in live.parameters().items():
        pre, *experts = (one.tensor(name) for one in parents.everybody)
        wanted = merge_dare_ties(pre, experts, (0.5, 0.5), density=1.0, generator=torch.Generator())
        assert torch.equal(parameter, wanted)
        # Where the task vectors agree in sign, nothing is dropped and the shares add up to one: the mean.
        agree = (experts[0] - pre) * (experts[1] - pre) > 0
        mean = torch.stack(experts).mean(dim=0)
        torch.testing.assert_close(parameter.detach()[agree], mean[agree], atol=1e-6, rtol=1e-5)
    live.apply(dare_ties_blend(parents, seed=1))
    first = {name: parameter.detach().clone() for name, parameter in live.parameters().items()}
    live.apply(dare_ties_blend(parents, seed=2))
    changed = [not torch.equal(first[name], parameter) for name, parameter in live.parameters().items()]
    assert np.mean(changed) > 0.9
    with pytest.raises(MergeError, match="density"):
        dare_ties_blend(parents, density=0.0)
