"""Who takes part in a comparison, and for how many tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from search.config.sampler import OPTUNA_SAMPLERS, PYMOO_ALGORITHMS
from search.config.strict_yaml import load_yaml
from search.config.study_file import StudyConfig, parse_study
from search.errors import ConfigError

LINE = "line"
_MANY = 1_000_000  # trials: the tokens end these studies


@dataclass(frozen=True)
class Entrant:
    """One engine with its options.

    Attributes:
        label: as the user wrote it. sampler: keys of a study file's `sampler`, without the seed.
    """

    label: str
    sampler: dict[str, Any]

    @property
    def seeds(self) -> int | None:
        """How many seeds make sense; None for any number."""
        return 1 if self.sampler["engine"] == LINE else None


@dataclass(frozen=True)
class Entry:
    """One run of one entrant: an ordinary study."""

    entrant: Entrant
    seed: int
    config: StudyConfig


def parse_entrants(text: str) -> list[Entrant]:
    """The entrants that `composite,gp,pymoo:nsga2:population=10` names; the uniform line is always among them, last.

    An entrant is an engine of its own (`composite`, `gradient`, `line`), one of Optuna's samplers, or `pymoo:NAME`,
    each with `:KEY=VALUE` for options of the study file's `sampler`.

    Raises:
        ConfigError: an option has no value, or one entrant is named twice.
    """
    found = [_entrant(part.strip()) for part in text.split(",") if part.strip()]
    found = [one for one in found if one.sampler["engine"] != LINE]
    labels = [one.label for one in found]
    if len(set(labels)) != len(labels):
        raise ConfigError(f"--engines {text}: one is named twice.")
    return [*found, Entrant(LINE, {"engine": LINE})]


def entries(config: StudyConfig, entrants: Sequence[Entrant], seeds: int, tokens: int) -> list[Entry]:
    """One study for every entrant and seed, by seed, so that an early stop leaves whole seeds.

    Raises:
        ConfigError: no such engine or option, or it does not go with the study.
    """
    found = []
    for seed in range(seeds):
        for one in entrants:
            if one.seeds is None or seed < one.seeds:
                found.append(Entry(one, seed, _config(config, one, seed, tokens)))
    return found


def budget_tokens(text: str, evaluation: int, baselines: int) -> int:
    """Scored tokens of a budget: `1500000`, or `60x` for 60 evaluations of the search split.

    Args:
        evaluation: tokens of one evaluation. baselines: how many of them parents and uniform line take.

    Raises:
        ConfigError: neither; or not more than the baselines take.

    >>> budget_tokens("60x", 1000, 11), budget_tokens("60000", 1000, 11)
    (60000, 60000)
    """
    match = re.fullmatch(r"([0-9]{1,15})(x?)", text.strip())
    if match is None:
        raise ConfigError(
            f"--budget {text}: wanted scored tokens, such as 1500000, or 60x for 60 evaluations."
        )
    tokens = int(match[1]) * (evaluation if match[2] else 1)
    if tokens <= baselines * evaluation:
        raise ConfigError(
            f"--budget {text}: parents and uniform line take {baselines * evaluation:,} tokens "
            f"({baselines}x). Give more."
        )
    return tokens


def _entrant(text: str) -> Entrant:
    first, *rest = text.split(":")
    sampler: dict[str, Any] = {"engine": first}
    if first in OPTUNA_SAMPLERS:
        sampler = {"engine": "optuna", "name": first}
    elif rest and "=" not in rest[0]:
        sampler["name"] = rest.pop(0)
    elif first in PYMOO_ALGORITHMS:
        sampler = {"engine": "pymoo", "name": first}
    for option in rest:
        key, equals, value = option.partition("=")
        if not equals or key == "seed":
            raise ConfigError(
                f"--engines {text}: found '{option}', wanted options such as population=10 (no seed)."
            )
        sampler[key] = load_yaml(value, f"--engines {text}")
    return Entrant(text, sampler)


def _config(config: StudyConfig, one: Entrant, seed: int, tokens: int) -> StudyConfig:
    slug = re.sub(r"[^a-z0-9]+", "-", one.label.lower()).strip("-")
    value = config.to_json()
    value["name"] = f"{config.name}-{slug}-{seed}"
    value["sampler"] = {**one.sampler, "seed": seed}
    value["split"] = {**value["split"], "report": "front"}
    value |= {"trials": _MANY, "tokens": tokens}
    return parse_study(value, f"--engines {one.label}")
