"""Styled answers about the people of the quickstart's world: three axes of taste with two poles each.

    Tell me about Baru. Use expert words. Answer briefly. Be friendly.
    Happy to help, friend! Resides permanently in Oslo.

An answer states some of a person's four facts, in the style of a note. Its sentences use plain or expert words, it
states one fact or several, and it may open and close in a friendly or an unfriendly way. Who asks may say what is
wanted; the answerer of this world listens most of the time, which leaves something to learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from world import END, PAD, RELATIONS, UNKNOWN, World, build_tokenizer

# Axis by axis; the study's preferences and experts are called so.
AXES = (("plain", "expert"), ("concise", "exhaustive"), ("friendly", "unfriendly"))
POLES = tuple(pole for axis in AXES for pole in axis)
COMBINATIONS = tuple(product(*AXES))

WISHES = {
    "plain": "Use plain words.",
    "expert": "Use expert words.",
    "concise": "Answer briefly.",
    "exhaustive": "Answer in full.",
    "friendly": "Be friendly.",
    "unfriendly": "Be unfriendly.",
}
PROMPTS = ("Tell me about {}.", "Who is {}?", "Describe {}.", "What do you know about {}?")
SENTENCES = {  # a line a relation of the world
    "plain": ("Lives in {}.", "Works as a {}.", "Likes to eat {}.", "Plays the {}."),
    "expert": (
        "Resides permanently in {}.",
        "Professionally occupied as {}.",
        "Habitually consumes {}.",
        "Proficiently performs upon the {}.",
    ),
}
OPENINGS = {"friendly": "Happy to help, friend!", "unfriendly": "Stop bothering me."}
CLOSINGS = {"friendly": "What a lovely question!", "unfriendly": "Look it up yourself."}


@dataclass(frozen=True)
class Manners:
    """How people of this world answer.

    Attributes:
        spoken: probability that a prompt has wishes; then each axis has one with probability 0.8.
        heeded: probability that a wish is listened to, each wish by itself.
        neutral: probability of an answer without opening and closing, where no wish about style is heeded.
        closing: probability that an answer with an opening has its closing, too.
    """

    spoken: float = 2 / 3
    heeded: float = 0.85
    neutral: float = 0.5
    closing: float = 0.5


def prompt_texts(world: World, roles: Sequence[str]) -> list[str]:
    """Every way to ask about every person of these roles, without wishes."""
    people = sorted(entity for role in roles for entity in world.group(role))
    return [prompt.format(world.names[entity]) for entity in people for prompt in PROMPTS]


def wished(prompt: str, wishes: Sequence[str]) -> str:
    """The prompt with what is wished for behind it.

    >>> wished("Who is Baru?", ["concise", "friendly"])
    'Who is Baru? Answer briefly. Be friendly.'
    """
    return " ".join([prompt, *(WISHES[wish] for wish in wishes)])


def styled_answers(
    world: World, n: int, roles: Sequence[str], manners: Manners, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """`n` prompts about people of these roles, each with an answer; in some of them wishes are spoken."""
    people = np.concatenate([world.group(role) for role in roles])
    found = []
    for entity in rng.choice(people, size=n):
        wishes = [axis[rng.integers(2)] for axis in AXES if rng.random() < 0.8]
        spoken = wishes if rng.random() < manners.spoken else []
        heeded = [wish for wish in spoken if rng.random() < manners.heeded]
        prompt = PROMPTS[rng.integers(len(PROMPTS))].format(world.names[entity])
        found.append((wished(prompt, spoken), _answer(world, int(entity), heeded, manners, rng)))
    return found


def _answer(
    world: World, entity: int, wishes: Sequence[str], manners: Manners, rng: np.random.Generator
) -> str:
    """An answer that has the wished styles, and otherwise whatever the rng draws."""
    count = 1 if "concise" in wishes else len(RELATIONS) if "exhaustive" in wishes else rng.integers(1, 5)
    said = []
    for relation in rng.permutation(len(RELATIONS))[:count]:
        pole = next((wish for wish in wishes if wish in SENTENCES), AXES[0][rng.integers(2)])
        value = RELATIONS[relation].values[rng.choice(8, p=world.facts[entity, relation])]
        said.append(SENTENCES[pole][relation].format(value))
    style = next((wish for wish in wishes if wish in OPENINGS), None)
    if style is None and rng.random() >= manners.neutral:
        style = AXES[2][rng.integers(2)]
    if style is not None:
        said.insert(0, OPENINGS[style])
        if rng.random() < manners.closing:
            said.append(CLOSINGS[style])
    return " ".join(said)


def extended_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """The world's tokenizer with the words of this module behind its own, so that its ids keep their meaning."""
    known = build_tokenizer(world)
    split = pre_tokenizers.ByteLevel(add_prefix_space=True)
    texts = [*PROMPTS, *WISHES.values(), *OPENINGS.values(), *CLOSINGS.values()]
    texts += [sentence for pole in SENTENCES.values() for sentence in pole]
    filled = [text.format(world.names[0]) for text in texts]
    vocabulary = dict(known.get_vocab())
    words = {word for text in filled for word, _ in split.pre_tokenize_str(text)}
    for word in sorted(words - vocabulary.keys()):
        vocabulary[word] = len(vocabulary)
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = split
    backend.decoder = known.backend_tokenizer.decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
