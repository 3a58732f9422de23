"""The main path of Switch Generation: rollouts -> labels -> switcher -> folder.

trained = train(materials, work)          # resumes after any kill
save_switcher(trained, out)               # `folder`
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from search.errors import ConfigError
from search.materials import Materials
from search.piece_store import PieceStore
from search.switching.batch import Cost, Start
from search.switching.candidates import Setting
from search.switching.classifier import PENALTIES, Classifier, fit_classifier, penalty_losses
from search.switching.config import SwitchingConfig
from search.switching.labels import Labels, label
from search.switching.rollouts import RolloutOptions, derived, roll
from search.switching.switcher import ClassifierSwitcher, features_of

logger = logging.getLogger("mergefront")

FOLDS = 5

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# (task, questions done, questions, whether the last ones were stored)
Watch = Callable[[str, int, int, bool], None]


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the rollouts of all tasks say.

    Attributes:
        candidates: their names.
        setting, question, starts: of each of m traces: whose, about which question (distinct over tasks), where.
        scores: `(m, n)`, higher is better. labels: of them.
        cost: tokens of this run. computed, reused: questions.
    """

    candidates: tuple[str, ...]
    setting: tuple[Setting, ...]
    question: Integers
    starts: tuple[Start, ...]
    scores: Floats
    labels: Labels
    cost: Cost
    computed: int
    reused: int

    @property
    def counts(self) -> dict[str, int]:
        """How often each candidate is the label."""
        found = np.bincount(self.labels.label[self.labels.kept], minlength=len(self.candidates))
        return {name: int(n) for name, n in zip(self.candidates, found, strict=True)}


@dataclass(frozen=True, eq=False)
class Trained:
    """A switcher with where it came from.

    Attributes:
        classifier: of `features`. host: the candidate whose hidden states it reads.
        held_out: log loss on questions that were not fitted, in nats, lower is better; `chance` is that of always
            giving the labels' own frequencies.
    """

    lesson: Lesson
    classifier: Classifier
    host: str
    held_out: float
    chance: float

    def policy(self, config: SwitchingConfig, room: int) -> ClassifierSwitcher:
        """The switcher at work on responses of at most `room` tokens."""
        names = self.lesson.candidates
        seed = derived(config.seed, "choice")
        return ClassifierSwitcher(
            self.classifier, names.index(self.host), len(names), room, config.choice, config.top_p, seed
        )


def train(materials: Materials, settings: list[Setting], work: Path, watch: Watch | None = None) -> Trained:
    """Rolls out, labels and fits on the search split alone.

    Args:
        settings: of the study, from `open_settings`. work: folder of finished rollouts.

    Raises:
        ConfigError: no section `switching`, or labels that teach nothing: too few, or all the same.
    """
    config = switching_of(materials)
    lesson = learn(materials, settings, work, watch)
    names = lesson.candidates
    host = config.host or names[-1]
    kept = lesson.labels.kept
    if len(np.unique(lesson.question[kept])) < FOLDS or len(np.unique(lesson.labels.label[kept])) < 2:
        found = ", ".join(f"{name} {n}" for name, n in lesson.counts.items())
        raise ConfigError(
            f"switching: {int(kept.sum())} of {len(kept)} rollouts have a best candidate ({found}): nothing to learn "
            f"(wanted {FOLDS} questions or more, and two candidates). Give more rollouts, or lower switching.margin."
        )
    seen = np.concatenate(
        [
            features_of(
                one.relay,
                [start for start, its in zip(lesson.starts, lesson.setting, strict=True) if its is one],
                names.index(host),
            )
            for one in settings
        ]
    )
    x, y, groups = seen[kept], lesson.labels.label[kept], lesson.question[kept]
    losses = penalty_losses(x, y, len(names), groups=groups, folds=FOLDS)
    best = min(zip(losses, PENALTIES, strict=True), key=lambda pair: (pair[0], -pair[1]))[1]
    classifier = fit_classifier(x, y, len(names), penalties=(best,))
    return Trained(lesson, classifier, host, min(losses), lesson.labels.entropy)


def learn(materials: Materials, settings: list[Setting], work: Path, watch: Watch | None = None) -> Lesson:
    """The rollouts of all written tasks with their labels."""
    config = switching_of(materials)
    options = options_of(config)
    facts = {"parents": materials.parents.digest, "dtype": materials.config.merge.dtype}
    store = PieceStore(work)
    question: list[Integers] = []
    starts: list[Start] = []
    owners: list[Setting] = []
    scores: list[Floats] = []
    cost, computed, reused, before = Cost(), 0, 0, 0
    for one in settings:
        asked = one.asked["search"][: config.rollouts.questions]

        def told(done: int, of: int, stored: bool, name: str = one.name) -> None:
            if watch is not None:
                watch(name, done, of, stored)

        found = roll(one.relay, asked, options, store, facts, told)
        question.append(found.question + before)
        before += len(asked)
        starts += found.starts
        owners += [one] * len(found.starts)
        scores.append(found.scores)
        cost += found.cost
        computed, reused = computed + found.computed, reused + found.reused
    names = settings[0].relay.names
    every = np.concatenate(scores)
    return Lesson(
        names,
        tuple(owners),
        np.concatenate(question),
        tuple(starts),
        every,
        label(every, config.margin),
        cost,
        computed,
        reused,
    )


def options_of(config: SwitchingConfig) -> RolloutOptions:
    """The section's rollouts."""
    rolled = config.rollouts
    return RolloutOptions(
        rolled.traces,
        rolled.branches,
        rolled.completions,
        rolled.cut[0],
        rolled.cut[1],
        derived(config.seed, "rollouts"),
    )


def switching_of(materials: Materials) -> SwitchingConfig:
    """The study's section. Raises ConfigError if it has none."""
    if materials.config.switching is None:
        raise ConfigError(
            f"study '{materials.config.name}': has no section switching. Add one, such as switching: {{segment: 25}}."
        )
    return materials.config.switching


def summary(trained: Trained) -> list[str]:
    """Lines for people: what was tried, what it says, what was learned."""
    lesson, labels = trained.lesson, trained.lesson.labels
    n = len(lesson.candidates)
    shares = ", ".join(f"{name} {count}" for name, count in lesson.counts.items())
    means = ", ".join(
        f"{name} {value:.3f}"
        for name, value in zip(lesson.candidates, lesson.scores.mean(axis=0), strict=True)
    )
    return [
        f"rollouts    {len(lesson.starts)} traces of {len(np.unique(lesson.question))} questions; {lesson.computed} "
        f"questions now ({lesson.cost.total:,} tokens), {lesson.reused} were stored",
        f"scores      if this one writes next: {means}",
        f"labels      {int(labels.kept.sum())} of {len(labels.kept)} are clear: {shares}; entropy {labels.entropy:.3f} "
        f"of {math.log(n):.3f} nats",
        f"switcher    classifier on {trained.host}: held-out log loss {trained.held_out:.3f} nats, of always the same "
        f"shares {trained.chance:.3f}",
    ]
