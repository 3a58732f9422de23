"""The sections of a study file, typed: what each key may be, and which keys go together."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from objectives.estimators.methods import get_estimator
from search.errors import ConfigError

PREDICTED = "answers"  # of fidelity.estimator: a model of answers instead of one of items


class Section(BaseModel):
    """Unknown keys and implicit conversions are errors; a section never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ParentsConfig(Section):
    """The two checkpoints: a folder, or a hub id such as `org/name` or `org/name@revision`."""

    pre: str = Field(min_length=1)
    post: str = Field(min_length=1)


class MergeConfig(Section):
    """How two tensors become one, and the dtype of the result."""

    method: Literal["linear", "slerp"] = "linear"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class SpaceConfig(Section):
    """Which tensors share a coefficient, and how far a coefficient may go: 0 is `pre`, 1 is `post`.

    Bounds hold both parents, since the parents and the uniform line are trials of every study and seed its search.
    """

    granularity: str = "layer"
    components: list[Literal["attention", "mlp", "norms"]] = []
    low: float = Field(default=0.0, ge=-10.0, le=0.0)
    high: float = Field(default=1.0, ge=1.0, le=10.0)

    @field_validator("granularity")
    @classmethod
    def _known_granularity(cls, value: str) -> str:
        if not re.fullmatch(r"uniform|layer|tensor|block:[1-9][0-9]{0,3}", value):
            raise ValueError(
                f"found '{value}', wanted uniform, layer, tensor or block:N (N layers share a group)"
            )
        return value

    @model_validator(mode="after")
    def _components_fit(self) -> SpaceConfig:
        if len(set(self.components)) != len(self.components):
            raise ValueError("components: found one twice; name each once")
        if self.components and self.granularity in ("uniform", "tensor"):
            raise ValueError(
                f"components: do not go with granularity {self.granularity}; remove one of the two"
            )
        return self


class TaskConfig(Section):
    """One source of questions: a preset, or JSON lines / a dataset with fields of your own."""

    preset: str | None = None
    path: str | None = None
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    split: str | None = None
    subset: str | None = None
    format: Literal["continuation", "letter"] = "continuation"
    normalize: Literal["none", "tokens", "characters", "bytes"] = "none"
    shots: int = Field(default=0, ge=0, le=64)
    limit: int | None = Field(default=None, ge=1)
    chat_template: bool = False
    fields: dict[Literal["question", "choices", "answer"], str] | None = None

    @model_validator(mode="after")
    def _has_source(self) -> TaskConfig:
        if self.preset is None and self.path is None:
            raise ValueError("names no source; give a preset, a path, or both")
        return self


class SplitConfig(Section):
    """`search`: the share of questions that steers the search; the others are the report split.

    `report` says which trials are scored on the report split when the search is over: the front with its baselines,
    or all of them (never to choose among them: to show what choosing on the search split was worth).
    """

    search: float = Field(default=0.5, gt=0.0, lt=1.0)
    seed: int = Field(default=0, ge=0, lt=2**32)
    report: Literal["front", "all"] = "front"


class DiversityConfig(Section):
    """Answers that are sampled in every trial, and how they are drawn.

    `prompts` is a file of JSON lines with `prompt` or `question`; search and report split share none. `equivalence` is
    a local model that says which answers mean the same: with a `threshold` by the cosine of its embeddings, without
    one by entailment both ways.
    """

    prompts: str = Field(min_length=1)
    limit: int | None = Field(default=None, ge=2)
    chat_template: bool = False
    samples: int = Field(default=8, ge=2, le=256)
    max_new_tokens: int = Field(default=32, ge=1, le=8192)
    temperature: float = Field(default=1.0, gt=0.0, le=100.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int = Field(default=0, ge=0, lt=2**32)
    equivalence: str | None = None
    threshold: float | None = Field(default=None, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _threshold_has_a_model(self) -> DiversityConfig:
        if self.threshold is not None and self.equivalence is None:
            raise ValueError("threshold: has no model to go with; give equivalence, or remove it")
        return self


class RacingConfig(Section):
    """Search candidates are scored in `looks` batches of questions and stopped once they cannot enter the front.

    `error` bounds the probability that a candidate which belongs on the front is stopped (`search.fidelity.racing`);
    `seed` draws the order of the questions.
    """

    error: float = Field(default=0.05, gt=0.0, lt=0.5)
    looks: int = Field(default=5, ge=2, le=100)
    seed: int = Field(default=0, ge=0, lt=2**32)


class FidelityConfig(Section):
    """Search candidates are scored on a fixed subset first, and in full where the estimates promise the front.

    `estimator` is one of `objectives.estimators`, or `answers`: all objectives from predicted answers.
    `dimensions` are the item response model's, 2 if not given; `mean`, `weighted` and `answers` have none.
    `seed` draws the subset.
    """

    estimator: str = "gmp-irt"
    questions: int = Field(ge=1, le=10_000_000)
    dimensions: int | None = Field(default=None, ge=1, le=10)
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _known_estimator(self) -> FidelityConfig:
        if self.estimator == PREDICTED:
            if self.dimensions is not None:
                raise ValueError(f"dimensions: do not go with {self.estimator}; remove it")
            return self
        try:
            estimator = get_estimator(self.estimator)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if self.dimensions is not None and estimator.ability is None:
            raise ValueError(f"dimensions: do not go with {self.estimator}; remove it")
        return self
