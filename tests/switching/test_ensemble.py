"""Several models that write as one: laws of both combinations, and the distribution that the formulas say."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from objectives.generation.sampler import AnswerSampler, Decoding
from search.errors import ConfigError, EvaluationError
from search.switching.ensemble import Ensemble, average, contrast, contrastive, logit_average
from tests.pico import ARCHS, pico_model, pico_tokenizer

LAW = settings(deadline=None, max_examples=60)
PROMPTS = ("What?", "Tell me a long story about a fox and a hen.", "Hi", "Why is the sky blue", "n")
SHORT = Decoding(samples=3, max_new_tokens=10)
LOGITS = arrays(np.float32, (2, 3, 6), elements=st.floats(-20, 20, width=32) | st.just(-math.inf))


@cache
def peaked(seed: int = 0, arch: str = "llama") -> Any:
    """A pico model whose next token is far from uniform."""
    model = pico_model(arch, seed, tied=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8.0)
    return model


def answers(model: Any, decoding: Decoding = SHORT, **options: Any) -> NDArray[np.int32]:
    found = AnswerSampler(model, pico_tokenizer(), PROMPTS, decoding, **options).generate()
    assert (found.tokens >= 0).any()
    return found.tokens


@pytest.mark.parametrize("arch", ARCHS)
def test_the_average_of_a_model_with_itself_is_that_model(arch: str) -> None:
    one = peaked(arch=arch)
    for count in (1, 2, 3):
        np.testing.assert_array_equal(answers(logit_average([one] * count)), answers(one))


def test_contrast_without_strength_and_floor_is_the_strong_model() -> None:
    strong, weak = peaked(0), peaked(1)
    found = answers(contrastive(strong, weak, strength=0.0, plausibility=0.0))
    np.testing.assert_array_equal(found, answers(strong))
    assert (answers(contrastive(strong, weak)) != found).any()
    assert (answers(logit_average([strong, weak])) != found).any()


def test_a_model_contrasted_with_itself_is_itself_among_the_plausible() -> None:
    one = peaked()
    found = answers(contrastive(one, one, strength=3.0, plausibility=0.0))
    assert (found == answers(one)).mean() > 0.98  # (1 + b) x - b x has other last bits


def test_full_plausibility_is_the_strong_models_greedy_answer() -> None:
    strong, weak = peaked(0), peaked(1)
    greedy = Decoding(samples=3, max_new_tokens=10, temperature=1e-6)
    found = answers(contrastive(strong, weak, strength=2.0, plausibility=1.0))
    np.testing.assert_array_equal(found, answers(strong, greedy))


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("kind", ["average", "contrast"])
def test_answers_do_not_depend_on_the_batch(kind: str, arch: str) -> None:
    members = [peaked(0, arch), peaked(1, arch)]
    model = logit_average(members) if kind == "average" else contrastive(*members)
    whole = answers(model, batch_rows=64)
    for rows in (1, 6):
        np.testing.assert_array_equal(answers(model, batch_rows=rows), whole)


def test_the_order_of_the_members_does_not_matter_to_the_average() -> None:
    members = [peaked(seed) for seed in range(2)]
    np.testing.assert_array_equal(answers(logit_average(members)), answers(logit_average(members[::-1])))


def test_first_tokens_have_the_frequencies_of_the_formulas() -> None:
    strong, weak, tokenizer = peaked(0), peaked(1), pico_tokenizer()
    with torch.inference_mode():
        ids = torch.tensor([tokenizer("Why?")["input_ids"]])
        p, q = (torch.softmax(one(ids).logits[0, -1].double(), dim=-1).numpy() for one in (strong, weak))
    mean = np.sqrt(p * q)
    score = np.where(p >= 0.1 * p.max(), p**1.5 / q**0.5, 0.0)
    for model, wanted in ((logit_average([strong, weak]), mean), (contrastive(strong, weak), score)):
        wanted = wanted / wanted.sum()
        sampler = AnswerSampler(model, tokenizer, ["Why?"], Decoding(4000, max_new_tokens=1))
        tokens = sampler.generate().tokens[0, :, 0]
        count = np.bincount(np.where(tokens < 0, 2, tokens), minlength=len(p))  # EOS leaves an empty answer
        assert not count[wanted == 0].any()
        assert (np.abs(count - 4000 * wanted) <= 6 * np.sqrt(4000 * wanted * (1 - wanted)) + 1).all()
        assert 0.02 < wanted.max() < 0.98
    assert np.abs(mean / mean.sum() - p).max() > 0.05


@LAW
@given(logits=LOGITS, strength=st.floats(0, 5), plausibility=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_combined_logits_are_the_formulas_in_probabilities(
    logits: NDArray[np.float32], strength: float, plausibility: float
) -> None:
    logits[..., 0] = np.maximum(logits[..., 0], -20)  # every row has a token
    strong, weak = torch.from_numpy(logits)
    p, q = (torch.softmax(one.double(), dim=-1) for one in (strong, weak))
    mean = (p * q).sqrt()
    found = average([strong, weak])
    ruled_out = (strong == -torch.inf) | (weak == -torch.inf)
    assert torch.equal(found == -torch.inf, ruled_out)
    torch.testing.assert_close(
        torch.softmax(found.double(), dim=-1), mean / mean.sum(dim=-1, keepdim=True), atol=1e-5, rtol=0
    )
    scores = contrast(strong, weak, strength, plausibility)
    assert not scores.isnan().any()
    assert (scores < torch.inf).all()
    assert torch.isfinite(scores.amax(dim=-1)).all()
    assert (scores[strong == -torch.inf] == -torch.inf).all()
    least = torch.where(q > 0, q, 1.0).amin(dim=-1, keepdim=True)
    floored = torch.where(q > 0, q, least)
    kept = (p >= plausibility * p.amax(dim=-1, keepdim=True) * (1 + 1e-5)) & (p > 0)
    dropped = p < plausibility * p.amax(dim=-1, keepdim=True) * (1 - 1e-5)
    assert (scores[dropped] == -torch.inf).all()
    assert torch.isfinite(scores[kept]).all()
    wanted = (1 + strength) * p.log() - strength * floored.log()
    constant = (scores.double() - wanted)[..., :]
    for row, inside in zip(constant, kept, strict=True):
        if inside.any():
            assert float(row[inside].max() - row[inside].min()) < 1e-4 * (1 + strength)


def test_a_member_whose_numbers_are_broken_is_named_by_the_prompt() -> None:
    whole, broken = peaked(0), pico_model("llama", 1, tied=False)
    for value in (torch.nan, torch.inf, -torch.inf):
        with torch.no_grad():
            broken.get_output_embeddings().weight.fill_(0.0)
            broken.model.norm.weight.fill_(0.0)
        handle = broken.get_output_embeddings().register_forward_hook(lambda *_, value=value: _[-1] + value)
        for model in (
            logit_average([whole, broken]),
            contrastive(whole, broken),
            contrastive(whole, broken, 0.0),
        ):
            with pytest.raises(EvaluationError, match="not numbers"):
                answers(model)
        handle.remove()


def test_an_ensemble_of_ensembles_is_a_model_too() -> None:
    members = [peaked(seed) for seed in range(3)]
    nested = contrastive(logit_average(members[:2]), members[2])
    assert nested.members[0].members == tuple(members[:2])
    assert not np.array_equal(answers(nested), answers(contrastive(members[0], members[2])))
    with torch.inference_mode():
        ids = torch.tensor([[5, 6, 7]])
        one, two, three = (member(ids).logits for member in members)
        wanted = contrast(average([one, two]), three, 0.5, 0.1)
        torch.testing.assert_close(nested(ids).logits, wanted)


def test_the_smallest_context_is_the_ensembles() -> None:
    small = pico_model(max_position_embeddings=16)
    model = logit_average([peaked(), small])
    assert model.config.max_position_embeddings == 16
    with pytest.raises(ConfigError, match="wanted 16 together"):
        answers(model)


def test_members_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="no members"):
        logit_average([])
    with pytest.raises(ConfigError, match=r"\[96, 128\]"):
        logit_average([peaked(), pico_model(vocab_size=128)])
    for strength, plausibility in ((-1.0, 0.1), (math.inf, 0.1), (math.nan, 0.1), (1.0, -0.1), (1.0, 1.1)):
        with pytest.raises(ConfigError, match=r"^contrastive: "):
            contrastive(peaked(), peaked(1), strength, plausibility)


def test_members_are_put_into_eval_mode() -> None:
    one, other = pico_model(seed=0).train(), pico_model(seed=1).train()
    model = Ensemble([one, other], average)
    assert not one.training
    assert not other.training
    assert model.eval() is model
