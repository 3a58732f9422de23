"""A base that knows an old world, and experts that each learnt the news about some of its people.

The base reads the corpus of the quickstart's world and learns to answer questions about it. Then everybody's life
changes. Each expert is the base after supervised answers to questions about the news of its own people; it hears
nothing of the others'. All news are told in the same questions with the same values, in the same few layers, so the
experts get in each other's way. Embeddings and final norm stay as they are in the base, as under most adapters.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import transformers

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
sys.path.insert(0, str(QUICKSTART))

from train import Training, new_model, pretrain, supervise  # noqa: E402
from world import Question, World, build_tokenizer  # noqa: E402

SOURCES = (HERE / "experts.py", QUICKSTART / "train.py", QUICKSTART / "world.py")
GROUPS = ("north", "east", "south", "west")


@dataclass(frozen=True)
class Settings:
    """All that a family depends on, beside the sources. `seed` is that of the training; world and questions stay.

    Attributes:
        world: whose corpus the base reads.
        training: of the base (`pretrain_*`) and of the experts (`supervise_*`).
        questions: about each group's news; part of them to choose by, the others to report.
    """

    seed: int = 0
    world: World = field(
        default_factory=lambda: World(entities=120, majorities=(0.97,), asked=1.0, trained=0.0)
    )
    training: Training = field(
        default_factory=lambda: Training(
            pretrain_steps=350, questions=8, supervise_steps=150, supervise_rate=5e-4
        )
    )
    questions: int = 600


@dataclass(frozen=True)
class News(World):
    """New facts about some people of an old world. A question in `kept` is never asked in training.

    Attributes:
        known: the names of these people.
    """

    known: tuple[str, ...] = ()
    kept: frozenset[str] = frozenset()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Those of the old world."""
        return self.known

    def questions(self, n: int, role: str, rng: np.random.Generator) -> list[Question]:
        """As of any world, without those that are kept for the study."""
        found: list[Question] = []
        while len(found) < n:
            drawn = super().questions(n, role, rng)
            found += [question for question in drawn if question.question not in self.kept]
        return found[:n]


def news(settings: Settings, group: str) -> News:
    """What happened to a quarter of the people, and the questions about it that are kept for the study."""
    number = GROUPS.index(group)
    share = settings.world.entities // len(GROUPS)
    told = News(
        entities=share,
        majorities=settings.world.majorities,
        asked=0.0,
        trained=1.0,
        seed=1000 + number,
        known=settings.world.names[number * share : (number + 1) * share],
    )
    return dataclasses.replace(
        told, kept=frozenset(q.question for q in kept_questions(told, settings.questions))
    )


def kept_questions(told: News, n: int) -> list[Question]:
    """`n` questions about these news, no text twice."""
    rng = np.random.default_rng([told.seed, 3])
    found: dict[str, Question] = {}
    while len(found) < n:
        for question in World.questions(told, n, "trained", rng):
            found.setdefault(question.question, question)
    return list(found.values())[:n]


def training_texts(settings: Settings, group: str, n: int) -> list[str]:
    """Questions with their answers as the expert's training knew them, `n` of them."""
    rng = np.random.default_rng([settings.seed, 77, GROUPS.index(group)])
    return [f"{q.prompt} {q.choices[q.answer]}" for q in news(settings, group).questions(n, "trained", rng)]


def build(folder: Path, settings: Settings) -> float:
    """Trains base and experts of one seed at `folder`, unless they are there; returns the seconds it took, or 0.

    A folder holds `pre`, one folder for each of `GROUPS`, and `GROUP.jsonl` with its questions; it appears whole.
    """
    recipe = _digest(settings)
    stamp = folder / "stamp.json"
    if stamp.is_file() and json.loads(stamp.read_text())["recipe"] == recipe:
        return 0.0
    began = time.perf_counter()
    staging = folder.with_name(f"{folder.name}.partial")
    for old in (staging, folder):
        shutil.rmtree(old, ignore_errors=True)
    staging.mkdir(parents=True)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = build_tokenizer(settings.world)
    base = new_model(tokenizer, settings.training, settings.seed)
    pretrain(base, tokenizer, settings.world, settings.training, np.random.default_rng([settings.seed, 0]))
    models = {"pre": base}
    for number, group in enumerate(GROUPS):
        told = news(settings, group)
        with (staging / f"{group}.jsonl").open("w", encoding="utf-8") as file:
            for question in kept_questions(told, settings.questions):
                file.write(json.dumps(asdict(question)) + "\n")
        models[group] = copy.deepcopy(base)
        for part in (models[group].model.embed_tokens, models[group].model.norm):
            part.requires_grad_(False)
        rng = np.random.default_rng([settings.seed, 1, number])
        supervise(models[group], tokenizer, told, settings.training, rng)
    for name, model in models.items():
        model.save_pretrained(staging / name)
        tokenizer.save_pretrained(staging / name)
    (staging / "stamp.json").write_text(json.dumps({"recipe": recipe}) + "\n", encoding="utf-8")
    staging.rename(folder)
    return time.perf_counter() - began


def places(folder: Path, groups: Sequence[str] = GROUPS) -> dict[str, str]:
    """The experts' folders by name."""
    return {group: str(folder / group) for group in groups}


def _digest(settings: Settings) -> str:
    whole = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for source in SOURCES:
        whole.update(source.read_bytes())
    return whole.hexdigest()
