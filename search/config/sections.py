"""The sections of a study file, typed: what each key may be, and which keys go together."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from objectives.estimators.methods import get_estimator
from objectives.metrics.preferences import words_of
from objectives.questions.config import Section
from search.config.methods import OPTIONS, get_method
from search.errors import ConfigError, MergeError

PREDICTED = "answers"  # of fidelity.estimator: a model of answers instead of one of items


MAX_EXPERTS = 16
# What a row of a board, or a selection, may be called.
_KINDS = ("pre", "post", "uniform", "search", "alternative", "knee", "all")


class ParentsConfig(Section):
    """The checkpoints: folders, or hub ids such as `org/name` or `org/name@revision`.

    `pre` and one `post`, or `pre` and several `experts` by name, all of them trained from `pre`.
    """

    pre: str = Field(min_length=1)
    post: str | None = Field(default=None, min_length=1)
    experts: dict[str, str] | None = None

    @field_validator("experts")
    @classmethod
    def _fit_names(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for name, place in (value or {}).items():
            if not re.fullmatch(r"(?!best-)[a-z0-9][a-z0-9_-]{0,31}", name) or name in _KINDS:
                raise ValueError(
                    f"found name {name!r}, wanted 1 to 32 of a-z, 0-9, _ and -, no best-..., and none of "
                    f"{', '.join(_KINDS)}"
                )
            if not place:
                raise ValueError(f"{name} has no place; give a folder or a hub id")
        if value is not None and not 2 <= len(value) <= MAX_EXPERTS:
            raise ValueError(
                f"found {len(value)}, wanted 2 to {MAX_EXPERTS}; a single one is called parents.post"
            )
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> ParentsConfig:
        if (self.post is None) == (self.experts is None):
            found = "neither" if self.post is None else "both"
            raise ValueError(
                f"post, experts: found {found}; give one checkpoint as post, or several as experts"
            )
        return self

    @property
    def post_trained(self) -> dict[str, str]:
        """Places of the experts by name; a single one is called `post`."""
        return {"post": self.post} if self.post is not None else dict(self.experts or {})

    @property
    def places(self) -> dict[str, str]:
        """Places of all parents by name, pre first."""
        return {"pre": self.pre, **self.post_trained}


class MergeConfig(Section):
    """How the parents' tensors become one, and the dtype of the result.

    `method` is a name of `search.config.methods`, or a list of them: then it is searched, too. Its
    hyper-parameters are numbers, or `[low, high]` to be searched together with the coefficients. `seed` draws the
    random masks of DARE and DELLA, the same for every trial.
    """

    method: str | list[str] = "linear"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    density: float | list[float] | None = None
    scaling: float | list[float] | None = None
    epsilon: float | list[float] | None = None
    gamma: float | list[float] | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str | list[str]) -> str | list[str]:
        names = [value] if isinstance(value, str) else value
        if not names:
            raise ValueError("found none; name one, or a list to be searched")
        for name in names:
            try:
                get_method(name)
            except MergeError as error:
                raise ValueError(str(error).removeprefix("merge.method: ")) from error
        if len(set(names)) != len(names):
            raise ValueError("found one twice; name each once")
        return value

    @model_validator(mode="after")
    def _options_fit(self) -> MergeConfig:
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not any(name in get_method(method).options for method in self.methods):
                raise ValueError(f"{name}: does not go with {', '.join(self.methods)}; remove it")
            ends = value if isinstance(value, list) else [value]
            if isinstance(value, list) and not (len(ends) == 2 and ends[0] < ends[1]):
                raise ValueError(f"{name}: found {value}, wanted a number, or [low, high] to search it")
            for end in ends:
                if (fault := option.fault(end)) is not None:
                    raise ValueError(f"{name}: {fault}")
        if any("epsilon" in get_method(method).options for method in self.methods):
            self._check_epsilon()
        return self

    def _check_epsilon(self) -> None:
        (low, high), (_, spread) = (self.range_of(name) for name in ("density", "epsilon"))
        if low - spread <= 0.0 or (low < 1.0 and high + spread >= 1.0):
            raise ValueError(
                f"epsilon: found up to {spread:g} with density from {low:g} to {high:g}, wanted density - epsilon "
                "above 0 and density + epsilon below 1 (a density of 1 throughout takes any)"
            )

    @property
    def methods(self) -> tuple[str, ...]:
        """Their names; several are searched."""
        return (self.method,) if isinstance(self.method, str) else tuple(self.method)

    @property
    def searched(self) -> tuple[str, ...]:
        """What is searched beside the coefficients: `method`, hyper-parameters."""
        options = tuple(name for name in OPTIONS if isinstance(getattr(self, name), list))
        return (*(("method",) if len(self.methods) > 1 else ()), *options)

    def range_of(self, option: str) -> tuple[float, float]:
        """Lowest and highest value of a hyper-parameter, equal if it is not searched."""
        value = getattr(self, option)
        if value is None:
            value = OPTIONS[option].default
        return (value[0], value[1]) if isinstance(value, list) else (value, value)


class SpaceConfig(Section):
    """Which tensors share a coefficient, and how far a coefficient may go: 0 is `pre`, 1 is `post` or one expert.

    Bounds hold both parents, since the parents and the uniform line are trials of every study and seed its search.
    With several experts each has a coefficient of its own in every group; `simplex` keeps them at or above 0 with a sum
    of 1, so that a merge is a mean of the experts and `pre` has no part in it.
    """

    granularity: str = "layer"
    components: list[Literal["attention", "mlp", "norms"]] = Field(default=[])
    low: float = Field(default=0.0, ge=-10.0, le=0.0)
    high: float = Field(default=1.0, ge=1.0, le=10.0)
    simplex: bool = False

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
        if self.simplex and (self.low, self.high) != (0.0, 1.0):
            raise ValueError(f"simplex: goes with low 0 and high 1, found {self.low:g} and {self.high:g}")
        return self


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


class PreferenceConfig(Section):
    """One way to like an answer, higher is better: exactly one key.

    `words`: fewer or more of them. `mentions`, `avoids`: the share of an answer's words that are among these. `model`:
    the score of a reward model, a local checkpoint with one output.
    """

    words: Literal["fewer", "more"] | None = None
    mentions: list[str] | None = None
    avoids: list[str] | None = None
    model: str | None = Field(default=None, min_length=1)

    @field_validator("mentions", "avoids")
    @classmethod
    def _single_words(cls, value: list[str] | None) -> list[str] | None:
        for word in value or ():
            if words_of(word) != [word.lower()]:
                raise ValueError(f"found {word!r}, wanted single words: letters and digits, no punctuation")
        if value is not None and not value:
            raise ValueError("found none; name at least one word")
        return value

    @model_validator(mode="after")
    def _one_key(self) -> PreferenceConfig:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "nothing"
            raise ValueError(f"found {found}, wanted exactly one of words, mentions, avoids, model")
        return self


class RacingConfig(Section):
    """Search candidates are scored in `looks` batches of questions and stopped once they cannot enter the front.

    `error` bounds the probability that a candidate which belongs on the front is stopped
    (`search.running.fidelity.racing`); `seed` draws the order of the questions.
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
