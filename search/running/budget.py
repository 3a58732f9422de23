"""How far a study may go: numbers of trials, and scored tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from search.errors import ConfigError
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord


def set_budget(store: StudyStore, text: str | int | None, at_least: int = 0) -> int:
    """The number of search trials beyond the baselines: `80` sets it (never below what is done), `+50` adds to it.

    Args:
        at_least: what it is raised to if there is no text.
    """
    with store.exclusive():
        budget = int(store.attribute("trials"))
        if text is None and budget < at_least:
            store.set_attribute("trials", budget := at_least)
        if text is not None:
            number = str(text).strip()
            if not re.fullmatch(r"\+?[0-9]{1,8}", number):
                raise ConfigError(f"--trials {text}: wanted a number such as 80, or +50 to extend.")
            wanted = budget + int(number) if number.startswith("+") else int(number)
            budget = max(
                wanted, sum(r.state in ("complete", "stopped") and r.kind == "search" for r in store.trials())
            )
            store.set_attribute("trials", budget)
    return budget


def set_tokens(store: StudyStore, tokens: int | None) -> None:
    """Sets the scored tokens that the study may take, unless None is given; what is spent stays spent."""
    if tokens is not None:
        with store.exclusive():
            store.set_attribute("tokens", tokens)


def within_tokens(records: Sequence[TrialRecord], tokens: int) -> list[TrialRecord]:
    """The complete ones among the first records, by number, that together took at most so many scored tokens."""
    spent = np.cumsum([record.tokens for record in records])
    return [
        record
        for record, total in zip(records, spent, strict=True)
        if total <= tokens and record.state == "complete"
    ]


def expected_trials(records: Sequence[TrialRecord], trials: int, tokens: int | None) -> int:
    """How many of `trials` a study will have, baselines included, if those to come take the tokens of the first.

    Args:
        tokens: scored tokens that it may take; None for any number.
    """
    first = next((record.tokens for record in records if record.state == "complete" and record.tokens), 0)
    if tokens is None or not first:
        return trials
    there = sum(record.state in ("complete", "stopped") for record in records)
    left = tokens - sum(record.tokens for record in records)
    return min(trials, there + max(left, 0) // first)
