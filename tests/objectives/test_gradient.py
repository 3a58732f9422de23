"""The gradient of a merge's coefficients against finite differences of plain forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import objectives.scoring.masks
from objectives.questions.config import TaskConfig
from objectives.questions.questions import Question
from objectives.scoring.backward import GRAPH_SHARE
from objectives.scoring.losses import BRIER, CROSS_ENTROPY, SOFT_BINNED_ECE, Loss, scalarized
from objectives.scoring.scorer import Scorer, plain_loglikelihoods
from search.checkpoints.checkpoint import SINGLE
from search.checkpoints.parents import Parents
from search.config.sections import MergeConfig, SpaceConfig
from search.errors import ConfigError, EvaluationError, MergeError
from search.merging.blend import make_blend
from search.merging.live import LiveModel
from search.merging.methods.linear import coefficient_derivative
from search.merging.space import CoefficientSpace
from search.recipe import Recipe
from search.samplers.gradient import CoefficientGradient
from tests.checkpoints.test_placement import spread_by_hand
from tests.objectives.test_scoring import sharp, some_questions
from tests.pico import block_network, pico_model, pico_tokenizer

SPACE = SpaceConfig(granularity="layer", components=["attention", "mlp"], low=-0.2, high=1.2)
TASKS = (TaskConfig(path="made-up", normalize="tokens"),)
SMOOTH = scalarized((CROSS_ENTROPY, BRIER), (0.5, 0.3))
MIXED = scalarized((CROSS_ENTROPY, BRIER, SOFT_BINNED_ECE), (0.5, 0.3, 2.0))

# A window of 16 is shorter than every question below, so a wrong one shows.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tied": False}),
    "llama-tied": ("llama", {"tied": True}),
    "gemma3": ("gemma3", {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_neox": ("gpt_neox", {}),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    block_network(monkeypatch)


def save_parents(folder: Path, layout: str = "llama") -> Parents:
    """Two parents whose tokens notice their context."""
    arch, overrides = LAYOUTS[layout]
    for seed, name in enumerate(("pre", "post")):
        model = sharp(pico_model(arch, seed, **{"max_position_embeddings": 2048, **overrides}), 3.0)
        model.save_pretrained(folder / name)
        pico_tokenizer().save_pretrained(folder / name)
    return Parents.pair(str(folder / "pre"), str(folder / "post"))


def asked(n: int = 10, shots: int = 0, letter: bool = False) -> tuple[Question, ...]:
    """Questions whose right options are spread."""
    made = some_questions(n, shots, letter)
    return tuple(Question(q.key, 0, q.context, q.options, i % len(q.options)) for i, q in enumerate(made))


def gradient_of(
    parents: Parents, questions: Sequence[Question], dtype: str = "float64", batch_tokens: int | None = None
) -> CoefficientGradient:
    live = LiveModel(parents, dtype)
    space = CoefficientSpace.build(parents.names, SPACE, MergeConfig())
    return CoefficientGradient(
        live, space, Scorer(live.model, parents.tokenizer(), batch_tokens), questions, TASKS
    )


def some_recipe(space: CoefficientSpace) -> Recipe:
    return space.from_vector(np.linspace(-0.1, 1.1, space.dim))


class Plain:
    """The same loss from merged float64 weights, one forward pass an option: no packing, no cache, no graph."""

    def __init__(
        self, parents: Parents, space: CoefficientSpace, questions: Sequence[Question], loss: Loss
    ) -> None:
        self.parents, self.space, self.questions, self.loss = parents, space, questions, loss
        self.model = AutoModelForCausalLM.from_pretrained(parents.post.folder, dtype=torch.float64)
        self.gold = torch.tensor([question.gold for question in questions])

    def __call__(self, coefficients: np.ndarray[Any, Any]) -> float:
        state = self.model.state_dict()
        for group, c in zip(self.space.groups, coefficients, strict=True):
            for name in group.tensors:
                pre, post = self.parents.pre.tensor(name).double(), self.parents.post.tensor(name).double()
                state[self.parents.parameter[name]].copy_((1 - c) * pre + c * post)
        scores = plain_loglikelihoods(self.model, self.parents.tokenizer(), self.questions)
        divisor = np.maximum(scores.tokens, 1) if TASKS[0].normalize == "tokens" else 1.0
        return float(self.loss(torch.from_numpy(scores.total / divisor), self.gold))

    def gradient(self, coefficients: np.ndarray[Any, Any], h: float) -> np.ndarray[Any, Any]:
        """Central differences of fourth order."""
        found = np.zeros(len(coefficients))
        for i in range(len(coefficients)):
            step = np.eye(len(coefficients))[i] * h
            near, far = (self(coefficients + k * step) - self(coefficients - k * step) for k in (1, 2))
            found[i] = (8 * near - far) / (12 * h)
        return found


@pytest.mark.parametrize("letter", [False, True], ids=["continuation", "letter"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_group_equals_a_finite_difference(layout: str, letter: bool, tmp_path: Path) -> None:
    """With a shared few-shot prefix and several batches."""
    parents = save_parents(tmp_path, layout)
    questions = asked(5, 1, letter)
    exact, rounded = (gradient_of(parents, questions, dtype, 600) for dtype in ("float64", "float32"))
    recipe = some_recipe(exact.space)
    plain = Plain(parents, exact.space, questions, SMOOTH)
    # Gemma multiplies its embeddings, and with them the curvature.
    wanted = plain.gradient(exact.space.to_vector(recipe), h=1e-3 if layout == "gemma3" else 1e-2)
    assert np.abs(wanted).max() > 0.05
    found = exact.at(recipe, SMOOTH)
    # RMS norms compute in float32 inside a float64 model: that noise, divided by h, is the absolute part.
    np.testing.assert_allclose(found.gradient, wanted, rtol=1e-3, atol=5e-6)
    assert found.loss == pytest.approx(plain(exact.space.to_vector(recipe)), rel=1e-5)
    np.testing.assert_allclose(rounded.at(recipe, SMOOTH).gradient, wanted, rtol=2e-3, atol=1e-5)


def test_a_coupled_loss_equals_a_finite_difference(tmp_path: Path) -> None:
    """Steps as small as soft bins ask for, and noise as large in comparison."""
    parents, questions = save_parents(tmp_path, "llama-tied"), asked(8, 1)
    gradient = gradient_of(parents, questions, batch_tokens=600)
    recipe = some_recipe(gradient.space)
    wanted = Plain(parents, gradient.space, questions, MIXED).gradient(
        gradient.space.to_vector(recipe), h=1e-3
    )
    found = gradient.at(recipe, MIXED).gradient
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_bfloat16_points_the_same_way(tmp_path: Path) -> None:
    parents, questions = save_parents(tmp_path), asked(8, 1)
    exact, coarse = (gradient_of(parents, questions, dtype) for dtype in ("float32", "bfloat16"))
    one, other = (g.at(some_recipe(g.space), CROSS_ENTROPY).gradient for g in (exact, coarse))
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.99


def test_float16_loses_nothing_to_many_questions(tmp_path: Path) -> None:
    """A question's share of a mean over hundreds is below what float16 can tell from zero."""
    parents, questions = save_parents(tmp_path), asked(150, 1)
    exact, half = (gradient_of(parents, questions, dtype, 4000) for dtype in ("float32", "float16"))
    wanted, found = (g.at(some_recipe(g.space), CROSS_ENTROPY).gradient for g in (exact, half))
    assert np.linalg.norm(found - wanted) < 0.005 * np.linalg.norm(wanted)


