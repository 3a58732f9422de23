"""Merge methods of several experts against the real mergekit, tensor by tensor and on whole models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search.errors import MergeError
from search.merging.methods import consensus
from search.merging.methods.breadcrumbs import merge_breadcrumbs, merge_breadcrumbs_ties
from search.merging.methods.dare import merge_dare_linear, merge_dare_ties
from search.merging.methods.della import merge_della, merge_della_linear
from search.merging.methods.karcher import merge_karcher
from search.merging.methods.model_stock import merge_model_stock, stock_ratio
from search.merging.methods.multislerp import merge_multislerp
from search.merging.methods.sparsify import magnitude_ranks, uniform_draws
from search.merging.methods.task_arithmetic import merge_task_arithmetic
from search.merging.methods.ties import merge_ties
from tests.mergekit_oracle import by_mergekit, model_by_mergekit, same_bits, stored
from tests.pico import save_pico

Merge = Callable[..., torch.Tensor]
SHAPES = [(7,), (64,), (40, 70), (33, 129), (3, 5, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = [0.7, -0.3, 0.0, 1.1, 0.25]
DENSITIES = [0.3, 0.7, 1.0, 0.5, 0.6]
GENERAL: dict[str, Merge] = {
    "task_arithmetic": merge_task_arithmetic,
    "ties": merge_ties,
    "dare_linear": merge_dare_linear,
    "dare_ties": merge_dare_ties,
    "della_linear": merge_della_linear,
    "della": merge_della,
    "breadcrumbs": merge_breadcrumbs,
    "breadcrumbs_ties": merge_breadcrumbs_ties,
}  # fmt: skip
RANKED: dict[str, dict[str, bool]] = {
    "ties": {"descending": True},
    "breadcrumbs": {},
    "breadcrumbs_ties": {},
    "della": {"rows": True},
    "della_linear": {"rows": True},
}


@pytest.fixture
def stable_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sorts equal values by their positions, whatever the processor."""
    argsort, sort = torch.argsort, torch.sort
    monkeypatch.setattr(torch, "argsort", lambda x, *a, **k: argsort(x, *a, **{**k, "stable": True}))
    monkeypatch.setattr(torch, "sort", lambda x, *a, **k: sort(x, *a, **{**k, "stable": True}))


