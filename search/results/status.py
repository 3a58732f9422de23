"""How a study stands, from its storage alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search.front import hypervolume, worst_corner
from search.merging.baselines import BASELINES, PARENTS, parent_count
from search.running.budget import expected_trials
from search.storage.database import shown
from search.storage.store import StudyStore
from search.storage.trials import State, TrialRecord, front_of

STATES: tuple[State, ...] = ("complete", "stopped", "running", "waiting", "failed")


@dataclass(frozen=True)
class Status:
    """Counts and rates.

    Attributes:
        hypervolume: over the corner of the parents' worst values, None until both are scored.
        tokens: scored on the search split so far, proposals included; token_limit: how many may be, None for any.
        tokens_saved: what scoring every candidate in full, in one go, would have taken beyond that; below 0 where parts
            cost more than they saved; None for a study without `racing` or `fidelity`.
    """

    study: str
    storage: str
    trials: dict[State, int]
    total: int
    front: int
    hypervolume: float | None
    seconds_per_trial: float | None
    failures: tuple[str, ...]
    tokens: int
    token_limit: int | None
    tokens_saved: int | None = None

    @property
    def to_go(self) -> int:
        return max(self.total - self.trials["complete"] - self.trials["stopped"], 0)

    @property
    def seconds_left(self) -> float | None:
        """At the measured pace, for one worker."""
        return None if self.seconds_per_trial is None else self.seconds_per_trial * self.to_go

    def to_json(self) -> dict[str, Any]:
        return {
            "study": self.study,
            "storage": self.storage,
            "trials": self.trials,
            "total": self.total,
            "to_go": self.to_go,
            "front": self.front,
            "hypervolume": self.hypervolume,
            "seconds_per_trial": self.seconds_per_trial,
            "seconds_left": self.seconds_left,
            "tokens": self.tokens,
            "token_limit": self.token_limit,
            "tokens_saved": self.tokens_saved,
            "failures": list(self.failures),
        }

    def text(self) -> str:
        called = {"stopped": "stopped early"}
        states = (
            ", ".join(f"{count} {called.get(state, state)}" for state, count in self.trials.items() if count)
            or "none"
        )
        volume = (
            "not known before both parents are scored"
            if self.hypervolume is None
            else f"{self.hypervolume:.4f}"
        )
        lines = [f"study        {self.study}", f"storage      {self.storage}"]
        lines += [f"trials       {states}; {self.to_go} of {self.total} to go"]
        lines += [f"front        {self.front} trials, hypervolume {volume}"]
        limit = "" if self.token_limit is None else f" of {self.token_limit:,}"
        lines += [f"tokens       {self.tokens:,}{limit} scored on the search split"]
        if self.tokens_saved is not None:
            whole = self.tokens + self.tokens_saved
            share = f" ({self.tokens_saved / whole:.1%})" if whole > 0 else ""
            lines += [f"saved        {self.tokens_saved:,} tokens{share} by scoring candidates in parts"]
        if self.seconds_per_trial is not None:
            left = "" if not self.to_go else f", {self.seconds_left:.0f} s left for one worker"
            lines.append(f"pace         {self.seconds_per_trial:.2f} s/trial{left}")
        lines += [f"failed       {reason}" for reason in self.failures[-3:]]
        return "\n".join(lines)


def read_status(store: StudyStore) -> Status:
    """Counts the trials of a study."""
    records = store.trials()
    objectives, config = store.attribute("objectives"), store.attribute("config")
    done = [record for record in records if record.state == "complete"]
    maximize = [bool(m) for _, m in objectives]
    counts = Counter(record.state for record in records)
    tried = [record for record in records if record.state in ("complete", "stopped")]
    seconds = [r.seconds for r in tried if r.seconds is not None and "same_as" not in r.attributes]
    return Status(
        study=store.name,
        storage=shown(store.url),
        trials={state: counts.get(state, 0) for state in STATES},
        total=expected_trials(
            records, _baselines(store) + int(store.attribute("trials")), store.attribute("tokens")
        ),
        front=len(front_of(done, maximize)),
        hypervolume=_volume(done, maximize, parent_count(config)),
        seconds_per_trial=float(np.median(seconds)) if seconds else None,
        failures=tuple(
            f"trial {r.number}: {r.attributes.get('error', 'unknown')}"
            for r in records
            if r.state == "failed"
        ),
        tokens=sum(record.tokens for record in records),
        token_limit=store.attribute("tokens"),
        tokens_saved=_saved(tried) if config.get("racing") or config.get("fidelity") else None,
    )


def _saved(tried: Sequence[TrialRecord]) -> int:
    """Baselines are scored in one go: the first one tells what that takes."""
    whole = next(
        (int(r.attributes["tokens"]) for r in tried if r.kind != "search" and "tokens" in r.attributes), 0
    )
    taken = [
        int(record.attributes["tokens"])
        for record in tried
        if record.kind == "search" and "tokens" in record.attributes
    ]
    return whole * len(taken) - sum(taken)


def _baselines(store: StudyStore) -> int:
    return int(store.attribute("facts").get("baselines", len(BASELINES)))


def _volume(done: list[TrialRecord], maximize: list[bool], wanted: int) -> float | None:
    """None until all `wanted` parents are scored."""
    parents = [record.values for record in done if record.kind in PARENTS]
    if len(parents) < wanted:
        return None
    corner = worst_corner(np.array(parents), maximise=maximize)
    return hypervolume(np.array([record.values for record in done]), corner, maximise=tuple(maximize))
