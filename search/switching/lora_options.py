"""What can be chosen when a switcher is trained; the defaults are those of the published training code (MoCo)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from search.errors import ConfigError

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
