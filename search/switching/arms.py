"""Everything that stands beside a trained switcher, on four levels, and what each of them writes to a split.

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

from objectives.evaluator import Evaluation, questions_digest
from objectives.generation import AnswerSampler
from objectives.metrics import get_metric
from objectives.questions import written
from objectives.written import evaluate_texts
from search.board_arms import AVERAGE, CONTRASTIVE, DARE, RANDOM, REFINE, ROUTER, SOUP, UNTRAINED
from search.errors import ConfigError
from search.materials import Materials, Split
from search.switching.batch import Policy, Start
from search.switching.brains import AskedBrain
from search.switching.candidates import Setting
from search.switching.ensemble import contrastive, logit_average
from search.switching.kept import Draft, Kept, Texts
from search.switching.policies import Always, AtRandom, ByPrompt
from search.switching.refine import refine
from search.switching.rollouts import branch_seed, derived
from search.switching.router import Router, scored, train_router
from search.switching.soup import Soup, dare_ties_blend, greedy_soup, soup_blend
from search.switching.switcher import features_of
from search.switching.train import options_of, switching_of

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Written:
    """What an arm wrote to the questions of a split.

    Attributes:
        texts: s answers to each of n questions, in the order of the split.
        right: `(n, s)` float64 scores in [0, 1], higher is better.
        tokens: that all its models read and wrote. single: of one model that writes as much.
        seconds: wall time.
        evaluation: of the answers' agreement.
    """

    texts: Texts
    right: Floats
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
        ConfigError: the study has a task with options, which nobody writes answers to.
    """

    def __init__(
        self,
        materials: Materials,
        settings: Sequence[Setting],
        switchers: Mapping[str, Callable[[Setting], Policy]],
        kept: Kept | None = None,
    ) -> None:
        for number, task in enumerate(materials.config.tasks):
            if not task.written:
                raise ConfigError(
                    f"tasks.{number}: has options; who takes turns writes answers. Give it format: generation."
                )
        self._materials, self._settings, self._kept = materials, settings, kept
        self.names = settings[0].relay.names
        self._models = dict(zip(self.names, settings[0].relay.models, strict=True))
        self._config = switching_of(materials)
        host = self._config.host or self.names[-1]
        self._host = self.names.index(host)
        self._switchers = dict(switchers)
        with suppress(ConfigError):  # a tokenizer without digits cannot be asked
            untrained = AskedBrain(self._models[host], materials.parents.sha256_of(host))
            for one in settings:
                untrained.policy(one.relay, self._config)
            self._switchers[UNTRAINED] = lambda one: untrained.policy(one.relay, self._config)
        self._known: dict[tuple[str, Split], Written] = {}

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
        return max(self.names, key=lambda name: float(self.written(name, "search").right.mean()))

    @cached_property
    def router(self) -> Router:
        """Trained on as many answers of each candidate as a rollout has, drawn with the rollouts' numbers."""
        options = options_of(self._config)
        samples = options.branches * options.completions
        right: dict[str, list[Floats]] = {name: [] for name in self.names}
        for one in self._settings:
            limit = self._config.rollouts.questions
            asked = one.asked["search"][:limit]
            drawn = replace(one.relay.decoding, samples=samples, seed=branch_seed(options))
            for name, model in self._models.items():
                sampler = self._sampler(model, one, "search", drawn, limit)
                texts = sampler.texts(sampler.generate())
                rules = [question.rule for question in asked]
                right[name].append(scored(texts, [question.accepted for question in asked], rules))
        seen = np.concatenate([self._features(one, "search", limit) for one in self._settings])
        merged = {name: np.concatenate(found) for name, found in right.items()}
        return train_router(merged, seen, margin=self._config.margin, settle=self._config.ties != "drop")

    @cached_property
    def soup(self) -> Soup:
        """Ingredients by accuracy of an answer on the search split."""

        def score(weights: Mapping[str, float]) -> float:
            alone = next((name for name, share in weights.items() if share == 1.0), None)
            if alone is not None:
                return float(self.written(alone, "search").right.mean())
            self._materials.live.apply(soup_blend(self._materials.parents, weights))
            drafts = [self._alone(self._materials.live.model, one, "search") for one in self._settings]
            return float(self._judged(drafts, 0.0, "search").right.mean())

        return greedy_soup(self.names, score)

    def oracle(self, split: Split) -> Floats:
        """`(n,)` accuracy if each question went to its best candidate: the ceiling of routing.

        The best is found on every other answer and scored on those between, both ways: else luck would count.
        """
        right = np.stack([self.written(name, split).right for name in self.names])
        one, other = right[:, :, ::2].mean(axis=2), right[:, :, 1::2].mean(axis=2)
        at = np.arange(right.shape[1])
        return np.asarray((other[one.argmax(axis=0), at] + one[other.argmax(axis=0), at]) / 2)

    def in_turn(self, split: Split) -> Floats:
        """`(n, s)` scores of s answers of which every candidate gave its share, with the numbers of its own draws."""
        right = np.stack([self.written(name, split).right for name in self.names])
        s = right.shape[2]
        return np.asarray(right[np.arange(s) % len(self.names), :, np.arange(s)].T)

    def _drafts(self, label: str, split: Split) -> tuple[list[Draft], float]:
        """What an arm writes to each task, and the seconds that took when it was written."""
        if self._kept is not None and (found := self._kept.read(label, split)) is not None:
            return found
        began = time.perf_counter()
        drafts = [self._draft(label, one, split) for one in self._settings]
        seconds = time.perf_counter() - began
        if self._kept is not None:
            self._kept.write(label, split, drafts, seconds)
        return drafts, seconds

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
            return self._relayed(one, split, ByPrompt(dict(zip(prompts, authors, strict=True))))
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
            return found.texts, tokens, self._relayed(one, split, Always(len(names) - 1))[2]
        if label == AVERAGE:
            return self._alone(logit_average(list(models.values())), one, split)
        if label == CONTRASTIVE:
            return self._alone(contrastive(models[names[-1]], models[names[0]]), one, split)
        parents = self._materials.parents
        blend = soup_blend(parents, self.soup.weights) if label == SOUP else dare_ties_blend(parents)
        self._materials.live.apply(blend)
        return self._alone(self._materials.live.model, one, split)

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
        questions = written(self._materials.questions.of(split))
        place = {question.key: i for i, question in enumerate(questions)}
        texts: list[tuple[str, ...]] = [()] * len(questions)
        scores: list[list[float]] = [[]] * len(questions)
        for one, (found, _, _) in zip(self._settings, drafts, strict=True):
            for asked, answers in zip(one.asked[split], found, strict=True):
                texts[place[asked.key]] = answers
                scores[place[asked.key]] = [asked.rule.score(text, asked.accepted) for text in answers]
        tokens, single = sum(draft[1] for draft in drafts), sum(draft[2] for draft in drafts)
        tasks = self._materials.config.tasks
        digest = questions_digest(questions, tasks)
        evaluation = evaluate_texts(questions, texts, tasks, tokens=tokens, digest=digest)
        return Written(tuple(texts), np.array(scores), tokens, single, seconds, evaluation)


def voted(found: Written, metric: str) -> float:
    """A metric of the answers that most agree on."""
    return float(get_metric(metric).value(found.evaluation.outcomes))
