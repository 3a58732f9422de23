"""The section `switching` of a study file: how the parents take turns, and how a switcher learns who is next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from objectives.questions.config import Section
from search.errors import ConfigError


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
    """How the LoRA of a switcher is trained: see `search.config.switching.LoraOptions`, which checks values."""

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

    `segment` counts tokens; `first`, `last`, `closing` and `wait` are the rules of `search.config.switching.Turns`.
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


_MOST = {"rank": 8192, "epochs": 10_000, "batch": 65_536, "seed": 2**32 - 1}


@dataclass(frozen=True)
class LoraOptions:
    """How a LoRA is trained to name who writes next.

    Attributes:
        rank, alpha: the product of the two factors is scaled by alpha / rank.
        dropout: of what enters the factors, in training.
        rate: highest rate of AdamW. It rises over the first `warmup` of all steps and falls as a cosine to 0. The
            published one is for 8B models and thousands of rows; with few steps or a small model it teaches nothing.
        epochs, batch: the rows of a step are drawn without repetition within an epoch.
        targets: last names of the linear layers that are adapted, in all blocks.
        held: share of the questions whose rows are kept from training, and only reported on; 0 for none.
        seed: of the first factors, dropout, the order of the rows, and the questions that are held out.

    Raises:
        ConfigError: a value out of its range.
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    rate: float = 1e-5
    warmup: float = 0.1
    epochs: int = 5
    batch: int = 32
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    held: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value, least = getattr(self, name), int(name != "seed")
            if type(value) is not int or not least <= value <= most:
                raise _refused(name, value, f"a whole number, {least} to {most:,}")
        for name in ("alpha", "rate"):
            value = getattr(self, name)
            if not _number(value) or not 0.0 < value < math.inf:
                raise _refused(name, value, "a positive number")
        for name in ("dropout", "held"):
            value = getattr(self, name)
            if not _number(value) or not 0.0 <= value < 1.0:
                raise _refused(name, value, "a share, 0 or more and below 1")
        if not _number(self.warmup) or not 0.0 <= self.warmup <= 1.0:
            raise _refused("warmup", self.warmup, "a share, 0 to 1")
        named = isinstance(self.targets, tuple) and all(isinstance(one, str) and one for one in self.targets)
        if not named or not self.targets or len(set(self.targets)) < len(self.targets):
            raise _refused("targets", self.targets, "different names of linear layers, such as q_proj")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refused(name: str, value: object, wanted: str) -> ConfigError:
    return ConfigError(f"switching.lora.{name}: found {value!r} (wanted {wanted}).")


@dataclass(frozen=True)
class Turns:
    """Rules of a relay. The two published variants (Feng et al., arXiv 2510.09913, and its successor library MoCo):

    `Turns(50, first="post", last="post", closing="The final answer is")` forces the aligned model at both ends;
    `Turns(25, wait=" Wait,")` forces nobody, and may go on once where an author ends early.

    Attributes:
        segment: tokens that an author writes before the next is chosen, 1 or more.
        first: who writes the first segment; None lets the policy choose.
        last: who writes the last one: the last whole segment within `max_new_tokens`, or the one after another author
            ended early.
        closing: text before the last segment; needs `last`.
        wait: text that is put once where an author ends a response early, which then goes on; does not go with `last`.

    Raises:
        ConfigError: a value out of its range, or two that do not go together.
    """

    segment: int
    first: str | None = None
    last: str | None = None
    closing: str = ""
    wait: str = ""

    def __post_init__(self) -> None:
        if self.segment < 1:
            raise ConfigError(f"switching.segment: found {self.segment} (wanted 1 token or more).")
        if self.closing and self.last is None:
            raise ConfigError("switching.closing: stands before the last segment; say who writes it (last).")
        if self.wait and self.last is not None:
            raise ConfigError(
                "switching.wait: does not go with last, which follows an early end. Remove one of them."
            )

    def leave_choice(self, room: int) -> bool:
        """Whether some segment of a response of `room` tokens has an author to choose, the closing text left aside."""
        free = self.segment if self.first is not None else 0
        return room - free >= 2 * self.segment if self.last is not None else room > free

    def check(self, names: Sequence[str], room: int) -> None:
        """Raises ConfigError where a name is no candidate's, or a segment does not fit into `room` tokens."""
        if len(names) < 2:
            raise ConfigError(f"switching: found {len(names)} candidates (wanted 2 or more).")
        for key, name in (("first", self.first), ("last", self.last)):
            if name is not None and name not in names:
                raise ConfigError(
                    f"switching.{key}: found {name!r} (wanted one of the candidates: {', '.join(names)})."
                )
        if self.segment > room:
            raise ConfigError(
                f"switching.segment: found {self.segment} tokens (wanted at most max_new_tokens, {room})."
            )
