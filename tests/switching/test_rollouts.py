"""What is tried to learn who should write next: traces, scores, and that nothing of it is lost or computed twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from objectives.generation.sampler import AnswerSampler, Decoding, encode_prompts
from objectives.generation.stopping import stopping
from objectives.questions.matching import Rule, get_rule
from search.config.switching import Turns
from search.errors import ConfigError
from search.storage.pieces import PieceStore
from search.switching.classifier import fit_classifier
from search.switching.classifier_switcher import ClassifierSwitcher, features_of
from search.switching.labels import label
from search.switching.policies import Always, AtRandom, ByPrompt
from search.switching.reader import PlainReader
from search.switching.relay import Relay
from search.switching.rollouts import Asked, RolloutOptions, Rollouts, branch_seed, derived, roll
from search.switching.router import scored, train_router
from tests.pico import pico_model, pico_tokenizer
from tests.rollout_process import QUESTIONS, rolled

NAMES = ("pre", "sft", "dpo")
ROOM = 6


def _vowels(answer: str) -> str:
    return "yes" if any(letter in "aeiouAEIOU" for letter in answer) else "no"


# Random models are right by chance: an answer with a vowel is, or one without, as the question wants it.
VOWELS = Rule("exact", _vowels, lambda key, accepted: key in accepted)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Models with opinions: the first likes vowels, the second does without."""
    made = {name: pico_model("llama", seed) for seed, name in enumerate(NAMES)}
    vowels = pico_tokenizer()("aeiouAEIOU", add_special_tokens=False)["input_ids"]
    for model, liking in zip(made.values(), (3.0, -3.0, 0.0), strict=True):
        head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
        with torch.no_grad():
            head.weight.copy_(model.lm_head.weight)
            head.bias.zero_()
            head.bias[vowels] = liking
        model.lm_head = head
    return made


def relay_of(models: dict[str, Any], segment: int, samples: int = 1, seed: int = 0, **turns: Any) -> Relay:
    tokenizer = pico_tokenizer()
    decoding = Decoding(samples, 1.0, 1.0, ROOM, seed)
    ends = stopping(tokenizer, chat_template=False)
    return Relay(models, tokenizer, Turns(segment, **turns), ends, decoding)


def asked(n: int, rule: Rule = VOWELS) -> list[Asked]:
    texts = [f"{'with' if number % 2 else '#'} {number}?" for number in range(n)]
    prompts = encode_prompts(texts, pico_tokenizer())
    return [
        Asked(text, prompt, ("yes" if text[0] == "w" else "no",), rule)
        for text, prompt in zip(texts, prompts, strict=True)
    ]


def test_traces_are_cut_where_an_author_was_chosen(models: dict[str, Any], tmp_path: Path) -> None:
    options = RolloutOptions(traces=3, completions=2)
    found = roll(relay_of(models, 2), asked(20), options, PieceStore(tmp_path), {})
    assert found.scores.shape == (60, 3)
    assert found.question.tolist() == [i for i in range(20) for _ in range(3)]
    lengths = [len(start.tokens) for start in found.starts]
    assert set(lengths) == {0, 2, 4}
    assert all(len(start.authors) == len(start.tokens) for start in found.starts)
    authors = {start.authors[place] for start in found.starts for place in range(0, len(start.tokens), 2)}
    assert authors == {0, 1, 2}
    assert ((found.scores >= 0) & (found.scores <= 1) & (found.scores * 2 % 1 == 0)).all()
    assert found.cost.total > 0


def test_a_score_is_the_mean_over_completions(models: dict[str, Any], tmp_path: Path) -> None:
    """Counted again by hand for one question: every branch and completion drawn with its own numbers."""
    relay, (one,) = relay_of(models, 2), asked(4)[3:]
    options = RolloutOptions(branches=2, completions=3, seed=7)
    found = roll(relay, [one], options, PieceStore(tmp_path), {})
    (start,) = found.starts
    for author in range(3):
        scores = []
        for branch in range(2):
            begun = type(start)(one.prompt, branch, start.tokens, start.authors)
            (segment,), _ = relay.run([begun], Always(author), branch_seed(options), segments=1)
            for completion in range(3):
                if segment.finish is None:
                    rest = type(start)(
                        one.prompt, branch * 3 + completion, tuple(segment.tokens), tuple(segment.authors)
                    )
                    seeds = derived(7, "completion authors"), derived(7, "completion")
                    (end,), _ = relay.run([rest], AtRandom(3, seeds[0]), seeds[1])
                else:
                    end = segment
                text = relay.tokenizer.decode(end.tokens, skip_special_tokens=True)
                scores.append(float(_vowels(text) == one.accepted[0]))
        assert found.scores[0, author] == pytest.approx(np.mean(scores))


def test_nothing_is_computed_twice(models: dict[str, Any], tmp_path: Path) -> None:
    options, store = RolloutOptions(completions=2), PieceStore(tmp_path)
    first = roll(relay_of(models, 2), asked(20), options, store, {"who": 1})
    again = roll(relay_of(models, 2), asked(20), options, store, {"who": 1})
    assert (first.computed, first.reused, again.computed, again.reused) == (20, 0, 0, 20)
    assert_equal(first, again)
    assert again.cost.total == 0
    other = roll(relay_of(models, 2), asked(20), options, store, {"who": 2})
    longer = roll(relay_of(models, 3), asked(20), options, store, {"who": 1})
    assert (other.reused, longer.reused) == (0, 0)
    piece = next(tmp_path.glob("rollouts-*"))
    piece.write_bytes(piece.read_bytes()[:-9])
    mended = roll(relay_of(models, 2), asked(20), options, store, {"who": 1})
    assert_equal(first, mended)


