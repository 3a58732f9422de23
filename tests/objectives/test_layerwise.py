"""Scores after every layer, against the hidden states of one plain forward pass per option."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from objectives.calibrators.dual_align import dual_align
from objectives.calibrators.layerwise import LayerwiseScorer
from objectives.calibrators.logits import LayerwiseLogits, OptionLogits
from objectives.calibrators.tempering import tempered
from objectives.evaluator import Evaluator
from objectives.outcomes import Floats
from objectives.questions.config import TaskConfig
from objectives.questions.questions import Question
from objectives.scoring.encoding import encode_questions
from objectives.scoring.packed import PackedModel
from objectives.scoring.scorer import Scorer
from search.errors import ConfigError, EvaluationError
from tests.objectives.test_scoring import LAYOUTS, question, sharp, some_questions
from tests.pico import pico_model, pico_tokenizer

TASK = [TaskConfig(path="a.jsonl")]
BY_TOKENS = [TaskConfig(path="a.jsonl", normalize="tokens")]
NORMS = {"gpt_neox": "final_layer_norm"}
DEPTH = 3


def layout(name: str, **overrides: Any) -> Any:
    """Three layers, so that two of them are intermediate."""
    arch, own = LAYOUTS[name]
    if "layer_types" in own:
        own = {**own, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    values = {"max_position_embeddings": 2048, "num_hidden_layers": DEPTH, **own, **overrides}
    return sharp(pico_model(arch, **values))


def letters(n: int) -> tuple[Question, ...]:
    """Letters of one token each: what normalises over the vocabulary cancels."""
    spaced = some_questions(n, 1, True)
    return tuple(question(q.context, [option.strip() for option in q.options]) for q in spaced)


def plain(model: Any, questions: Sequence[Question], by_tokens: bool = False) -> Floats:
    """`(n, L, k)` the transformers way: all hidden states, the final norm, the head, log_softmax, one sum."""
    encoded = encode_questions(questions, pico_tokenizer(), 2048)
    norm = getattr(model.base_model, NORMS.get(model.config.model_type, "norm"))
    softcap = getattr(model.config, "final_logit_softcapping", None)
    k = max(len(q.options) for q in questions)
    scores = np.full((len(encoded), DEPTH, k), -np.inf)
    for i, item in enumerate(encoded):
        for j, (sequence, start) in enumerate(zip(item.sequences, item.starts, strict=True)):
            with torch.no_grad():
                ids = torch.tensor([sequence[:-1]])
                states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
                assert len(states) == DEPTH + 1
                for layer in range(1, DEPTH + 1):  # the last one comes with the norm applied
                    hidden = states[layer][0, start - 1 :]
                    out = model.get_output_embeddings()(hidden if layer == DEPTH else norm(hidden))
                    out = out if softcap is None else torch.tanh(out / softcap) * softcap
                    share = torch.log_softmax(out.double(), dim=-1)
                    total = share.gather(1, torch.tensor(sequence[start:])[:, None]).sum()
                    scores[i, layer - 1, j] = float(total) / (len(sequence) - start if by_tokens else 1)
    return scores


def same_distributions(found: Floats, wanted: Floats, tolerance: float) -> None:
    assert np.array_equal(np.isfinite(found), np.isfinite(wanted))
    gap = tempered(found, 1.0)[1] - tempered(wanted, 1.0)[1]
    assert np.abs(gap[np.isfinite(wanted)]).max() < tolerance


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["continuation", "few-shot letters", "single tokens"])
def test_layers_equal_hidden_states_through_norm_and_head(name: str, kind: str) -> None:
    questions = {
        "continuation": some_questions(5, 0, False),
        "few-shot letters": some_questions(5, 3, True),
        "single tokens": letters(5),
    }[kind]
    model = layout(name)
    scorer = LayerwiseScorer(model, pico_tokenizer())
    found = scorer.layerwise(questions, TASK)
    assert not [note for note in scorer.notes if "one option at a time" in note]
    assert found.depth == DEPTH
    wanted = plain(model, questions)
    same_distributions(found.scores, wanted, 2e-4)
    assert np.abs(np.diff(tempered(wanted, 1.0)[0], axis=1)).max() > 0.01  # the layers do differ


@pytest.mark.parametrize("tasks", [TASK, BY_TOKENS])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_the_last_layer_is_the_evaluation(name: str, tasks: list[TaskConfig]) -> None:
    questions = (*some_questions(6, 2, False), question("a b", ["x", "y"]), *letters(3))
    model, tokenizer = layout(name), pico_tokenizer()
    found = LayerwiseScorer(model, tokenizer).layerwise(questions, tasks)
    evaluation = Evaluator(model, tokenizer, questions, tasks).evaluate()
    wanted = OptionLogits.from_evaluation(evaluation, tokenizer)
    assert np.array_equal(found.final.score, wanted.score)
    assert (found.final.digest, found.final.vocabulary) == (wanted.digest, wanted.vocabulary)
    assert found.final.gold is not None
    assert found.final.gold.tolist() == evaluation.outcomes.gold.tolist()
    same_distributions(found.scores, plain(model, questions, tasks is BY_TOKENS), 2e-4)


def test_single_tokens_that_are_not_compared_alike_are_normalised() -> None:
    """Divided by different bytes, or after different contexts, the normalisation over the vocabulary matters."""
    contexts = ("Because the cat was", "Because the big hat was")
    asked = (
        question("Question: a\nAnswer:", ["b", "c"], normalizer=(1.0, 2.0)),
        Question("k", 0, "", ("x", "x"), 0, None, contexts),
    )
    model = layout("llama")
    for one, divisor in zip(asked, ([1.0, 2.0], [1.0, 1.0]), strict=True):  # a batch is normalised as a whole
        found = LayerwiseScorer(model, pico_tokenizer()).layerwise((one,), TASK)
        same_distributions(found.scores, plain(model, (one,)) / np.array(divisor), 2e-4)


@pytest.mark.parametrize("kind", ["continuation", "single tokens"])
def test_every_token_is_fed_once_and_no_state_is_kept(kind: str) -> None:
    questions = letters(9) if kind == "single tokens" else some_questions(9, 2, False)
    scorer = LayerwiseScorer(layout("llama"), pico_tokenizer(), 300)
    fed = scorer.loglikelihoods(questions).fed
    embedded, normed = [], []
    embedding, norm = scorer.model.get_input_embeddings(), scorer.model.base_model.norm
    embedding.register_forward_hook(lambda m, i, o: embedded.append(o.shape[0] * o.shape[1]))
    norm.register_forward_hook(lambda m, i, o: normed.append(tuple(o.shape)))
    scorer.loglikelihoods(questions)
    once = list(embedded)
    embedded.clear()
    normed.clear()
    found = scorer.layerwise(questions, TASK)
    assert embedded == once
    assert sum(once) >= fed
    read = sum(shape[0] for shape in normed if len(shape) == 2)
    reads = len(questions) if kind == "single tokens" else sum(len(o) for q in questions for o in q.options)
    assert read <= DEPTH * reads  # the norm sees what is read, at each layer, and no other position
    assert found.scores.shape == (9, DEPTH, 5)
    assert not any(layer._forward_hooks for layer in scorer.model.base_model.layers)


def test_only_the_letters_pass_the_head() -> None:
    scorer = LayerwiseScorer(layout("llama"), pico_tokenizer())
    questions = letters(4)
    scorer.loglikelihoods(questions)
    through: list[int] = []
    scorer.model.get_output_embeddings().register_forward_hook(lambda m, i, o: through.append(o.shape[-2]))
    scorer.layerwise(questions, TASK)
    assert sum(through) == len(questions)  # the final scores of the plain reading, and nothing for the layers
    through.clear()
    scorer.layerwise(some_questions(2, 0, False), TASK)
    assert len(through) == 1 + DEPTH


def test_a_model_that_takes_no_trees_is_read_the_plain_way() -> None:
    questions = (*some_questions(3, 1, False), *letters(2))
    model = layout("llama")
    wanted = LayerwiseScorer(model, pico_tokenizer()).layerwise(questions, TASK)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic"}
    scorer = LayerwiseScorer(model, pico_tokenizer())
    found = scorer.layerwise(questions, TASK)
    assert any("one option at a time" in note for note in scorer.notes)
    same_distributions(found.scores, wanted.scores, 2e-4)
    same_distributions(found.final.score, wanted.final.score, 1e-4)


def test_halves_after_running_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = LayerwiseScorer(layout("llama"), pico_tokenizer())
    questions = some_questions(7, 0, False)
    wanted = scorer.layerwise(questions, TASK)
    read = PackedModel.read

    def small(self: PackedModel, batch: Any, cache: Any) -> Any:
        if len(batch.rows) > 2:
            raise torch.OutOfMemoryError("no room")
        return read(self, batch, cache)

    monkeypatch.setattr(PackedModel, "read", small)
    seen: list[tuple[int, int]] = []
    found = scorer.layerwise(questions, TASK, lambda done, total: seen.append((done, total)))
    assert np.allclose(found.earlier, wanted.earlier, atol=1e-4)
    assert seen[-1] == (7, 7)
    assert len(seen) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype: torch.dtype) -> None:
    questions = (*some_questions(3, 1, False), *letters(3))
    wanted = LayerwiseScorer(layout("llama"), pico_tokenizer()).layerwise(questions, TASK)
    found = LayerwiseScorer(layout("llama").to(dtype), pico_tokenizer()).layerwise(questions, TASK)
    gap = np.abs(tempered(found.scores, 1.0)[0] - tempered(wanted.scores, 1.0)[0])
    assert gap.max() < 0.3


def test_no_questions_are_no_scores() -> None:
    found = LayerwiseScorer(layout("llama"), pico_tokenizer()).layerwise((), TASK)
    assert (len(found), found.depth) == (0, DEPTH)


def test_values_that_are_no_numbers_are_refused() -> None:
    model = layout("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    scorer = LayerwiseScorer(model, pico_tokenizer())
    with pytest.raises(EvaluationError, match="question 0: option scores are"):
        scorer.layerwise(some_questions(2, 0, False), TASK)
    assert not any(layer._forward_hooks for layer in model.base_model.layers)


def test_a_model_whose_layers_cannot_be_found_is_refused() -> None:
    model = layout("llama")
    model.config.num_hidden_layers = 4  # three are there
    scorer = LayerwiseScorer(layout("llama"), pico_tokenizer())
    scorer.model = model
    with pytest.raises(ConfigError, match="no list of 4 decoder layers"):
        scorer.layerwise(some_questions(2, 0, False), TASK)


def test_layers_that_do_not_lead_to_the_own_scores_are_refused() -> None:
    """A head that is followed by a scale, as Granite's and Cohere's: its layers would be read wrongly."""
    model = sharp(pico_model("llama"))
    own = model.forward

    def doubled(*arguments: Any, **named: Any) -> Any:
        output = own(*arguments, **named)
        output.logits = output.logits * 2.0
        return output

    model.forward = doubled
    with pytest.raises(EvaluationError, match="do not lead to its own scores"):
        LayerwiseScorer(model, pico_tokenizer()).layerwise(some_questions(2, 0, False), TASK)


def test_two_models_are_aligned_from_end_to_end() -> None:
    """A head three times as large is a temperature of 3 in every layer, whatever happens inside."""
    questions = letters(20)
    model = layout("llama", tie_word_embeddings=False)
    pre = LayerwiseScorer(model, pico_tokenizer()).layerwise(questions, TASK)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3.0)
    post = LayerwiseScorer(model, pico_tokenizer()).layerwise(questions, TASK)
    fitted = dual_align(post, pre)
    assert fitted.temperature == pytest.approx(3.0, rel=1e-4)
    assert fitted.agreement == 20
    assert sum(fitted.divergence_layers) == 20
    assert isinstance(post, LayerwiseLogits)


def test_scoring_is_as_before() -> None:
    questions = some_questions(5, 1, False)
    model = layout("llama")
    scorer = LayerwiseScorer(model, pico_tokenizer())
    scorer.layerwise(questions, TASK)
    wanted = Scorer(model, pico_tokenizer()).loglikelihoods(questions).total
    assert np.array_equal(scorer.loglikelihoods(questions).total, wanted)
