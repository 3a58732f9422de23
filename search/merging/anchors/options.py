"""What can be chosen when anchors are made and blocks are adapted to them; the defaults are the paper's (App. C.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from search.errors import ConfigError

Distance = Literal["cosine", "squared", "l1"]
Init = Literal["weight", "gauss", "data"]

DISTANCES: tuple[Distance, ...] = ("cosine", "squared", "l1")
INITS: tuple[Init, ...] = ("weight", "gauss", "data")
_MOST = {"n": 2**20, "tokens": 8192, "sigma_steps": 1_000_000}
_SEEDS = 2**32 - 1
RATE_FROM_PRE, RATE_OF_FACTORS = 5e-5, 1e-2


@dataclass(frozen=True)
class AnchorOptions:
    """How the anchors of every block are made. `steps=0` is a control: anchors that are not optimised.

    Attributes:
        n: anchors for each expert and block (paper: 64).
        tokens: positions of an anchor (paper: 5 for RoBERTa, 50 to 257 for vision transformers).
        steps: of AdamW on all anchors at once (paper: 1200, though 40 already beat task arithmetic there). A better
            alignment is not always a better merge: compare merges.
        rate: of AdamW (paper: 1e-2).
        decay: weight decay of AdamW on the anchors; torch's default, the paper names none.
        distance: between the outputs of pre's and the expert's block (paper: cosine).
        init: first anchors. `weight`: random rows of the expert's matrices; `gauss`: sigma * N(0, 1);
            `data`: hidden states of given tokens in pre (with `steps=0`, the control of real data).
        sigma: of `gauss` (paper: 0.01).
        sigmas: if any, `sigma` is instead the one of these that aligns best in one block after `sigma_steps`.
        sigma_steps: see there.
        seed: of the first anchors.
    """

    n: int = 64
    tokens: int = 5
    steps: int = 1200
    rate: float = 1e-2
    decay: float = 1e-2
    distance: Distance = "cosine"
    init: Init = "weight"
    sigma: float = 0.01
    sigmas: tuple[float, ...] = ()
    sigma_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError at the first value that makes no sense."""
        for name in ("n", "tokens", "sigma_steps"):
            _whole(f"anchors.{name}", getattr(self, name), 1, _MOST[name])
        _whole("anchors.steps", self.steps, 0)
        _whole("anchors.seed", self.seed, 0, _SEEDS)
        _positive("anchors.rate", self.rate)
        _positive("anchors.decay", self.decay, zero=True)
        for sigma in (self.sigma, *self.sigmas):
            _positive("anchors.sigma", sigma)
        _one_of("anchors.distance", self.distance, DISTANCES)
        _one_of("anchors.init", self.init, INITS)
        if self.sigmas and self.init != "gauss":
            raise ConfigError(f"anchors.sigmas: only init gauss has a sigma (found init {self.init}).")


@dataclass(frozen=True)
class AdaptOptions:
    """How a block is fitted to the experts' outputs on their anchors. `epochs=0` leaves the start as it is.

    Attributes:
        epochs: over the pooled anchors of all experts (paper: 100, for large models 15 to 50).
        batch: anchors a step of Adam (paper: 128).
        rate: of Adam; None is the paper's: 5e-5 on tensors (Eq. 5), 1e-2 on factors (Eq. 6). A step moves an element by
            about the rate, so with few steps (epochs * experts * n / batch) 5e-5 may end long before the experts.
        distance: between the outputs (paper: cosine for vision, squared for language models).
        seed: of the order of the anchors.
    """

    epochs: int = 100
    batch: int = 128
    rate: float | None = None
    distance: Distance = "cosine"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError at the first value that makes no sense."""
        _whole("adapt.epochs", self.epochs, 0)
        _whole("adapt.batch", self.batch, 1)
        _whole("adapt.seed", self.seed, 0, _SEEDS)
        if self.rate is not None:
            _positive("adapt.rate", self.rate)
        _one_of("adapt.distance", self.distance, DISTANCES)


def _whole(name: str, value: object, least: int, most: int = 1_000_000) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{name}: found {value!r} (wanted a whole number, {least} to {most:,}).")


def _positive(name: str, value: object, *, zero: bool = False) -> None:
    good = isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or (zero and value == 0))
    if not good:
        raise ConfigError(
            f"{name}: found {value!r} (wanted a {'number from 0' if zero else 'positive number'})."
        )


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: found {value!r} (wanted {', '.join(known)}).")