def family(
    shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 0.1
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and its experts, some distance away from it."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw)
    return base.to(dtype), [
        (base + spread * torch.randn(shape, generator=draw)).to(dtype) for _ in range(count)
    ]


def own_options(method: str, count: int, seed: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for the kernel and for mergekit: all that the method knows."""
    merge = inspect.signature(GENERAL[method]).parameters
    known: dict[str, Any] = {"density": DENSITIES[:count], "epsilon": 0.2, "gamma": 0.1}
    shared = {name: value for name, value in known.items() if name in merge}
    if "generator" not in merge:
        return shared, shared
    return {**shared, "generator": torch.Generator().manual_seed(seed)}, {**shared, "seed": seed}


def mergekits_order(method: str, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Ranks in the order that torch gives equal magnitudes on this machine."""
    if method not in RANKED:
        return {}
    return {
        "ranks": [magnitude_ranks(e.float() - base.float(), **RANKED[method], stable=False) for e in experts]
    }


@pytest.mark.parametrize("method", GENERAL)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_is_mergekits(method: str, count: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        base, experts = family(shape, count, dtype)
        kept = [tensor.clone() for tensor in (base, *experts)]
        ranks = mergekits_order(method, base, experts)
        for normalize in (False, True):
            common: dict[str, Any] = {"normalize": normalize, "scaling": 0.8}
            if method != "task_arithmetic":
                common["rescale"] = not normalize
            mine, theirs = own_options(method, count)
            merged = GENERAL[method](base, experts, WEIGHTS[:count], **mine, **ranks, **common)
            wanted = by_mergekit(method, base, experts, weight=WEIGHTS[:count], **theirs, **common)
            assert same_bits(merged, wanted), shape
        assert all(torch.equal(a, b) for a, b in zip(kept, (base, *experts), strict=True))


@pytest.mark.parametrize("method", GENERAL)
def test_defaults_are_mergekits(method: str) -> None:
    base, experts = family((9, 31), 2)
    mine, theirs = own_options(method, 2)
    for options in (mine, theirs):
        for name in ("epsilon", "gamma"):
            options.pop(name, None)
    merged = GENERAL[method](base, experts, [0.5, 0.25], **mine)
    assert same_bits(merged, by_mergekit(method, base, experts, weight=[0.5, 0.25], **theirs))


@pytest.mark.usefixtures("stable_sort")
@pytest.mark.parametrize("method", RANKED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_magnitudes_go_by_position(method: str, dtype: torch.dtype) -> None:
    """As mergekit does where torch sorts equal values by position; with and without ranks the same."""
    for shape in SHAPES:
        base, experts = family(shape, 3, dtype)
        experts[2] = base + (base > 0)  # two magnitudes only
        mine, theirs = own_options(method, 3)
        theirs["density"] = mine["density"] = [0.3, 0.7, 0.45]
        wanted = by_mergekit(method, base, experts, weight=WEIGHTS[:3], **theirs)
        assert same_bits(GENERAL[method](base, experts, WEIGHTS[:3], **mine), wanted), shape
        ranks = [magnitude_ranks(e.float() - base.float(), **RANKED[method]) for e in experts]
        again, _ = own_options(method, 3)
        again["density"] = mine["density"]
        assert same_bits(GENERAL[method](base, experts, WEIGHTS[:3], **again, ranks=ranks), wanted), shape


@pytest.mark.parametrize("method", GENERAL)
def test_zero_task_vectors_duplicates_and_cancelling_weights(method: str) -> None:
    base, (first, second) = family((12, 40), 2)
    cases = [
        ([base, base], [1.0, 0.5]),
        ([first, base], [1.0, 0.5]),
        ([first, first.clone()], [1.0, 1.0]),
        ([first, second], [1.0, -1.0]),
        ([first, first.clone()], [1.0, -1.0]),
        ([first, second], [0.0, 0.0]),
    ]
    for experts, weights in cases:
        for normalize in (False, True):
            mine, theirs = own_options(method, 2)
            merged = GENERAL[method](base, experts, weights, normalize=normalize, **mine)
            wanted = by_mergekit(method, base, experts, weight=weights, normalize=normalize, **theirs)
            assert same_bits(merged, wanted)


@pytest.mark.parametrize("method", GENERAL)
def test_several_chunks_and_many_experts(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = family((50, 41), 6)
    weights = [0.1, -0.7, 0.4, 0.3, 0.9, -0.2]
    mine, theirs = own_options(method, 5)
    theirs |= {"density": 0.6} if "density" in theirs else {}
    mine |= {"density": 0.6} if "density" in mine else {}
    monkeypatch.setattr(consensus, "CHUNK", 256)
    merged = GENERAL[method](base, experts, weights, **mine)
    assert same_bits(merged, by_mergekit(method, base, experts, weight=weights, **theirs))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_model_stock_is_mergekits(rows: bool, count: int, dtype: torch.dtype) -> None:
    for shape in [*SHAPES, (1,), *([] if rows else [()])]:
        base, experts = family(shape, count, dtype)
        wanted = by_mergekit("model_stock", base, experts, filter_wise=rows)
        merged = merge_model_stock(base, experts, [0.4] * count, rows=rows)
        assert same_bits(merged, wanted), shape
        ratio = stock_ratio(base, experts, rows=rows)
        assert same_bits(merge_model_stock(base, experts, [1] * count, rows=rows, ratio=ratio), wanted)


def test_model_stock_at_its_edges() -> None:
    base, (first, second) = family((4, 6), 2)
    opposite = 2 * base - first
    for experts in ([first, first.clone()], [first, base], [base, base], [first, opposite]):
        assert same_bits(merge_model_stock(base, experts, [1, 1]), by_mergekit("model_stock", base, experts))
    weighted = merge_model_stock(base, [first, second], [3, 1])
    t = stock_ratio(base, [first, second])
    torch.testing.assert_close(weighted, t * (0.75 * first + 0.25 * second) + (1 - t) * base)


@pytest.mark.parametrize("spread", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_means_on_the_sphere_are_near_mergekits(spread: float, count: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        base, experts = family(shape, count, dtype, spread=spread)
        weights = [0.7, 0.3, 0.1, 1.1, 0.25][:count]
        pairs = [
            (merge_karcher(base, experts, [2.0] * count), by_mergekit("karcher", None, experts)),
            (
                merge_multislerp(base, experts, weights),
                by_mergekit("multislerp", base, experts, weight=weights),
            ),
            (
                merge_multislerp(base, experts, weights, around_base=False, normalize=False),
                by_mergekit("multislerp", None, experts, weight=weights, normalize_weights=False),
            ),
        ]
        for merged, wanted in pairs:
            assert merged.dtype == torch.float32
            assert float((merged - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()), shape


def test_karcher_by_hand() -> None:
    east, north, zero = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0]), torch.zeros(2)
    third = merge_karcher(zero, [east, north], [2, 1])  # a third of the way, norm (2 * 2 + 4) / 3
    angle = torch.tensor(torch.pi / 6)
    torch.testing.assert_close(third, 8 / 3 * torch.stack([angle.cos(), angle.sin()]))
    assert torch.equal(merge_karcher(zero, [zero, zero], [1, 1]), zero)
    torch.testing.assert_close(merge_karcher(zero, [east, zero], [1, 1]), east / 2)
    with pytest.raises(MergeError, match="opposite to the mean"):
        merge_karcher(zero, [east, -east], [1, 1])
    torch.testing.assert_close(merge_karcher(zero, [east, -east], [1, 0]), east)
    chord = merge_karcher(zero, [east, north], [2, 1], steps=0)
    torch.testing.assert_close(chord, 8 / 3 * torch.tensor([2.0, 1.0]) / 5**0.5)


def test_multislerp_at_its_edges() -> None:
    base = torch.arange(6.0)
    opposite = [base + 2.0, base - 2.0]
    assert torch.equal(merge_multislerp(base, opposite, [0.5, 0.5]), base)
    assert torch.equal(merge_multislerp(base, [base, base, base], [1, 1, 1]), base)
    vectors = [
        torch.tensor([1.0, 0.0]),
        torch.tensor([-0.5, 3**0.5 / 2]),
        torch.tensor([-0.5, -(3**0.5) / 2]),
    ]
    with pytest.raises(MergeError, match="cancel each other"):
        merge_multislerp(torch.zeros(2), vectors, [1, 1, 1])


def whole_model(
    merge: Merge, models: list[dict[str, torch.Tensor]], **options: Any
) -> dict[str, torch.Tensor]:
    return {name: merge(models[0][name], [one[name] for one in models[1:]], **options) for name in models[0]}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task_arithmetic", {}),
        ("ties", {"density": 0.3}),
        ("breadcrumbs", {"density": 0.7, "gamma": 0.05}),
        ("breadcrumbs_ties", {"density": 0.3}),
    ],
)
@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("bfloat16", False)])
def test_whole_models_are_mergekits(
    method: str, options: dict[str, float], dtype: str, tied: bool, tmp_path: Path
) -> None:
    folders = [
        save_pico(tmp_path / str(k), seed=k, dtype=dtype, tied=tied, tokenizer=False) for k in range(3)
    ]
    settings = [{"weight": weight, **options} for weight in (0.6, -0.2)]
    wanted = model_by_mergekit(tmp_path / "out", method, folders, settings, **{"lambda": 1.3})
    models = [stored(folder) for folder in folders]

    def merge(base: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
        ranks = mergekits_order(method, base, experts)
        return GENERAL[method](base, experts, [0.6, -0.2], scaling=1.3, **options, **ranks)

    merged = whole_model(merge, models)
    assert merged.keys() == wanted.keys()
    assert [name for name in wanted if not same_bits(merged[name], wanted[name])] == []


@pytest.mark.parametrize("method", ["model_stock", "karcher", "multislerp"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_means_are_mergekits(method: str, dtype: str, tmp_path: Path) -> None:
    folders = [
        save_pico(tmp_path / str(k), seed=k, dtype=dtype, tied=True, tokenizer=False) for k in range(3)
    ]
    settings = [{"weight": weight} if method == "multislerp" else {} for weight in (0.6, 0.2)]
    wanted = model_by_mergekit(tmp_path / "out", method, folders, settings)
    models = [stored(folder) for folder in folders]
    if method == "karcher":  # mergekit averages the base as well
        merged = whole_model(lambda base, ends: merge_karcher(base, [*ends, base], [1, 1, 1]), models)
    elif method == "multislerp":
        merged = whole_model(merge_multislerp, models, weights=[0.6, 0.2])
    else:
        merged = whole_model(merge_model_stock, models, weights=[1, 1])
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if method == "model_stock":
            assert same_bits(merged[name], tensor), name
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-5 * float(tensor.abs().max()))


def test_draws_are_those_of_bernoulli() -> None:
    for density in (0.3, 0.123456789, 0.999):
        torch.manual_seed(5)
        wanted = torch.bernoulli(torch.full((17, 31), density))
        generator = torch.Generator().manual_seed(5)
        draws = uniform_draws(torch.Size((17, 31)), generator)
        assert torch.equal((draws < density).float(), wanted)
        assert torch.equal(generator.get_state(), torch.get_rng_state())


def test_a_row_of_one_element_is_kept_with_the_density() -> None:
    base, experts = torch.zeros(4000, 1), [torch.ones(4000, 1)]
    generator = torch.Generator().manual_seed(0)
    merged = merge_della_linear(base, experts, [1.0], density=0.3, generator=generator, rescale=False)
    assert float(merged.mean()) == pytest.approx(0.3, abs=0.03)


def test_scalars_and_empty_tensors() -> None:
    for shape in [(), (0,), (0, 4), (4, 0)]:
        base, experts = family(shape, 2)
        for method, merge in GENERAL.items():
            mine, _ = own_options(method, 2)
            assert merge(base, experts, [0.5, 0.5], **mine).shape == shape, method
        for mean in (merge_model_stock, merge_karcher, merge_multislerp):
            assert mean(base, experts, [0.5, 0.5]).shape == shape


def refusals() -> list[Callable[[], torch.Tensor]]:
    base, experts = family((3, 4), 2)
    bad: list[Callable[[], torch.Tensor]] = []
    for method, merge in {
        **GENERAL,
        "stock": merge_model_stock,
        "karcher": merge_karcher,
        "ms": merge_multislerp,
    }.items():
        options = own_options(method, 2)[0] if method in GENERAL else {}

        def add(*arguments: Any, merge: Merge = merge, **named: Any) -> None:
            bad.append(lambda: merge(*arguments, **named))

        add(base, [], [], **options)
        add(base, experts, [1.0], **options)
        add(base, experts, [1.0, float("nan")], **options)
        add(base, experts, [1.0, 1e39], **options)
        add(base, [experts[0], experts[1][:2]], [1.0, 1.0], **options)
        add(base, [experts[0], experts[1][0]], [1.0, 1.0], **options)
        add(base, [experts[0], experts[1].half()], [1.0, 1.0], **options)
        add(base.double(), [e.double() for e in experts], [1.0, 1.0], **options)
        add(base.int(), [e.int() for e in experts], [1.0, 1.0], **options)
        for name, values in {
            "density": [0.0, -0.1, 1.1, float("nan"), [0.5], [0.5, 0.0]],
            "scaling": [float("nan"), float("inf")],
            "gamma": [-0.1, 1.0, float("nan"), [0.1]],
            "epsilon": [-0.1, 0.4, float("nan"), [0.1]],
            "ranks": [
                [torch.zeros(4, 3, dtype=torch.int32)] * 2,
                [torch.zeros(3, 4)] * 2,
                [torch.zeros(3, 4, dtype=torch.int32)],
            ],
        }.items():
            if name in inspect.signature(merge).parameters:
                for value in values:
                    add(base, experts, [1.0, 1.0], **{**options, name: value})
    bad += [
        lambda: merge_model_stock(base, experts[:1], [1.0]),
        lambda: merge_model_stock(base, experts, [1.0, -1.0]),
        lambda: merge_model_stock(base, experts, [0.0, 0.0]),
        lambda: merge_karcher(base, experts, [1.0, -1.0]),
        lambda: merge_karcher(base, experts, [1.0, 1.0], steps=-1),
        lambda: merge_karcher(base, experts, [1.0, 1.0], tolerance=0.0),
        lambda: merge_karcher(base, experts, [1.0, 1.0], table=np.eye(3)),
        lambda: merge_karcher(base, [experts[0], base * 0], [0.0, 1.0]),
        lambda: merge_multislerp(base, experts, [1.0, -1.0]),
    ]
    return bad


def test_refusals_are_one_line() -> None:
    for index, call in enumerate(refusals()):
        with pytest.raises(MergeError) as caught:
            call()
        assert "\n" not in str(caught.value), index