def test_a_spread_model_has_the_same_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through accelerate's hooks, with a shared prefix whose keys lie where their layers do."""
    parents, questions = save_parents(tmp_path), asked(6, 2)
    whole = gradient_of(parents, questions, "float32", 600)
    wanted = whole.at(some_recipe(whole.space), MIXED)
    monkeypatch.setattr("search.merging.live.place", lambda model, device: spread_by_hand(model, "spread"))
    spread = gradient_of(parents, questions, "float32", 600)
    found = spread.at(some_recipe(spread.space), MIXED)
    assert hasattr(spread._live.model.model.layers[0], "_hf_hook")
    assert np.array_equal(found.gradient, wanted.gradient)
    assert found.tokens == wanted.tokens


def test_batches_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents, questions = save_parents(tmp_path), asked(8, 2)
    recipe = some_recipe(gradient_of(parents, questions).space)
    whole = gradient_of(parents, questions, batch_tokens=10**6).at(recipe, MIXED)
    for batch_tokens, head_values in ((1, 2**25), (600, 2**25), (10**6, 3 * 96)):
        monkeypatch.setattr(objectives.scoring.packed, "HEAD_VALUES", head_values)
        parts = gradient_of(parents, questions, batch_tokens=batch_tokens).at(recipe, MIXED)
        np.testing.assert_allclose(parts.gradient, whole.gradient, rtol=1e-5, atol=1e-8)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
        assert parts.tokens == whole.tokens


def test_tokens_count_what_was_computed(tmp_path: Path) -> None:
    """One forward, two for backward; a loss that couples the questions needs all scores first."""
    gradient = gradient_of(save_parents(tmp_path), questions := asked(6, 2))
    recipe = some_recipe(gradient.space)
    fed = gradient._scorer.loglikelihoods(questions).fed
    assert gradient.at(recipe, BRIER).tokens == 3 * fed
    assert gradient.at(recipe, MIXED).tokens == 4 * fed


