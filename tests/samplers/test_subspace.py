"""Fewer numbers for all coefficients: what they stand for, and the contract of engines over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.config.sampler import SamplerConfig
from search.config.study_file import load_study_file
from search.errors import ConfigError
from search.merging.baselines import BASELINES
from search.merging.groups import places_of
from search.merging.space import CoefficientSpace
from search.running.budget import set_budget
from search.running.launch import create
from search.samplers import Engine, make_engine
from search.samplers.coarse import first_blocks, from_tag, split, to_tag
from search.samplers.gradient import LossGradient
from search.samplers.subspace import Blocks, Knots, Moving, Subspace
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord
from search.study import run
from tests.pico_study import write_study
from tests.samplers.test_samplers import ALL, BOUNDS, LINE, Gradient, aims, config, sources

LAYERS = 5
GROUPS = (
    "embeddings",
    *(f"layer.{layer}.{component}" for layer in range(LAYERS) for component in ("attention", "mlp")),
    "final_norm",
    "head",
)
FIRST = len(LINE)
BLOCKS = "mergefront:blocks"
BEST = np.array([np.linspace(0.1, 0.9, len(GROUPS)), np.linspace(0.6, 0.2, len(GROUPS))])
OPTIONS: dict[str, dict[str, Any]] = {"knots": {"knots": 3}, "coarse": {"coarse": {"start": 2, "every": 4}}}
IDLE = ("embeddings", "head")


def objective(x: np.ndarray[Any, Any]) -> tuple[float, ...]:
    return float(1 - ((x - BEST[0]) ** 2).sum()), float(((x - BEST[1]) ** 2).sum())


def slope(x: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> LossGradient:
    away = x - BEST[: len(weights)]
    return LossGradient(float(weights @ (away**2).sum(axis=1)), 2 * weights @ away, tokens=30)


def vector(trial: TrialRecord) -> np.ndarray[Any, Any]:
    return np.array([trial.coefficients[group] for group in GROUPS])


def trial_of(x: Sequence[float] | np.ndarray[Any, Any], **tags: Any) -> TrialRecord:
    coefficients = dict(zip(GROUPS, map(float, x), strict=True))
    return TrialRecord(0, "search", "complete", coefficients, (0.0, 0.0), {}, tags, None)


def options(engine: str, name: str, option: str, seed: int = 0) -> SamplerConfig:
    return SamplerConfig.model_validate(
        {**config(engine, name, seed).model_dump(), "points": None, **OPTIONS.get(option, {})}
    )


def maker(
    engine: str, name: str, option: str, value: Callable[..., LossGradient] = slope
) -> Callable[[], Engine]:
    idle = IDLE if option == "idle" else ()
    chosen = options(engine, name, option)
    return lambda: make_engine(
        chosen, GROUPS, BOUNDS, replace(sources(len(aims(name))), gradient=lambda: Gradient(value)), idle
    )


def asked(
    one: Engine,
    history: Sequence[TrialRecord],
    objectives: int = 2,
    scores: Callable[[np.ndarray[Any, Any]], tuple[float, ...]] = objective,
) -> TrialRecord:
    """The next trial, complete."""
    number = len(history)
    kind, coefficients, tags = "uniform", dict.fromkeys(GROUPS, LINE[min(number, FIRST - 1)]), {}
    if number < FIRST:
        tags = dict(one.baseline_tags(number))
    else:
        proposal = one.propose(history, number)
        kind, coefficients, tags = "search", dict(proposal.coefficients), dict(proposal.tags)
    values = scores(np.array([coefficients[group] for group in GROUPS]))[:objectives]
    return TrialRecord(number, kind, "complete", coefficients, values, {}, tags, None)


def played(
    make: Callable[[], Engine], trials: int, *, fresh: bool = False, objectives: int = 2, **keys: Any
) -> list[TrialRecord]:
    one = make()
    history: list[TrialRecord] = []
    for number in range(trials):
        if fresh:
            one = make()
        new = asked(one, history, objectives, **keys)
        history.append(replace(new, state="failed", values=None) if number in (13, 19) else new)
    return history


def inside(history: Sequence[TrialRecord], option: str) -> bool:
    if option == "idle":
        return all(
            trial.coefficients[name] == 0.0 or np.ptp(vector(trial)) == 0.0
            for trial in history[FIRST:]
            for name in IDLE
        )
    if option == "knots":
        knots = Knots(GROUPS, 3)
        lies = [(knots.contract(trial), trial) for trial in history]
        return all(x is not None and (knots.expand(x) == vector(trial)).all() for x, trial in lies)
    return all(
        Blocks(GROUPS, from_tag(trial.tags[BLOCKS])).contract(trial) is not None for trial in history[FIRST:]
    )


# -- the contract of every engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["knots", "coarse", "idle"])
@pytest.mark.parametrize(("engine", "name"), [(e, n) for e, n in ALL if n not in ("grid", "qmc")])
def test_a_resumed_engine_proposes_what_an_uninterrupted_one_does(
    engine: str, name: str, option: str
) -> None:
    make = maker(engine, name, option)
    trials = 18 if name == "gp" else 44
    through = played(make, trials, objectives=len(aims(name)))
    assert played(make, trials, fresh=True, objectives=len(aims(name))) == through
    assert inside(through, option)
    assert all(BOUNDS[0] <= c <= BOUNDS[1] for trial in through for c in trial.coefficients.values())
    assert all(tuple(trial.coefficients) == GROUPS for trial in through)
    searched = {tuple(trial.coefficients.values()) for trial in through[FIRST:]}
    assert len(searched) >= 0.6 * (trials - FIRST)  # in two blocks a child is often one of its parents


@pytest.mark.parametrize("option", ["knots", "idle"])
def test_even_cover_of_a_fixed_subspace(option: str) -> None:
    make = maker("optuna", "qmc", option)
    through = played(make, 30)
    assert played(make, 30, fresh=True) == through
    assert inside(through, option)


@pytest.mark.parametrize("option", ["knots", "coarse", "idle"])
@pytest.mark.parametrize(
    ("engine", "name"), [("optuna", "tpe"), ("optuna", "nsga2"), ("pymoo", "nsga2"), ("gradient", "adam")]
)
def test_results_of_several_workers_arrive_in_any_order(engine: str, name: str, option: str) -> None:
    make = maker(engine, name, option)
    one, history = make(), list[TrialRecord]()
    rng = np.random.default_rng(0)
    for _ in range(60):
        new = asked(one, history)
        history.append(replace(new, state="running", values=None))
        running = [trial.number for trial in history if trial.state == "running"]
        while len(running) > 4:
            done = history[running.pop(int(rng.integers(len(running))))]
            history[done.number] = replace(done, state="complete", values=objective(vector(done)))
    assert inside(history, option)
    if (engine, name) != ("optuna", "nsga2"):  # a worker of it keeps to the parents it once selected
        assert make().propose(history, 60) == one.propose(history, 60)
    if option == "coarse":
        partitions = [from_tag(trial.tags[BLOCKS]) for trial in history[FIRST:]]
        assert len({len(blocks) for blocks in partitions}) > 5
        for early, late in pairwise(partitions):
            assert len(late) - len(early) in (0, 1)  # one is split at a time,
            assert all(any(set(b) <= set(a) for a in early) for b in late)  # and none is joined again


# -- knots ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_knots_are_interpolated_over_the_layers_and_one_number_is_for_the_rest(count: int, seed: int) -> None:
    knots = Knots(GROUPS, count)
    n = min(count, LAYERS)
    assert len(knots.names) == 2 * n + 1
    x = np.random.default_rng(seed).uniform(*BOUNDS, 2 * n + 1)
    found = dict(zip(GROUPS, knots.expand(x), strict=True))
    at = np.linspace(0, LAYERS - 1, n)
    for offset, component in ((0, "attention"), (n, "mlp")):
        expected = np.interp(range(LAYERS), at, x[offset : offset + n])
        np.testing.assert_allclose(
            [found[f"layer.{i}.{component}"] for i in range(LAYERS)], expected, rtol=0, atol=1e-15
        )
    assert found["embeddings"] == found["final_norm"] == found["head"] == x[-1]
    assert BOUNDS[0] <= min(found.values()) <= max(found.values()) <= BOUNDS[1]
    trial = trial_of(list(found.values()), **knots.tags(x))
    np.testing.assert_array_equal(knots.contract(trial), x)


@given(st.integers(1, 9), st.floats(*BOUNDS))
def test_constant_knots_are_the_uniform_line(count: int, value: float) -> None:
    knots = Knots(GROUPS, count)
    x = np.full(len(knots.names), value)
    assert (knots.expand(x) == value).all()
    np.testing.assert_array_equal(knots.contract(trial_of([value] * len(GROUPS))), x)


def test_a_trial_of_another_engine_lies_outside_the_knots() -> None:
    rough = np.linspace(0, 1, len(GROUPS)) ** 2
    assert Knots(GROUPS, 3).contract(trial_of(rough)) is None
    one = maker("optuna", "nsga2", "knots")()
    history = [asked(one, [None] * number) for number in range(FIRST)]  # type: ignore[list-item]
    after = replace(trial_of(rough), number=FIRST)
    assert one.propose([*history, after], FIRST + 1) == maker("optuna", "nsga2", "knots")().propose(
        history, FIRST + 1
    )


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        (("block.0-3", "block.4-7", "block.8-9", "head"), ("layer.0", "layer.1", "layer.2", "outside")),
        (("layer.0", "layer.1"), ("layer.0", "layer.1")),
        (("layer.0.norms", "layer.0.rest"), ("norms.0", "rest.0")),
        (("a.layers.0.mlp.up.weight", "a.layers.0.mlp.down.weight", "wte.weight"), ("mlp.0", "outside")),
    ],
)
def test_knots_of_other_granularities(groups: tuple[str, ...], names: tuple[str, ...]) -> None:
    knots = Knots(groups, 5)
    assert knots.names == names
    assert np.linalg.matrix_rank(knots.jacobian) == len(names)
    assert len(set(knots.expand(np.arange(len(names)) + 0.5))) == len(names)  # one knot a layer


# -- blocks ---------------------------------------------------------------------------------------------------------


@st.composite
def spaces(draw: st.DrawFn) -> tuple[str, ...]:
    layers = draw(st.integers(1, 6))
    components = draw(st.sampled_from([[""], [".attention", ".mlp"], [".attention", ".mlp", ".norms"]]))
    inner = [f"layer.{layer}{component}" for layer in range(layers) for component in components]
    return (
        *draw(st.sampled_from([(), ("embeddings",)])),
        *inner,
        *draw(st.sampled_from([(), ("final_norm", "head")])),
    )


@given(spaces(), st.integers(1, 8), st.data())
def test_every_trial_lies_exactly_in_every_later_subspace(
    groups: tuple[str, ...], start: int, data: st.DataObject
) -> None:
    places = places_of(groups)
    blocks = first_blocks(places, start)
    assert len(blocks) == min(start, len(groups))
    trials = []
    while True:
        assert sorted(index for block in blocks for index in block) == list(range(len(groups)))
        assert from_tag(to_tag(blocks)) == blocks
        subspace = Blocks(groups, blocks)
        x = np.array(data.draw(st.lists(st.floats(*BOUNDS), min_size=len(blocks), max_size=len(blocks))))
        named = dict(zip(groups, subspace.expand(x), strict=True))
        trials.append(TrialRecord(0, "search", "complete", named, (), {}, {}, None))
        for trial in trials:
            found = subspace.contract(trial)
            assert found is not None
            np.testing.assert_array_equal(subspace.expand(found), list(trial.coefficients.values()))
        wide = [number for number, block in enumerate(blocks) if len(block) > 1]
        if not wide:
            break
        blocks = split(blocks, data.draw(st.sampled_from(wide)), places)
    assert subspace.names == groups  # the plain engine's space, in its order


def test_blocks_are_halved_by_depth_and_then_by_component() -> None:
    places = places_of(GROUPS)
    halves = first_blocks(places, 2)
    assert [[GROUPS[index] for index in block] for block in halves] == [
        ["embeddings", "layer.0.attention", "layer.0.mlp", "layer.1.attention", "layer.1.mlp"],
        [*GROUPS[5:]],
    ]
    one_layer = (tuple(index for index, name in enumerate(GROUPS) if name.startswith("layer.3")),)
    assert [GROUPS[block[0]] for block in split(one_layer, 0, places)] == ["layer.3.attention", "layer.3.mlp"]


def test_the_block_that_matters_is_split() -> None:
    """Only the last two layers' coefficients count, so the split blocks lie there."""
    late = [index for index, name in enumerate(GROUPS) if name.startswith(("layer.3", "layer.4"))]

    def scores(x: np.ndarray[Any, Any]) -> tuple[float, ...]:
        away = ((x[late] - [0.9, 0.1, 0.8, 0.0]) ** 2).sum()
        return float(-away), float(away)

    for name in ("random", "tpe"):
        config = SamplerConfig.model_validate({"name": name, "coarse": {"start": 4, "every": 15}})
        make = lambda config=config: make_engine(config, GROUPS, BOUNDS, sources())  # noqa: E731
        history = played(make, FIRST + 50, scores=scores)
        first, last = (from_tag(history[place].tags[BLOCKS]) for place in (FIRST, -1))
        assert len(last) == len(first) + 3
        split_up = [set(block) for block in first if block not in last]
        assert all(block & set(late) for block in split_up), (name, split_up)


