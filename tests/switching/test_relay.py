"""Candidates that take turns: what they write, what they read, and what that costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from objectives.generation.sampler import AnswerSampler, Decoding, encode_prompts
from objectives.generation.stopping import stopping
from search.config.switching import Turns
from search.errors import ConfigError, EvaluationError
from search.switching.policies import Always, AtRandom, ByPrompt
from search.switching.reader import CachedReader, PlainReader, make_reader
from search.switching.relay import Batch, Relay, Relayed
from search.switching.response import INSERTED, Border, Start
from tests.pico import ARCHS, pico_model, pico_tokenizer

NAMES = ("pre", "supervised", "preferred")
PROMPTS = ("Where is Baru?", "What is 3 plus 4?", "x")
DECODING = Decoding(samples=4, temperature=0.9, top_p=0.9, max_new_tokens=30, seed=5)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: pico_model("llama", seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pico_tokenizer()


def relay_of(
    models: dict[str, Any], turns: Turns, *, until: tuple[str, ...] = (), rows: int = 64, **changed: Any
) -> Relay:
    tokenizer = pico_tokenizer()
    decoding = Decoding(**{**DECODING.__dict__, **changed})
    ends = stopping(tokenizer, chat_template=False, until=until)
    return Relay(models, tokenizer, turns, ends, decoding, batch_rows=rows)


def prompts_of(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    return encode_prompts(PROMPTS, tokenizer)


def written(found: Relayed) -> list[list[int]]:
    n, s, t = found.answers.tokens.shape
    return [[token for token in row if token >= 0] for row in found.answers.tokens.reshape(n * s, t).tolist()]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_reader_knows_what_a_model_knows_that_reads_everything_again(arch: str) -> None:
    model = pico_model(arch)
    if arch.startswith("gemma"):  # as their checkpoints are loaded
        model.set_attn_implementation("eager")
    rng = np.random.default_rng(0)
    first, second = (tuple(rng.integers(3, 60, size=70).tolist()) for _ in range(2))
    prefixes = [first, first, second, first]
    reader, plain = make_reader(model, prefixes, 120), PlainReader(model, prefixes, 120)
    assert isinstance(reader, CachedReader)
    texts = list(prefixes)
    longest = np.zeros(4, dtype=int)
    for _ in range(8):
        rows = np.sort(rng.permutation(4)[: rng.integers(1, 5)])
        texts = [(*text, *rng.integers(3, 60, size=rng.integers(0, 5)).tolist()) for text in texts]
        for one in (reader, plain):
            one.read(rows, [texts[row] for row in rows])
        longest[rows] = [len(texts[row]) for row in rows]
        torch.testing.assert_close(reader.logits[rows], plain.logits[rows], atol=2e-5, rtol=0)
        torch.testing.assert_close(reader.hidden[rows], plain.hidden[rows], atol=2e-5, rtol=0)
    assert reader.fed == 2 * 70 + sum(max(0, length - 70) for length in longest)


def test_a_model_without_masks_of_our_own_reads_again(models: dict[str, Any], tokenizer: Any) -> None:
    import copy

    slow = {name: copy.deepcopy(model) for name, model in models.items()}
    for model in slow.values():
        model.config._attn_implementation = "flash_attention_2"  # asked for by name only: it is never run
    assert isinstance(make_reader(slow["pre"], [(1,)], 4), PlainReader)
    for model in slow.values():
        model.config._attn_implementation = "sdpa"
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic"}
    assert isinstance(make_reader(slow["pre"], [(1,)], 4), PlainReader)
    policy = AtRandom(3, 1)
    cached, plain = (
        relay_of(each, Turns(5), max_new_tokens=12).generate(prompts_of(tokenizer), policy)
        for each in (models, slow)
    )
    assert written(cached) == written(plain)
    assert (cached.authors == plain.authors).all()


@pytest.mark.parametrize("segment", [1, 7, 30])
@pytest.mark.parametrize("until", [(), ("q",), ("ab", "q")])
def test_who_writes_alone_writes_what_it_writes_alone(
    models: dict[str, Any], tokenizer: Any, segment: int, until: tuple[str, ...]
) -> None:
    relay = relay_of(models, Turns(segment), until=until, rows=8)
    for author, name in enumerate(NAMES):
        found = relay.generate(prompts_of(tokenizer), Always(author))
        sampler = AnswerSampler(models[name], tokenizer, PROMPTS, DECODING, until=until)
        wanted = sampler.generate()
        np.testing.assert_array_equal(found.answers.tokens, wanted.tokens)
        assert relay.texts(found.answers) == sampler.texts(wanted)
        assert found.answers.generated_tokens == wanted.generated_tokens == found.cost.written
        assert found.cost.single == wanted.prompt_tokens + wanted.generated_tokens == found.cost.total
        assert ((found.authors == author) == (found.answers.tokens >= 0)).all()


@pytest.mark.parametrize("turns", [Turns(4), Turns(4, "pre", "preferred", "SO: "), Turns(4, wait="...")])
def test_responses_depend_on_nothing_else_of_the_batch(
    models: dict[str, Any], tokenizer: Any, turns: Turns
) -> None:
    prompts = prompts_of(tokenizer)
    together = relay_of(models, turns).generate(prompts, AtRandom(3, 1))
    apart = [relay_of(models, turns, rows=4).generate([prompt], AtRandom(3, 1)) for prompt in prompts]
    np.testing.assert_array_equal(
        together.answers.tokens, np.concatenate([one.answers.tokens for one in apart])
    )
    np.testing.assert_array_equal(together.authors, np.concatenate([one.authors for one in apart]))
    total = sum((one.cost for one in apart[1:]), apart[0].cost)
    assert together.cost == total


def test_every_token_is_read_once_by_whoever_writes_behind_it(models: dict[str, Any], tokenizer: Any) -> None:
    """The cost, counted again from who wrote what."""
    prompts = prompts_of(tokenizer)
    found = relay_of(models, Turns(4)).generate(prompts, AtRandom(3, 1))
    read = 0
    for i, prompt in enumerate(prompts):
        heard_prompt = set()
        for authors in found.authors[i].tolist():
            authors = [author for author in authors if author >= 0]
            for candidate in range(3):
                mine = [place for place, author in enumerate(authors) if author == candidate]
                # An author whose whole segment was the end of the response left no token behind.
                if mine:
                    heard_prompt.add(candidate)
                    read += sum(author != candidate for author in authors[: mine[-1]])
        read += len(prompt) * len(heard_prompt)
    drawn_ends = found.cost.written - int((found.answers.tokens >= 0).sum())
    assert read <= found.cost.read <= read + drawn_ends * (30 + max(map(len, prompts)))
    assert found.cost.switcher == 0
    assert found.cost.prompts == sum(map(len, prompts))
    assert "times a single model's" in str(found.cost)


def test_chance_is_fair_and_has_a_seed(models: dict[str, Any], tokenizer: Any) -> None:
    relay = relay_of(models, Turns(1), samples=64)
    prompts = prompts_of(tokenizer)[:1]
    one, again, other = (relay.generate(prompts, AtRandom(3, seed)) for seed in (1, 1, 2))
    assert (one.authors == again.authors).all()
    assert (one.authors[..., 0] != other.authors[..., 0]).any()
    first = np.bincount(one.authors[0, :, 0].clip(0), minlength=3)
    assert first.min() >= 8  # of 64, 21.3 expected: below with a probability of 1e-4


def test_forced_ends(models: dict[str, Any], tokenizer: Any) -> None:
    """The last author comes at the end of the room, or when somebody else ends early; what is inserted is nobody's."""
    turns = Turns(6, first="preferred", last="supervised", closing="SO: ")
    found = relay_of(models, turns).generate(prompts_of(tokenizer), AtRandom(3, 1))
    closing = tokenizer("SO: ", add_special_tokens=False)["input_ids"]
    seen = set()
    for tokens, authors in zip(
        found.answers.tokens.reshape(-1, 30).tolist(), found.authors.reshape(-1, 30).tolist(), strict=True
    ):
        length = sum(token >= 0 for token in tokens)
        place = authors.index(INSERTED)
        assert tokens[place : place + 4] == closing
        assert authors[place : place + 4] == [INSERTED] * 4
        assert set(authors[: min(place, 6)]) <= {2}
        behind = authors[place + 4 : length]
        assert set(behind) <= {1}
        assert len(behind) <= 6
        seen.add(place == 18)
    assert seen == {True, False}, "both ways to the last segment must occur"


