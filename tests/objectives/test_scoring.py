"""Packed scoring against one plain forward pass per option, for every supported architecture."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.questions.questions import Question
from objectives.scoring.encoding import EncodedQuestion, encode_questions, max_length
from objectives.scoring.packed import PackedModel
from objectives.scoring.scorer import Scorer, plain_loglikelihoods
from objectives.scoring.tree_attention import Group, build_row, make_batch, pack, plan_groups
from search.errors import ConfigError, EvaluationError
from tests.pico import pico_model, pico_tokenizer

# A window of 16 is shorter than every question below, so a wrong one shows.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha-untied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "gemma2": (
        "gemma2",
        {"sliding_window": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": ("gemma3", {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "mistral-window": ("mistral", {"sliding_window": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
}


def sharp(model: Any, scale: float = 5.0) -> Any:
    """Larger weights: with pico's own, a token hardly notices its context and no mask could be wrong."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(scale)
    return model


def layout(name: str) -> Any:
    arch, overrides = LAYOUTS[name]
    return sharp(pico_model(arch, **{"max_position_embeddings": 2048, **overrides}))


def question(context: str, options: Sequence[str], **more: Any) -> Question:
    return Question(f"key of {context} {options}", 0, context, tuple(options), 0, **more)


def some_questions(n: int, shots: int, letter: bool, seed: int = 0) -> tuple[Question, ...]:
    """Questions with options of 1 to 60 characters, some alike at the start, after `shots` common examples."""
    draw = random.Random(seed)

    def words(count: int) -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(count))

    def ask() -> tuple[str, list[str]]:
        stem = f"Question: {words(draw.randint(1, 8))}"
        choices = [words(count) for count in (1, 12, 2)] + [words(1) + "x"]
        choices.append(choices[1][:10] + " z")  # shares a beginning with another option
        if not letter:
            return f"{stem}\nAnswer:", [f" {choice}" for choice in choices]
        lines = "\n".join(f"{mark}. {choice}" for mark, choice in zip("ABCDE", choices, strict=True))
        return f"{stem}\n{lines}\nAnswer:", [f" {mark}" for mark in "ABCDE"]

    examples = [ask() for _ in range(shots)]
    prefix = "".join(f"{context}{options[1]}\n\n" for context, options in examples)
    return tuple(question(prefix + context, options) for context, options in (ask() for _ in range(n)))


