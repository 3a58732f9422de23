"""Sampled answers: the right distribution, the same answers however they are batched, and evidence of them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from objectives.generation.drawing import draw_tokens
from objectives.generation.sampler import AnswerSampler, Decoding, Generations, uniforms
from objectives.generation.stopping import Stopping
from search.errors import ConfigError, DiskError, EvaluationError
from tests.pico import ARCHS, pico_model, pico_tokenizer

LAW = settings(deadline=None, max_examples=50)
PROMPTS = ("What?", "Tell me a long story about a fox and a hen.", "Hi", "Why is the sky blue", "What?", "n")
SHORT = Decoding(samples=3, max_new_tokens=12)
OFTEN = (2, *range(10, 96, 12))  # so that about two answers in three end before their twelfth token


def peaked(arch: str = "llama", seed: int = 0, scale: float = 8.0, **overrides: Any) -> Any:
    """A pico model whose next token is far from uniform, and with its own mind about where to stop."""
    model = pico_model(arch, seed, tied=False, **overrides)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return model


@cache
def shared() -> Any:
    return peaked()


def sampler(
    model: Any = None,
    prompts: Any = PROMPTS,
    decoding: Decoding = SHORT,
    *,
    tokenizer: Any = None,
    stops: Any = None,
    **options: Any,
) -> AnswerSampler:
    one = AnswerSampler(model or shared(), tokenizer or pico_tokenizer(), prompts, decoding, **options)
    if stops is not None:
        one.stopping = Stopping(one.tokenizer, stops, one.stopping.until)
    return one


def test_what_comes_out() -> None:
    calls: list[tuple[int, int]] = []
    one = sampler(batch_rows=6)
    found = one.generate(lambda done, total: calls.append((done, total)))
    assert found.tokens.shape == (6, 3, 12)
    assert found.tokens.dtype == np.int32
    assert found.finished.shape == (6, 3)
    assert found.prompt_tokens == sum(map(len, PROMPTS))
    assert found.digest == one.digest
    assert found.seconds > 0
    assert calls == [(2, 6), (4, 6), (6, 6)]
    texts = found.texts(one.tokenizer)
    assert [len(answers) for answers in texts] == [3] * 6
    assert len(set(texts[0])) == 3  # samples differ
    assert texts[0] == texts[4] != texts[1]  # the same prompt has the same answers
    with pytest.raises(ValueError, match="read-only"):
        found.tokens[0, 0, 0] = 1


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("limit", [{"temperature": 1e-6}, {"top_p": 1e-9}], ids=["cold", "narrow"])
def test_the_limits_are_transformers_own_greedy_search(arch: str, limit: dict[str, float]) -> None:
    model, tokenizer = peaked(arch), pico_tokenizer()
    prompts = ("abc", "The quick brown fox " * 4, "Question: why?\nAnswer:")  # one beyond Gemma's window
    found = sampler(model, prompts, Decoding(samples=2, max_new_tokens=20, **limit), stops=OFTEN).generate()
    for prompt, answers in zip(prompts, found.tokens, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            greedy = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                max_new_tokens=20,
                eos_token_id=list(OFTEN),
                pad_token_id=0,
            )
        wanted = [token for token in greedy[0, ids.shape[1] :].tolist() if token not in OFTEN]
        for answer in answers:
            assert answer[answer >= 0].tolist() == wanted


@pytest.mark.parametrize("decoding", [Decoding(4000, max_new_tokens=1), Decoding(4000, 0.5, 0.8, 1, seed=3)])
def test_first_tokens_have_the_frequencies_of_the_softmax(decoding: Decoding) -> None:
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

    model, tokenizer = peaked(), pico_tokenizer()
    found = sampler(model, ["Why?"], decoding).generate()
    ids = torch.tensor([tokenizer("Why?")["input_ids"]])
    with torch.inference_mode():
        logits = model(ids).logits[:, -1].double()
    logits = TopPLogitsWarper(decoding.top_p)(ids, TemperatureLogitsWarper(decoding.temperature)(ids, logits))
    p = torch.softmax(logits, dim=-1)[0].numpy()
    # Drawing EOS leaves an empty answer.
    drawn = np.where(found.tokens[0, :, 0] < 0, 2, found.tokens[0, :, 0])
    count = np.bincount(drawn, minlength=len(p))
    assert not count[p == 0].any()
    assert 0.02 < p.max() < 0.9
    # Six standard deviations for each of 96 tokens, and one count for the rare ones.
    assert (np.abs(count - 4000 * p) <= 6 * np.sqrt(4000 * p * (1 - p)) + 1).all()
    kept = p > 0
    chi2 = float(((count[kept] - 4000 * p[kept]) ** 2 / (4000 * p[kept])).sum())
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


@LAW
@given(
    logits=arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 9)), elements=st.floats(-30, 30)),
    temperature=st.floats(0.01, 10),
    top_p=st.floats(0.01, 1.0),
)
def test_the_nucleus_is_the_smallest_set_of_that_mass(
    logits: NDArray[np.float64], temperature: float, top_p: float
) -> None:
    p = torch.softmax(torch.from_numpy(logits) / temperature, dim=-1).numpy()
    grid = np.linspace(0, 1 - 2.0**-53, 201)
    for row, probability in zip(logits, p, strict=True):
        many = torch.from_numpy(np.repeat(row[None], len(grid), axis=0))
        drawn = draw_tokens(many, grid, temperature, top_p)
        assert (np.diff(drawn) >= 0).all()  # the inverse of a cumulative distribution
        least = probability[drawn].min()
        more_probable = probability[probability > least * (1 + 1e-6)].sum()
        assert more_probable < top_p + 1e-6


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 3)
    ends = np.array([0.0, 0.5, 1 - 2.0**-53])
    assert draw_tokens(logits, ends).tolist() == [1, 3, 3]
    assert draw_tokens(torch.tensor([[3e38, -3e38]]), ends[:1], temperature=1e-9).tolist() == [0]
    assert draw_tokens(torch.zeros((3, 4)), ends, top_p=0.3).tolist() == [0, 2, 3]  # all tie: all stay


@pytest.mark.parametrize(("scale", "top_p"), [(1.0, 1.0), (1.0, 0.9), (4.0, 1.0), (4.0, 0.9)])
def test_large_vocabularies_equal_the_plain_inverse(scale: float, top_p: float) -> None:
    random = np.random.default_rng(0)
    logits = scale * torch.from_numpy(random.standard_normal((50, 5003)))
    uniform = random.random(50)
    p = torch.softmax(logits.float(), dim=-1).double()
    descending, order = p.sort(dim=-1, descending=True)
    kept = descending.cumsum(dim=-1) - descending < top_p
    assert (kept.sum(dim=-1) > 1024).any() == (scale == 1.0 or top_p == 1.0)
    p = torch.zeros_like(p).scatter(1, order, descending * kept)
    cumulative = p.cumsum(dim=-1)
    wanted = torch.searchsorted(
        cumulative, torch.from_numpy(uniform)[:, None] * cumulative[:, -1:], right=True
    )
    assert draw_tokens(logits, uniform, top_p=top_p).tolist() == wanted[:, 0].tolist()


@pytest.mark.parametrize("arch", ARCHS)
def test_answers_do_not_depend_on_the_batch(arch: str) -> None:
    model = peaked(arch)
    prompts = (*PROMPTS, "The quick brown fox jumps over the lazy dog. " * 2)
    found = sampler(model, prompts, stops=OFTEN).generate().tokens
    assert 0 < (found[..., -1] < 0).mean() < 1  # some answers leave their batch early
    for rows in (1, 6, 9):
        assert np.array_equal(sampler(model, prompts, stops=OFTEN, batch_rows=rows).generate().tokens, found)
    assert np.array_equal(sampler(model, prompts[::-1], stops=OFTEN).generate().tokens[::-1], found)
    assert np.array_equal(sampler(model, prompts[2:3], stops=OFTEN).generate().tokens, found[2:3])


def test_answers_equal_those_without_cache_and_padding() -> None:
    model = shared()
    one = sampler(decoding=replace(SHORT, temperature=0.8, top_p=0.9), stops=OFTEN)
    found = one.generate()
    for prompt, answers in zip(one.prompts, found.tokens, strict=True):
        numbers = [uniforms(prompt, one.decoding.seed, j, 12) for j in range(3)]
        for answer, uniform in zip(answers, numbers, strict=True):
            text: list[int] = []
            for u in uniform:
                with torch.inference_mode():
                    logits = model(torch.tensor([[*prompt, *text]]), use_cache=False).logits[:, -1]
                token = int(draw_tokens(logits, np.array([u]), 0.8, 0.9)[0])
                if token in one.stopping.stops:
                    break
                text.append(token)
            assert answer[answer >= 0].tolist() == text


def test_more_samples_or_tokens_extend_what_was_drawn_and_seeds_change_it() -> None:
    found = sampler().generate().tokens
    assert np.array_equal(sampler().generate().tokens, found)
    more = sampler(decoding=replace(SHORT, samples=5)).generate().tokens
    assert np.array_equal(more[:, :3], found)
    longer = sampler(decoding=replace(SHORT, max_new_tokens=20)).generate().tokens
    assert np.array_equal(longer[:, :, :12], found)
    assert len({row.tobytes() for row in more[0]}) == 5
    other = sampler(decoding=replace(SHORT, seed=1)).generate().tokens
    assert not (other == found).all(axis=-1).any()


def test_the_models_present_values_are_used_and_its_generation_config_is_not() -> None:
    model = peaked()
    one = sampler(model)
    before = one.generate().tokens
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k, config.max_new_tokens = True, 0.01, 1, 2
    config.repetition_penalty, config.eos_token_id = 9.0, [5, 6, 7]
    assert np.array_equal(one.generate().tokens, before)
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), peaked(seed=1).parameters(), strict=True):
            parameter.copy_(other)
    after = one.generate().tokens
    assert not np.array_equal(after, before)
    assert np.array_equal(after, sampler(peaked(seed=1)).generate().tokens)


def test_an_answer_ends_at_eos() -> None:
    found = sampler(decoding=Decoding(samples=40, max_new_tokens=12), stops=OFTEN).generate()
    assert not np.isin(found.tokens, OFTEN).any()
    assert found.finished.any()
    assert not found.finished.all()
    lengths = (found.tokens >= 0).sum(axis=-1)
    assert (lengths[found.finished] < 12).all()
    assert (lengths[~found.finished] == 12).all()
    assert found.generated_tokens == lengths.sum() + found.finished.sum()


@pytest.mark.parametrize("always", [True, False])
def test_all_or_no_answers_end(always: bool) -> None:
    model = peaked()
    with torch.no_grad():  # a head that reads the first unit, which the last norm makes constant
        model.model.norm.weight.zero_()
        head = torch.nn.Linear(32, 96, bias=True)
        head.weight.zero_()
        head.bias.zero_()
        head.bias[2] = 1000.0 if always else -1000.0
        model.lm_head = head
    found = sampler(model).generate()
    assert found.finished.all() == found.finished.any() == always
    assert found.generated_tokens == (18 if always else 18 * 12)
    assert set(found.texts(pico_tokenizer())[0]) == {""} or not always


def chat_tokenizer(template: str) -> Any:
    tokenizer = pico_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    return tokenizer


def test_a_chat_template_wraps_the_prompt_and_names_the_end_of_a_turn() -> None:
    turn = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}%s{% endfor %}"
    prompt = "{% if add_generation_prompt %}assistant:{% endif %}"
    for end, stops in (("<end>\n", {"<end>", "</s>"}), (" </s>", {"</s>"}), ("\n", {"</s>"}), ("", {"</s>"})):
        tokenizer = chat_tokenizer(turn.replace("%s", end) + prompt)
        one = sampler(prompts=["Hi"], tokenizer=tokenizer, chat_template=True)
        assert tokenizer.decode(one.prompts[0]) == f"user: Hi{end}assistant:"
        assert {tokenizer.decode(token) for token in one.stopping.stops} == stops
        assert sampler(prompts=["Hi"], tokenizer=tokenizer).stopping.stops == (2,)
    with pytest.raises(ConfigError, match="chat_template is asked for, but the tokenizer has none"):
        sampler(chat_template=True)
    with pytest.raises(ConfigError, match=r"the chat template fails \(no roles, please\)"):
        sampler(tokenizer=chat_tokenizer("{{ raise_exception('no roles,\nplease') }}"), chat_template=True)


def test_special_tokens_of_prompts() -> None:
    tokenizer = pico_tokenizer()
    assert sampler(prompts=[""]).prompts == ((1,),)  # BOS alone
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    plain, own = sampler(prompts=["a", "<s>a"], tokenizer=tokenizer).prompts
    assert (
        plain == own == (1, tokenizer.convert_tokens_to_ids("a"))
    )  # a text that brings its BOS gets no second
    bare = pico_tokenizer()
    bare.bos_token = bare.eos_token = None
    assert sampler(prompts=["a"], tokenizer=bare).stopping.stops == ()
    assert sampler(prompts=["a"], tokenizer=bare).generate().finished.any() == np.False_
    with pytest.raises(ConfigError, match="prompt 1: has no token"):
        sampler(prompts=["a", ""], tokenizer=bare)


def test_what_cannot_be_generated_is_refused_before_anything_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peaked()
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ConfigError) as caught:
        sampler(model, ["a", "b\n" * 251])  # 502 tokens, 12 more, a context of 512
    assert str(caught.value).startswith("prompt 1 ('b\\nb\\n")
    assert "502 tokens and 12 new ones (wanted 512 together" in str(caught.value)
    assert "\n" not in str(caught.value)
    sampler(model, ["b\n" * 250])
    with pytest.raises(ConfigError, match="there are none"):
        sampler(model, [])
    monkeypatch.setattr(model, "_is_stateful", True, raising=False)
    with pytest.raises(ConfigError, match="recurrent state"):
        sampler(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_decoding_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^decoding: {message} "):
        Decoding(**options)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_broken_values_are_named(value: float) -> None:
    model = peaked()
    with torch.no_grad():
        model.lm_head.weight.fill_(value)
    with pytest.raises(
        EvaluationError, match=r"prompt \d: the probabilities of token 0 of an answer are not numbers"
    ):
        sampler(model).generate()


def test_a_batch_that_memory_does_not_hold_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = sampler().generate().tokens
    model = peaked()
    forward = model.forward

    def small(input_ids: Any, **options: Any) -> Any:
        if len(input_ids) > 6:
            raise torch.OutOfMemoryError("no")
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", small)
    assert np.array_equal(sampler(model).generate().tokens, wanted)
    with pytest.raises(torch.OutOfMemoryError):
        sampler(model, decoding=replace(SHORT, samples=7)).generate()


def test_the_prompt_goes_through_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peaked()
    forward, shapes = model.forward, []

    def counted(input_ids: Any, **options: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", counted)
    found = sampler(model, ["What is it?"], stops=OFTEN).generate()
    assert shapes[0] == (1, 11)
    assert {shape[1] for shape in shapes[1:]} == {1}
    rows = [shape[0] for shape in shapes[1:]]
    assert rows == sorted(rows, reverse=True)  # answers that ended leave the batch
    assert rows[-1] < 3
    assert 3 + sum(rows) == found.generated_tokens


def test_the_digest_depends_on_prompts_order_and_settings() -> None:
    digests = {
        sampler().digest,
        sampler(prompts=PROMPTS[::-1]).digest,
        sampler(prompts=PROMPTS[:-1]).digest,
        sampler(decoding=replace(SHORT, seed=1)).digest,
        sampler(decoding=replace(SHORT, top_p=0.5)).digest,
    }
    assert len(digests) == 5
    assert sampler(batch_rows=3).digest in digests


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    found = sampler().generate()
    digest = found.save(tmp_path / "g")
    again = Generations.load(tmp_path / "g", sha256=digest, digest=found.digest)
    assert np.array_equal(again.tokens, found.tokens)
    assert (again.prompt_tokens, again.digest, again.seconds) == (found.prompt_tokens, found.digest, 0.0)
    assert sampler().generate().save(tmp_path / "h") == digest
    assert sorted(os.listdir(tmp_path)) == ["g", "h"]
    # Another process: another hash seed, which the library's own metadata order depends on.
    script = "from objectives.generation.sampler import Generations; print(Generations.load('g').save('i'))"
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == digest


def test_evidence_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    digest = sampler().generate().save(path)
    good = path.read_bytes()
    with pytest.raises(EvaluationError, match="about other questions or settings"):
        Generations.load(path, digest="0" * 64)
    with pytest.raises(EvaluationError, match="cannot be read"):
        Generations.load(tmp_path / "none")
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(EvaluationError, match="the file was changed"):
        Generations.load(path, sha256=digest)
    for broken in (b"", good[:-4], good[:30], good.replace(b"generations-1", b"generations-9")):
        path.write_bytes(broken)
        with pytest.raises(EvaluationError, match=r"g\.safetensors: "):
            Generations.load(path)
    good_count = str(sum(map(len, PROMPTS))).encode()
    path.write_bytes(
        good.replace(b'"prompt_tokens":"' + good_count, b'"prompt_tokens":"' + b"x" * len(good_count))
    )
    with pytest.raises(EvaluationError, match="prompt_tokens is 'xx"):
        Generations.load(path)


@pytest.mark.parametrize(
    "tokens",
    [
        np.zeros((2, 3), np.int32),
        np.zeros((2, 3, 4), np.int64),
        np.zeros((0, 3, 4), np.int32),
        np.full((1, 1, 2), -2, np.int32),
        np.array([[[-1, 5]]], np.int32),
    ],
)
def test_arrays_that_are_no_generations(tmp_path: Path, tokens: NDArray[Any]) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(EvaluationError, match=r"^generations: "):
        Generations(tokens, 0, "")
    metadata = {"format": "mergefront-generations-1", "about": "", "prompt_tokens": "3"}
    save_file({"tokens": tokens}, tmp_path / "g", metadata)
    with pytest.raises(EvaluationError, match="/g: "):
        Generations.load(tmp_path / "g")
    save_file({"other": tokens}, tmp_path / "g", metadata)
    with pytest.raises(EvaluationError, match="array 'tokens' is nothing"):
        Generations.load(tmp_path / "g")


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sampler().generate()
    found.save(tmp_path / "g")
    before = (tmp_path / "g").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        found.save(tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == before
    assert os.listdir(tmp_path) == ["g"]
    with pytest.raises(DiskError, match="No such file"):
        found.save(tmp_path / "no folder" / "g")


@LAW
@given(st.lists(st.lists(st.integers(0, 95), max_size=6), min_size=1, max_size=5))
def test_any_answers_survive(tmp_path_factory: pytest.TempPathFactory, answers: list[list[int]]) -> None:
    tokens = np.array([[[*answer, *[-1] * (6 - len(answer))] for answer in answers]], dtype=np.int32)
    found = Generations(tokens, 1, "x")
    assert found.finished.tolist() == [[len(answer) < 6 for answer in answers]]
    path = tmp_path_factory.mktemp("any") / "g"
    found.save(path)
    assert np.array_equal(Generations.load(path).tokens, tokens)
    assert all(isinstance(text, str) for text in found.texts(pico_tokenizer())[0])


def newline_often(seed: int = 0) -> Any:
    """A peaked model that writes a line of about a dozen characters."""
    model = peaked(seed=seed)
    head = torch.nn.Linear(32, 96, bias=True)
    with torch.no_grad():
        head.weight.copy_(model.get_output_embeddings().weight)
        head.bias.zero_()
        head.bias[pico_tokenizer().convert_tokens_to_ids("\n")] = 3.0
    model.lm_head = head
    return model


def test_an_answer_ends_with_a_text_and_its_batch_goes_on_without_it() -> None:
    model, decoding = newline_often(), Decoding(samples=4, max_new_tokens=24, seed=2)
    free = sampler(model, decoding=decoding).generate()
    for until in (("\n",), ("a", "\n"), ("never there",)):
        one = sampler(model, decoding=decoding, until=until)
        found = one.generate()
        ends, steps = 0, 0
        for answer, whole in zip(found.tokens.reshape(-1, 24), free.tokens.reshape(-1, 24), strict=True):
            kept = answer[answer >= 0].tolist()
            assert whole[: len(kept)].tolist() == kept  # the same draws, only fewer
            full = whole[whole >= 0].tolist()
            texts = [one.tokenizer.decode(full[: n + 1], skip_special_tokens=True) for n in range(len(full))]
            reached = [any(end in text for end in until) for text in texts]
            if any(reached):
                assert len(kept) == reached.index(True) + 1
                ends, steps = ends + (len(kept) < 24), steps + len(kept)
            else:
                assert kept == full
                steps += len(kept) + (len(kept) < 24)
        assert found.completed == ends
        assert found.generated_tokens == steps
        assert found.digest != free.digest
        assert [text for row in one.texts(found) for text in row] == [
            one.stopping.cut(text) for row in free.texts(one.tokenizer) for text in row
        ]
        assert (ends > 0) == (until != ("never there",))
    assert np.array_equal(
        sampler(model, decoding=decoding, until=("\n",), batch_rows=1).generate().tokens,
        sampler(model, decoding=decoding, until=("\n",)).generate().tokens,
    )


def test_how_many_answers_a_text_ended_is_kept_on_disk(tmp_path: Path) -> None:
    found = sampler(newline_often(), until=["\n"]).generate()
    assert found.completed > 0
    again = Generations.load(tmp_path / "g", sha256=found.save(tmp_path / "g"), digest=found.digest)
    assert (again.completed, again.generated_tokens) == (found.completed, found.generated_tokens)


def test_texts_that_end_answers_are_found_in_every_tokenizers_pieces() -> None:
    """Byte pieces that hold parts of characters, and words whose space is dropped when they stand alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("e", "n"), ("en", "d")]
    pieces = [*letters, *(a + b for a, b in merges)]
    byte_level = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    words = Tokenizer(
        models.WordLevel({"<unk>": 0, "▁Q:": 1, "▁I": 2, "▁see": 3, "\n": 4}, unk_token="<unk>")
    )
    words.decoder = decoders.Metaspace()
    for backend, answer, until in (
        (byte_level, byte_level.encode("the é\n\nend").ids, ("é",)),
        (byte_level, byte_level.encode("the é\n\nend").ids, ("\nen",)),
        (byte_level, byte_level.encode("the é\n\nend").ids, ("\n\n",)),
        (words, [2, 3, 1, 2], ("Q: ",)),
        (words, [2, 3, 4, 2], ("\n", "Q:")),
    ):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        stop = Stopping(tokenizer, (), until)
        texts = [
            tokenizer.decode(answer[:n], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for n in range(1, len(answer) + 1)
        ]
        wanted = [any(end in text for end in until) for text in texts]
        first = wanted.index(True)
        for n in range(first + 1):  # nothing is drawn after it
            assert stop.reached([answer[: n + 1]], [answer[n]]) == [wanted[n]]
    with pytest.raises(ConfigError, match="until: found an empty text"):
        Stopping(None, (), ("a", ""))