def test_it_ends_as_the_plain_engine() -> None:
    fine = played(maker("optuna", "tpe", "coarse"), FIRST + 70)
    assert to_tag(tuple((index,) for index in range(len(GROUPS)))) == fine[-1].tags[BLOCKS]
    coarse, plain = (maker("optuna", "tpe", option)() for option in ("coarse", ""))
    assert coarse.propose(fine, len(fine)).coefficients == plain.propose(fine, len(fine)).coefficients


# -- idle groups ----------------------------------------------------------------------------------------------------


def test_idle_groups_are_no_dimension_and_stay_at_zero() -> None:
    moving = Moving(GROUPS, IDLE)
    assert moving.names == GROUPS[1:-1]
    x = np.linspace(0.2, 0.7, len(moving.names))
    np.testing.assert_array_equal(moving.expand(x), [0.0, *x, 0.0])
    np.testing.assert_array_equal(moving.contract(trial_of([0.3, *x, 1.1])), x)
    assert (moving.expand(np.full(len(x), 0.4)) == 0.4).all()  # the recipe of a baseline
    grid, layers = SamplerConfig(name="grid", points=2), tuple(f"layer.{i}" for i in range(40))
    with pytest.raises(ConfigError, match="2 points in 31 dimensions"):
        make_engine(grid, layers, BOUNDS, sources(1), layers[:9])