def test_an_early_end_may_be_put_off_once(models: dict[str, Any], tokenizer: Any) -> None:
    plain, patient = (
        relay_of(models, turns).generate(prompts_of(tokenizer), Always(0))
        for turns in (Turns(30), Turns(30, wait="..."))
    )
    short = [one for one in written(plain) if len(one) < 27]
    assert short, "some response must end early"
    dots = tokenizer("...", add_special_tokens=False)["input_ids"]
    for before, after in zip(written(plain), written(patient), strict=True):
        assert after[: len(before)] == before
        if len(before) < 27:
            assert after[len(before) : len(before) + 3] == dots


def test_a_router_sends_whole_prompts(models: dict[str, Any], tokenizer: Any) -> None:
    prompts = prompts_of(tokenizer)
    relay = relay_of(models, Turns(5))
    found = relay.generate(prompts, ByPrompt({prompt: i for i, prompt in enumerate(prompts)}))
    for i in range(3):
        alone = relay.generate(prompts, Always(i))
        np.testing.assert_array_equal(found.answers.tokens[i], alone.answers.tokens[i])


def test_a_response_goes_on_from_where_it_stands(models: dict[str, Any], tokenizer: Any) -> None:
    prompt = prompts_of(tokenizer)[0]
    relay = relay_of(models, Turns(5))
    (whole,), _ = relay.run([Start(prompt, 0)], Always(1), seed=5)
    (half,), _ = relay.run([Start(prompt, 0)], Always(1), seed=5, segments=1)
    assert half.tokens == whole.tokens[:5]
    assert half.finish is None
    (rest,), _ = relay.run([Start(prompt, 0, tuple(half.tokens), tuple(half.authors))], Always(1), seed=5)
    assert (rest.tokens, rest.authors, rest.finish) == (whole.tokens, whole.authors, whole.finish)
    full = tuple(range(3, 33))
    (nothing,), cost = relay.run([Start(prompt, 0, full, (0,) * 30)], Always(1), seed=5)
    assert nothing.finish == "length"
    assert nothing.tokens == list(full)
    assert cost.total == 0


