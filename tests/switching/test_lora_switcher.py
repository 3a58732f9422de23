"""The switcher that is asked in text: what it reads, that it answers with a candidate, and that it learns to."""

from __future__ import annotations

import builtins
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from objectives.generation.sampler import Decoding, encode_prompts
from objectives.generation.stopping import stopping
from search.checkpoints.adapters import merged_adapter
from search.checkpoints.checkpoint import Checkpoint
from search.config.switching import LoraOptions, Turns
from search.errors import ConfigError, EvaluationError, MergefrontError
from search.switching.adapter import load_switcher
from search.switching.asked_switcher import AskedSwitcher, Asking, asked_logits, common
from search.switching.classifier_switcher import chosen
from search.switching.lora import Epoch, Lora, train_lora
from search.switching.policies import AtRandom
from search.switching.reader import CachedReader, PlainReader, Tokens, make_reader
from search.switching.relay import Relay
from search.switching.response import INSERTED, Border, Response, Start
from tests.pico import ARCHS, pico_model, pico_tokenizer, save_pico

NAMES = ("pre", "supervised", "preferred")
ROOM, SEGMENT = 14, 3
FAST = LoraOptions(rank=8, alpha=16, dropout=0.0, rate=1e-2, epochs=12, batch=16)


@pytest.fixture(scope="module")
def asking() -> Asking:
    return Asking.of(pico_tokenizer(), 3, SEGMENT)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: pico_model("llama", seed) for seed, name in enumerate(NAMES)}


def loud(arch: str = "llama", seed: int = 7) -> Any:
    """A model whose opinions differ from text to text."""
    model = pico_model(arch, seed)
    if arch.startswith("gemma"):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(4)
    return model


def relay_of(models: dict[str, Any], turns: Turns, samples: int = 4) -> Relay:
    tokenizer = pico_tokenizer()
    decoding = Decoding(samples, 0.9, 0.95, ROOM, 5)
    return Relay(models, tokenizer, turns, stopping(tokenizer, chat_template=False), decoding)


def prompts() -> tuple[Tokens, ...]:
    return encode_prompts(("Where is Baru?", "What is 3 plus 4?", "x"), pico_tokenizer())


# What it reads


def test_every_segment_is_marked_with_its_author(asking: Asking) -> None:
    tokenizer = pico_tokenizer()

    def ids(text: str) -> list[int]:
        return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]

    authors = [0, 0, 0, 0, 0, 0, 2, INSERTED, INSERTED, INSERTED, INSERTED, 1, 1, 1]
    start = Start(tuple(ids("Q:")), 0, tuple(ids("abcdefg....xyz")), tuple(authors))
    text = (
        "Q:<model 0 begins>abc<model 0 ends><model 0 begins>def<model 0 ends><model 2 begins>g<model 2 ends>"
        "....<model 1 begins>xyz<model 1 ends>\nWhich model writes next, 0 to 2? Answer: "
    )
    assert list(asking.asked(start)) == ids(text)
    assert [tokenizer.decode(digit) for digit in asking.digits] == ["0", "1", "2"]
    assert asking.asked(Start((5,), 0)) == (5, *asking.question)


@given(st.data())
def test_tokens_and_authors_can_be_read_back(data: Any) -> None:
    """Nothing is lost and nothing of the response is encoded anew, whatever its tokens look like."""
    asking = Asking.of(pico_tokenizer(), 3, SEGMENT)
    authors = data.draw(st.lists(st.integers(INSERTED, 2), max_size=20))
    # Tokens that no mark contains: a mark that a candidate wrote itself is no mark, but reads like one.
    tokens = [70 + data.draw(st.integers(0, 4)) for _ in authors]
    rest = list(asking.marked((1, 2), tokens, authors))[2:]
    found: list[tuple[int, int]] = []
    while rest:
        author = next((a for a in range(3) if tuple(rest[: len(asking.begins[a])]) == asking.begins[a]), None)
        if author is None:
            found.append((rest.pop(0), INSERTED))
            continue
        rest = rest[len(asking.begins[author]) :]
        length = 0
        while tuple(rest[: len(asking.ends[author])]) != asking.ends[author]:
            found.append((rest.pop(0), author))
            length += 1
        assert 1 <= length <= SEGMENT
        rest = rest[len(asking.ends[author]) :]
    assert found == list(zip(tokens, authors, strict=True))
    start = Start((1, 2), 0, tuple(tokens), tuple(authors))
    longest = asking.longest(start, len(tokens))
    assert len(asking.asked(start)) <= longest
    for more in range(1, 8):
        grown = Start((1, 2), 0, (*tokens, *[70] * more), (*authors, *[2] * more))
        assert len(asking.asked(grown)) <= asking.longest(start, len(tokens) + more)


