"""Several experts of one base: their space, their studies, and exports that mergekit rebuilds bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge

from search.checkpoints.parents import Parents
from search.config.sections import MergeConfig, SpaceConfig
from search.config.study_file import load_study_file, parse_study
from search.errors import ConfigError, IncompatibleModelsError, MergeError
from search.export.folder import export_rows
from search.export.verify import verify_folder
from search.merging.baselines import UNCHOSEN, baselines
from search.merging.methods.linear import linear_weights, merge_linear, weighted_sum
from search.merging.space import CoefficientSpace
from search.results.board import read_board
from search.results.front_table import front_table
from search.results.page import write_report
from search.results.picks import named_picks, pick
from search.results.plots.coefficients import coefficients_figure
from search.running.launch import create
from search.running.problem import Problem
from search.samplers.gradient import CoefficientGradient
from search.storage.store import StudyStore
from search.study import run
from tests.conftest import Cli
from tests.merging.test_mergekit_config import differing, loaded
from tests.pico import save_pico
from tests.pico_study import write_study

EXPERTS = ("brief", "kind", "sure")
FIRST = 1 + len(EXPERTS) + 10  # pre, the experts, ten points of the line
TENSORS = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")


def expert_study(
    folder: Path, *, simplex: bool = False, names: tuple[str, ...] = EXPERTS, **keys: Any
) -> Path:
    space: dict[str, Any] = {"granularity": "layer", "components": ["attention", "mlp"]}
    space |= {"simplex": True} if simplex else {"low": -0.2, "high": 1.2}
    return write_study(folder, experts=names, **{"parents": {"dtype": "bfloat16"}, "space": space, **keys})


def finished(folder: Path, **keys: Any) -> tuple[StudyStore, Problem]:
    store, problem = create(
        load_study_file(expert_study(folder, **keys)), f"sqlite:///{folder / 'study.db'}", "cpu"
    )
    run(store, problem)
    return store, problem


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyStore, Problem]:
    return finished(tmp_path_factory.mktemp("experts"))


def space_of(*, simplex: bool = False, experts: tuple[str, ...] = EXPERTS) -> CoefficientSpace:
    config = SpaceConfig(simplex=True) if simplex else SpaceConfig(low=-0.5, high=1.5)
    return CoefficientSpace.build(TENSORS, config, MergeConfig(), experts)


# -- the space --------------------------------------------------------------------------------------------------


def test_every_expert_has_a_coefficient_in_every_group() -> None:
    space = space_of()
    assert space.dim == 9
    assert space.names[:4] == ("brief/embeddings", "brief/layer.0", "brief/final_norm", "kind/embeddings")
    recipe = space.from_vector(np.arange(9) / 10)
    assert space.by_tensor(recipe)["model.layers.0.mlp.up_proj.weight"] == (0.1, 0.4, 0.7)
    assert space.to_vector(recipe).tolist() == (np.arange(9) / 10).tolist()


@given(st.lists(st.floats(0.0, 1.0), min_size=9, max_size=9))
def test_a_simplex_holds_means_of_the_experts(x: list[float]) -> None:
    space = space_of(simplex=True)
    recipe = space.from_vector(x)
    for each in space.by_tensor(recipe).values():
        assert min(each) >= 0.0
        assert sum(each) == pytest.approx(1.0, abs=1e-12)
        assert linear_weights(each)[0] == 0.0  # nothing of pre
    again = space.from_vector(space.to_vector(recipe))
    assert again.coefficients == recipe.coefficients  # a projection


def test_baselines_of_several_experts() -> None:
    free, simplex = (baselines(space_of(simplex=kind)) for kind in (False, True))
    assert [one.kind for one in free] == ["pre", *["expert"] * 3, *["uniform"] * 10]
    assert [one.label for one in free[:5]] == ["pre", *EXPERTS, "uniform 0.1"]
    assert set(free[2].recipe.coefficients.items()) >= {("kind/layer.0", 1.0), ("sure/layer.0", 0.0)}
    assert set(free[-1].recipe.coefficients.values()) == {1.0}  # the sum of all task vectors
    assert set(simplex[-1].recipe.coefficients.values()) == {1.0 / 3.0}  # their mean
    assert len({one.recipe.key for one in free}) == len(free) == FIRST


def test_one_expert_is_as_before() -> None:
    space = space_of(experts=("post",))
    assert space.names == ("embeddings", "layer.0", "final_norm")
    assert [one.label for one in baselines(space)[:3]] == ["pre", "post", "uniform 0.1"]
    assert len(baselines(space)) == 11


# -- the kernel -------------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([0.0, 1.0, 0.5, -0.25, 1.0 / 3.0]), min_size=2, max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_what_has_no_weight_is_not_read(coefficients: list[float], dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(5, 7, generator=draw).to(dtype) for _ in range(len(coefficients) + 1)]
    tensors[0][0, 0] = -0.0
    weights = linear_weights(coefficients)
    out = torch.empty_like(tensors[0])
    weighted_sum(tensors, weights, out)
    assert torch.equal(out.view(torch.uint8), merge_linear(tensors, weights).view(torch.uint8))


def test_one_expert_alone_is_that_expert_bit_for_bit(study: tuple[StudyStore, Problem]) -> None:
    _, problem = study
    for name, expert in problem.parents.experts.items():
        problem.merge(problem.space.alone(name))
        state = problem.live.model.state_dict()
        for tensor, key in problem.parents.parameter.items():
            assert torch.equal(state[key], expert.tensor(tensor).float()), (name, tensor)


# -- studies ----------------------------------------------------------------------------------------------------


def test_board_tables_and_pages_know_every_expert(study: tuple[StudyStore, Problem], tmp_path: Path) -> None:
    store, _ = study
    board = read_board(store)
    assert [row.label for row in board.parents] == ["pre", *EXPERTS]
    assert [row.kind for row in board.rows[:5]] == ["pre", *["expert"] * 3, "uniform"]
    assert all(row.report for row in board.parents)
    worst = min(row.search["accuracy"].value for row in board.parents)
    assert board.reference["accuracy"] == worst
    front = next(row for row in board.front if row.kind not in ("pre", "expert"))
    assert list(front.against) == ["pre", *EXPERTS]
    table = front_table(board)
    assert all(name in table for name in EXPERTS)
    page = write_report(store, tmp_path / "report")[0].read_text()
    assert all(f"({name})" in page for name in EXPERTS)
    assert len(board.to_csv().splitlines()) == len(board.rows) + len(board.alternatives) + 1


@pytest.mark.parametrize("simplex", [False, True])
def test_mergekit_rebuilds_the_whole_front(simplex: bool, tmp_path: Path) -> None:
    store, problem = finished(tmp_path / "study", simplex=simplex, trials=12)
    board = read_board(store)
    chosen = [*board.front, *board.of_kind("expert"), board.rows[-1]]
    rows = list({row.trial: row for row in chosen}.values())
    folders = export_rows(store, board, rows, tmp_path / "out", weights=True, overwrite=False, overrides=[])
    for row, folder in zip(rows, folders, strict=True):
        config = yaml.safe_load((folder / "mergekit_config.yml").read_text())
        assert len(config["models"]) == 4
        rebuilt = tmp_path / f"rebuilt-{row.trial}"
        run_merge(MergeConfiguration.model_validate(config), str(rebuilt), MergeOptions(quiet=True))
        ours, theirs = loaded(folder / "model"), loaded(rebuilt)
        assert differing(ours, theirs) == 0
        problem.merge(next(r.recipe for r in store.trials() if r.number == row.trial))
        scored = problem.live.model.state_dict()
        assert all(torch.equal(scored[key], ours[name]) for name, key in problem.parents.parameter.items())
    said = [line for folder in folders for line in verify_folder(folder, None, [], "cpu")]
    assert sum("search  " in line for line in said) == len(folders)
    card = (folders[0] / "README.md").read_text()
    assert all(f"`{name}`" in card for name in EXPERTS)
    bare = export_rows(
        store, board, rows[:1], tmp_path / "bare", weights=False, overwrite=False, overrides=[]
    )
    assert "gives all" in "".join(verify_folder(bare[0], None, [], "cpu"))


QUICK: tuple[dict[str, Any], ...] = (
    {"engine": "optuna", "name": "tpe"},
    {"engine": "pymoo", "name": "nsga2", "population": 8},
)
ENGINES: tuple[dict[str, Any], ...] = (
    *QUICK,
    {"engine": "optuna", "name": "gp", "startup": 3},
    {"engine": "composite", "startup": 2},
    {"engine": "optuna", "name": "tpe", "knots": 2},
    {"engine": "optuna", "name": "tpe", "coarse": {"start": 2, "every": 3}},
)


@pytest.mark.parametrize(
    ("sampler", "simplex"),
    [
        pytest.param(one, simplex, marks=[] if one in QUICK else [pytest.mark.slow])
        for one in ENGINES
        for simplex in (False, True)
        if not (simplex and "coarse" in one)
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_every_engine_searches_experts_and_resumes(
    sampler: dict[str, Any], simplex: bool, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"sampler": {**sampler, "seed": 1}, "simplex": simplex, "trials": 6}
    whole, _ = finished(tmp_path / "whole", **keys)
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", parts, ignore=shutil.ignore_patterns("study*"))
    for trials in (0, 4, 6):
        store, problem = create(
            load_study_file(expert_study(parts, **keys)), f"sqlite:///{parts / 'study.db'}", "cpu"
        )
        store.set_attribute("trials", trials)
        run(store, problem)
    one, other = whole.trials(), store.trials()
    assert len(one) == FIRST + 6
    assert [(r.kind, r.coefficients, r.values) for r in one] == [
        (r.kind, r.coefficients, r.values) for r in other
    ]
    assert len({tuple(record.coefficients.items()) for record in one[FIRST:]}) == 6
    if simplex:
        for record in one[FIRST:]:
            assert sum(c for n, c in record.coefficients.items() if n.endswith("/head")) == pytest.approx(1.0)


@pytest.mark.parametrize("estimator", ["gmp-irt", "answers"])
def test_cheap_fitness_knows_all_parents(estimator: str, tmp_path: Path) -> None:
    store, _ = finished(tmp_path, fidelity={"estimator": estimator, "questions": 8}, trials=8)
    assert {record.state for record in store.trials()} <= {"complete", "stopped"}
    assert len(store.trials()) == FIRST + 8


def test_a_gradient_by_every_experts_coefficient(tmp_path: Path) -> None:
    """Equal to a central difference within 1e-3 of the largest."""
    from objectives.scoring.losses import stand_in

    problem = Problem.open(load_study_file(expert_study(tmp_path, names=("brief", "kind"))), "cpu")
    space = problem.space
    gradient = CoefficientGradient(
        problem.live, space, problem.scorer, problem.questions.search, problem.config.tasks
    )
    loss, x = stand_in("brier"), np.linspace(0.1, 0.6, space.dim)
    found = gradient.at(space.from_vector(x), loss).gradient
    step = 1e-2
    wanted = []
    for place in range(space.dim):
        move = np.eye(space.dim)[place] * step
        up, down = (gradient.at(space.from_vector(y), loss).loss for y in (x + move, x - move))
        wanted.append((up - down) / (2 * step))
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max() + 1e-6)


def test_an_expert_that_left_a_group_alone_has_no_dimension_there(tmp_path: Path) -> None:
    path = expert_study(tmp_path)
    shared = {"model.embed_tokens.weight"}
    from safetensors.torch import load_file, save_file

    base, kind = (load_file(tmp_path / name / "model.safetensors") for name in ("pre", "kind"))
    save_file(
        {**kind, **{n: base[n] for n in shared}}, tmp_path / "kind" / "model.safetensors", {"format": "pt"}
    )
    problem = Problem.open(load_study_file(path), "cpu")
    assert problem.idle == ("kind/embeddings",)


@pytest.mark.parametrize(("granularity", "panels"), [("uniform", 1), ("layer", 3)])
def test_a_pick_has_one_row_of_cells_or_a_panel_an_expert(
    granularity: str, panels: int, tmp_path: Path
) -> None:
    store, _ = finished(tmp_path, space={"granularity": granularity}, trials=2)
    board = read_board(store)
    figure = coefficients_figure(board)
    titles = [title for axes in figure.axes if (title := axes.get_title(loc="left"))]
    picked = {row.trial for row in named_picks(board).values()}
    assert len(titles) == panels * len(picked)
    assert all(any(title.endswith(f", {name}") for title in titles) == (panels > 1) for name in EXPERTS)


# -- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"parents": {"pre": "a", "post": "b", "experts": {"x": "c", "y": "d"}}}, "found both"),
        ({"parents": {"pre": "a"}}, "post, experts: found neither"),
        ({"parents": {"pre": "a", "experts": {"x": "c"}}}, "parents.experts: found 1, wanted 2 to 16"),
        ({"parents": {"pre": "a", "experts": {"post": "c", "y": "d"}}}, "found name 'post'"),
        ({"parents": {"pre": "a", "experts": {"a/b": "c", "y": "d"}}}, "found name 'a/b'"),
        ({"parents": {"pre": "a", "experts": {"x": "", "y": "d"}}}, "x has no place"),
        ({"merge": {"method": "slerp"}}, "slerp merges a single expert, found 2"),
        ({"space": {"simplex": True, "high": 1.2}}, "simplex: goes with low 0 and high 1"),
        ({"space": {"simplex": True}, "sampler": {"engine": "gradient"}}, "leaves the simplex"),
        ({"space": {"simplex": True}, "sampler": {"engine": "line"}}, "has nothing to move in a simplex"),
        (
            {"merge": {"method": "karcher"}, "sampler": {"engine": "line"}},
            "nothing to move in a simplex or under",
        ),
        (
            {"space": {"simplex": True}, "sampler": {"coarse": {"start": 2, "every": 4}}},
            "nothing to move in a simplex",
        ),
        (
            {"merge": {"method": "ties", "density": [0.2, 1.0]}, "sampler": {"knots": 2}},
            "merge.density is searched",
        ),
        (
            {"merge": {"method": ["ties", "linear"]}, "sampler": {"coarse": {"start": 2, "every": 4}}},
            "merge.method is",
        ),
        ({"merge": {"method": "della", "density": [0.5, 1.0]}}, r"density \+ epsilon below 1"),
        ({"merge": {"method": "ties", "density": "half"}}, "merge.density: found 'half'"),
        ({"space": {"simplex": True}, "parents": {"pre": "a", "post": "b"}}, "is for several experts"),
    ],
)
def test_mistakes_in_the_study_file(keys: dict[str, Any], wanted: str) -> None:
    study = {
        "schema": 1,
        "name": "x",
        "parents": {"pre": "a", "experts": {"x": "b", "y": "c"}},
        "tasks": [{"path": "q.jsonl"}],
        **keys,
    }
    with pytest.raises(ConfigError, match=wanted) as error:
        parse_study(study, "study.yaml")
    assert "\n" not in str(error.value)


def test_copies_and_strangers(tmp_path: Path, cli: Cli) -> None:
    path = expert_study(tmp_path)
    shutil.rmtree(tmp_path / "kind")
    shutil.copytree(tmp_path / "brief", tmp_path / "kind")
    code, out, err = cli("launch", path)
    assert (code, out) == (3, "")
    assert "kind: every tensor is as in brief, so its task vector is counted twice. Leave one" in err
    assert err.count("\n") == 1
    shutil.rmtree(tmp_path / "kind")
    shutil.copytree(tmp_path / "pre", tmp_path / "kind")
    with pytest.raises(
        IncompatibleModelsError, match="kind: every tensor is as in pre, so its task vector is zero"
    ):
        Problem.open(load_study_file(path), "cpu")
    shutil.rmtree(tmp_path / "kind")
    save_pico(tmp_path / "kind", seed=9, dtype="bfloat16")
    notes = Problem.open(load_study_file(path), "cpu").notes
    assert any("kind: its task vector is 1." in note and "another base" in note for note in notes)
    shutil.rmtree(tmp_path / "kind")
    save_pico(tmp_path / "kind", "qwen3", dtype="bfloat16")
    with pytest.raises(IncompatibleModelsError, match="model_type: 'llama' in pre but 'qwen3' in kind"):
        Parents.open(str(tmp_path / "pre"), {n: str(tmp_path / n) for n in EXPERTS})


def test_another_set_of_experts_is_another_study(tmp_path: Path) -> None:
    store, _ = finished(tmp_path, trials=0)
    value = json.loads(json.dumps(store.attribute("config")))
    assert list(value["parents"]["experts"]) == list(EXPERTS)
    two = load_study_file(expert_study(tmp_path, names=("brief", "sure"), trials=0))
    with pytest.raises(ConfigError, match="changed since it began"):
        create(two, store.url, "cpu")


def test_a_recipe_of_other_experts_does_not_fit() -> None:
    recipe = space_of(experts=("brief", "kind")).uniform(0.5)
    with pytest.raises(MergeError, match="is not in both"):
        space_of().by_tensor(recipe)


def test_a_pick_may_be_an_expert(study: tuple[StudyStore, Problem]) -> None:
    board = read_board(study[0])
    expert = board.of_kind("expert")[0]
    assert pick(board, f"trial:{expert.trial}").kind in UNCHOSEN
