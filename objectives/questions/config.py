"""The sections of a study file about questions."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from objectives.errors import ConfigError
from objectives.questions.matching import get_rule


class Section(BaseModel):
    """Unknown keys and implicit conversions are errors; a section never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class SplitConfig(Section):
    """`search`: the share of questions that steers the search; the others are the report split.

    `report` says which trials are scored on the report split when the search is over: the front with its baselines,
    or all of them (never to choose among them: to show what choosing on the search split was worth).
    """

    search: float = Field(default=0.5, gt=0.0, lt=1.0)
    seed: int = Field(default=0, ge=0, lt=2**32)
    report: Literal["front", "all"] = "front"


class GenerateConfig(Section):
    """How written answers are drawn, and which are right.

    `match` is one of `objectives.questions.matching`. Of `samples` answers to a question the one that most agree on
    counts, and
    its share is the confidence. `until` are texts that end an answer: an empty line, unless a chat template ends it.
    """

    match: str = "exact"
    samples: int = Field(default=8, ge=1, le=256)
    max_new_tokens: int = Field(default=64, ge=1, le=8192)
    temperature: float = Field(default=0.7, gt=0.0, le=100.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    until: list[str] | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("match")
    @classmethod
    def _known_rule(cls, value: str) -> str:
        try:
            get_rule(value)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("match: ").rstrip(".")) from error
        return value

    @field_validator("until")
    @classmethod
    def _whole_texts(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and "" in value:
            raise ValueError("found an empty text, which every answer contains; remove it")
        return value


class TaskConfig(Section):
    """One source of questions: a preset, or JSON lines / a dataset with fields of your own.

    `format: generation` has answers written instead of options scored; `generate` says how, and what is right.
    """

    preset: str | None = None
    path: str | None = None
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    split: str | None = None
    subset: str | None = None
    format: Literal["continuation", "letter", "generation"] = "continuation"
    normalize: Literal["none", "tokens", "characters", "bytes"] = "none"
    shots: int = Field(default=0, ge=0, le=64)
    generate: GenerateConfig | None = None
    limit: int | None = Field(default=None, ge=1)
    chat_template: bool = False
    fields: dict[Literal["question", "choices", "answer"], str] | None = None

    @model_validator(mode="after")
    def _has_source(self) -> TaskConfig:
        if self.preset is None and self.path is None:
            raise ValueError("names no source; give a preset, a path, or both")
        return self

    @model_validator(mode="after")
    def _answers_fit(self) -> TaskConfig:
        if self.generate is not None and not self.written:
            raise ValueError(f"generate: does not go with format {self.format}; give format: generation")
        if self.written and self.normalize != "none":
            raise ValueError(
                "normalize: is for likelihoods of options, format generation has none; remove it"
            )
        return self

    @property
    def written(self) -> bool:
        """Whether answers are written."""
        return self.format == "generation"

    @property
    def generation(self) -> GenerateConfig:
        """How written answers are drawn and judged."""
        return self.generate or GenerateConfig()

    @property
    def until(self) -> tuple[str, ...]:
        """Texts that end a written answer."""
        until = self.generation.until
        if (
            until is None
        ):  # a plain prompt's next paragraph would be the next question; a chat's turn has an end
            return () if self.chat_template else ("\n\n",)
        return tuple(until)