@dataclass
class _Listening:
    """Random switching that keeps what a switcher would have been asked."""

    asking: Asking
    inner: AtRandom
    heard: dict[int, list[Tokens]]

    @property
    def key(self) -> object:
        return "listening"

    def begin(self, responses: Sequence[Response]) -> _Listening:
        self.lots = self.inner.begin(responses)
        return self

    fed: int = 0

    def choose(self, border: Border) -> Any:
        for row in border.rows:
            one = border.responses[row]
            text = self.asking.asked(one)
            trace = Start(one.start.prompt, one.start.sample, tuple(one.tokens), tuple(one.authors))
            assert self.asking.asked(trace) == text, "a trace reads as the response it was cut from"
            assert len(text) <= self.asking.longest(one.start, ROOM)
            self.heard.setdefault(int(row), []).append(text[: -len(self.asking.question)])
        return self.lots.choose(border)


@pytest.mark.parametrize("turns", [Turns(3), Turns(3, wait="..."), Turns(3, "pre", "preferred", "SO: ")])
def test_what_was_marked_once_stays_and_segments_are_those_that_were_written(
    models: dict[str, Any], asking: Asking, turns: Turns
) -> None:
    policy = _Listening(asking, AtRandom(3, 1), {})
    starts = [Start(prompt, sample) for prompt in prompts() for sample in range(16)]
    responses, _ = relay_of(models, turns).run(starts, policy, 5, whole=48)
    assert len(policy.heard) > 40, "others ended in their first segment"
    short = 0
    for texts in policy.heard.values():
        for before, after in pairwise(texts):
            assert after[: len(before)] == before
            assert len(after) > len(before)
    for one in responses:
        written = {border for border in one.borders if border < len(one.tokens)}
        written -= {place for place in written if one.authors[place] == INSERTED}  # it ended at once
        pieces = [first for first, _ in asking._pieces(one.authors) if one.authors[first] != INSERTED]
        assert pieces == sorted(written)
        short += INSERTED in one.authors
    assert (short > 0) == (turns != Turns(3))


def test_each_candidate_has_a_token_of_its_own() -> None:
    tokenizer = pico_tokenizer()
    assert len(set(Asking.of(tokenizer, 10, 5).digits)) == 10
    with pytest.raises(ConfigError, match=r"no token of its own for model number 10 .* 0 to 10\)"):
        Asking.of(tokenizer, 11, 5)  # a 1 and a 0
    with pytest.raises(ConfigError, match="no token of its own for model number 0"):
        Asking.of(pico_tokenizer(order="abcdefghijklmnopqrstuvwxyz:,.?"), 2, 5)  # both unknown