def test_a_space_of_idle_groups_only_is_searched_as_it_is() -> None:
    config = SamplerConfig(name="random")
    one = make_engine(config, GROUPS, BOUNDS, sources(1), GROUPS)
    assert one.propose([], 11) == make_engine(config, GROUPS, BOUNDS, sources(1)).propose([], 11)


# -- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "subspace", [Knots(GROUPS, 3), Moving(GROUPS, IDLE), Blocks(GROUPS, first_blocks(places_of(GROUPS), 4))]
)
def test_the_gradient_is_that_of_the_coordinates(subspace: Subspace) -> None:
    from search.samplers.subspace import pulled

    weights = np.array([0.3, 0.7])
    of = pulled(Gradient(slope), subspace)
    x = np.linspace(0.1, 0.9, len(subspace.names))
    for index, unit in enumerate(np.eye(len(x))):
        difference = (of(x + 1e-5 * unit, weights, 0).loss - of(x - 1e-5 * unit, weights, 0).loss) / 2e-5
        np.testing.assert_allclose(of(x, weights, 0).gradient[index], difference, atol=1e-6)


def test_with_gradients_the_block_that_cannot_follow_is_split() -> None:
    """Only within the second half do the groups pull apart."""
    pull = np.where(np.arange(len(GROUPS)) < 9, 1.0, -1.0)

    def steady(x: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> LossGradient:
        return LossGradient(float(pull @ x), pull, tokens=1)

    history = played(maker("gradient", "adam", "coarse", steady), FIRST + 8)
    blocks = from_tag(history[-1].tags[BLOCKS])
    assert blocks[0] == (0, 1, 2, 3, 4)
    assert len(blocks) == 3
    assert history[-1].tags["mergefront:slope"] == pull.tolist()
    assert len(history[-1].tags["mergefront:adam"]["first"]) == 3


# -- whole studies --------------------------------------------------------------------------------------------------


def essence(trials: Sequence[TrialRecord]) -> list[Any]:
    return [(t.number, t.kind, t.state, t.coefficients, t.values, t.tags) for t in trials]


@pytest.mark.parametrize(
    "sampler",
    [
        {"engine": "optuna", "name": "nsga2", "population": 8, "coarse": {"start": 1, "every": 2}},
        {"engine": "pymoo", "name": "nsga2", "population": 8, "knots": 2},
        {"engine": "gradient", "steps": 1, "weights": 2, "coarse": {"start": 2, "every": 2}},
    ],
)
def test_an_interrupted_study_equals_an_uninterrupted_one(tmp_path: Path, sampler: dict[str, Any]) -> None:
    path = write_study(tmp_path, trials=7, sampler=sampler)
    whole, parts = (f"sqlite:///{tmp_path / name}.db" for name in ("whole", "parts"))
    run(*create(load_study_file(path), whole, "cpu"), report=False)
    for budget in (1, 2, 5, 7):
        store, problem = create(load_study_file(path), parts, "cpu")
        set_budget(store, budget)
        run(store, problem, report=False)
    one, other = (StudyStore.open(url, "pico").trials() for url in (whole, parts))
    assert essence(one) == essence(other)
    assert [t.state for t in one] == ["complete"] * (len(BASELINES) + 7)


def test_embeddings_that_training_left_alone_are_left_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = write_study(tmp_path, trials=3, sampler={"name": "random"})
    pre, post = (tmp_path / name / "model.safetensors" for name in ("pre", "post"))
    name = "model.embed_tokens.weight"
    save_file({**load_file(post), name: load_file(pre)[name]}, post, {"format": "pt"})
    store, problem = create(load_study_file(path), f"sqlite:///{tmp_path / 'study.db'}", "cpu")
    assert problem.idle == ("embeddings",)
    run(store, problem, report=False)
    trials = StudyStore.open(store.url, "pico").trials()
    assert [t.coefficients["embeddings"] for t in trials if t.kind == "search"] == [0.0] * 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"sampler": {"engine": "pymoo", "name": "ga"}},
            "sampler.name: pymoo ga searches one objective, found 2; name one, or choose nsga2",
        ),
        ({"sampler": {"name": "grid", "coarse": {}}}, "sampler: coarse: optuna grid covers one fixed space"),
        ({"sampler": {"name": "qmc", "coarse": {}}}, "sampler: coarse: optuna qmc covers one fixed space"),
        ({"sampler": {"knots": 5, "coarse": {}}}, "sampler: knots, coarse: found both"),
        ({"sampler": {"knots": 0}}, "sampler.knots: found 0: .*greater than or equal to 1"),
        ({"sampler": {"coarse": {"evry": 3}}}, r"sampler.coarse.evry: unknown key. Did you mean 'every'\?"),
        ({"sampler": {"coarse": {"every": 0}}}, "sampler.coarse.every: found 0"),
        (
            {"sampler": {"knots": 5}, "space": {"granularity": "uniform"}},
            "sampler.knots: space.granularity uniform has one coefficient only",
        ),
        (
            {"sampler": {"coarse": {}}, "space": {"granularity": "uniform"}},
            "sampler.coarse: space.granularity uniform has one coefficient only",
        ),
    ],
)
def test_study_files_that_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study_file(write_study(tmp_path, **keys))


@pytest.mark.parametrize("head", [(), ("lm_head.weight",)])
@pytest.mark.parametrize("file", ["slerp-ga.yaml", "slerp-nsga2.yaml"])
def test_the_presets_have_eleven_genes(file: str, head: tuple[str, ...]) -> None:
    config = load_study_file(Path(__file__).parents[2] / "studies" / "mergenetic" / file)
    parts = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm", "post_attention_layernorm")
    layers = [f"model.layers.{layer}.{part}.weight" for layer in range(32) for part in parts]
    tensors = ("model.embed_tokens.weight", *layers, "model.norm.weight", *head)
    space = CoefficientSpace.build(tensors, config.space, config.merge)
    knots = Knots(space.names, config.sampler.knots or 0)
    assert knots.names == (*(f"{c}.{k}" for c in ("attention", "mlp") for k in range(5)), "outside")
    assert (config.sampler.population, space.low, space.high) == (10, 0.0, 1.0)
