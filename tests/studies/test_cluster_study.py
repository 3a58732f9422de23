"""studies/cluster: laws of the virtual clock, virtual workers against the product's own loop, sizes of known models."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.config.study_file import load_study_file
from search.running.check import describe
from search.running.launch import create
from search.study import run
from tests.pico import pico_config
from tests.pico_study import write_study
from tests.scripts import load_script

# In the order in which they import one another: the scripts are no package.
events, surrogate, virtual, service, reality, proxy, figures, simulate, sizing = (
    load_script(f"cluster/{name}.py")
    for name in (
        "events",
        "surrogate",
        "virtual",
        "service",
        "reality",
        "proxy",
        "figures",
        "simulate",
        "sizing",
    )
)
SECONDS = st.floats(0.01, 10.0)
LAW = settings(deadline=None, max_examples=40)


def constant(seconds: float) -> Callable[[Any], float]:
    return lambda rng: seconds


@LAW
@given(st.integers(1, 30), SECONDS)
def test_without_a_lock_workers_are_independent(workers: int, latency: float) -> None:
    """Oracle: N workers that wait for nothing finish N trials every latency."""
    record = events.simulate([events.Priced(0.0, 0.0)] * workers, events.Plan(5 * workers, constant(latency)))
    assert record.rate() == pytest.approx(workers / latency)
    assert record.utilisation == pytest.approx(1.0)
    assert max(record.waits) == 0.0


@LAW
@given(st.integers(1, 40), SECONDS, st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_throughput_is_that_of_the_workers_or_of_the_lock(
    workers: int, latency: float, ask: float, tell: float
) -> None:
    """Oracle: bounds of a closed queue, N / (latency + service) and 1 / service (Denning and Buzen 1978)."""
    record = events.simulate(
        [events.Priced(ask, tell)] * workers, events.Plan(60 * workers, constant(latency))
    )
    held, rate = ask + tell, record.rate(20 * workers)
    assert (
        rate <= min(workers / (latency + held), 1.0 / held) * 1.03
    )  # a window begins and ends with trials under way
    assert rate >= workers / (latency + workers * held) * 0.97
    if workers == 1:
        assert rate == pytest.approx(1.0 / (latency + held))


def test_a_lock_is_busy_from_the_number_of_workers_that_the_formula_gives() -> None:
    """Oracle: the simulation itself, on both sides of the number."""
    locks = [service.Lock(n, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0) for n in (1, 64)]
    limit = simulate.saturation(locks, service.Proposals({64: 0.3, 256: 0.3}, 0.0), 30.0)
    assert limit == math.ceil((30.0 + 0.5) / 0.5)

    def rate(workers: int) -> float:
        members = [events.Priced(0.4, 0.1)] * workers
        return float(events.simulate(members, events.Plan(20 * workers, constant(30.0))).rate(10 * workers))

    assert rate(2 * limit) == pytest.approx(1.0 / 0.5, rel=0.01)
    assert rate(limit // 2) == pytest.approx(limit // 2 / 30.5, rel=0.02)


def test_deaths_take_the_share_of_the_work_that_they_should() -> None:
    """Oracle: a worker dies in half of its trials, half-way on average, and is away for 60 s then."""
    plan = events.Plan(4000, constant(30.0), death=0.5)
    record = events.simulate([events.Priced(0.0, 0.0)] * 4, plan)
    assert record.rate(100) == pytest.approx(4 * 0.5 / (0.5 * 30.0 + 0.5 * (15.0 + 60.0)), rel=0.05)


def test_prices_are_interpolated_and_go_on_along_the_last_line() -> None:
    proposals = service.Proposals({64: 1.0, 256: 2.0, 512: 4.0}, 0.0)
    assert [proposals.at(t) for t in (10, 64, 160, 256, 1024)] == [1.0, 1.0, 1.5, 2.0, 8.0]


def test_the_surrogate_finds_a_quadratic_function() -> None:
    """Oracle: the function that made the scores."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-0.2, 1.2, (80, 4))

    def truth(x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return np.stack([x[:, 0] - x[:, 1] * x[:, 2], 2.0 - x[:, 3] ** 2], axis=1)

    new = rng.uniform(-0.2, 1.2, (20, 4))
    assert surrogate.Surrogate(x, truth(x)).scores(new) == pytest.approx(truth(new), abs=1e-3)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A real pico study with its answers, and simulated problem made of them."""
    folder = tmp_path_factory.mktemp("cluster")
    sampler = {"engine": "optuna", "name": "qmc", "seed": 0}
    url = f"sqlite:///{folder / 'study.db'}"
    store, problem = create(load_study_file(write_study(folder, sampler=sampler, trials=12)), url, "cpu")
    run(store, problem, report=False)
    return url, surrogate.load(url, ["pico"])[0]


def drawn(store: Any) -> list[Any]:
    return [(t.number, t.kind, dict(t.coefficients), t.values, dict(t.tags)) for t in store.trials()]


@pytest.mark.parametrize(
    "engine", ["tpe", "composite:startup=2", pytest.param("pymoo:nsga2", marks=pytest.mark.slow)]
)
def test_one_virtual_worker_draws_what_the_product_draws(
    study: tuple[str, Any], engine: str, tmp_path: Path
) -> None:
    """Oracle: `search.study.run` on the same simulated problem."""
    trials = 11 + 6
    made = service.fresh(study[1], engine, 6, seed=3)
    store, _ = create(made.config, f"sqlite:///{tmp_path / 'run.db'}", problem=made)
    run(store, made, report=False)
    plan = events.Plan(trials, constant(1.0))
    workers = virtual.cluster(f"sqlite:///{tmp_path / 'virtual.db'}", made, 1)
    record = events.simulate(workers, plan)
    assert drawn(workers[0].store) == drawn(store)
    assert min(record.asks) > 0.0
    assert min(record.tells) > 0.0
    members, memory = virtual.cluster_in_memory(made, 1, virtual.Prices(0.0, 0.0))
    events.simulate(members, plan)
    assert drawn(memory) == drawn(store)


@pytest.mark.parametrize("storage", ["memory", pytest.param("sqlite", marks=pytest.mark.slow)])
def test_trials_of_dead_workers_are_adopted_and_none_is_lost(
    study: tuple[str, Any], storage: str, tmp_path: Path
) -> None:
    """Oracle: the numbers of the budget, each complete once; workers died at some of them."""
    trials = 20
    made = service.fresh(study[1], "nsga2", trials - 11, seed=1)
    if storage == "memory":
        workers, store = virtual.cluster_in_memory(made, 4, virtual.Prices(0.01, 0.01))
    else:
        workers = virtual.cluster(f"sqlite:///{tmp_path / 'virtual.db'}", made, 4, grace=1.0)
        store = workers[0].store
    record = events.simulate(workers, events.Plan(trials, constant(2.0), death=0.3, restart=1.0, seed=2))
    assert record.deaths > 0
    assert [(t.number, t.state) for t in store.trials()] == [(n, "complete") for n in range(trials)]
    assert len(record.done) == trials


def test_duplicates_are_counted(study: tuple[str, Any]) -> None:
    """Oracle: the keys of the recipes, over all trials."""
    made = service.fresh(study[1], "nsga2", 100, seed=0)
    workers, store = virtual.cluster_in_memory(made, 8, virtual.Prices(0.0, 0.0))
    events.simulate(workers, events.Plan(100, constant(5.0)))
    searched = [t.attributes["recipe"] for t in store.trials() if t.kind == "search"]
    others = {t.attributes["recipe"] for t in store.trials() if t.kind != "search"}
    twice = len(searched) - len(set(searched) - others)
    assert twice > 0  # genetic algorithms propose exact duplicates
    assert store.running_twice + store.finished_twice == twice


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("135M", 134_515_008), ("7B", 7_241_732_096), ("70B", 70_553_706_496), ("MoE 8x7B", 46_702_792_704)],
)
def test_parameters_are_those_that_the_models_are_published_with(name: str, parameters: int) -> None:
    assert sizing.MODELS[name].parameters == parameters


def test_a_worker_is_sized_as_check_sizes_it(study: tuple[str, Any]) -> None:
    """Oracle: the parameters of real checkpoints, and the line that `mergefront check` prints."""
    config = pico_config()
    model = sizing.Decoder(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
        tied=config.tie_word_embeddings,
    )
    problem = study[1]
    assert model.parameters == problem.parents.parameters
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[problem.config.merge.dtype]
    found = sizing.size(model, 1000.0, sizing.Study(bytes=width))
    (line,) = [line for line in describe(problem, study[0]) if line.startswith("memory")]
    assert f"{found.live / 2**20:,.0f} MiB for the live model" in line
    assert found.parents == 2 * found.live


def test_hours_shrink_with_workers_and_grow_with_questions() -> None:
    model = sizing.MODELS["7B"]
    one, eight, long = (
        sizing.size(model, 1000.0, sizing.Study(workers=workers, questions=questions))
        for workers, questions in ((1, 1000), (8, 1000), (1, 2000))
    )
    assert eight.search == pytest.approx(one.search / 8)
    assert eight.report == pytest.approx(one.report * 4 / 31)  # 31 recipes in four rounds
    assert long.score == 2 * one.score


@pytest.mark.slow
def test_the_whole_script_in_small(
    study: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what is simulated of two real processes is what they do, within a factor of two on a busy machine."""
    monkeypatch.chdir(tmp_path)
    missing = f"sqlite:///{tmp_path / 'none.db'}#none"
    arguments = argparse.Namespace(study=study[0], names="pico", latency=missing, storage=None, out=tmp_path)
    result = simulate.run(arguments, simulate.QUICK, say=lambda *_, **__: None)
    (real,) = result["reality"]
    assert 0.5 < real["rate"] / real["expected"] < 1.5
    text = figures.document(result)
    assert "| SQLite | random |" in text
    figures.picture(result, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert not list((tmp_path / "runs" / "cluster").iterdir())


def test_scripts_are_modules_of_their_own() -> None:
    assert all(isinstance(one, ModuleType) for one in (events, virtual, proxy, reality))