def test_the_space_before_a_number_may_be_part_of_its_token() -> None:
    """Byte-level BPE as GPT-2's, in which ` 0` and ` 10` are words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = ["".join(f" {number}" for number in range(12))] * 4 + ["Which model writes next? Answer: 1"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    asking = Asking.of(tokenizer, 12, 5)
    assert [tokenizer.decode(digit) for digit in asking.digits] == [f" {number}" for number in range(12)]
    assert tokenizer.decode(list(asking.question)).endswith("0 to 11? Answer:")


# How it chooses


@pytest.mark.parametrize("arch", ARCHS)
def test_a_reader_forgets_what_lies_behind(arch: str) -> None:
    """Read on, taken back, read otherwise: as a model that reads everything again, windows included."""
    model = loud(arch)
    rng = np.random.default_rng(0)
    prefixes = [tuple(rng.integers(3, 60, size=70).tolist()) for _ in range(3)]
    reader, plain = make_reader(model, prefixes, 140), PlainReader(model, prefixes, 140)
    assert isinstance(reader, CachedReader)
    texts = list(prefixes)
    for _ in range(8):
        rows = np.sort(rng.permutation(3)[: rng.integers(1, 4)])
        lengths = [int(rng.integers(70, len(texts[row]) + 1)) for row in rows]
        for row, length in zip(rows, lengths, strict=True):
            more = rng.integers(3, 60, size=rng.integers(1, 12)).tolist()
            texts[row] = (*texts[row][:length], *more)
        for one in (reader, plain):
            one.rewind(rows, np.array(lengths))
            one.read(rows, [texts[row] for row in rows])
        torch.testing.assert_close(reader.logits[rows], plain.logits[rows], atol=2e-4, rtol=1e-5)


@dataclass(frozen=True, eq=False)
class _Plainly:
    """The switcher, written down again: it reads the whole text at every border."""

    switcher: AskedSwitcher
    fed: int = 0

    @property
    def key(self) -> object:
        return self.switcher.key

    def begin(self, responses: Sequence[Response]) -> _Plainly:
        return self

    def choose(self, border: Border) -> Any:
        one = self.switcher
        responses = [border.responses[row] for row in border.rows]
        digits = torch.tensor(one.asking.digits)
        with torch.no_grad():
            texts = [torch.tensor([one.asking.asked(response)]) for response in responses]
            logits = torch.stack([one.model(input_ids=text).logits[0, -1, digits] for text in texts])
        return chosen(logits.double().numpy(), responses, one.choice, one.top_p, one.seed)


@pytest.mark.parametrize("turns", [Turns(3), Turns(3, wait="..."), Turns(3, "pre", "preferred", "SO: ")])
@pytest.mark.parametrize("choice", ["best", "draw"])
def test_it_chooses_as_if_it_read_everything_again(
    models: dict[str, Any], asking: Asking, turns: Turns, choice: Any
) -> None:
    switcher = AskedSwitcher(loud(), asking, ROOM, "digest", choice, 0.9, 3)
    relay = relay_of(models, turns)
    ours, plain = (relay.generate(prompts(), policy) for policy in (switcher, _Plainly(switcher)))
    np.testing.assert_array_equal(ours.authors, plain.authors)
    np.testing.assert_array_equal(ours.answers.tokens, plain.answers.tokens)
    assert len(np.unique(ours.authors[ours.authors >= 0])) > 1, "there must be something to choose"
    assert plain.cost.switcher == 0


def test_a_response_that_stands_in_the_middle_of_a_segment(models: dict[str, Any], asking: Asking) -> None:
    """Its author may go on, and fills the segment up: what was marked is taken back then."""
    switcher = AskedSwitcher(loud(), asking, ROOM, "digest", "draw", 1.0, 3)
    relay, prompt = relay_of(models, Turns(3)), prompts()[0]
    starts = [
        Start(prompt, sample, (5, 6, 7, 8), (author,) * 4) for sample in range(8) for author in range(3)
    ]
    ours, plain = (relay.run(starts, policy, 5)[0] for policy in (switcher, _Plainly(switcher)))
    assert [(one.tokens, one.authors) for one in ours] == [(one.tokens, one.authors) for one in plain]
    assert any(one.authors[3:6] == [one.authors[0]] * 3 and len(one.free) > 1 for one in ours)


@pytest.mark.parametrize("arch", ["gemma2", "qwen3", "gpt_neox"])
def test_it_chooses_so_in_other_architectures(models: dict[str, Any], asking: Asking, arch: str) -> None:
    switcher = AskedSwitcher(loud(arch), asking, ROOM, "digest", "draw", 1.0, 3)
    relay = relay_of(models, Turns(3), samples=2)
    ours, plain = (relay.generate(prompts(), policy) for policy in (switcher, _Plainly(switcher)))
    np.testing.assert_array_equal(ours.authors, plain.authors)


def test_marked_text_is_read_once(models: dict[str, Any], asking: Asking) -> None:
    """Tokens counted again from what was asked: each row's marked text, the question at every border, prompts once."""
    switcher = AskedSwitcher(loud(), asking, ROOM, "digest")
    relay = relay_of(models, Turns(3))
    starts = [Start(prompt, sample) for prompt in prompts() for sample in range(4)]
    responses, cost = relay.run(starts, switcher, 5, whole=4)
    wanted = sum(map(len, prompts()))
    for one in responses:
        last = one.free[-1]
        asked = asking.asked(Start(one.start.prompt, 0, tuple(one.tokens[:last]), tuple(one.authors[:last])))
        wanted += len(asked) - len(one.start.prompt) - len(asking.question)
        wanted += len(one.free) * len(asking.question)
    # The question and a mark may begin with the same token, which is kept then.
    assert common(asking.question, asking.begins[0]) == 0
    assert cost.switcher == wanted


