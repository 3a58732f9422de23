"""The study file, typed. Every key is checked before anything is opened; unknown keys are errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from objectives.metrics.diversity import DIVERSITY_NAMES, get_sampled_metric
from objectives.metrics.names import METRIC_NAMES, find_metric, is_sampled
from objectives.questions.config import GenerateConfig, Section, SplitConfig, TaskConfig
from search.config.explain import explain, kind_of
from search.config.methods import get_method
from search.config.sampler import SINGLE_OBJECTIVE, CoarseConfig, SamplerConfig
from search.config.sections import (
    PREDICTED,
    DiversityConfig,
    FidelityConfig,
    MergeConfig,
    ParentsConfig,
    PreferenceConfig,
    RacingConfig,
    SpaceConfig,
)
from search.config.strict_yaml import apply_overrides, load_yaml
from search.config.switching import LoraConfig, RolloutConfig, SwitchingConfig, switching_fault
from search.errors import ConfigError

__all__ = [
    "DiversityConfig",
    "FidelityConfig",
    "GenerateConfig",
    "MergeConfig",
    "ParentsConfig",
    "PreferenceConfig",
    "RacingConfig",
    "SamplerConfig",
    "SpaceConfig",
    "SplitConfig",
    "StudyConfig",
    "TaskConfig",
    "apply_overrides",
    "differences",
    "load_study_file",
    "parse_study",
]

SCHEMA = 1

# Where things lie, and how long to search: may differ between two runs of one study. What lies there is
# compared by content (the digests of parents and questions), not by path.
_NOT_IDENTITY = re.compile(
    r"^(trials|tokens|trial_seconds|switching(\..+)?|parents\.(pre|post|experts\.[^.]+)|tasks\.\d+\.path"
    r"|diversity\.(prompts|equivalence)|preferences\.[^.]+\.model)$"
)


class StudyConfig(Section):
    """A whole study file.

    The search ends after `trials` trials beyond the baselines (those stopped early count), or before the trial with
    which it could exceed `tokens` scored tokens (baselines, proposals and partial evaluations counted; the report split
    is not), whichever is first.

    A trial whose merge and scores take longer than `trial_seconds` fails with that reason and the search goes on; the
    time is looked at between batches, on the search split. Where no trial reaches it, it changes nothing.

    `batch_tokens` is how many tokens are scored at once, padding counted; without it the study measures what is
    fastest on each kind of device and keeps to it. Another number changes the last bits of the scores, so give one
    where two studies shall be equal bit by bit.
    """

    model_config = ConfigDict(**(Section.model_config | ConfigDict(populate_by_name=True)))

    schema_version: Literal[1] = Field(alias="schema")
    name: str = Field(pattern=r"^[a-z0-9-]{1,64}$")
    parents: ParentsConfig
    merge: MergeConfig = MergeConfig()
    space: SpaceConfig = SpaceConfig()
    tasks: Annotated[list[TaskConfig], Field(min_length=1, max_length=64)]
    split: SplitConfig = SplitConfig()
    objectives: Annotated[list[str], Field(min_length=1, max_length=8)] = Field(default=["accuracy", "ece"])
    diversity: DiversityConfig | None = None
    preferences: dict[str, PreferenceConfig] | None = None
    sampler: SamplerConfig = SamplerConfig()
    racing: RacingConfig | None = None
    fidelity: FidelityConfig | None = None
    switching: SwitchingConfig | None = None
    trials: int = Field(default=64, ge=0, le=1_000_000)
    tokens: int | None = Field(default=None, ge=1, le=2**53)
    trial_seconds: float | None = Field(default=None, gt=0.0, le=1e9)
    batch_tokens: int | None = Field(default=None, ge=1, le=2**24)

    @field_validator("objectives")
    @classmethod
    def _different_objectives(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("found one twice; name each once")
        return value

    @field_validator("preferences")
    @classmethod
    def _fit_names(cls, value: dict[str, PreferenceConfig] | None) -> dict[str, PreferenceConfig] | None:
        for name in value or ():
            if not re.fullmatch(r"[a-z][a-z0-9-]{0,63}", name):
                raise ValueError(f"found name {name!r}, wanted 1 to 64 of a-z, 0-9 and -, a letter first")
            if name in (*METRIC_NAMES, *DIVERSITY_NAMES, "calibration"):  # best-calibration is a selection
                raise ValueError(f"found name '{name}', which means something else; choose another")
        if value is not None and not value:
            raise ValueError("found none; name one, or remove the section")
        return value

    @property
    def sampled_objectives(self) -> list[str]:
        """The objectives that are measured on sampled answers."""
        return [name for name in self.objectives if is_sampled(name, self.preferences or ())]

    @model_validator(mode="after")
    def _known_objectives(self) -> StudyConfig:
        for name in self.objectives:
            metric, _, _ = name.partition("@")  # the task of METRIC@TASK is checked once the tasks are read
            try:
                find_metric(metric, preferences=self.preferences or ())
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _sampled_answers_have_prompts(self) -> StudyConfig:
        if self.preferences is not None and self.diversity is None:
            raise ValueError("preferences: need sampled answers; add a section diversity with prompts")
        for name in self.sampled_objectives:
            if self.diversity is None:
                raise ValueError(
                    f"objectives: {name} needs sampled answers; add a section diversity with prompts"
                )
            needs_model = get_sampled_metric(name, self.preferences or ()).needs_model
            if needs_model and self.diversity.equivalence is None:
                raise ValueError(
                    f"objectives: {name} needs a model that compares answers; add diversity.equivalence"
                )
        return self

    @model_validator(mode="after")
    def _answers_are_modelled(self) -> StudyConfig:
        sampled = self.sampled_objectives
        if self.sampler.engine == "composite" and sampled:
            raise ValueError(
                f"sampler: engine composite predicts answers to questions, but {sampled[0]} is measured on sampled "
                "ones; use another engine"
            )
        return self

    @model_validator(mode="after")
    def _written_answers_fit(self) -> StudyConfig:
        if (fault := written_fault(self.tasks, self.sampler, self.fidelity)) is not None:
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _turns_can_be_taken(self) -> StudyConfig:
        rooms = [task.generation.max_new_tokens for task in self.tasks if task.written]
        if self.switching is not None:
            fault = switching_fault(self.switching, list(self.parents.places), rooms)
            if fault is not None:
                raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _parts_can_be_judged(self) -> StudyConfig:
        if self.racing is not None and self.fidelity is not None:
            raise ValueError(
                "racing: does not go with fidelity, which stops candidates by estimates; remove one of the two"
            )
        section = "racing" if self.racing is not None else "fidelity" if self.fidelity is not None else None
        sampled = next(iter(self.sampled_objectives), None)
        if section is not None and sampled is not None:
            raise ValueError(
                f"{section}: does not go with objective {sampled}, which is not scored in parts; remove one"
            )
        return self

    @model_validator(mode="after")
    def _gradient_exists(self) -> StudyConfig:
        if not self.sampler.follows_gradients:
            return self
        if self.merge.methods != ("linear",):
            raise ValueError("sampler: gradients need merge.method linear")
        from objectives.scoring.losses import stand_in

        for name in self.objectives:
            try:
                stand_in(name)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _sampler_fits(self) -> StudyConfig:
        sampler = self.sampler
        if sampler.name in SINGLE_OBJECTIVE and len(self.objectives) > 1:
            raise ValueError(
                f"sampler.name: {sampler.engine} {sampler.name} searches one objective, found "
                f"{len(self.objectives)}; name one, or choose nsga2"
            )
        key = "knots" if sampler.knots else "coarse"
        if (sampler.knots or sampler.coarse) and self.space.granularity == "uniform":
            raise ValueError(
                f"sampler.{key}: space.granularity uniform has one coefficient only; remove one of the two"
            )
        if (sampler.knots or sampler.coarse) and self.merge.searched:
            raise ValueError(
                f"sampler.{key}: moves coefficients only, but merge.{self.merge.searched[0]} is searched, too; "
                "fix it, or remove sampler." + key
            )
        if sampler.coarse and self.space.simplex:
            raise ValueError(
                "sampler.coarse: a block of all experts has nothing to move in a simplex; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> StudyConfig:
        count = len(self.parents.post_trained)
        for method in map(get_method, self.merge.methods):
            if (fault := method.fault(count)) is not None:
                raise ValueError(f"merge.method: {fault}")
            if method.relative and self.space.low < 0.0:
                raise ValueError(
                    f"space.low: found {self.space.low:g}, but {method.name} takes no weights below 0; give 0"
                )
        if self.parents.experts is None:
            if self.space.simplex:
                raise ValueError("space.simplex: is for several experts; remove it, or give parents.experts")
            return self
        if self.space.simplex and self.sampler.follows_gradients:
            raise ValueError(
                f"sampler: {self.sampler.title} leaves the simplex; remove space.simplex, or use another engine"
            )
        if self.sampler.engine == "line" and not self.has_line:
            raise ValueError(
                "sampler: engine line has nothing to move in a simplex or under a method that takes a mean; use "
                "another engine"
            )
        return self

    @property
    def has_line(self) -> bool:
        """Whether recipes with one coefficient for everything differ: not in a simplex, nor where only ratios count."""
        return not self.space.simplex and not get_method(self.merge.methods[0]).relative

    def to_json(self) -> dict[str, Any]:
        """The frozen form that is stored in the study: plain JSON, the key order of this file."""
        return self.model_dump(mode="json", by_alias=True)


def load_study_file(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study that a file describes, with `key=value` overrides applied and relative paths made absolute.

    A relative path of a parent or a task is looked up from the study file's folder.

    Raises:
        ConfigError: the file, a key or an override is wrong.
    """
    where = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: no such study file.") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{where}: cannot be read: {reason}.") from error
    value = load_yaml(text, where)
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: found {kind_of(value)}, wanted keys such as name, parents, tasks.")
    apply_overrides(value, overrides)
    config, folder = parse_study(value, where), path.resolve().parent
    if not _is_text(str(folder)):
        raise ConfigError(
            f"{where}: the path of its folder is no text in this locale. Run under a UTF-8 one, such as LC_ALL=C.UTF-8."
        )
    return _resolve_paths(config, folder)


