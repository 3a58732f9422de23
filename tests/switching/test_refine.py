"""Candidates that read each other's answers: who reads what, what it costs, and what it must not depend on."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from objectives.generation.sampler import AnswerSampler, Decoding, encode_prompts
from search.errors import ConfigError
from search.switching import refine as module
from search.switching.refine import TEMPLATE, Refined, refine
from tests.pico import CHAT_TEMPLATE, pico_model, pico_tokenizer

PROMPTS = ("Who?", "2 + 2 = ", "Why is the sky blue")
SHORT = Decoding(samples=2, max_new_tokens=6, seed=5)


@cache
def peaked(seed: int) -> Any:
    model = pico_model("llama", seed, tied=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8.0)
    return model


def three() -> dict[str, Any]:
    return {"pre": peaked(0), "sft": peaked(1), "post": peaked(2)}


def refined(
    candidates: Any = None, prompts: Any = PROMPTS, decoding: Decoding = SHORT, **options: Any
) -> Refined:
    return refine(candidates or three(), pico_tokenizer(), prompts, decoding, **options)


class Script:
    """Stands in for AnswerSampler: a candidate's answer says who wrote it, and keeps what it was asked."""

    asked: list[tuple[str, str, int, int]] = []  # noqa: RUF012

    def __init__(self, model: Any, tokenizer: Any, prompts: Any, decoding: Decoding, **options: Any) -> None:
        self._model, self._prompts, self._decoding = model, prompts, decoding
        Script.asked += [(model.name, prompt, decoding.samples, decoding.seed) for prompt in prompts]

    def generate(self) -> Any:
        class Found:
            prompt_tokens, generated_tokens = 10 * len(self._prompts), len(self._prompts)

        return Found

    def texts(self, found: Any) -> Any:
        turn = [prompt.count("|") for prompt in self._prompts]
        return tuple(
            tuple(f" {self._model.name}{turn[i]}{prompt[-1]}.{j} " for j in range(self._decoding.samples))
            for i, prompt in enumerate(self._prompts)
        )


class Named:
    def __init__(self, name: str) -> None:
        self.name, self.config = name, pico_model().config


def test_each_reads_its_own_draft_and_those_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AnswerSampler", Script)
    monkeypatch.setattr(Script, "asked", [])
    found = refined(
        {name: Named(name) for name in "abc"},
        ["x", "y"],
        template="{own}|{others}|{prompt}",
        rounds=2,
        final="b",
    )
    drafts = [(name, prompt, 2) for name in "abc" for prompt in "xy"]
    assert [row[:3] for row in Script.asked[:6]] == drafts
    first = [
        (name, f"{name}0{q}.{j}|- {left}0{q}.{j}\n- {right}0{q}.{j}|{q}", 1)
        for name, left, right in (("a", "b", "c"), ("b", "a", "c"), ("c", "a", "b"))
        for j in range(2)
        for q in "xy"
    ]
    assert [row[:3] for row in Script.asked[6:18]] == first
    # Its samples are drawn one by one: each says .0, and stands where its conversation is.
    last = [("b", f"b2{q}.0|- a2{q}.0\n- c2{q}.0|{q}", 1) for j in range(2) for q in "xy"]
    assert [row[:3] for row in Script.asked[18:]] == last
    assert found.texts == ((" b2x.0 ",) * 2, (" b2y.0 ",) * 2)
    assert found.drafts["c"] == ((" c0x.0 ", " c0x.1 "), (" c0y.0 ", " c0y.1 "))
    assert (found.prompt_tokens, found.generated_tokens, found.kept) == (220, 22, 0)
    # One seed for each candidate of the first round, then one for each candidate, round and sample.
    seeds = [row[3] for row in Script.asked]
    assert len(set(seeds)) == 3 + 3 * 2 + 2
    assert seeds[0] == seeds[1]
    assert seeds[6] == seeds[7] != seeds[8]


def test_no_rounds_leave_the_drafts_of_the_candidate_that_answers() -> None:
    found = refined(rounds=0)
    assert found.texts == found.drafts["post"]
    assert found.texts != refined(rounds=1).texts
    assert refined(rounds=0, final="sft").texts == found.drafts["sft"]
    fed = 3 * sum(map(len, encode_prompts(PROMPTS, pico_tokenizer())))
    assert found.prompt_tokens == fed