def test_it_names_a_candidate_whatever_it_would_rather_say(models: dict[str, Any], asking: Asking) -> None:
    model = loud()
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.fill_(100.0)
        head.bias[list(asking.digits)] = torch.tensor([-1e3, 0.0, -1e3])
    model.lm_head = head
    found = relay_of(models, Turns(3)).generate(prompts(), AskedSwitcher(model, asking, ROOM, "digest"))
    assert set(found.authors[found.authors >= 0].tolist()) == {1}


def test_what_it_cannot_read_is_refused_before_anything_is_written(models: dict[str, Any]) -> None:
    asking = Asking.of(pico_tokenizer(), 3, 1)  # 14 segments with 32 marks each
    prompt = prompts()[0]
    assert asking.longest(Start(prompt, 0), ROOM) > 512
    relay, switcher = relay_of(models, Turns(1)), AskedSwitcher(loud(), asking, ROOM, "digest")
    with pytest.raises(ConfigError, match="wanted 512, its context"):
        relay.generate([prompt], switcher)
    short = Start(prompt, 0, (5,) * ROOM, (0,) * ROOM)
    with pytest.raises(ConfigError, match="wanted 512"):
        switcher.begin([Response(short, list(short.tokens), list(short.authors))])


def test_probabilities_that_are_not_numbers(models: dict[str, Any], asking: Asking) -> None:
    model = loud()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="switcher: its probabilities are not numbers"):
        relay_of(models, Turns(3)).generate(prompts(), AskedSwitcher(model, asking, ROOM, "digest"))


def test_its_key_names_what_it_depends_on(asking: Asking) -> None:
    model = loud()
    keys = [
        json.dumps(AskedSwitcher(model, each, ROOM, digest, choice, top_p, seed).key)
        for each, digest, choice, top_p, seed in (
            (asking, "a", "best", 1.0, 0),
            (asking, "b", "best", 1.0, 0),
            (asking, "a", "draw", 1.0, 0),
            (asking, "a", "draw", 0.5, 0),
            (asking, "a", "draw", 0.5, 1),
            (Asking.of(pico_tokenizer(), 3, 4), "a", "best", 1.0, 0),
            (Asking.of(pico_tokenizer(), 2, 3), "a", "best", 1.0, 0),
        )
    ]
    assert len(set(keys)) == len(keys)


def test_padding_and_order_do_not_matter(asking: Asking) -> None:
    model, (starts, _, _) = loud(), toy(12)
    texts = [asking.asked(start) for start in starts]
    assert len(set(map(len, texts))) > 2
    with torch.no_grad():
        every = [model(input_ids=torch.tensor([text])).logits[0, -1, list(asking.digits)] for text in texts]
    for rows in (1, 5, 64):
        found = torch.from_numpy(asked_logits(model, asking, texts, batch_rows=rows))
        torch.testing.assert_close(found, torch.stack(every).double(), atol=2e-4, rtol=1e-5)