def test_what_does_not_fit(models: dict[str, Any], tokenizer: Any) -> None:
    for turns, said in (
        (lambda: Turns(0), "segment: found 0"),
        (lambda: Turns(5, closing="So"), "say who writes it"),
        (lambda: Turns(5, last="pre", wait="Wait"), "does not go with last"),
    ):
        with pytest.raises(ConfigError, match=said):
            turns()
    with pytest.raises(ConfigError, match=r"switching\.first: found 'post'"):
        relay_of(models, Turns(5, first="post"))
    with pytest.raises(ConfigError, match="at most max_new_tokens, 30"):
        relay_of(models, Turns(31))
    with pytest.raises(ConfigError, match="found 1 candidates"):
        relay_of({"pre": models["pre"]}, Turns(5))
    with pytest.raises(ConfigError, match="closing: 31 tokens"):
        relay_of(models, Turns(5, last="pre", closing="x" * 31))
    with pytest.raises(ConfigError, match="does not fit"):
        relay_of(models, Turns(5)).generate([tuple([5] * 500)], Always(0))
    broken = pico_model("llama", 9)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="preferred: its probabilities are not numbers"):
        relay_of({**models, "preferred": broken}, Turns(5)).generate(prompts_of(tokenizer), AtRandom(3, 1))


