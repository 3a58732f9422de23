"""Studies over merge methods and their hyper-parameters, and exports that mergekit rebuilds under its own names."""

from __future__ import annotations

from collections.abc import Sequence
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
from safetensors.torch import load_file, save_file

from search.checkpoints.parents import Parents
from search.config.methods import METHODS
from search.config.sections import MergeConfig, SpaceConfig
from search.config.study_file import load_study_file, parse_study
from search.errors import ConfigError, ExportError, MergeError
from search.export.folder import export_rows
from search.export.verify import verify_folder
from search.merging.blend import KERNELS, make_blend
from search.merging.space import CoefficientSpace
from search.results.board import read_board
from search.results.front_table import front_table
from search.running.launch import create
from search.running.problem import Problem
from search.storage.store import StudyStore
from search.study import run
from tests.conftest import Cli
from tests.merging.test_experts import EXPERTS, expert_study, finished
from tests.merging.test_mergekit_config import differing, loaded
from tests.pico import save_experts

RANGES: dict[str, list[float]] = {
    "density": [0.3, 0.7],
    "scaling": [0.5, 1.5],
    "epsilon": [0.05, 0.2],
    "gamma": [0.0, 0.1],
}
TENSORS = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")


def searched(method: str, **keys: Any) -> dict[str, Any]:
    """A merge section that searches everything that a method has."""
    options = {name: RANGES[name] for name in METHODS[method].options}
    return {"method": method, "seed": 5, **options, **keys}


def test_every_kernel_has_a_row_in_the_table() -> None:
    assert {name for name, method in METHODS.items() if method.kernel} == KERNELS.keys()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "slerp"])
def test_mergekit_rebuilds_what_a_study_of_any_method_scored(method: str, tmp_path: Path) -> None:
    store, problem = finished(
        tmp_path / "study",
        merge=searched(method, dtype="bfloat16"),
        space={"granularity": "layer", "components": ["attention", "mlp"]},
        parents={"dtype": "bfloat16", "tied": method in ("dare_ties", "ties")},
        trials=3,
    )
    board = read_board(store)
    found, kind = board.of_kind("search")[-1], board.of_kind("expert")[1]
    assert found.method == method
    rows = [found, kind, board.of_kind("uniform")[3]]
    folders = export_rows(store, board, rows, tmp_path / "out", weights=True, overwrite=False, overrides=[])
    bare = export_rows(store, board, rows, tmp_path / "bare", weights=False, overwrite=False, overrides=[])
    for row, folder, other in zip(rows, folders, bare, strict=True):
        text = (folder / "mergekit_config.yml").read_text()
        config = MergeConfiguration.model_validate(yaml.safe_load(text))
        rebuilt = tmp_path / f"rebuilt-{row.trial}"
        torch.set_num_threads(1)
        run_merge(config, str(rebuilt), MergeOptions(quiet=True, random_seed=5))
        ours, theirs = loaded(folder / "model"), loaded(rebuilt)
        assert differing(ours, theirs) == 0
        problem.merge(next(r.recipe for r in store.trials() if r.number == row.trial))
        scored = problem.live.model.state_dict()
        assert all(torch.equal(scored[key], ours[name]) for name, key in problem.parents.parameter.items())
        assert ("--random-seed 5" in text) == METHODS[row.method].seeded
        assert "gives all" in "".join(verify_folder(other, None, [], "cpu"))
    expert = loaded(tmp_path / "study" / EXPERTS[1])
    assert differing(loaded(folders[1] / "model"), expert) == 0  # a parent is itself, whatever the method
    assert (
        sum("search  " in line for folder in folders for line in verify_folder(folder, None, [], "cpu")) == 3
    )
    card = (folders[0] / "README.md").read_text()
    assert all(name in card for name in METHODS[method].options)


def test_a_card_names_fixed_numbers_and_those_of_its_own_method_only(tmp_path: Path) -> None:
    merge = {"method": ["ties", "linear"], "density": 0.4, "scaling": [0.5, 2.0]}
    store, _ = finished(tmp_path, merge=merge, trials=1)
    board = read_board(store)
    rows = [*board.of_kind("uniform")[:1], *board.of_kind("pre")]
    folders = export_rows(store, board, rows, tmp_path / "o", weights=False, overwrite=False, overrides=[])
    ties, linear = ((folder / "README.md").read_text() for folder in folders)
    assert "Of the method: density 0.4, scaling 1.0." in ties
    assert "Of the method" not in linear