def test_the_answer_is_what_the_final_candidate_writes_after_the_drafts() -> None:
    found = refined(rounds=1)
    tokenizer = pico_tokenizer()
    for i, prompt in enumerate(PROMPTS):
        for j in range(2):
            own, *others = (found.drafts[name][i][j].strip() for name in ("post", "pre", "sft"))
            text = TEMPLATE.format(prompt=prompt, own=own, others="\n".join(f"- {one}" for one in others))
            decoding = Decoding(1, max_new_tokens=6, seed=module._seed(5, 1, "post", j))
            sampler = AnswerSampler(peaked(2), tokenizer, [text], decoding)
            assert sampler.texts(sampler.generate()) == ((found.texts[i][j],),)


def test_copies_of_a_model_draft_differently_and_samples_stay_apart() -> None:
    found = refined({"one": peaked(0), "two": peaked(0)}, rounds=1)
    assert found.drafts["one"] != found.drafts["two"]
    assert all(first != second for first, second in found.texts)


def test_neither_the_other_prompts_nor_the_batch_matter() -> None:
    whole = refined()
    assert refined(batch_rows=1) == whole
    order = [2, 0, 1]
    turned = refined(prompts=[PROMPTS[i] for i in order])
    assert turned.texts == tuple(whole.texts[i] for i in order)
    assert refined(decoding=Decoding(2, max_new_tokens=6, seed=6)).texts != whole.texts
    assert refined() == whole


def test_a_prompt_that_is_too_long_leaves_the_draft_as_it_was() -> None:
    prompts = ("n", "Tell me a long story. " * 6)
    config = {"max_position_embeddings": 160}
    models = {
        name: pico_model("llama", seed, tied=False, **config) for seed, name in enumerate(("pre", "post"))
    }
    template = "{own} {others} {prompt}"
    found = refined(models, prompts, rounds=2, template=template)
    assert found.kept == 0
    found = refined(models, prompts, rounds=2)  # the longer template
    assert found.texts[1] == found.drafts["post"][1]
    assert found.texts[0] != found.drafts["post"][0]
    assert found.kept == 2 * 2 + 2  # two candidates, two samples in the first round, then one candidate
    with pytest.raises(ConfigError, match="wanted 160 together"):
        refined(models, ["n" * 160])


def test_answers_are_read_up_to_the_text_that_ends_them() -> None:
    free = refined(rounds=0).texts
    end = next(letter for row in free for text in row for letter in text[1:-1] if not letter.isspace())
    found = refined(rounds=1, until=[end])
    for texts in (found.texts, *found.drafts.values()):
        assert not any(end in text for row in texts for text in row)
    assert found.generated_tokens < refined(rounds=1).generated_tokens


def test_the_whole_prompt_is_one_message_of_a_chat() -> None:
    tokenizer = pico_tokenizer(chat_template=CHAT_TEMPLATE)
    plain = refine(three(), tokenizer, PROMPTS, SHORT, rounds=1)
    chat = refine(three(), tokenizer, PROMPTS, SHORT, rounds=1, chat_template=True)
    assert chat.texts != plain.texts
    assert chat.prompt_tokens > plain.prompt_tokens - 50
    with pytest.raises(ConfigError, match="chat_template"):
        refined(chat_template=True)


def test_progress_counts_to_its_end() -> None:
    for rounds, steps in ((0, 3), (1, 4), (2, 7)):
        calls: list[tuple[int, int]] = []
        refined(rounds=rounds, progress=lambda done, all_: calls.append((done, all_)))  # noqa: B023
        assert calls == [(i + 1, steps) for i in range(steps)]


def test_braces_of_a_question_stay_as_they_are() -> None:
    assert refined(prompts=["{own} {0} }{"], rounds=1).texts


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": {"one": peaked(0)}}, "two or more"),
        ({"final": "best"}, "best of candidates"),
        ({"rounds": -1}, "rounds is -1"),
        ({"template": "{prompt}"}, "fields are {prompt} "),
        ({"template": "{own} {others}"}, "wanted {prompt}"),
        ({"template": "{prompt} {others} {answer}"}, "{answer}"),
        ({"template": "{prompt} {others[0]}"}, "fields"),
        ({"template": "{prompt!r} {others}"}, "fields"),
        ({"template": "{prompt} {others} {"}, "brace"),
        ({"prompts": []}, "there are none"),
    ],
)
def test_what_cannot_be_refined(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("{", r"\{")) as caught:
        refined(**options)
    assert "\n" not in str(caught.value)