@pytest.mark.slow
def test_a_killed_job_goes_on_to_the_same_labels(tmp_path: Path) -> None:
    whole = rolled(tmp_path / "whole")
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.rollout_process", str(folder), "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().split() == ["16", "computed"]
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    rest = rolled(folder)
    assert (rest.reused, rest.computed) == (16, QUESTIONS - 16)
    assert_equal(whole, rest)
    ours, theirs = label(whole.scores, 0.1), label(rest.scores, 0.1)
    assert ours.label.tolist() == theirs.label.tolist()
    assert ours.entropy == theirs.entropy


def test_a_segment_as_long_as_the_answer_is_routing(models: dict[str, Any], tmp_path: Path) -> None:
    """Labels, choices and answers are those of the router, which never saw the relay: exactly."""
    questions, samples = asked(60), 5
    options = RolloutOptions(branches=samples, completions=4, seed=3)
    relay = relay_of(models, ROOM, samples=2, seed=9)
    found = roll(relay, questions, options, PieceStore(tmp_path), {})
    assert all(start.tokens == () for start in found.starts)

    texts = [one.key for one in questions]
    alone = {}
    for name, model in models.items():
        sampler = AnswerSampler(
            model, pico_tokenizer(), texts, Decoding(samples, 1.0, 1.0, ROOM, branch_seed(options))
        )
        answers = sampler.texts(sampler.generate())
        alone[name] = scored(answers, [one.accepted for one in questions], [VOWELS] * len(questions))
    np.testing.assert_allclose(found.scores, np.column_stack([one.mean(axis=1) for one in alone.values()]))

    seen = features_of(relay, found.starts, host=2)
    width = seen.shape[1] - 5
    prompts = [one.prompt for one in questions]
    plain = PlainReader(models["dpo"], prompts, 0)
    plain.read(np.arange(len(prompts)), prompts)
    np.testing.assert_allclose(seen[:, :width], plain.hidden.numpy(), atol=1e-5)
    router = train_router(alone, seen[:, :width])
    labels = label(found.scores)
    assert labels.label.tolist() == router.labels.label.tolist()
    switcher = ClassifierSwitcher(fit_classifier(seen[labels.kept], labels.label[labels.kept], 3), 2, 3, ROOM)
    routed = dict(zip(prompts, router.choose(seen[:, :width]).tolist(), strict=True))
    assert len(set(routed.values())) > 1, "the router must have something to choose"
    ours, theirs = relay.generate(prompts, switcher), relay.generate(prompts, ByPrompt(routed))
    np.testing.assert_array_equal(ours.answers.tokens, theirs.answers.tokens)
    np.testing.assert_array_equal(ours.authors, theirs.authors)


def test_a_switcher_reads_what_its_host_would_read_anyway(models: dict[str, Any], tmp_path: Path) -> None:
    relay, questions = relay_of(models, 2, samples=3), asked(12)
    found = roll(relay, questions, RolloutOptions(completions=4), PieceStore(tmp_path), {})
    kept = label(found.scores)
    host = 1
    classifier = fit_classifier(
        features_of(relay, found.starts, host)[kept.kept],
        kept.label[kept.kept],
        3,
        penalties=(1.0,),
    )
    prompts = [one.prompt for one in questions]
    best = relay.generate(prompts, ClassifierSwitcher(classifier, host, 3, ROOM))
    drawn = [
        relay.generate(prompts, ClassifierSwitcher(classifier, host, 3, ROOM, "draw", 1.0, seed))
        for seed in (0, 0, 1)
    ]
    assert (drawn[0].authors == drawn[1].authors).all()
    assert (drawn[0].authors != drawn[2].authors).any()
    nucleus = relay.generate(prompts, ClassifierSwitcher(classifier, host, 3, ROOM, "draw", 1e-9))
    np.testing.assert_array_equal(nucleus.authors, best.authors)
    # A host that writes everything read nothing in vain but what follows its last segment.
    always = np.zeros((3, classifier.weight.shape[1]))
    bias = np.array([-np.inf, 0.0, -np.inf])
    one = ClassifierSwitcher(type(classifier)(always, bias, classifier.mean, classifier.scale), host, 3, ROOM)
    alone = relay.generate(prompts, one)
    np.testing.assert_array_equal(alone.answers.tokens, relay.generate(prompts, Always(host)).answers.tokens)
    assert alone.cost.switcher == 0
    assert alone.cost.total == alone.cost.single
    assert best.cost.switcher > 0


def test_forced_ends_are_no_choice(models: dict[str, Any], tmp_path: Path) -> None:
    relay = relay_of(models, 2, first="dpo", last="dpo")
    found = roll(relay, asked(20), RolloutOptions(completions=2), PieceStore(tmp_path), {})
    assert found.starts, "between the two there is a choice"
    assert {start.authors for start in found.starts} <= {(2, 2)}


def test_numbers_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match=r"rollouts\.completions: found 0"):
        RolloutOptions(completions=0)
    with pytest.raises(ConfigError, match=r"cut: found 0.9 to 0.1"):
        RolloutOptions(first=0.9, last=0.1)


def test_the_score_of_f1_is_graded() -> None:
    assert get_rule("f1").score("red house", ("the red door", "blue")) == 0.5
    assert get_rule("number").score("it is 7.0", ("7",)) == 1.0
    assert get_rule("exact").score("", ("",)) == 0.0


def assert_equal(one: Rollouts, other: Rollouts) -> None:
    np.testing.assert_array_equal(one.scores, other.scores)
    np.testing.assert_array_equal(one.question, other.question)
    assert one.starts == other.starts