def test_a_config_that_was_changed_is_found_out(tmp_path: Path) -> None:
    store, _ = finished(tmp_path / "study", merge=searched("ties"), trials=1)
    board = read_board(store)
    row = board.of_kind("search")[0]
    (folder,) = export_rows(store, board, [row], tmp_path, weights=False, overwrite=False, overrides=[])
    path = folder / "mergekit_config.yml"
    text = path.read_text()
    from search.storage.manifest import read_manifest, write_manifest

    facts = {k: v for k, v in read_manifest(folder).items() if k != "files"}
    for old, new in (
        ("normalize: true", "normalize: false"),
        ("density: 0.", "density: 0.9"),
        ("lambda: ", "lambda: 1"),
    ):
        path.write_text(text.replace(old, new, 1))
        write_manifest(folder, facts)
        with pytest.raises(ExportError, match="Export again"):
            list(verify_folder(folder, None, [], "cpu"))


def test_the_method_itself_is_searched(tmp_path: Path) -> None:
    import optuna

    merge = {"method": ["linear", "ties", "dare_ties"], "density": [0.2, 1.0], "seed": 3}
    store, problem = finished(
        tmp_path, merge=merge, sampler={"engine": "optuna", "name": "random"}, trials=12
    )
    records = store.trials()
    chosen = {r.attributes["method"] for r in records if r.kind == "search"}
    assert len(chosen) == 3
    assert problem.space.names[-2:] == ("density", "method")
    for record in records:
        if record.kind == "search":
            assert merge["method"][int(record.coefficients["method"])] == record.attributes["method"]
            assert 0.2 <= record.coefficients["density"] <= 1.0
    study = optuna.load_study(study_name=store.name, storage=store.url)
    assert {t.params["method"] for t in study.trials} == {"linear", "ties", "dare_ties"}
    board = read_board(store)
    told = {row.trial: row.to_json()["recipe"] for row in board.rows}
    for record in records:
        recipe = told[record.number]
        assert recipe["method"] == record.attributes["method"]
        assert set(recipe["coefficients"]) == set(problem.space.coefficients)
        wanted = {"density"} if recipe["method"] != "linear" else set()
        assert set(recipe.get("options", {})) == wanted
    assert "uniform" in front_table(board)


@pytest.mark.parametrize("name", ["tpe", pytest.param("gp", marks=pytest.mark.slow), "nsga2"])
def test_engines_search_hyper_parameters_and_resume(name: str, tmp_path: Path) -> None:
    merge = {"method": ["ties", "linear"], "density": [0.2, 1.0], "scaling": [0.5, 2.0]}
    sampler = {
        "engine": "optuna",
        "name": name,
        "seed": 2,
        **({"population": 8} if name == "nsga2" else {"startup": 2}),
    }
    keys: dict[str, Any] = {"merge": merge, "sampler": sampler, "trials": 5}
    whole, _ = finished(tmp_path / "whole", **keys)
    for trials in (2, 5):
        path = expert_study(tmp_path / "parts", **keys)
        parts, problem = create(load_study_file(path), f"sqlite:///{path.parent / 'study.db'}", "cpu")
        parts.set_attribute("trials", trials)
        run(parts, problem)
    one, other = (store.trials() for store in (whole, StudyStore.open(parts.url, parts.name)))
    assert [r.coefficients for r in one] == [r.coefficients for r in other]


def space_of(**merge: Any) -> CoefficientSpace:
    return CoefficientSpace.build(TENSORS, SpaceConfig(low=-0.5, high=1.5), MergeConfig(**merge), EXPERTS)


@given(st.lists(st.floats(-0.5, 1.5), min_size=11, max_size=11))
def test_axes_come_back_as_they_were(x: list[float]) -> None:
    space = space_of(method=["ties", "linear", "breadcrumbs"], density=[0.2, 0.9])
    assert space.dim == 11
    recipe = space.from_vector(x)
    assert 0.2 <= recipe.coefficients["density"] <= 0.9
    assert recipe.method == space.methods[int(recipe.coefficients["method"])]
    again = space.from_vector(space.to_vector(recipe))
    assert again.method == recipe.method
    assert again.coefficients["density"] == pytest.approx(recipe.coefficients["density"], abs=1e-12)
    assert [again.coefficients[n] for n in space.coefficients] == x[:9]
    assert ((space.unit(recipe.coefficients) >= 0.0) & (space.unit(recipe.coefficients) <= 1.0)).all()


