"""What a study works on: parents, questions and space; and one live model that turns a recipe into an evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from objectives.evaluation import Evaluation
from objectives.evaluator import Evaluator
from objectives.generation.sampler import AnswerSampler, Decoding
from objectives.metrics.diversity import Diversity, DiversityMetric, Equivalence, measure_diversity
from objectives.metrics.names import Metric, find_metric
from objectives.metrics.power import Power, note_on, powers
from objectives.metrics.preferences import Preference
from objectives.outcomes import Outcomes
from objectives.questions.prompts import PromptSet, load_prompts
from objectives.questions.questions import Question, QuestionSet, Split, closed
from objectives.questions.tasks import load_questions
from objectives.scoring.scorer import Scorer
from search.checkpoints.checkpoint import Checkpoint
from search.checkpoints.equivalence import EmbeddingEquivalence, EntailmentEquivalence
from search.checkpoints.origin import origins
from search.checkpoints.parents import Parents
from search.checkpoints.placement import SPREAD, choose_device
from search.checkpoints.reward_model import check_reward_model, make_preference, reward_digest
from search.config.methods import get_method
from search.config.study_file import StudyConfig
from search.errors import ConfigError
from search.merging.baselines import Baseline, baselines
from search.merging.blend import Blend, check_masks, make_blend
from search.merging.live import LiveModel
from search.merging.space import CoefficientSpace
from search.recipe import Recipe

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from objectives.scoring.losses import Loss
    from search.checkpoints.local_parents import LocalParents
    from search.samplers import WeightedGradient


@dataclass(frozen=True)
class Problem:
    """Everything that a study file names, opened and checked. Nothing is computed yet."""

    config: StudyConfig
    parents: Parents
    tokenizer: Any
    questions: QuestionSet
    space: CoefficientSpace
    metrics: tuple[Metric | DiversityMetric, ...]
    device: str
    prompts: PromptSet | None = None

    @classmethod
    def open(cls, config: StudyConfig, device: str = "auto", local: LocalParents | None = None) -> Problem:
        """Opens parents and questions.

        Args:
            local: reads the parents from copies on this machine; the config keeps their own places.

        Raises:
            CheckpointError, IncompatibleModelsError, MergeError: the parents cannot be read or merged, or what is given
                as a reward model is none.
            ConfigError: the questions cannot be read, an objective names an unknown task, or `racing` or `fidelity`
                wants more of the search split than there is.
        """
        parents = Parents.open(config.parents.pre, config.parents.post_trained, local=local)
        if any(get_method(name).seeded for name in config.merge.methods):
            check_masks(parents)
        tokenizer = parents.tokenizer()
        questions = load_questions(config.tasks, config.split, tokenizer)
        require_fitting(config, [question.task for question in questions.search])
        prompts = None
        if (sampled := config.diversity) is not None:
            prompts = load_prompts(sampled.prompts, sampled.limit, config.split.search, config.split.seed)
        preferences = config.preferences or {}
        for place in reward_models(config).values():
            check_reward_model(place)
        find = partial(find_metric, tasks=questions.task_names, preferences=preferences)
        return cls(
            config=config,
            parents=parents,
            tokenizer=tokenizer,
            questions=questions,
            space=make_space(config, parents),
            metrics=tuple(map(find, config.objectives)),
            device=choose_device(device),
            prompts=prompts,
        )

    def under(self, config: StudyConfig) -> Problem:
        """The same, with all that is open, under a config that differs in name, sampler, budgets or tokens a batch.

        Raises:
            ConfigError: it differs in something else.
        """
        free = dict.fromkeys(("name", "sampler", "trials", "tokens", "batch_tokens"), True) | {
            "split": {"report": True}
        }
        mine, other = (one.model_dump(exclude=free) for one in (self.config, config))
        if mine != other:
            raise ConfigError(f"study '{config.name}': differs from '{self.config.name}' in what was opened.")
        self.evaluator("search"), self.evaluator("report")  # made once, for all
        if config.batch_tokens is not None:
            self.scorer.use(config.batch_tokens)
        twin = copy(self)
        object.__setattr__(twin, "config", config)
        for key in ("gradient", "_parts"):  # the sampler's own
            twin.__dict__.pop(key, None)
        return twin

    @property
    def notes(self) -> list[str]:
        """What a user should know before trusting the numbers."""
        few = note_on(self.power("search"), self.power("report"))
        return [*self.parents.notes, *self.questions.notes, *([] if few is None else [few])]

    def power(self, split: Split, pair: tuple[Outcomes, Outcomes] | None = None) -> list[Power]:
        """What one split can show of the objectives; `pair` is as for `objectives.metrics.power.powers`."""
        return powers(self.metrics, [question.task for question in self.questions.of(split)], pair)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Digests of what must not change during a study."""
        found = {
            "parents": self.parents.digest,
            "questions": self.questions.digest,
            "groups": groups_digest(self.space),
        }
        if self.prompts is not None and self.config.diversity is not None:
            judge = self.config.diversity.equivalence
            found["prompts"] = self.prompts.digest
            if judge is not None:
                found["equivalence"] = Checkpoint.open(Path(judge)).sha256()
        for name, place in reward_models(self.config).items():
            found[f"preferences.{name}"] = reward_digest(Checkpoint.open(Path(place)))
        return found

    @cached_property
    def idle(self) -> tuple[str, ...]:
        """Coefficients that change nothing: post-training left all tensors of the group as they were.

        So it is with embeddings under LoRA. There is none where every coefficient takes from the others: in a simplex,
        and under methods that take a mean.
        """
        import torch

        if self.space.simplex or any(get_method(name).relative for name in self.space.methods):
            return ()
        pre, groups = self.parents.pre, self.space.groups
        still = [
            all(torch.equal(pre.tensor(name), expert.tensor(name)) for name in group.tensors)
            for expert in self.parents.experts.values()
            for group in groups
        ]
        return tuple(name for name, idle in zip(self.space.coefficients, still, strict=True) if idle)

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """What the storage says about every number of a recipe."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        space = self.space
        found: dict[str, BaseDistribution] = {
            name: FloatDistribution(space.low, space.high) for name in space.coefficients
        }
        for axis in space.axes:
            found[axis.name] = (
                CategoricalDistribution(axis.choices)
                if axis.choices
                else FloatDistribution(axis.low, axis.high)
            )
        return found

    @cached_property
    def baselines(self) -> list[Baseline]:
        """Parents and uniform line, in order."""
        return baselines(self.space)

    def provenance(self) -> dict[str, dict[str, str | None]]:
        """Where each parent came from, what exactly it is, and under which licence its own card puts it."""
        return provenance(self.config, self.parents)

    @cached_property
    def live(self) -> LiveModel:
        """The one resident model. Its weights are those of the recipe merged last."""
        import torch

        return LiveModel(self.parents, getattr(torch, self.config.merge.dtype), self.device)

    @cached_property
    def scorer(self) -> Scorer:
        """The live model's scorer, shared by both splits."""
        return Scorer(self.live.model, self.tokenizer, self.config.batch_tokens)

    def evaluator(self, split: Split) -> Evaluator:
        """The evaluator of one split, made at its first use."""
        return self._search_evaluator if split == "search" else self._report_evaluator

    @cached_property
    def _search_evaluator(self) -> Evaluator:
        return Evaluator(self.scorer, self.tokenizer, self.questions.search, self.config.tasks)

    @cached_property
    def _report_evaluator(self) -> Evaluator:
        return Evaluator(self.scorer, self.tokenizer, self.questions.report, self.config.tasks)

    def load(self, split: Split) -> None:
        """Loads and tokenises what `evaluate` and `diversify` would at their first call."""
        _ = self.evaluator(split), self.preferences, self.equivalence

    def merge(self, recipe: Recipe) -> None:
        """Writes the recipe's weights into the live model."""
        self.live.apply(blend_of(self.config, self.parents, self.space, recipe))

    def evaluate(self, split: Split, progress: Callable[[int, int], None] | None = None) -> Evaluation:
        """Scores the live model on one split."""
        return self.evaluator(split).evaluate(progress)

    @property
    def proposal_evaluations(self) -> float:
        """What a proposal of the study's engine costs at most, in evaluations of the search split."""
        if not self.config.sampler.follows_gradients:
            return 0.0
        from objectives.scoring.backward import passes
        from objectives.scoring.losses import scalarized
        from search.samplers.gradient_engine import STEPS

        most = scalarized(self._losses, [1.0] * len(self._losses))
        return (self.config.sampler.steps or STEPS) * passes(most) / len(self._parts)

    @cached_property
    def gradient(self) -> WeightedGradient:
        """Gradients on the search split of weighted sums of the objectives' stand-ins; each call moves the live model.

        Raises:
            ConfigError: merge.method is not linear, an objective has no stand-in, or the model does not take token
                trees.
        """
        from search.samplers.gradient import CoefficientGradient, StepGradient
        from search.samplers.gradient_engine import STEPS

        of = CoefficientGradient(
            self.live, self.space, self.scorer, closed(self.questions.search), self.config.tasks
        )
        proposal = self.proposal_evaluations * self.evaluator("search").tokens
        tokens = -int(-proposal // (self.config.sampler.steps or STEPS))
        return StepGradient(of, self._losses, self._parts, tokens)

    def losses(self, evaluation: Evaluation) -> NDArray[np.float64]:
        """`(objectives,)`: the objectives' stand-ins on what was answered; lower is better."""
        import torch

        padding = np.isneginf(evaluation.loglikelihood)
        divided = evaluation.loglikelihood.astype(np.float64) / evaluation.divisor
        score = torch.from_numpy(np.where(padding, -np.inf, divided))
        gold = torch.from_numpy(evaluation.outcomes.gold.copy())
        return np.array([float(loss(score, gold)) for loss in self._losses])

    @cached_property
    def _losses(self) -> list[Loss]:
        from objectives.scoring.losses import stand_in

        return [stand_in(metric.name) for metric in self.metrics]

    @cached_property
    def _parts(self) -> list[tuple[Question, ...]]:
        from search.samplers.gradient import dealt
        from search.samplers.gradient_engine import BATCH

        sampler = self.config.sampler
        return dealt(closed(self.questions.search), sampler.batch or BATCH, sampler.seed)

    def diversify(self, split: Split, tempering: float = 1.0) -> Diversity | None:
        """Samples answers of the live model to one split's prompts and measures them; None without such a section.

        Args:
            tempering: a calibrator's temperature, by which the logits are divided on top of the section's own.
        """
        config = self.config.diversity
        if config is None or self.prompts is None:
            return None
        decoding = Decoding(
            config.samples, config.temperature * tempering, config.top_p, config.max_new_tokens, config.seed
        )
        prompts = self.prompts.of(split)
        sampler = AnswerSampler(
            self.live.model, self.tokenizer, prompts, decoding, chat_template=config.chat_template
        )
        return measure_diversity(
            sampler.generate(), self.tokenizer, prompts, self.equivalence, self.preferences
        )

    @property
    def _judging(self) -> str:
        """Where models that judge answers run: on one device."""
        return "cuda" if self.device == SPREAD else self.device

    @cached_property
    def preferences(self) -> dict[str, Preference]:
        """What the study's preferences are measured with, by name; reward models are loaded here.

        Raises:
            CheckpointError: a reward model does not load.
        """
        wanted = self.config.preferences or {}
        return {name: make_preference(one, self._judging) for name, one in wanted.items()}

    @cached_property
    def equivalence(self) -> Equivalence | None:
        """Decides whether two sampled answers mean the same; its model is loaded here. None without such a section.

        Raises:
            CheckpointError: it does not load.
        """
        config = self.config.diversity
        if config is None or config.equivalence is None:
            return None
        if config.threshold is None:
            return EntailmentEquivalence(config.equivalence, device=self._judging)
        return EmbeddingEquivalence(config.equivalence, threshold=config.threshold, device=self._judging)


def reward_models(config: StudyConfig) -> dict[str, str]:
    """Places of the reward models of a study by preference."""
    preferences = (config.preferences or {}).items()
    return {name: one.model for name, one in preferences if one.model is not None}


def make_space(config: StudyConfig, parents: Parents) -> CoefficientSpace:
    """The recipes of a study of these parents."""
    return CoefficientSpace.build(parents.names, config.space, config.merge, tuple(parents.experts))


def blend_of(config: StudyConfig, parents: Parents, space: CoefficientSpace, recipe: Recipe) -> Blend:
    """What a recipe of a study does to every tensor."""
    return make_blend(
        parents, space.by_tensor(recipe), recipe.method, space.options(recipe), config.merge.seed
    )


def groups_digest(space: CoefficientSpace) -> str:
    """SHA-256 over the groups of a space, the tensors in them, and the names of several experts."""
    groups: list[Any] = [[group.name, group.tensors] for group in space.groups]
    if len(space.experts) > 1:
        groups.append(list(space.experts))
    return hashlib.sha256(json.dumps(groups).encode()).hexdigest()


def provenance(config: StudyConfig, parents: Parents) -> dict[str, dict[str, str | None]]:
    """Where each parent came from, what exactly it is, and under which licence its own card puts it."""
    return origins(config.parents.places, parents)


def require_fitting(config: StudyConfig, tasks: Sequence[int]) -> None:
    """Refuses `racing` or `fidelity` that the search split cannot fill; `tasks` has the task of each of its questions.

    Raises:
        ConfigError: more looks than questions, or a subset that is not smaller than the split or misses a task.
    """
    n, least = len(tasks), len(set(tasks))
    if config.racing is not None and config.racing.looks > n:
        raise ConfigError(
            f"racing.looks: {config.racing.looks} looks at the search split's {n} questions (wanted at most {n})."
        )
    if config.fidelity is not None and not least <= config.fidelity.questions < n:
        raise ConfigError(
            f"fidelity.questions: {config.fidelity.questions} of the search split's {n} questions of {least} "
            f"{'task' if least == 1 else 'tasks'} (wanted {least} to {n - 1}). Change it, or the split."
        )