# How it learns


def toy(rows: int = 96) -> tuple[list[Start], list[int], list[int]]:
    """Who is next is told by the last token; two rows of every question."""
    rng = np.random.default_rng(0)
    first = pico_tokenizer()("a", add_special_tokens=False)["input_ids"][0]
    starts, labels = [], []
    for row in range(rows):
        label = int(rng.integers(3))
        rest = rng.integers(first + 5, first + 26, size=2).tolist()
        author = int(rng.integers(3))
        prompt = (5, 6, 7, 8, 9)[: 3 + row % 3]
        starts.append(Start(prompt, row, (*rest, first + label), (author,) * 3))
        labels.append(label)
    return starts, labels, [row // 2 for row in range(rows)]


@pytest.fixture(scope="module")
def learned(asking: Asking) -> tuple[Lora, list[tuple[int, int, Epoch | None]]]:
    told: list[tuple[int, int, Epoch | None]] = []
    return train_lora(loud(), asking, *toy(), FAST, watch=lambda *step: told.append(step)), told


def merged(model: Any, lora: Lora, folder: Path) -> Any:
    """The base saved, the adapter beside it, and both loaded again without peft."""
    model.save_pretrained(folder / "base")
    (folder / "adapter").mkdir()
    lora.save(folder / "adapter")
    return load_switcher(folder / "base", folder / "adapter")


def test_it_learns(learned: tuple[Lora, Any], asking: Asking, tmp_path: Path) -> None:
    lora, told = learned
    starts, labels, groups = toy()
    texts = [asking.asked(start) for start in starts]
    before = asked_logits(loud(), asking, texts).argmax(axis=1)
    after = asked_logits(merged(loud(), lora, tmp_path), asking, texts).argmax(axis=1)
    assert np.mean(before == labels) < 0.6
    assert np.mean(after == labels) > 0.9
    assert [epoch.number for epoch in lora.epochs] == list(range(1, 13))
    assert lora.epochs[-1].loss < 0.3 < np.log(3) < lora.epochs[0].loss + 0.2
    assert len(lora.held) == 5, "a tenth of 48 questions"
    rest = np.isin(groups, lora.held)
    assert rest.sum() == 10
    assert lora.epochs[-1].held_accuracy == pytest.approx(np.mean(after[rest] == np.array(labels)[rest]))
    logits = torch.from_numpy(asked_logits(load_switcher(tmp_path / "base"), asking, texts))
    assert np.mean(logits.argmax(dim=1).numpy() == before) == 1.0, "without an adapter it is the base"
    assert [done for done, _, _ in told] == list(range(1, 73))
    assert {steps for _, steps, _ in told} == {72}
    assert tuple(epoch for _, _, epoch in told if epoch is not None) == lora.epochs


def test_held_out_numbers_are_cross_entropy_and_accuracy(asking: Asking, tmp_path: Path) -> None:
    """Without dropout, as it will choose."""
    starts, labels, groups = toy(32)
    options = LoraOptions(rank=8, alpha=16, dropout=0.5, rate=1e-2, epochs=3, batch=8, held=0.3)
    lora = train_lora(loud(), asking, starts, labels, groups, options)
    rows = [row for row, group in enumerate(groups) if group in lora.held]
    assert len(rows) == 10
    logits = asked_logits(
        merged(loud(), lora, tmp_path), asking, [asking.asked(starts[row]) for row in rows], batch_rows=3
    )
    wanted = torch.tensor(labels)[rows]
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), wanted)
    assert lora.epochs[-1].held_loss == pytest.approx(float(loss), rel=1e-3)
    assert lora.epochs[-1].held_accuracy == np.mean(logits.argmax(axis=1) == wanted.numpy())