def test_what_is_not_searched_is_fixed() -> None:
    space = space_of(method="ties", density=0.4)
    assert (space.axes, space.fixed) == ((), {"density": 0.4, "scaling": 1.0})
    assert space.options(space.uniform(0.5)) == {"density": 0.4, "scaling": 1.0}
    assert space.uniform(0.5).method == "ties"
    assert space_of(method="karcher").uniform(0.5).method == "linear"
    assert space.alone("kind").method == "linear"
    neutral = space_of(method="della", density=[0.4, 0.6], epsilon=[0.1, 0.2], scaling=[2.0, 3.0])
    assert {axis.name: axis.neutral for axis in neutral.axes} == {
        "density": 0.6,
        "epsilon": 0.15,
        "scaling": 2.0,
    }


@pytest.mark.parametrize(
    ("merge", "wanted"),
    [
        ({"method": "tyes"}, "merge.method: 'tyes' is not known. Did you mean 'ties'"),
        ({"method": []}, "found none"),
        ({"method": ["ties", "ties"]}, "found one twice"),
        ({"density": 0.5}, "density: does not go with linear"),
        ({"method": "ties", "density": 0.0}, "density: found 0, wanted above 0, at most 1"),
        ({"method": "ties", "density": 1.5}, "density: found 1.5, wanted above 0, at most 1"),
        ({"method": "ties", "density": [0.0, 0.5]}, "density: found 0, wanted above 0"),
        (
            {"method": "ties", "density": [0.5, 0.2]},
            r"density: found \[0.5, 0.2\], wanted a number, or \[low, high\]",
        ),
        ({"method": "ties", "gamma": 0.1}, "gamma: does not go with ties"),
        ({"method": "della", "density": 0.1}, "epsilon: found up to 0.15 with density from 0.1"),
        ({"method": "slerp"}, "slerp merges a single expert, found 2"),
        ({"method": "ties", "seed": -1}, "merge.seed"),
    ],
)
def test_mistakes_in_the_section(merge: dict[str, Any], wanted: str) -> None:
    study = {
        "schema": 1,
        "name": "x",
        "parents": {"pre": "a", "experts": {"x": "b", "y": "c"}},
        "tasks": [{"path": "q.jsonl"}],
        "merge": merge,
    }
    with pytest.raises(ConfigError, match=wanted) as error:
        parse_study(study, "study.yaml")
    assert "\n" not in str(error.value)


def test_means_need_several_experts_and_weights_from_zero() -> None:
    study: dict[str, Any] = {
        "schema": 1,
        "name": "x",
        "parents": {"pre": "a", "post": "b"},
        "tasks": [{"path": "q"}],
    }
    with pytest.raises(ConfigError, match="karcher merges at least 2 experts, found 1"):
        parse_study({**study, "merge": {"method": "karcher"}}, "s")
    study["parents"] = {"pre": "a", "experts": {"x": "b", "y": "c"}}
    with pytest.raises(ConfigError, match=r"space.low: found -0.2, but model_stock takes no weights below 0"):
        parse_study({**study, "merge": {"method": "model_stock"}, "space": {"low": -0.2}}, "s")
    assert parse_study({**study, "merge": {"method": "ties", "density": 1}}, "s").merge.range_of(
        "density"
    ) == (1, 1)


def test_blends_that_do_not_fit(tmp_path: Path) -> None:
    folders = save_experts(tmp_path, ("a", "b"))
    parents = Parents.open(str(folders["pre"]), {"a": str(folders["a"]), "b": str(folders["b"])})
    full = dict.fromkeys(parents.names, (0.5, 0.5))
    for arguments, wanted in (
        ((full, "ties", {"density": 2.0}), "merge.density: found 2, wanted above 0"),
        ((full, "linear", {"density": 0.5}), "merge.density: linear has no such option"),
        ((dict.fromkeys(parents.names, (0.5,)), "ties"), "has 1 coefficients .wanted 2"),
        ((full, "tise"), "'tise' is not known. Did you mean 'ties'"),
        ((full, "slerp"), "slerp merges a single expert, found 2"),
    ):
        with pytest.raises(MergeError, match=wanted):
            make_blend(parents, *arguments)  # type: ignore[arg-type]


def test_buffers_that_mergekit_leaves_alone_draw_no_masks(tmp_path: Path) -> None:
    """Old Llamas store inverse frequencies; transformers ignores them and so does mergekit."""
    expert_study(tmp_path)
    for name in ("pre", *EXPERTS):
        path = tmp_path / name / "model.safetensors"
        buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
        save_file({**load_file(path), **buffers}, path, {"format": "pt"})
    store, _ = finished(tmp_path, merge={"method": "dare_ties", "density": 0.5, "seed": 5}, trials=1)
    board = read_board(store)
    (folder,) = export_rows(
        store,
        board,
        list(board.of_kind("search")),
        tmp_path / "out",
        weights=True,
        overwrite=False,
        overrides=[],
    )
    config = MergeConfiguration.model_validate(yaml.safe_load((folder / "mergekit_config.yml").read_text()))
    torch.set_num_threads(1)
    run_merge(config, str(tmp_path / "rebuilt"), MergeOptions(quiet=True, random_seed=5))
    assert differing(loaded(folder / "model"), loaded(tmp_path / "rebuilt")) == 0