def agree(scorer: Scorer, questions: Sequence[Question], tolerance: float = 1e-4) -> None:
    plain = plain_loglikelihoods(scorer.model, scorer.tokenizer, questions)
    packed = scorer.loglikelihoods(questions)
    assert not [note for note in scorer.notes if "one option at a time" in note]
    assert np.array_equal(packed.tokens, plain.tokens)
    assert np.array_equal(np.isinf(packed.total), np.isinf(plain.total))
    real = plain.tokens > 0
    assert np.abs(packed.total[real] - plain.total[real]).max() < tolerance
    assert np.allclose(packed.mass, plain.mass, atol=1e-5)
    assert packed.fed < plain.fed


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("letter", [False, True], ids=["continuation", "letter"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_equals_plain(name: str, letter: bool, shots: int) -> None:
    questions = some_questions(9, shots, letter)
    scorer = Scorer(layout(name), pico_tokenizer())
    agree(scorer, questions)
    groups = plan_groups(encode_questions(questions, scorer.tokenizer, scorer.limit))
    assert any(len(group.prefix) > 20 for group in groups) == bool(shots)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-window"])
def test_batch_composition_does_not_matter(name: str) -> None:
    model, tokenizer = layout(name), pico_tokenizer()
    questions = some_questions(12, 1, False)
    whole = Scorer(model, tokenizer).loglikelihoods(questions).total
    for batch_tokens in (1, 300, 10**6):
        total = Scorer(model, tokenizer, batch_tokens).loglikelihoods(questions).total
        assert np.abs(total - whole)[np.isfinite(whole)].max() < 1e-4
    for i in (0, 7):  # alone, without a shared prefix
        alone = Scorer(model, tokenizer).loglikelihoods(questions[i : i + 1]).total[0]
        assert np.abs(alone - whole[i]).max() < 1e-4
    backwards = Scorer(model, tokenizer).loglikelihoods(questions[::-1]).total[::-1]
    assert np.abs(backwards - whole)[np.isfinite(whole)].max() < 1e-4


def test_the_same_call_gives_the_same_bits() -> None:
    scorer = Scorer(layout("llama"), pico_tokenizer())
    questions = some_questions(10, 2, False)
    first = scorer.loglikelihoods(questions).total
    assert np.array_equal(first, scorer.loglikelihoods(questions).total)
    assert np.array_equal(first, Scorer(scorer.model, pico_tokenizer()).loglikelihoods(questions).total)


def test_values_are_read_anew_at_every_call() -> None:
    scorer = Scorer(layout("llama"), pico_tokenizer())
    questions = some_questions(6, 2, False)
    before = scorer.loglikelihoods(questions).total
    with torch.no_grad():
        for parameter in scorer.model.parameters():
            parameter.mul_(0.9)
    agree(scorer, questions)
    assert np.abs(scorer.loglikelihoods(questions).total - before)[np.isfinite(before)].min() > 1e-3


def test_options_with_contexts_of_their_own() -> None:
    """WinoGrande: one continuation after different contexts."""
    contexts = ("Question: ab cd. Because the cat", "Question: ab cd. Because the hat", "Nothing alike")
    twin = Question("k", 0, "", (" was too big.",) * 3, 0, None, contexts)
    scorer = Scorer(layout("qwen3"), pico_tokenizer())
    agree(scorer, (twin, *some_questions(3, 0, False)))
    encoded = encode_questions((twin,), scorer.tokenizer, scorer.limit)
    assert [len(s) - start for s, start in zip(encoded[0].sequences, encoded[0].starts, strict=True)] == [
        13
    ] * 3


def test_different_numbers_of_options_and_equal_options() -> None:
    questions = (
        question("a b", [" x", " x"]),
        question("c", [" y", " yz", " yzz", " q"]),
        question("d d", [" p"]),
    )
    scores = Scorer(layout("llama"), pico_tokenizer()).loglikelihoods(questions)
    assert scores.total[0, 0] == scores.total[0, 1]
    assert np.isneginf(scores.total[0, 2:]).all()
    assert np.isneginf(scores.total[2, 1:]).all()
    assert scores.tokens.tolist() == [[2, 2, 0, 0], [2, 3, 4, 2], [2, 0, 0, 0]]
    agree(Scorer(layout("llama"), pico_tokenizer()), questions)


def test_long_contexts_lose_their_left_end() -> None:
    model = sharp(pico_model("llama", max_position_embeddings=60))
    questions = (*some_questions(5, 0, False), question("b" * 90, [" a", " abcdef" * 5, " c"]))
    scorer = Scorer(model, pico_tokenizer())
    agree(scorer, questions)
    assert scorer.limit == 60
    assert any("lose context on the left" in note for note in scorer.notes)
    long = encode_questions(questions, scorer.tokenizer, 60)[-1]
    assert [len(sequence) for sequence in long.sequences] == [61, 61, 61]
    assert [len(s) - start for s, start in zip(long.sequences, long.starts, strict=True)] == [2, 35, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_close(dtype: torch.dtype) -> None:
    scorer = Scorer(pico_model("llama").to(dtype), pico_tokenizer())
    agree(scorer, some_questions(5, 1, False), tolerance=0.3)


def test_mass_of_letters() -> None:
    scorer = Scorer(layout("llama"), pico_tokenizer())
    scores = scorer.loglikelihoods((question("Answer:", ["A", "B"]),))
    ids = torch.tensor([scorer.tokenizer("Answer:")["input_ids"]])
    chances = torch.softmax(scorer.model(ids).logits[0, -1].detach(), dim=-1)
    wanted = sum(float(chances[scorer.tokenizer(mark)["input_ids"][0]]) for mark in "AB")
    assert scores.mass[0] == pytest.approx(wanted, abs=1e-6)


def test_non_finite_scores_name_the_question() -> None:
    model = layout("llama")
    scorer = Scorer(model, pico_tokenizer())
    questions = some_questions(3, 0, False)
    good = model.model.norm.weight.detach().clone()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match=r"option 0: log-likelihood is nan, 3 of 3"):
        scorer.loglikelihoods(questions)
    with torch.no_grad():  # the next recipe is scored, and the packed way is not given up
        model.model.norm.weight.copy_(good)
    agree(scorer, questions)


def test_a_model_that_cannot_is_scored_the_plain_way_with_a_reason() -> None:
    questions = some_questions(3, 0, False)
    model = layout("llama")
    plain = plain_loglikelihoods(model, pico_tokenizer(), questions)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic"}
    scorer = Scorer(model, pico_tokenizer())
    assert np.array_equal(scorer.loglikelihoods(questions).total, plain.total)
    assert any("rotary scaling 'dynamic'" in note for note in scorer.notes)


def test_a_model_whose_packed_scores_differ_is_scored_the_plain_way() -> None:
    model = layout("llama")
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:  # a factor that only the model's own forward pass knows of
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    model.forward = scaled
    scorer = Scorer(model, pico_tokenizer())
    questions = some_questions(3, 0, False)
    plain = plain_loglikelihoods(model, pico_tokenizer(), questions)
    assert np.array_equal(scorer.loglikelihoods(questions).total, plain.total)
    assert any("differ by" in note for note in scorer.notes)


def test_eager_attention_is_named_and_equal() -> None:
    model = layout("llama")
    model.set_attn_implementation("eager")
    scorer = Scorer(model, pico_tokenizer())
    agree(scorer, some_questions(4, 1, False))
    assert any("attention is 'eager'" in note for note in scorer.notes)


def test_halves_after_running_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(layout("llama"), pico_tokenizer())
    questions = some_questions(7, 0, False)
    wanted = scorer.loglikelihoods(questions).total
    read = PackedModel.read

    def small(self: PackedModel, batch: Any, cache: Any) -> Any:
        if len(batch.rows) > 2:
            raise torch.OutOfMemoryError("no room")
        return read(self, batch, cache)

    monkeypatch.setattr(PackedModel, "read", small)
    assert np.allclose(scorer.loglikelihoods(questions).total, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("cost", "wanted"),
    [
        (lambda n: 0.02 + n * 1e-6, 4096),  # a call costs much, a token little
        (lambda n: 0.01 + n * (1e-4 if n <= 600 else 3e-4), 512),  # beyond 600 tokens all is slow
    ],
)
def test_batch_size_is_the_fastest(cost: Any, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    scorer = Scorer(layout("llama"), pico_tokenizer())
    read = PackedModel.read

    def timed(self: PackedModel, batch: Any, cache: Any) -> Any:
        nonlocal now
        now += cost(batch.tokens.size)
        return np.zeros(len(batch.reads)) if batch.tokens.size > 300 else read(self, batch, cache)

    questions = some_questions(80, 2, False)
    scorer.loglikelihoods(questions[:2])
    monkeypatch.setattr(PackedModel, "read", timed)
    monkeypatch.setattr("objectives.scoring.scorer.time.perf_counter", lambda: now)
    assert scorer.measure(questions) == scorer.batch_tokens == wanted


def test_batch_size_stays_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(layout("llama"), pico_tokenizer())
    questions = some_questions(80, 2, False)
    scorer.loglikelihoods(questions[:2])
    sizes = []

    def small(self: PackedModel, batch: Any, cache: Any) -> Any:
        sizes.append(batch.tokens.size)
        if batch.tokens.size > 300:
            raise torch.OutOfMemoryError("no room")
        return np.zeros(len(batch.reads))

    monkeypatch.setattr(PackedModel, "read", small)
    assert scorer.measure(questions) == 256
    assert max(sizes) > 300


def test_progress_counts_questions() -> None:
    seen: list[tuple[int, int]] = []
    Scorer(layout("llama"), pico_tokenizer(), 200).loglikelihoods(
        some_questions(6, 0, False), lambda done, total: seen.append((done, total))
    )
    assert len(seen) > 1
    assert seen[-1] == (6, 6)


# --- tokens of a pair, as lm-eval


def test_trailing_space_of_the_context_is_scored() -> None:
    (encoded,) = encode_questions((question("ab  ", ["c"]),), pico_tokenizer(), 100)
    tokenizer = pico_tokenizer()
    assert encoded.sequences[0] == tuple(tokenizer("ab  c")["input_ids"])
    assert encoded.starts == (2,)


def test_an_empty_context_is_bos() -> None:
    (encoded,) = encode_questions((question("", ["c", "d"]),), pico_tokenizer(), 100)
    assert [s[0] for s in encoded.sequences] == [1, 1]
    assert encoded.starts == (1, 1)


def test_options_without_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"question 1 .*option 0"):
        encode_questions((question("a", ["b"]), question("a", [""])), pico_tokenizer(), 100)
    with pytest.raises(ConfigError, match="wanted 1 to 4"):
        encode_questions((question("a", ["bbbbbb"]),), pico_tokenizer(), 4)


def test_max_length_prefers_the_config() -> None:
    assert max_length(pico_model("gpt_neox").config, None) == 512
    assert max_length(object(), pico_tokenizer()) == 2048


# --- trees


@st.composite
def encoded_questions(draw: st.DrawFn) -> EncodedQuestion:
    token = st.integers(0, 3)
    context = draw(st.lists(token, min_size=1, max_size=6))
    options = draw(st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=5))
    own = draw(st.booleans())
    sequences, starts = [], []
    for option in options:
        before = draw(st.lists(token, min_size=1, max_size=6)) if own else context
        sequences.append((*before, *option))
        starts.append(len(before))
    return EncodedQuestion(tuple(sequences), tuple(starts))


@settings(max_examples=300, deadline=None)
@given(st.lists(encoded_questions(), min_size=1, max_size=12))
def test_every_token_is_fed_once_and_every_read_has_its_history(encoded: list[EncodedQuestion]) -> None:
    groups = plan_groups(encoded)
    assert sorted(row.question for group in groups for row in group.rows) == list(range(len(encoded)))
    for group in groups:
        for batch in pack(group, 40):
            for node, token, number, option in batch.reads:
                sequence, start = encoded[number].sequences[option], encoded[number].starts[option]
                row, at = divmod(int(batch.nodes[node]), batch.tokens.shape[1])
                history = [j for j in range(at + 1) if at < batch.end[row, j]]
                depth = batch.position[row, at]
                assert depth >= start - 1
                assert (*group.prefix, *(batch.tokens[row, j] for j in history)) == sequence[: depth + 1]
                assert [batch.position[row, j] for j in history] == list(range(len(group.prefix), depth + 1))
                assert token == sequence[depth + 1]
        for row in group.rows:
            question = encoded[row.question]
            distinct = {s[:n] for s in question.sequences for n in range(len(group.prefix) + 1, len(s))}
            assert len(row) == len(distinct)
            assert len(row.reads) == sum(
                len(s) - b for s, b in zip(question.sequences, question.starts, strict=True)
            )


def test_the_prefix_that_saves_most_is_taken() -> None:
    system = tuple(range(50))
    subjects = [tuple(range(100 * s, 100 * s + 90)) for s in (1, 2)]
    encoded = [
        EncodedQuestion(tuple((*system, *subjects[i % 2], 1000 + i, 7, o, 9) for o in (1, 2)), (142, 142))
        for i in range(20)
    ]
    groups = plan_groups(encoded)
    assert [(len(group.prefix), len(group.rows)) for group in groups] == [(140, 10), (140, 10)]
    alone = plan_groups(encoded[:1])
    assert [(len(group.prefix), len(group.rows)) for group in alone] == [(0, 1)]


def test_a_batch_pads_with_tokens_that_nothing_sees() -> None:
    rows = [
        build_row(0, EncodedQuestion(((1, 2, 3, 4),), (1,))),
        build_row(1, EncodedQuestion(((5, 6),), (1,))),
    ]
    batch = make_batch(rows)
    assert batch.tokens.tolist() == [[1, 2, 3], [5, 0, 0]]
    assert batch.end.tolist() == [[3, 3, 3], [1, 2, 3]]
    assert len(pack(Group((), tuple(rows)), 3)) == 2