def _is_text(text: str) -> bool:
    """False for bytes that Python could not decode and keeps as halves of surrogate pairs: nothing can store those."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def parse_study(value: object, where: str) -> StudyConfig:
    """Validates a plain value, as read from YAML or from a storage.

    Raises:
        ConfigError: one line for the first thing that is wrong, with the path of its key.
    """
    try:
        return StudyConfig.model_validate(value)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, StudyConfig, _INSIDE)}") from error


def differences(stored: StudyConfig, given: StudyConfig) -> list[str]:
    """What makes two configs different studies, one `key: stored -> given` a line; empty if they are the same."""
    old, new = dict(_flatten(stored.to_json())), dict(_flatten(given.to_json()))
    keys = [key for key in (*old, *(k for k in new if k not in old)) if not _NOT_IDENTITY.match(key)]
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}{key}.")
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _flatten(item, f"{prefix}{index}.")
    else:
        yield prefix.rstrip("."), value


def _resolve_paths(config: StudyConfig, folder: Path) -> StudyConfig:
    def resolve(where: str) -> str:
        try:
            path = Path(where).expanduser()
            if path.is_absolute() or where.startswith((".", "~")) or (folder / path).exists():
                return str((folder / path).resolve())
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # another locale, a NUL, a loop of links, no such user
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{where!r}: no path here ({reason}). Give another, or another locale."
            ) from error
        return where  # a hub id

    given = config.parents
    parents = ParentsConfig(
        pre=resolve(given.pre),
        post=given.post and resolve(given.post),
        experts=given.experts and {name: resolve(place) for name, place in given.experts.items()},
    )
    tasks = [
        task if task.path is None else task.model_copy(update={"path": resolve(task.path)})
        for task in config.tasks
    ]
    update: dict[str, Any] = {"parents": parents, "tasks": tasks}
    if (sampled := config.diversity) is not None:
        places = {"prompts": resolve(sampled.prompts)}
        if sampled.equivalence is not None:
            places["equivalence"] = resolve(sampled.equivalence)
        update["diversity"] = sampled.model_copy(update=places)
    if config.preferences is not None:
        update["preferences"] = {
            name: one if one.model is None else one.model_copy(update={"model": resolve(one.model)})
            for name, one in config.preferences.items()
        }
    return config.model_copy(update=update)


# Sections by the key under which they stand, where a value may be of several types.
_INSIDE: dict[str, type[BaseModel]] = {
    "tasks": TaskConfig,
    "generate": GenerateConfig,
    "diversity": DiversityConfig,
    "preferences": PreferenceConfig,
    "racing": RacingConfig,
    "fidelity": FidelityConfig,
    "coarse": CoarseConfig,
    "switching": SwitchingConfig,
    "rollouts": RolloutConfig,
    "lora": LoraConfig,
}


def written_fault(
    tasks: Sequence[TaskConfig], sampler: SamplerConfig, fidelity: FidelityConfig | None
) -> str | None:
    """Why a study with these sections cannot have written answers; None if it can, or has none."""
    which = next((i for i, task in enumerate(tasks) if task.written), None)
    if which is None:
        return None
    answers = f"tasks.{which}: answers are written"
    if sampler.follows_gradients:
        return f"sampler: {sampler.title} follows gradients of likelihoods, but {answers}; use another engine"
    if sampler.engine == "composite":
        return f"sampler: engine composite predicts likelihoods of options, but {answers}; use another engine"
    if fidelity is not None and fidelity.estimator == PREDICTED:
        return f"fidelity: estimator {PREDICTED} predicts likelihoods of options, but {answers}; use another estimator"
    return None