def test_a_group_equal_in_both_parents_has_gradient_zero(tmp_path: Path) -> None:
    parents = save_parents(tmp_path, "llama-tied")
    for names in (("model.embed_tokens.weight",), parents.names):  # one group, then all
        pre, post = load_file(parents.pre.folder / SINGLE), load_file(parents.post.folder / SINGLE)
        save_file(
            {**post, **{name: pre[name] for name in names}}, tmp_path / "post" / SINGLE, {"format": "pt"}
        )
        changed = Parents.pair(str(tmp_path / "pre"), str(tmp_path / "post"))
        gradient = gradient_of(changed, asked(4, 1))
        found = gradient.at(some_recipe(gradient.space), MIXED)
        same = np.array([all(name in names for name in group.tensors) for group in gradient.space.groups])
        assert same.any()
        assert (found.gradient[same] == 0.0).all()
        assert (found.gradient[~same] != 0.0).all()
        assert found.loss > 0.0


def test_the_live_model_is_left_as_a_merge_leaves_it(tmp_path: Path) -> None:
    parents = save_parents(tmp_path)
    gradient = gradient_of(parents, asked(4, 1), "float32")
    live, recipe = gradient._live, some_recipe(gradient.space)
    live.apply(make_blend(live.parents, gradient.space.by_tensor(recipe)))
    merged = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}

    def untouched() -> bool:
        state = live.model.state_dict()
        return all(torch.equal(state[name], tensor) for name, tensor in merged.items())

    first = gradient.at(recipe, MIXED).gradient
    assert untouched()

    def broken(score: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        gradient.at(recipe, Loss("broken", broken, coupled=False))
    assert untouched()
    for parameter in live.model.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks
    assert np.array_equal(gradient.at(recipe, MIXED).gradient, first)  # and the same bits again


@pytest.mark.parametrize("layout", ["llama", "llama-tied"])
def test_one_gradient_is_held_at_a_time(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents, questions = save_parents(tmp_path, layout), asked(6, 2)
    gradient = gradient_of(parents, questions, batch_tokens=GRAPH_SHARE * 300)
    held: list[int] = []

    def watched(*tensors: torch.Tensor) -> float:
        held.append(sum(parameter.grad is not None for parameter in gradient._live.model.parameters()))
        return coefficient_derivative(*tensors)

    monkeypatch.setattr("search.samplers.gradient.coefficient_derivative", watched)
    gradient.at(some_recipe(gradient.space), CROSS_ENTROPY)
    assert set(held) == {1}
    # One pass a batch, and one more for the prefix, which the last layer's output does not reach.
    assert len(held) % len(parents.names) != 0
    assert len(held) > 2 * len(parents.names)


def test_what_cannot_be_differentiated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents, questions = save_parents(tmp_path), asked(4)
    live = LiveModel(parents)
    slerp = CoefficientSpace.build(parents.names, SPACE, MergeConfig(method="slerp"))
    scorer = Scorer(live.model, parents.tokenizer())
    with pytest.raises(ConfigError, match="a gradient needs merge"):
        CoefficientGradient(live, slerp, scorer, questions, TASKS)
    gradient = gradient_of(parents, questions, "float32")

    def undefined(score: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
        return score.new_tensor(torch.nan) * score[:, 0].sum()

    with pytest.raises(EvaluationError, match="undefined is nan"):
        gradient.at(some_recipe(gradient.space), Loss("undefined", undefined, coupled=False))

    def refuse(model: Any) -> None:
        raise objectives.scoring.masks.Unmaskable("layers of type 'state space' are no plain attention")

    monkeypatch.setattr("objectives.scoring.scorer.PackedModel", refuse)
    with pytest.raises(ConfigError, match=r"needs a model that takes token trees.*state space"):
        gradient_of(parents, questions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_derivative_of_a_tensor(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.merging.methods.linear.CHUNK", 64)
    draw = torch.Generator().manual_seed(0)
    gradient, pre, post = (torch.randn(13, 17, generator=draw).to(dtype) for _ in range(3))
    wanted = float((gradient.double() * (post.double() - pre.double())).sum())
    assert coefficient_derivative(gradient, pre, post) == pytest.approx(wanted, rel=1e-6)
    transposed = [one.T.contiguous() for one in (pre, post)]
    assert coefficient_derivative(gradient.T, *transposed) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(MergeError, match="gradient of shape"):
        coefficient_derivative(gradient.T, pre, post)
