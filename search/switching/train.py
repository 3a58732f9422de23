"""The main path of Switch Generation: rollouts -> labels -> switcher -> folder.

trained = train(problem, settings, work)                   # resumes after any kill
save_switcher(trained, problem, settings, out)             # in `folder`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from objectives.questions.matching import get_rule
from search.config.switching import SwitchingConfig
from search.errors import ConfigError
from search.running.problem import Problem
from search.storage.pieces import PieceStore
from search.switching.asked_switcher import Asking
from search.switching.candidates import Setting
from search.switching.classifier import PENALTIES, fit_classifier, penalty_losses
from search.switching.classifier_switcher import features_of
from search.switching.labels import Labels, label
from search.switching.learned import AskedBrain, Brain, ClassifierBrain
from search.switching.lora import Watch as LoraWatch
from search.switching.lora import train_lora
from search.switching.response import Cost, Start
from search.switching.rollouts import Asked, RolloutOptions, derived, roll

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
        host: the candidate whose hidden states it reads, or that it was made of.
        held_out: log loss on questions that were not fitted, in nats, lower is better; None if none were held out.
            `entropy` of the labels is that of always giving their own shares.
    """

    lesson: Lesson
    brain: Brain
    host: str
    held_out: float | None


def train(
    problem: Problem,
    settings: list[Setting],
    work: Path,
    watch: Watch | None = None,
    watch_lora: LoraWatch | None = None,
) -> Trained:
    """Rolls out, labels and fits on the search split alone.

    Args:
        settings: of the study, from `open_settings`. work: folder of finished rollouts.

    Raises:
        ConfigError: no section `switching`, or labels that teach nothing: too few, or all the same.
    """
    config = switching_of(problem)
    lesson = learn(problem, settings, work, watch)
    host = config.host or lesson.candidates[-1]
    kept = lesson.labels.kept
    if len(np.unique(lesson.question[kept])) < FOLDS or len(np.unique(lesson.labels.label[kept])) < 2:
        found = ", ".join(f"{name} {n}" for name, n in lesson.counts.items())
        raise ConfigError(
            f"switching: {int(kept.sum())} of {len(kept)} rollouts have a best candidate ({found}): nothing to learn "
            f"(wanted {FOLDS} questions or more, and two candidates). Give more rollouts, or lower switching.margin."
        )
    if config.switcher == "lora":
        return _train_lora(problem, settings, lesson, host, watch_lora)
    names = lesson.candidates
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
    loss, penalty = min(zip(losses, PENALTIES, strict=True), key=lambda pair: (pair[0], -pair[1]))
    classifier = fit_classifier(x, y, len(names), penalties=(penalty,))
    return Trained(lesson, ClassifierBrain(classifier, host), host, loss)


def _train_lora(
    problem: Problem, settings: list[Setting], lesson: Lesson, host: str, watch: LoraWatch | None
) -> Trained:
    relay, kept = settings[0].relay, np.flatnonzero(lesson.labels.kept)
    lora = train_lora(
        relay.models[relay.names.index(host)],
        Asking.of(relay.tokenizer, len(relay.names), relay.turns.segment),
        [lesson.starts[row] for row in kept],
        lesson.labels.label[kept],
        lesson.question[kept],
        switching_of(problem).lora_options,
        watch=watch,
    )
    base = dict(zip(problem.parents.labels, problem.parents.everybody, strict=True))[host]
    brain = AskedBrain.trained(lora, base, problem.config.merge.dtype, problem.device)
    return Trained(lesson, brain, host, lora.epochs[-1].held_loss)


def learn(problem: Problem, settings: list[Setting], work: Path, watch: Watch | None = None) -> Lesson:
    """The rollouts of all written tasks with their labels."""
    config = switching_of(problem)
    options = options_of(config)
    facts = {
        "parents": problem.parents.digest,
        "dtype": problem.config.merge.dtype,
        "device": problem.device.partition(":")[0],
    }
    store = PieceStore(work)
    question: list[Integers] = []
    starts: list[Start] = []
    owners: list[Setting] = []
    scores: list[Floats] = []
    cost, computed, reused, before = Cost(), 0, 0, 0
    for one in settings:
        asked = taught(one, config)
        whole = config.segment >= one.relay.decoding.max_new_tokens

        def told(done: int, of: int, stored: bool, name: str = one.name) -> None:
            if watch is not None:
                watch(name, done, of, stored)

        found = roll(one.relay, asked, whole_answers(options) if whole else options, store, facts, told)
        question.append(groups_of(asked)[found.question] + before)
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
        label(every, config.margin, preference(config, every, starts)),
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


def taught(one: Setting, config: SwitchingConfig) -> tuple[Asked, ...]:
    """The questions of a task that teach, with the rule that scores rollouts."""
    asked = one.asked["search"][: config.rollouts.questions]
    if config.rollouts.score == "match":
        return asked
    return tuple(replace(question, rule=get_rule(config.rollouts.score)) for question in asked)


def groups_of(asked: Sequence[Asked]) -> Integers:
    """`(n,)` a number for each question; those of equal prompts have one: it may not be fitted and held out at once."""
    first = {question.prompt: place for place, question in reversed(list(enumerate(asked)))}
    return np.array([first[question.prompt] for question in asked], dtype=np.int64)


def whole_answers(options: RolloutOptions) -> RolloutOptions:
    """The same work where a segment is the whole answer: all traces are empty, and nothing is left to complete."""
    return replace(options, traces=1, branches=options.branches * options.completions, completions=1)


def preference(config: SwitchingConfig, scores: Floats, starts: Sequence[Start]) -> Floats | None:
    """`(m, n)` for `label`: who wrote last above all, then by mean score; None if ties are dropped."""
    if config.ties == "drop":
        return None
    found = np.tile(scores.mean(axis=0), (len(scores), 1))
    for row, start in enumerate(starts):
        author = next((one for one in reversed(start.authors) if one >= 0), None)
        if author is not None:
            found[row, author] += 1.0  # scores are at most 1
    return found


def switching_of(problem: Problem) -> SwitchingConfig:
    """The study's section. Raises ConfigError if it has none."""
    if problem.config.switching is None:
        raise ConfigError(
            f"study '{problem.config.name}': has no section switching. Add one, such as switching: {{segment: 25}}."
        )
    return problem.config.switching


def summary(trained: Trained) -> list[str]:
    """Lines for people: what was tried, what it says, what was learned."""
    lesson, labels = trained.lesson, trained.lesson.labels
    n = len(lesson.candidates)
    held = "unknown" if trained.held_out is None else f"{trained.held_out:.3f}"
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
        f"switcher    {trained.brain.kind} on {trained.host}: log loss on questions held out {held}, of always the "
        f"same shares {labels.entropy:.3f} nats",
    ]
