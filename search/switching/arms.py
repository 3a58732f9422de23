"""Everything that stands beside a trained switcher, level by level, and what each of them writes to a split.

| level | arms |
|---|---|
| checkpoints | every candidate alone |
| who answers | random switching, the switcher, a router for whole answers |
| text | multi-agent refine |
| logits | their average, contrastive (post minus pre) |
| weights | greedy soup, DARE-TIES |

What an arm has to choose (a soup's ingredients, a router) it chooses on the search split.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from objectives.evaluation import Evaluation, questions_digest
from objectives.generation.sampler import AnswerSampler
from objectives.generation.written import evaluate_texts
from objectives.questions.matching import get_rule
from objectives.questions.questions import Split, written
from search.config.study_file import StudyConfig
from search.errors import ConfigError
from search.results.arms import ARMS, AVERAGE, CONTRASTIVE, DARE, RANDOM, REFINE, ROUTER, SOUP, UNTRAINED
from search.running.problem import Problem
from search.switching.arms_cache import Draft, Kept, Texts
from search.switching.candidates import Setting
from search.switching.classifier_switcher import features_of
from search.switching.ensemble import contrastive, logit_average
from search.switching.learned import AskedBrain
from search.switching.policies import Always, AtRandom, ByPrompt
from search.switching.refine import refine
from search.switching.response import Policy, Start
from search.switching.rollouts import branch_seed, derived
from search.switching.router import Router, scored, train_router
from search.switching.soup import Soup, dare_ties_blend, greedy_soup, soup_blend
from search.switching.train import groups_of, options_of, switching_of, taught

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Written:
    """What an arm wrote to the questions of a split.

    Attributes:
        texts: s answers to each of n questions, in the order of the split.
        score: `(n, s)` float64 in [0, 1], higher is better; graded by the rule `f1`, else 1 where an answer is right.
        right: `(n, s)` whether an answer is right.
        tokens: that all its models read and wrote. single: of one model that writes the same; of multi-agent refine
            what the last candidate takes alone.
        seconds: wall time of writing, not of what was chosen for it on the search split.
        evaluation: of the answers' agreement.
    """

    texts: Texts
    score: Floats
    right: npt.NDArray[np.bool_]
    tokens: int
    single: int
    seconds: float
    evaluation: Evaluation


class Arms:
    """The arms of one study, each written at most once a split.

    Args:
        settings: all of the study's tasks; each is written. switchers: further arms, a policy for each setting.
        kept: what was written before; None keeps nothing.

    Raises:
        ConfigError: as `check_arms`.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Sequence[Setting],
        switchers: Mapping[str, Callable[[Setting], Policy]],
        kept: Kept | None = None,
    ) -> None:
        check_arms(problem.config)
        self._problem, self._settings, self._kept = problem, settings, kept
        self.names = settings[0].relay.names
        self._models = dict(zip(self.names, settings[0].relay.models, strict=True))
        self._config = switching_of(problem)
        host = self._config.host or self.names[-1]
        self._host = self.names.index(host)
        self._switchers = dict(switchers)
        with suppress(ConfigError):  # a tokenizer without digits cannot be asked
            untrained = AskedBrain(self._models[host], problem.parents.sha256_of(host))
            for one in settings:
                untrained.policy(one.relay, self._config)
            self._switchers[UNTRAINED] = lambda one: untrained.policy(one.relay, self._config)
        self._known: dict[tuple[str, Split], Written] = {}
        self._drawn: dict[tuple[str, Split], tuple[list[Draft], float]] = {}

    @property
    def labels(self) -> tuple[str, ...]:
        """All arms, candidates first."""
        return (*self.names, RANDOM, *self._switchers, ROUTER, REFINE, AVERAGE, CONTRASTIVE, SOUP, DARE)

    def written(self, label: str, split: Split) -> Written:
        """What an arm writes to a split."""
        if (label, split) not in self._known:
            self._known[label, split] = self._judged(*self._drafts(label, split), split)
        return self._known[label, split]

    @cached_property
    def best(self) -> str:
        """The best candidate alone, by accuracy of an answer on the search split; of equal ones the first."""
        return max(self.names, key=lambda name: float(self.written(name, "search").score.mean()))

    @cached_property
    def router(self) -> Router:
        """Trained as the switcher where a segment is the whole answer: as many answers, the same numbers and rules."""
        options = options_of(self._config)
        samples = options.branches * options.completions
        scores: dict[str, list[Floats]] = {name: [] for name in self.names}
        groups: list[npt.NDArray[np.int64]] = []
        for one in self._settings:
            asked = taught(one, self._config)
            groups.append(groups_of(asked) + sum(map(len, groups)))
            drawn = replace(one.relay.decoding, samples=samples, seed=branch_seed(options))
            for name, model in self._models.items():
                sampler = self._sampler(model, one, "search", drawn, len(asked))
                texts = sampler.texts(sampler.generate())
                rules = [question.rule for question in asked]
                scores[name].append(scored(texts, [question.accepted for question in asked], rules))
        limit = self._config.rollouts.questions
        seen = np.concatenate([self._features(one, "search", limit) for one in self._settings])
        merged = {name: np.concatenate(found) for name, found in scores.items()}
        return train_router(
            merged,
            seen,
            groups=np.concatenate(groups),
            margin=self._config.margin,
            settle=self._config.ties != "drop",
        )

    @cached_property
    def soup(self) -> Soup:
        """Ingredients by accuracy of an answer on the search split."""

        def score(weights: Mapping[str, float]) -> float:
            alone = next((name for name, share in weights.items() if share == 1.0), None)
            if alone is not None:
                return float(self.written(alone, "search").score.mean())
            self._problem.live.apply(soup_blend(self._problem.parents, weights))
            drafts = [self._alone(self._problem.live.model, one, "search") for one in self._settings]
            return float(self._judged(drafts, 0.0, "search").score.mean())

        return greedy_soup(self.names, score)

    def oracle(self, split: Split) -> Floats:
        """`(n,)` score of an answer if each question went to the candidate whose other answers to it are best.

        A lower bound of the ceiling of routing: with all of a candidate's answers luck would count, with the others
        alone it is sometimes not the best that is taken. Of equal ones the best on the search split.

        Raises:
            ConfigError: there is only one answer to each question.
        """
        score = np.stack([self.written(name, split).score for name in self.names])
        if score.shape[2] < 2:
            raise ConfigError(
                "generate.samples: found 1 (wanted 2 or more, to know a question's best candidate)."
            )
        overall = np.array([self.written(name, "search").score.mean() for name in self.names])
        others = (score.sum(axis=2, keepdims=True) - score) / (score.shape[2] - 1) + 1e-9 * overall[
            :, None, None
        ]
        return np.asarray(np.take_along_axis(score, others.argmax(axis=0)[None], axis=0)[0].mean(axis=1))

    def in_turn(self, split: Split) -> Written:
        """s answers of which every candidate gave its share, with the numbers of its own draws."""
        found = [self.written(name, split) for name in self.names]
        s = found[0].score.shape[1]
        whose = np.arange(s) % len(found)
        texts = tuple(
            tuple(found[author].texts[i][j] for j, author in enumerate(whose))
            for i in range(len(found[0].texts))
        )
        tokens, single = found[0].tokens, found[0].single
        return self._scored(texts, split, tokens, single, 0.0)

    def _drafts(self, label: str, split: Split) -> tuple[list[Draft], float]:
        """What an arm writes to each task, and the seconds that took when it was written."""
        if (label, split) in self._drawn:
            return self._drawn[label, split]
        found = None if self._kept is None else self._kept.read(label, split)
        if found is None:
            _ = (
                self.router if label == ROUTER else self.soup if label == SOUP else None
            )  # not in the arm's seconds
            began = time.perf_counter()
            drafts = [self._draft(label, one, split) for one in self._settings]
            found = drafts, time.perf_counter() - began
            if self._kept is not None:
                self._kept.write(label, split, *found)
        self._drawn[label, split] = found
        return found

    def _draft(self, label: str, one: Setting, split: Split) -> Draft:
        """What an arm writes to one task."""
        drawn, task = one.relay.decoding, one.task
        names, models = self.names, self._models
        if label in names:
            return self._relayed(one, split, Always(names.index(label)))
        if label == RANDOM:
            return self._relayed(one, split, AtRandom(len(names), derived(self._config.seed, RANDOM)))
        if label in self._switchers:
            return self._relayed(one, split, self._switchers[label](one))
        if label == ROUTER:
            authors = self.router.choose(self._features(one, split, None)).tolist()
            prompts = [asked.prompt for asked in one.asked[split]]
            texts, tokens, single = self._relayed(
                one, split, ByPrompt(dict(zip(prompts, authors, strict=True)))
            )
            # The host reads every question to choose, and again only where it answers.
            read = sum(
                len(prompt) for prompt, author in zip(prompts, authors, strict=True) if author != self._host
            )
            return texts, tokens + read, single
        if label == REFINE:
            found = refine(
                models,
                one.relay.tokenizer,
                [question.context for question in one.questions[split]],
                drawn,
                chat_template=task.chat_template,
                until=task.until,
            )
            tokens = found.prompt_tokens + found.generated_tokens
            alone, _ = self._drafts(names[-1], split)
            return found.texts, tokens, alone[list(self._settings).index(one)][2]
        if label == AVERAGE:
            return self._alone(logit_average(list(models.values())), one, split)
        if label == CONTRASTIVE:
            return self._alone(contrastive(models[names[-1]], models[names[0]]), one, split)
        parents = self._problem.parents
        blend = soup_blend(parents, self.soup.weights) if label == SOUP else dare_ties_blend(parents)
        self._problem.live.apply(blend)
        return self._alone(self._problem.live.model, one, split)

    def _relayed(self, one: Setting, split: Split, policy: Policy) -> Draft:
        found = one.relay.generate([asked.prompt for asked in one.asked[split]], policy)
        return one.relay.texts(found.answers), found.cost.total, found.cost.single

    def _alone(self, model: Any, one: Setting, split: Split) -> Draft:
        sampler = self._sampler(model, one, split, one.relay.decoding, None)
        found = sampler.generate()
        single = found.prompt_tokens + found.generated_tokens
        return sampler.texts(found), single * len(getattr(model, "members", (model,))), single

    def _sampler(
        self, model: Any, one: Setting, split: Split, drawn: Any, limit: int | None
    ) -> AnswerSampler:
        texts = [question.context for question in one.questions[split][:limit]]
        task = one.task
        return AnswerSampler(
            model,
            one.relay.tokenizer,
            texts,
            drawn,
            chat_template=task.chat_template,
            until=task.until,
        )

    def _features(self, one: Setting, split: Split, limit: int | None) -> Floats:
        """What the switcher's host has of the questions before anybody wrote."""
        starts = [Start(asked.prompt, 0) for asked in one.asked[split][:limit]]
        return features_of(one.relay, starts, self._host)

    def _judged(self, drafts: Sequence[Draft], seconds: float, split: Split) -> Written:
        questions = written(self._problem.questions.of(split))
        place = {question.key: i for i, question in enumerate(questions)}
        texts: list[tuple[str, ...]] = [()] * len(questions)
        for one, (found, _, _) in zip(self._settings, drafts, strict=True):
            for asked, answers in zip(one.asked[split], found, strict=True):
                texts[place[asked.key]] = answers
        tokens, single = sum(draft[1] for draft in drafts), sum(draft[2] for draft in drafts)
        return self._scored(tuple(texts), split, tokens, single, seconds)

    def _scored(self, texts: Texts, split: Split, tokens: int, single: int, seconds: float) -> Written:
        questions, tasks = written(self._problem.questions.of(split)), self._problem.config.tasks
        score, right = [], []
        for question, answers in zip(questions, texts, strict=True):
            rule = get_rule(tasks[question.task].generation.match)
            score.append([rule.score(text, question.accepted) for text in answers])
            right.append([rule.right(rule.key(text), question.accepted) for text in answers])
        digest = questions_digest(questions, tasks)
        evaluation = evaluate_texts(questions, texts, tasks, tokens=tokens, digest=digest)
        return Written(texts, np.array(score), np.array(right), tokens, single, seconds, evaluation)


def check_arms(config: StudyConfig) -> None:
    """Raises ConfigError where arms cannot stand beside each other.

    That is where a task has options, which nobody writes answers to, where tasks have another number of answers to a
    question, and where a candidate is called as an arm is.
    """
    for number, task in enumerate(config.tasks):
        if not task.written:
            raise ConfigError(
                f"tasks.{number}: has options; who takes turns writes answers. Give it format: generation."
            )
        first, its = config.tasks[0].generation.samples, task.generation.samples
        if its != first:
            raise ConfigError(
                f"tasks.{number}.generate.samples: found {its} (wanted {first} as in tasks.0: arms are compared by "
                "answers to a question)."
            )
    for name in config.parents.places:
        if name in ARMS:
            raise ConfigError(f"parents.experts: found {name!r}, which an arm is called. Rename it.")