def store_aliases(folder: Path, names: Sequence[str]) -> None:
    """Makes tied models below a folder, some of which store the head beside the embeddings."""
    expert_study(folder, parents={"tied": True})
    for name in names:
        path = folder / name / "model.safetensors"
        tensors = load_file(path)
        save_file(
            {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
            path,
            {"format": "pt"},
        )


def test_an_export_says_where_mergekit_draws_other_masks(tmp_path: Path) -> None:
    store_aliases(tmp_path, ("pre", *EXPERTS))
    store, _ = finished(tmp_path, merge={"method": "dare_ties", "density": 0.5}, trials=1)
    board = read_board(store)
    rows = list(board.of_kind("search"))
    (folder,) = export_rows(store, board, rows, tmp_path / "o", weights=False, overwrite=False, overrides=[])
    text = (folder / "mergekit_config.yml").read_text()
    assert "CAUTION: mergekit draws other random masks for the stored lm_head.weight" in text


def test_masks_whose_order_nobody_knows_are_refused_before_the_first_trial(tmp_path: Path) -> None:
    store_aliases(tmp_path, EXPERTS[:1])
    path = expert_study(tmp_path, merge={"method": "dare_ties", "density": 0.5})
    with pytest.raises(MergeError, match=r"lm_head\.weight: an alias that some parents store"):
        Problem.open(load_study_file(path), "cpu")
    Problem.open(load_study_file(expert_study(tmp_path, merge={"method": "ties", "density": 0.5})), "cpu")


@pytest.mark.parametrize("method", ["karcher", "multislerp", "model_stock"])
def test_methods_that_take_a_mean_need_no_size_of_weights(method: str, tmp_path: Path) -> None:
    folders = save_experts(tmp_path, ("a", "b"))
    parents = Parents.open(str(folders["pre"]), {"a": str(folders["a"]), "b": str(folders["b"])})
    one, other = (
        make_blend(parents, dict.fromkeys(parents.names, weights), method).weights
        for weights in ((0.3, 0.6), (3e-12, 6e-12))
    )
    for name in parents.names:
        assert one[name] == pytest.approx(other[name], abs=1e-9)


@pytest.mark.parametrize("method", ["karcher", "linear"])
def test_under_a_mean_no_coefficient_is_idle(method: str, tmp_path: Path) -> None:
    path = expert_study(tmp_path, merge={"method": method}, space={"low": 0.0})
    pre, kind = (load_file(tmp_path / name / "model.safetensors") for name in ("pre", "kind"))
    kind["model.embed_tokens.weight"] = pre["model.embed_tokens.weight"]
    save_file(kind, tmp_path / "kind" / "model.safetensors", {"format": "pt"})
    idle = Problem.open(load_study_file(path), "cpu").idle
    assert idle == (() if method == "karcher" else ("kind/embeddings",))


def test_the_uniform_line_leaves_hyper_parameters_alone(tmp_path: Path) -> None:
    merge = {"method": ["ties", "linear"], "density": [0.2, 0.9], "scaling": [0.5, 2.0]}
    store, _ = finished(tmp_path, merge=merge, sampler={"engine": "line"}, trials=3)
    for record in store.trials():
        assert (record.coefficients["density"], record.coefficients["method"]) == (0.9, 0)
        assert record.coefficients["scaling"] == pytest.approx(1.0, abs=1e-12)
        assert record.attributes["method"] == ("linear" if record.kind in ("pre", "expert") else "ties")


def test_check_names_methods_and_ranges(tmp_path: Path, cli: Cli) -> None:
    path = expert_study(tmp_path, merge={"method": ["ties", "dare_linear"], "density": [0.1, 1.0]})
    code, out, _ = cli("check", path)
    assert code == 0
    assert "merge       ties or dare_linear, density 0.1 to 1, scaling 1, float32" in out
    assert (
        "groups      7: embeddings, layer.0.attention, layer.0.mlp, ... final_norm, head; 21 coefficients"
        in out
    )


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(MergeError, match="found 9 coefficients, wanted 11"):
        space_of(method=["ties", "linear"], density=[0.2, 0.9]).from_vector(np.zeros(9))
