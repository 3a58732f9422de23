"""Laws of the merge methods of several experts, whatever the tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search.merging.methods import sparsify
from search.merging.methods.breadcrumbs import merge_breadcrumbs, merge_breadcrumbs_ties
from search.merging.methods.dare import merge_dare_linear, merge_dare_ties
from search.merging.methods.della import merge_della, merge_della_linear
from search.merging.methods.karcher import merge_karcher
from search.merging.methods.multislerp import merge_multislerp
from search.merging.methods.sparsify import kept, largest, magnitude_ranks, places, smallest
from search.merging.methods.task_arithmetic import merge_task_arithmetic
from search.merging.methods.ties import merge_ties
from search.merging.methods.tsv import merge_tsv
from search.merging.methods.wudi import merge_wudi
from tests.mergekit_oracle import same_bits

Merge = Callable[..., torch.Tensor]


def drawn(merge: Merge) -> Merge:
    """A random method with a generator of its own in every call."""
    return lambda *a, **k: merge(*a, generator=torch.Generator().manual_seed(0), **{"density": 1.0, **k})


SCALED: list[Merge] = [
    merge_task_arithmetic, merge_ties, merge_breadcrumbs, merge_breadcrumbs_ties, drawn(merge_dare_linear),
    drawn(merge_dare_ties), drawn(merge_della), drawn(merge_della_linear), merge_wudi,
]  # fmt: skip
ALL = [*SCALED, merge_karcher, merge_multislerp]
shape = st.sampled_from([(5,), (4, 6), (2, 3, 4), (1, 9)])
dtype = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
coarse = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=60).map(torch.tensor)


@st.composite
def families(draw: st.DrawFn, low: int = 1, high: int = 4) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and experts of any shape and dtype, some of them equal to the base or to each other."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size, kind = draw(shape), draw(dtype)
    base = torch.randn(size, generator=generator).to(kind)
    experts = [
        (base + torch.randn(size, generator=generator)).to(kind) for _ in range(draw(st.integers(low, high)))
    ]
    if draw(st.booleans()):
        experts[-1] = draw(st.sampled_from([base, experts[0]])).clone()
    return base, experts


@pytest.mark.parametrize("merge", ALL)
@settings(max_examples=25, deadline=None)
@given(parents=families(), data=st.data())
def test_one_weight_of_one_gives_that_expert(
    merge: Merge, parents: tuple[torch.Tensor, list[torch.Tensor]], data: st.DataObject
) -> None:
    base, experts = parents
    if merge is merge_wudi and base.dim() != 2:
        return
    chosen = data.draw(st.integers(0, len(experts) - 1))
    weights = [float(k == chosen) for k in range(len(experts))]
    merged = merge(base, experts, weights)
    scale = float(base.float().abs().max() + experts[chosen].float().abs().max())
    torch.testing.assert_close(merged, experts[chosen].float(), rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("merge", SCALED)
@settings(max_examples=15, deadline=None)
@given(parents=families(), weight=st.floats(-2, 2))
def test_a_scaling_of_zero_gives_the_base(
    merge: Merge, parents: tuple[torch.Tensor, list[torch.Tensor]], weight: float
) -> None:
    base, experts = parents
    assert same_bits(merge(base, experts, [weight] * len(experts), scaling=0.0), base.float())


@pytest.mark.parametrize("merge", ALL)
@settings(max_examples=15, deadline=None)
@given(parents=families(2, 2), weights=st.lists(st.floats(0.1, 2), min_size=2, max_size=2))
def test_the_order_of_two_experts_does_not_matter(
    merge: Merge, parents: tuple[torch.Tensor, list[torch.Tensor]], weights: list[float]
) -> None:
    base, experts = parents
    forward = merge(base, experts, weights)
    backward = merge(base, experts[::-1], weights[::-1])
    if merge in (merge_karcher, merge_multislerp, merge_wudi):
        torch.testing.assert_close(forward, backward, rtol=1e-5, atol=1e-5)
    else:
        assert same_bits(forward, backward)


@pytest.mark.parametrize("merge", [*ALL, merge_tsv])
@settings(max_examples=15, deadline=None)
@given(parents=families(1, 3))
def test_the_inputs_stay_as_they_are(merge: Merge, parents: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    base, experts = parents
    before = [tensor.clone() for tensor in (base, *experts)]
    merged = merge(base, experts, [0.5] * len(experts))
    assert merged.dtype == torch.float32
    assert merged.shape == base.shape
    merged += 1.0  # a view of an input would show
    assert all(torch.equal(a, b) for a, b in zip(before, (base, *experts), strict=True))


@settings(max_examples=200, deadline=None)
@given(vector=coarse, data=st.data(), sample=st.sampled_from([2, 5, 4096]))
def test_selections_are_those_of_a_stable_sort(
    vector: torch.Tensor, data: st.DataObject, sample: int
) -> None:
    count = data.draw(st.integers(0, vector.numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsify, "_SAMPLE", sample)
        for select, descending in ((largest, True), (smallest, False)):
            order = torch.argsort(vector.abs(), descending=descending, stable=True)
            wanted = torch.zeros(vector.numel())
            wanted[order[:count]] = 1.0
            assert torch.equal(select(vector, count), wanted)
            ranks = magnitude_ranks(vector, descending=descending)
            assert torch.equal(ranks[order].long(), torch.arange(vector.numel()))
            assert torch.equal(places(ranks, 0, count), wanted)
            low = data.draw(st.integers(0, count))
            band = select(vector, count) - select(vector, low)
            assert torch.equal(places(ranks, low, count), band)


@pytest.mark.parametrize("skew", ["normal", "sorted", "heavy", "equal", "nan"])
def test_the_window_of_the_selection_never_misses(skew: str) -> None:
    """Whatever the sample says: also where the keys are sorted, far apart or all the same."""
    draw = torch.Generator().manual_seed(0)
    vector = torch.randn(30_000, generator=draw)
    if skew == "sorted":
        vector = vector.sort().values
    elif skew == "heavy":
        vector = vector**15
        vector[::7] = 1e-20  # what the sample sees
    elif skew == "equal":
        vector = torch.ones(30_000)
    elif skew == "nan":
        vector[::100] = float("nan")  # counts as largest, as in torch
    order = torch.argsort(vector.abs(), stable=True)
    for count in (1, 299, 15_000, 29_999, 30_000):
        assert torch.equal(smallest(vector, count).nonzero()[:, 0], order[:count].sort().values)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), stable=st.booleans(), size=st.sampled_from([(6, 40), (40,), (3, 20, 2)]))
def test_ranks_of_rows_put_each_row_in_order(seed: int, stable: bool, size: tuple[int, ...]) -> None:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    ranks = magnitude_ranks(vector, rows=True, stable=stable)
    rows = (vector if vector.dim() > 1 else vector[None]).abs()
    order = (ranks if ranks.dim() > 1 else ranks[None]).long().argsort(dim=1)
    assert torch.equal(rows.gather(1, order), rows.sort(dim=1).values)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), density=st.floats(0.01, 0.99))
def test_densities_are_kept_and_magnitudes_restored(seed: int, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(13, 7, generator=generator)
    zero, count = torch.zeros(13, 7), int(density * 91)
    trimmed = merge_ties(zero, [vector], [1.0], density=density)
    assert int(trimmed.count_nonzero()) == max(1, count)
    band = merge_breadcrumbs(zero, [vector], [1.0], density=density, gamma=0.05)
    assert int(band.count_nonzero()) == count
    top = int(0.05 * 91)
    if count and top <= 91 - count:
        assert float(band.abs().max()) == float(vector.abs().flatten().sort().values[-1 - top])
    scaled = merge_ties(zero, [vector], [1.0], density=density, rescale=True)
    torch.testing.assert_close(scaled.abs().sum(), vector.abs().sum())
    mask = largest(vector, max(1, count))
    assert kept(zero, vector, mask, False).scale == 1.0
    assert kept(zero, vector * 1e-12, mask, True).scale == 1.0


def test_della_keeps_large_elements_more_often() -> None:
    vector = torch.arange(1.0, 41.0).expand(5000, 40)
    merged: Any = merge_della_linear(
        torch.zeros(5000, 40), [vector], [1.0], density=0.5, epsilon=0.3, rescale=False,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    found = (merged != 0).float().mean(0).numpy()
    assert np.abs(found - (0.2 + 0.6 * np.arange(40) / 39)).max() < 0.03


def test_ties_by_hand() -> None:
    base = torch.zeros(5)
    first = torch.tensor([3.0, 1.0, -2.0, 0.0, 4.0])
    second = torch.tensor([1.0, -2.0, 2.0, 0.0, -1.0])
    # Signs +, -, + (a tie counts as positive), none, +; each element is the mean of what agrees.
    merged = merge_ties(base, [first, second], [1.0, 1.0])
    assert merged.tolist() == [2.0, -2.0, 2.0, 0.0, 4.0]
    summed = merge_ties(base, [first, second], [1.0, 1.0], normalize=False, scaling=0.5)
    assert summed.tolist() == [2.0, -1.0, 1.0, 0.0, 2.0]
    trimmed = merge_ties(base, [first, second], [1.0, 1.0], density=[0.4, 0.4])
    assert trimmed.tolist() == [3.0, -2.0, 2.0, 0.0, 4.0]  # of the two twos the first is kept in each
