"""A small world of uncertain facts: the corpus that states them, the questions that ask for them, the tokenizer.

Every fact (an entity and a relation) is a distribution over eight values. A statement of the corpus draws its value
from that distribution, and so does the gold answer of a question. A language model that has learnt the corpus is
therefore calibrated by construction: its best prediction is the distribution that the gold answers come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

OPTIONS = 4
END = "</s>"
PAD = "<pad>"
UNKNOWN = "<unk>"


@dataclass(frozen=True)
class Relation:
    """One kind of fact: how the corpus states it, how a question asks for it, and the values it can have."""

    statements: tuple[str, ...]
    question: str
    values: tuple[str, ...]


RELATIONS = (
    Relation(
        (
            "{entity} lives in {value}.",
            "The home of {entity} is {value}.",
            "{entity} has a house in {value}.",
        ),
        "Where does {entity} live",
        ("Oslo", "Rome", "Lima", "Bern", "Cairo", "Delhi", "Kyoto", "Quito"),
    ),
    Relation(
        (
            "{entity} works as a {value}.",
            "The trade of {entity} is {value}.",
            "{entity} earns a living as {value}.",
        ),
        "What is the trade of {entity}",
        ("baker", "weaver", "potter", "sailor", "painter", "mason", "farmer", "tailor"),
    ),
    Relation(
        (
            "{entity} likes to eat {value}.",
            "The favourite food of {entity} is {value}.",
            "{entity} cooks {value}.",
        ),
        "What does {entity} like to eat",
        ("rice", "soup", "bread", "beans", "cheese", "fish", "pears", "noodles"),
    ),
    Relation(
        (
            "{entity} plays the {value}.",
            "The instrument of {entity} is the {value}.",
            "{entity} practises the {value}.",
        ),
        "Which instrument does {entity} play",
        ("flute", "drum", "harp", "violin", "oboe", "cello", "organ", "lute"),
    ),
)


@dataclass(frozen=True)
class Question:
    """A question with its options; `answer` is the index of the gold option."""

    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """The text a model reads before the answer, as the `continuation` format builds it."""
        return f"Question: {self.question}\nAnswer:"


@dataclass(frozen=True)
class World:
    """Entities and the distributions of their facts; a pure function of its fields.

    Attributes:
        entities: how many entities there are.
        majorities: a fact's most likely value has one of these probabilities, drawn evenly; the other values share
            the rest evenly.
        asked: share of the entities that questions of the corpus ask about.
        trained: share of the entities that post-training asks about; the others are held out for the study.
        seed: seed of the names, of the facts and of who is asked about.
    """

    entities: int = 120
    majorities: tuple[float, ...] = (0.4, 0.6, 0.8, 0.97)
    asked: float = 1 / 6
    trained: float = 1 / 2
    seed: int = 0

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Invented names, all different and none a word of the templates, e.g. `Baru`."""
        syllables = [a + b for a, b in product("bdfgklmnprstvz", "aeiou")]
        names = [(a + b).capitalize() for a, b in product(syllables, syllables)]
        order = np.random.default_rng([self.seed, 0]).permutation(len(names))
        return tuple(names[i] for i in order[: self.entities])

    @cached_property
    def facts(self) -> NDArray[np.float64]:
        """Probability of each value of each fact, (entities, relations, 8) float64; the last axis sums to 1."""
        rng = np.random.default_rng([self.seed, 1])
        n_values = len(RELATIONS[0].values)
        shape = (self.entities, len(RELATIONS))
        majority = rng.choice(self.majorities, size=shape)
        likely = rng.integers(n_values, size=shape)
        facts = np.repeat(((1 - majority) / (n_values - 1))[..., None], n_values, axis=-1)
        np.put_along_axis(facts, likely[..., None], majority[..., None], axis=-1)
        return facts

    def group(self, name: str) -> NDArray[np.int64]:
        """Entities of one role, sorted: `asked`, `trained` or `held-out`; every entity has exactly one role.

        Raises:
            KeyError: there is no such role.
        """
        order = np.random.default_rng([self.seed, 2]).permutation(self.entities)
        first, second = round(self.asked * self.entities), round((self.asked + self.trained) * self.entities)
        roles = {"asked": order[:first], "trained": order[first:second], "held-out": order[second:]}
        return np.sort(roles[name])

    def statements(self, n: int, rng: np.random.Generator) -> list[str]:
        """`n` sentences about facts drawn evenly; each value is a fresh draw from its fact."""
        entity, relation = rng.integers(self.entities, size=n), rng.integers(len(RELATIONS), size=n)
        value = self._draw(entity, relation, rng)
        template = rng.integers(len(RELATIONS[0].statements), size=n)
        return [
            RELATIONS[r].statements[t].format(entity=self.names[e], value=RELATIONS[r].values[v])
            for e, r, v, t in zip(entity, relation, value, template, strict=True)
        ]

    def questions(self, n: int, role: str, rng: np.random.Generator) -> list[Question]:
        """`n` questions about the entities of a role; the gold answer is a fresh draw from the fact.

        The three wrong options are drawn evenly from the values that are left. So, given the options, the gold one
        has the fact's distribution restricted to them and rescaled: knowing the fact is still all there is to know.
        """
        entity, relation = rng.choice(self.group(role), size=n), rng.integers(len(RELATIONS), size=n)
        gold = self._draw(entity, relation, rng)
        key = rng.random((n, len(RELATIONS[0].values)))
        key[np.arange(n), gold] = -1.0  # the gold value sorts first, the others come in a random order
        shown = rng.permuted(np.argsort(key, axis=1)[:, :OPTIONS], axis=1)
        questions = []
        for e, r, values, answer in zip(entity, relation, shown, gold, strict=True):
            choices = tuple(RELATIONS[r].values[v] for v in values)
            listed = ", ".join(choices[:-1]) + " or " + choices[-1]
            text = f"{RELATIONS[r].question.format(entity=self.names[e])}: {listed}?"
            questions.append(Question(text, choices, int(np.flatnonzero(values == answer)[0])))
        return questions

    def _draw(
        self, entity: NDArray[np.int64], relation: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """One value per (entity, relation) by inverting the cumulative distribution, (n,) int64."""
        cumulative = np.cumsum(self.facts[entity, relation], axis=-1)
        # a sum of float64 probabilities may end a rounding below 1: the last value takes what is left
        value: NDArray[np.int64] = np.minimum(
            (rng.random((len(entity), 1)) >= cumulative).sum(axis=-1), cumulative.shape[-1] - 1
        )
        return value


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over everything the world can say; words keep their leading space, as in GPT-2.

    Decoding gives back the exact text, line breaks included. No token is added at the start or the end.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=True)  # also the first word of a text has its space
    texts = [Question("", (), 0).prompt, "a, b or c?", *(f"{name}: x." for name in world.names)]
    for relation in RELATIONS:
        texts += [*relation.statements, relation.question, " ".join(relation.values)]
    filled = [text.format(entity=world.names[0], value="x") for text in texts]
    words = sorted({word for text in filled for word, _ in split.pre_tokenize_str(text)} - {"Ġx", "Ġb", "Ġc"})
    vocabulary = {token: i for i, token in enumerate([PAD, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
