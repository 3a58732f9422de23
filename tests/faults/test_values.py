"""Weights that are no numbers are refused by the tensor's name, even where a recipe would not use them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from search.checkpoints.checkpoint import SINGLE, Checkpoint
from search.checkpoints.parents import Parents
from search.config.study_file import load_study_file
from search.errors import CheckpointError, MergeError
from search.merging.blend import make_blend
from search.merging.live import LiveModel
from search.running.launch import create
from search.study import run
from tests.hostile_files import copy, edit_tensors, refused_pair
from tests.pico import save_pair
from tests.pico_study import write_study

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.fault(17)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers(
    dtype: str, value: float, saved: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = copy(saved[0], tmp_path / "model")
    tensors = {name: t.to(getattr(torch, dtype)) for name, t in load_file(folder / SINGLE).items()}
    tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[77] = value
    save_file(tensors, folder / SINGLE)
    one = Checkpoint.open(folder)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of 2048 values are NaN"
    ):
        one.check_finite()


@pytest.mark.fault(17)
def test_zero_subnormal_and_empty_tensors_are_finite(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(saved[0], tmp_path / "model")
    save_file({"z": torch.zeros(5), "s": torch.full((3,), 1e-42), "e": torch.zeros(0, 4)}, folder / SINGLE)
    assert Checkpoint.open(folder).check_finite() == ["e", "z"]


@pytest.mark.fault(17)
def test_values_are_read_only_when_asked(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    edit_tensors(pre, **{"model.norm.weight": torch.full((32,), float("nan"))})
    assert Parents.pair(str(pre), str(post), check_values=False).names
    edit_tensors(pre, **{"model.norm.weight": torch.zeros(32)})
    assert Parents.pair(str(pre), str(post)).notes == [
        "pre: 1 tensors are zero throughout (first: model.norm.weight)"
    ]


@pytest.mark.fault(17)
@pytest.mark.parametrize("label", ["pre", "post"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_study_of_such_parents_is_refused_even_if_no_recipe_takes_them(
    label: str, value: float, tmp_path: Path
) -> None:
    """At coefficient 0 the parent is not read, so that a study could run for hours before it meets the NaN."""
    pre, post = save_pair(tmp_path)
    weights = load_file(tmp_path / label / SINGLE)[NAME]
    weights[3, 4] = value
    edit_tensors(tmp_path / label, **{NAME: weights})
    message = refused_pair(pre, post, CheckpointError)
    assert f"{tmp_path / label}: tensor {NAME}: 1 of 2048 values are NaN or infinite" in message


@pytest.mark.fault(17)
def test_parents_that_are_zero_throughout_are_noted_and_searched(tmp_path: Path) -> None:
    """A model whose weights are all zero answers everything alike: dull, but finite."""
    study = write_study(tmp_path, trials=2)
    tensors = load_file(tmp_path / "pre" / SINGLE)
    edit_tensors(tmp_path / "pre", **{name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    store, problem = create(load_study_file(study), f"sqlite:///{tmp_path / 'study.db'}", "cpu")
    assert f"pre: {len(tensors)} tensors are zero throughout" in problem.notes[0]
    run(store, problem)
    assert {trial.state for trial in store.trials()} == {"complete"}


@pytest.mark.fault(17)
def test_subnormal_weights_are_merged_to_the_last_bit(tmp_path: Path) -> None:
    """No flush to zero: 2^-149 * 3 + 2^-149 * 1 is 2^-148 * 2 at the middle. Oracle: the integers that the bits are."""
    pre, post = save_pair(tmp_path)
    ulp = 2.0**-149
    edit_tensors(pre, **{"model.norm.weight": torch.full((32,), 3 * ulp)})
    edit_tensors(post, **{"model.norm.weight": torch.full((32,), 1 * ulp)})
    live = LiveModel(Parents.pair(str(pre), str(post)))
    for coefficient, wanted in ((0.0, 3), (1.0, 1), (0.5, 2)):
        live.apply(make_blend(live.parents, dict.fromkeys(live.parents.names, (coefficient,))))
        bits = live.parameters()["model.norm.weight"].detach().view(torch.int32)
        if coefficient == 0.5:
            assert set(bits.tolist()) <= {1, 2, 3}  # either product may have been rounded
        else:
            assert set(bits.tolist()) == {wanted}


@pytest.mark.fault(17)
def test_float16_overflow_names_the_tensor(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    for folder, value in ((pre, -40_000.0), (post, 40_000.0)):
        weights = load_file(folder / SINGLE)[NAME]
        weights[3, 4] = value
        edit_tensors(folder, **{NAME: weights})
    live = LiveModel(Parents.pair(str(pre), str(post)), "float16")
    live.apply(make_blend(live.parents, dict.fromkeys(live.parents.names, (0.5,))))
    with pytest.raises(MergeError, match=rf"{NAME}: a merged value does not fit into float16"):
        live.apply(make_blend(live.parents, dict.fromkeys(live.parents.names, (1.5,))))


@pytest.mark.fault(17)
def test_trials_that_overflow_fail_and_the_study_goes_on(tmp_path: Path) -> None:
    """In a row of the embedding that no token has: parents are scored, and what goes far beyond them is refused."""
    study = write_study(
        tmp_path,
        trials=4,
        merge={"method": "linear", "dtype": "float16"},
        space={"granularity": "uniform", "low": -10.0, "high": 10.0},
        sampler={"engine": "optuna", "name": "random", "seed": 1},
    )
    unused, value = "model.embed_tokens.weight", 15_000.0
    for label, one in (("pre", 0.0), ("post", value)):
        weights = load_file(tmp_path / label / SINGLE)[unused]
        weights[-1] = one
        edit_tensors(tmp_path / label, **{unused: weights})
    store, problem = create(load_study_file(study), f"sqlite:///{tmp_path / 'study.db'}", "cpu")
    run(store, problem, report=False)
    for trial in store.trials():
        assert (trial.state == "failed") == (abs(trial.coefficients["all"]) * value > 65_520)
        if trial.state == "failed":
            assert f"{unused}: a merged value does not fit into float16" in trial.attributes["error"]
    failed = [trial for trial in store.trials() if trial.state == "failed"]
    assert failed, "no recipe went far enough; choose another seed"
    assert sum(trial.state == "complete" for trial in store.trials()) == 11 + 4