def test_some_questions_are_held_out_but_never_all(asking: Asking) -> None:
    starts, labels, groups = toy(8)
    held = {}
    for share, seed in ((0.01, 0), (0.25, 0), (0.25, 1), (0.25, 2), (0.99, 0)):
        options = LoraOptions(rank=1, epochs=1, held=share, seed=seed)
        held[share, seed] = train_lora(loud(), asking, starts, labels, groups, options).held
    assert [len(held[share, 0]) for share in (0.01, 0.25, 0.99)] == [1, 1, 3]
    assert len({held[0.25, seed] for seed in (0, 1, 2)}) > 1
    assert set().union(*held.values()) <= set(groups)


@pytest.mark.filterwarnings("ignore:`is_grad")
def test_training_is_what_is_published(asking: Asking) -> None:
    """Written down again: AdamW, warm-up and cosine, clipped gradients, the loss of the numbers alone; row by row."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    starts, labels, groups = toy(20)
    options = LoraOptions(
        rank=3, alpha=5, dropout=0.0, rate=4e-3, warmup=0.3, epochs=3, batch=7, held=0.2, seed=3
    )
    model = loud()
    model.name_or_path = "/somebodys/folder"
    lora = train_lora(model, asking, starts, labels, groups, options)
    assert (lora.config["r"], lora.config["lora_alpha"], lora.config["lora_dropout"]) == (3, 5, 0.0)
    assert lora.config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert lora.config["base_model_name_or_path"] is None

    base = loud()
    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=list(options.targets), task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0)
    kept = np.array([row for row, group in enumerate(groups) if group not in lora.held])
    assert len(kept) == 16
    rates = [1 / 3, 2 / 3, 1.0] + [0.5 * (1 + np.cos(np.pi * at / 6)) for at in range(6)]
    losses: list[float] = []
    for step, rate in enumerate(rates):
        epoch, first = step // 3 + 1, step % 3 * 7
        order = kept[np.random.default_rng([3, 0, epoch]).permutation(16)]
        rows = order[first : first + 7]
        each = []
        for row in rows:
            ids = torch.tensor([asking.asked(starts[row])])
            logits = model(input_ids=ids).logits[0, -1, list(asking.digits)]
            each.append(-logits.log_softmax(0)[labels[row]])
        losses += [float(loss.detach()) for loss in each]
        optimizer.zero_grad()
        torch.stack(each).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = 4e-3 * rate
        optimizer.step()
    for name, tensor in get_peft_model_state_dict(model).items():
        # Adam makes much of a gradient that is almost nothing, and its sign is then one of rounding.
        apart = (lora.tensors[name] - tensor).abs()
        assert float(apart.mean()) < 2e-5
    means = [np.mean(losses[at : at + 16]) for at in (0, 16, 32)]
    assert [epoch.loss for epoch in lora.epochs] == pytest.approx(means, abs=1e-4)


def test_dropout_is_on_in_training(asking: Asking) -> None:
    def trained(share: float) -> Lora:
        model, modes = loud(), []
        options = LoraOptions(rank=4, dropout=share, rate=1e-2, batch=4, epochs=2, held=0.25)
        lora = train_lora(
            model,
            asking,
            *toy(16),
            options,
            watch=lambda done, of, epoch: modes.append((model.training, epoch)),
        )
        assert [training for training, epoch in modes if epoch is None] == [True] * 4, "in every epoch"
        return lora

    with_, without = trained(0.5), trained(0.0)
    assert abs(with_.epochs[-1].loss - without.epochs[-1].loss) > 1e-3
    assert with_.config["lora_dropout"] == 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:`is_grad")
def test_what_is_saved_is_what_peft_reads(
    learned: tuple[Lora, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setenv("MERGEFRONT_CACHE", str(tmp_path / "cache"))
    base, adapter = save_pico(tmp_path / "base", seed=7, dtype=dtype), tmp_path / "adapter"
    adapter.mkdir()
    learned[0].save(adapter)
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert str(tmp_path) not in (adapter / "adapter_config.json").read_text(encoding="utf-8")
    ours = load_switcher(base, adapter, getattr(torch, dtype)).state_dict()
    cached = AutoModelForCausalLM.from_pretrained(merged_adapter(adapter, Checkpoint.open(base))).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(base)
    theirs = PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    allowed = 1e-6 if dtype == "float32" else 2e-2
    changed = 0
    for name, tensor in load_switcher(base, None, getattr(torch, dtype)).state_dict().items():
        torch.testing.assert_close(ours[name], cached[name], rtol=0, atol=0)
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=0, atol=allowed)
        changed += not torch.equal(ours[name], tensor)
    assert changed == 8, "four matrices in each of two layers"


def test_training_leaves_the_model_as_it_was_and_can_be_repeated(asking: Asking) -> None:
    model = loud()
    options = LoraOptions(rank=4, rate=1e-2, epochs=2, batch=10, held=0.0, seed=3)  # dropout on
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    one, again = (train_lora(model, asking, *toy(24), options) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert one.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in one.tensors.items())
    assert (one.epochs, one.config) == (again.epochs, again.config)
    assert (one.held, one.epochs[0].held_loss, one.epochs[0].held_accuracy) == ((), None, None)
    other = train_lora(model, asking, *toy(24), LoraOptions(**{**options.__dict__, "seed": 4}))
    assert any(not torch.equal(other.tensors[name], tensor) for name, tensor in one.tensors.items())


def test_rows_in_memory_change_rounding_alone(asking: Asking) -> None:
    """Gradients of a step are those of all its rows, however they are cut up."""
    options = LoraOptions(rank=4, dropout=0.0, rate=1e-3, epochs=1, batch=10, held=0.25)
    whole, cut = (train_lora(loud(), asking, *toy(24), options, batch_rows=rows) for rows in (64, 3))
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(cut.tensors[name], tensor, atol=1e-4, rtol=0)
    assert cut.held == whole.held
    assert cut.epochs[0].loss == pytest.approx(whole.epochs[0].loss, abs=1e-4)


def test_what_cannot_be_learned_from(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, labels, groups = toy(8)
    small = LoraOptions(rank=2, epochs=1)
    for wrong, said in (
        ((starts, labels[:-1], groups), "labels of shape"),
        ((starts, [*labels[:-1], 3], groups), "none of the candidates, 0 to 2"),
        ((starts, [*labels[:-1], -1], groups), "none of the candidates"),
    ):
        with pytest.raises(EvaluationError, match=said):
            train_lora(loud(), asking, *wrong, small)
    for rows, options, said in (
        ((starts, [1] * 8, groups), small, "8 rows with 1 different labels"),
        (([], [], []), small, "0 rows with 0 different"),
        ((starts, labels, [0] * 8), small, "held: all rows are of one question"),
        (([Start((5,) * 500, 0), *starts[1:]], labels, groups), small, "wanted 512 at most"),
        (
            (starts, labels, groups),
            LoraOptions(targets=("q_proj", "qkv")),
            r"lora\.targets: found 'qkv'.*q_proj",
        ),
        ((starts, labels, groups), LoraOptions(targets=("lm_head",)), r"lora\.targets: found 'lm_head'"),
    ):
        with pytest.raises(ConfigError, match=said):
            train_lora(loud(), asking, *rows, options)
    broken = loud()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match=r"not a number\. Lower switching\.lora\.rate"):
        train_lora(broken, asking, starts, labels, groups, small)
    assert not any("lora" in name for name, _ in broken.named_modules()), "taken out after an error, too"
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MergefrontError, match=r"needs peft: pip install 'mergefront\[switch\]'") as caught:
        train_lora(loud(), asking, starts, labels, groups, small)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0),
        ("rank", 4.0),
        ("alpha", 0.0),
        ("alpha", float("inf")),
        ("dropout", 1.0),
        ("rate", float("nan")),
        ("rate", True),
        ("warmup", 1.5),
        ("epochs", 0),
        ("batch", -1),
        ("held", -0.1),
        ("seed", -1),
        ("targets", ()),
        ("targets", ("q_proj", "q_proj")),
        ("targets", "q_proj"),
    ],
)
def test_options_that_make_no_sense(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^switching\.lora\.{name}: found .*\(wanted .*\)\.$"):
        LoraOptions(**{name: value})
