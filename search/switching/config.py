"""The section `switching` of a study file: how the parents take turns, and how a switcher learns who is next."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from search.errors import ConfigError
from search.sections import Section
from search.switching.lora_options import LoraOptions
from search.switching.turns import Turns


class RolloutConfig(Section):
    """How much is tried: see `search.switching.rollouts.RolloutOptions`.

    `questions`: of each task's search split at most, all without it. `cut`: shares of a trace between which it is cut.
    `score`: how good a response is, by the task's own rule (`match`) or by the overlap of its words (`f1`), which tells
    more where random switching is seldom wholly right.
    """

    questions: int | None = Field(default=None, ge=1)
    traces: int = Field(default=1, ge=1, le=1000)
    branches: int = Field(default=1, ge=1, le=1000)
    completions: int = Field(default=16, ge=1, le=10_000)
    score: Literal["match", "f1"] = "match"
    cut: list[float] = Field(default=[0.1, 0.9], min_length=2, max_length=2)

    @model_validator(mode="after")
    def _cut_fits(self) -> RolloutConfig:
        low, high = self.cut
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"cut: found {self.cut}, wanted two shares from 0 to 1, the smaller first")
        return self


class LoraConfig(Section):
    """How the LoRA of a switcher is trained: see `search.switching.lora_options.LoraOptions`, which checks values."""

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    rate: float = 1e-5
    warmup: float = 0.1
    epochs: int = 5
    batch: int = 32
    targets: list[str] = Field(default=["q_proj", "k_proj", "v_proj", "o_proj"])
    held: float = 0.1

    def options(self, seed: int) -> LoraOptions:
        """Raises ConfigError at the first value out of its range."""
        return LoraOptions(**{**self.model_dump(), "targets": tuple(self.targets), "seed": seed})


class SwitchingConfig(Section):
    """Switch Generation (Feng et al. 2025, arXiv 2510.09913) with the study's parents as candidates.

    `segment` counts tokens; `first`, `last`, `closing` and `wait` are the rules of `search.switching.turns.Turns`.
    `switcher`: a `classifier` on the hidden state of the `host`, or a `lora` on it that is asked in text. The host is
    the last parent without it. `choice`: the `best` candidate, or a `draw` from the nucleus of `top_p`. `margin`: by
    which a candidate must score better than all others for a rollout to be learned from. `ties`: `drop` learns from no
    other rollouts; `stay` has who wrote last go on if it is among the best by this margin, else the best on average,
    and drops a rollout only if all are: so less is thrown away and fewer tokens change hands.
    """

    segment: int = Field(default=25, ge=1, le=8192)
    first: str | None = None
    last: str | None = None
    closing: str = ""
    wait: str = ""
    switcher: Literal["classifier", "lora"] = "classifier"
    host: str | None = None
    choice: Literal["best", "draw"] = "best"
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    margin: float = Field(default=0.1, ge=0.0, lt=1.0)
    ties: Literal["drop", "stay"] = "drop"
    rollouts: RolloutConfig = RolloutConfig()
    lora: LoraConfig | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _turns_fit(self) -> SwitchingConfig:
        try:
            _ = self.turns
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("switching.").rstrip(".")) from error
        return self

    @model_validator(mode="after")
    def _lora_fits(self) -> SwitchingConfig:
        if self.lora is not None and self.switcher != "lora":
            raise ValueError(f"lora: does not go with switcher {self.switcher}; remove it")
        try:
            _ = self.lora_options
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("switching.").rstrip(".")) from error
        return self

    @property
    def lora_options(self) -> LoraOptions:
        """How a switcher `lora` is trained."""
        return (self.lora or LoraConfig()).options(self.seed)

    @property
    def turns(self) -> Turns:
        """The rules of taking turns."""
        return Turns(self.segment, self.first, self.last, self.closing, self.wait)


def switching_fault(switching: SwitchingConfig, candidates: list[str], rooms: list[int]) -> str | None:
    """Why this section does not fit its study; None if it does.

    Args:
        candidates: names of the parents. rooms: `max_new_tokens` of the written tasks.
    """
    if not rooms:
        return "switching: needs written answers; give a task format: generation"
    if switching.host is not None and switching.host not in candidates:
        return f"switching.host: found {switching.host!r}, wanted one of the parents: {', '.join(candidates)}"
    try:
        for room in rooms:
            switching.turns.check(candidates, room)
            if not switching.turns.leave_choice(room):
                return (
                    f"switching.segment: found {switching.segment} tokens, with which first and last leave no segment "
                    f"of {room} tokens to choose an author for; shorten it"
                )
    except ConfigError as error:
        return str(error).rstrip(".")
    return None