def test_a_text_that_ends_a_response_ends_it_for_everybody(models: dict[str, Any], tokenizer: Any) -> None:
    """No last author is called behind it: what it wrote would be cut off."""
    turns = Turns(3, last="preferred", closing="SO: ")
    relay = relay_of(models, turns, until=("a", "e", "i"))
    found = relay.generate(prompts_of(tokenizer), AtRandom(3, 1))
    raw = [text for answers in found.answers.texts(tokenizer) for text in answers]
    ended = [text for text in raw if any(end in text for end in "aei")]
    assert ended
    for text in ended:
        assert sum(text.count(end) for end in "aei") == 1
        assert text[-1] in "aei"


def test_why_nothing_follows(models: dict[str, Any], tokenizer: Any) -> None:
    """Behind an early end the last segment is the end: there was room. Without one, room is why it stops there."""
    turns = Turns(6, last="supervised")
    relay = relay_of(models, turns, max_new_tokens=28)  # 18, 6, and 4 that are left over
    starts = [Start(prompt, sample) for prompt in prompts_of(tokenizer) for sample in range(60)]
    found, _ = relay.run(starts, Always(0), seed=5)
    seen = set()
    for one in found:
        whole = one.authors.count(1) == 6
        early = one.authors.count(0) < 18  # with room for more, only an end calls the last author
        seen.add((whole, early))
        assert one.finish == ("length" if whole and not early else "stop")
        assert one.cut != early
    assert {(True, True), (True, False)} <= seen


@pytest.mark.parametrize("turns", [Turns(4, last="preferred", closing="So: "), Turns(4, wait="o: ")])
def test_inserted_text_may_end_a_response(models: dict[str, Any], tokenizer: Any, turns: Turns) -> None:
    """Whatever were written behind it would be cut off."""
    relay = relay_of(models, turns, until=("o:",))
    starts = [Start(prompt, sample) for prompt in prompts_of(tokenizer) for sample in range(12)]
    found, _ = relay.run(starts, AtRandom(3, 1), seed=5)
    inserted = [one for one in found if INSERTED in one.authors]
    assert inserted
    for one in inserted:
        place = one.authors.index(INSERTED)
        assert (one.finish, one.by_text) == ("stop", True)
        assert one.authors[place:] == [INSERTED] * (len(one.authors) - place)
        # Nothing was drawn behind it: what was is there, or ended a segment.
        assert place <= one.drawn <= place + 1
    for start, one in zip(starts, found, strict=True):
        batch = Batch(relay, [start])
        rounds = [author for _, (author,) in batch.rounds(AtRandom(3, 1), 5)]
        assert batch.responses[0].tokens == one.tokens
        if turns.last is not None and one in inserted:
            assert rounds[-1] == 2


def test_rounds_say_who_wrote_even_nothing(models: dict[str, Any], tokenizer: Any) -> None:
    relay = relay_of(models, Turns(5))
    silent = 0

    class Cycle(Always):
        def choose(self, border: Border) -> Any:
            return np.array([len(border.responses[row].borders) % 3 for row in border.rows])

    for sample in range(40):
        batch = Batch(relay, [Start(prompts_of(tokenizer)[0], sample)])
        (response,) = batch.responses
        before = 0
        for turn, (rows, authors) in enumerate(batch.rounds(Cycle(0), 5)):
            assert (rows.tolist(), authors.tolist()) == ([0], [turn % 3])
            assert set(response.authors[before:]) <= {turn % 3}
            silent += before == len(response.tokens)
            before = len(response.tokens)
    assert silent > 0, "somebody must end a response at once"
