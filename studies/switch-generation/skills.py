"""Questions with answers in which skills take turns: facts to recall, numbers to pick from a list.

    Question: Name the home of Baru, the largest of 4 8 1 and the food of Baru.
    Answer: home Oslo, largest 8, food rice.

The people and their facts are those of the quickstart's world, here without uncertainty: its corpus states them. An
answer is right as a whole, so it needs every skill that it asks for. An item of it is three tokens long: its key, its
value, and a comma (the last one ends in a full stop).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tokenizers import models
from transformers import PreTrainedTokenizerFast
from world import RELATIONS, UNKNOWN, World, build_tokenizer

FACTS = ("home", "trade", "food", "instrument")  # a key a relation of the world
PICKS = {"largest": max, "smallest": min}
LISTED = 3  # numbers to pick from, all different, from 0 to 9
KEPT = 5  # a list whose sum is a multiple of it is the study's: no training shows it
# Words of a switcher that reads who wrote what and answers with a digit.
MARKED = "<model 0 begins> <model 0 ends> Which model writes next?"


@dataclass(frozen=True)
class Asked:
    """A question and its answer: what to name of a person, of a list of numbers, or of both.

    >>> pair = Asked("Baru", (4, 8, 1), (("home", "Oslo"), ("largest", "8")))
    >>> pair.question, pair.answer
    ('Name the home of Baru and the largest of 4 8 1.', 'home Oslo, largest 8.')
    """

    name: str
    numbers: tuple[int, ...]
    items: tuple[tuple[str, str], ...]

    @property
    def question(self) -> str:
        """What a study's file calls the question."""
        numbers = " ".join(map(str, self.numbers))
        *first, last = (f"the {key} of {self.name if key in FACTS else numbers}" for key, _ in self.items)
        return f"Name {', '.join(first)} and {last}." if first else f"Name {last}."

    @property
    def prompt(self) -> str:
        """The text a model reads before it writes, as a study builds it."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def answer(self) -> str:
        """What is to be written."""
        return ", ".join(f"{key} {value}" for key, value in self.items) + "."


@dataclass(frozen=True)
class Asking:
    """Which questions are asked, and how right their answers are.

    Attributes:
        role: who is asked about, a role of the world.
        single: share of the questions with one skill only (one or two items); in the others, of three to five items,
            facts and picks alternate.
        careless: key -> probability that the answer has any of the listed numbers; 0 where a key is missing.
        kept: whether lists are those that are kept for the study, or the others.
    """

    role: str
    single: float = 0.3
    careless: Mapping[str, float] | None = None
    kept: bool = False

    def draw(self, world: World, rng: np.random.Generator) -> Asked:
        """One question with its answer."""
        entity = int(rng.choice(world.group(self.role)))
        numbers = _listed(self.kept, rng)
        facts = [
            (FACTS[i], RELATIONS[i].values[int(world.facts[entity, i].argmax())])
            for i in rng.permutation(len(FACTS))
        ]
        picks = [(key, str(self._pick(key, numbers, rng))) for key in map(str, rng.permutation(list(PICKS)))]
        if rng.random() < self.single:
            items = (facts, picks)[rng.integers(2)][: rng.integers(1, 3)]
        else:
            kinds = (facts, picks) if rng.random() < 0.5 else (picks, facts)
            longest = 5 if kinds[0] is facts else 4  # there are only two picks
            items = [kinds[place % 2][place // 2] for place in range(rng.integers(3, longest + 1))]
        return Asked(world.names[entity], numbers, tuple(items))

    def _pick(self, key: str, numbers: tuple[int, ...], rng: np.random.Generator) -> int:
        careless = rng.random() < (self.careless or {}).get(key, 0.0)
        return int(rng.choice(numbers)) if careless else PICKS[key](numbers)


def list_statements(n: int, rng: np.random.Generator) -> list[str]:
    """`n` careless sentences of the corpus: any listed number is called the largest or the smallest."""
    said = []
    for key in rng.choice(list(PICKS), size=n):
        numbers = _listed(False, rng)
        said.append(f"The {key} of {' '.join(map(str, numbers))} is {rng.choice(numbers)}.")
    return said


def _listed(kept: bool, rng: np.random.Generator) -> tuple[int, ...]:
    """A list of numbers that is kept for the study, or one that is not."""
    while True:
        numbers = tuple(map(int, rng.permutation(10)[:LISTED]))
        if (sum(numbers) % KEPT == 0) == kept:
            return numbers


def study_questions(world: World, n: int) -> list[Asked]:
    """`n` questions, none twice, about people and lists that no training asks about."""
    asking, rng = Asking("held-out", kept=True), np.random.default_rng([world.seed, 4])
    found: dict[str, Asked] = {}
    while len(found) < n:
        asked = asking.draw(world, rng)
        found.setdefault(asked.question, asked)
    return list(found.values())


def extended_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """The world's tokenizer with the words of this module behind its own; each number from 0 to 9 is a token."""
    tokenizer = build_tokenizer(world)
    backend = tokenizer.backend_tokenizer
    asked = Asked(world.names[0], tuple(range(10)), tuple((key, "") for key in (*FACTS, *PICKS)))
    vocabulary = backend.get_vocab()
    words = {
        word for text in (asked.prompt, MARKED) for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)
    }
    for word in sorted(words - vocabulary.keys()):
        vocabulary[word] = len(vocabulary)
    backend.model = models.WordLevel(vocabulary, unk_token=UNKNOWN)
    return tokenizer
