"""Runs the studies of a comparison, each in one process, everything in one storage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from search.results.compare.entrants import Entry
from search.running.launch import create
from search.running.memory import Memory
from search.running.problem import Problem
from search.storage.database import reserved
from search.storage.store import StudyStore
from search.study import POLL_SECONDS, run

logger = logging.getLogger("mergefront")

SHARES = (0.2, 0.5, 1.0)  # of the budget: when the fronts are looked at


def checkpoints(tokens: int) -> tuple[int, ...]:
    """Scored tokens at which the fronts are looked at."""
    return tuple(int(share * tokens) for share in SHARES)


def run_entries(
    entries: Sequence[Entry],
    problem: Problem,
    url: str,
    *,
    helping: bool = False,
    done: Callable[[Entry, StudyStore, float], None] | None = None,
) -> list[StudyStore]:
    """Runs every entry to its budget and scores its fronts on the report split; finished ones are left as they are.

    Several processes may do this at once: an entry is run by one of them, so each study is that of a single worker.
    What one entry scored is not scored again for another of the same process, but counted in full.

    Args:
        helping: come back when what is left is in the hands of others; else wait for these, and take over what a dead
            process left.
        done: called after each entry that this process ran, with its store and the seconds it took.

    Returns:
        The stores of the entries that this process finished or found finished, in the order of the entries.
    """
    memory = Memory()
    stores: dict[str, StudyStore] = {}
    while len(stores) < len(entries):
        before = len(stores)
        for entry in entries:
            name = entry.config.name
            if name in stores:
                continue
            with reserved(url, name) as mine:
                if not mine:
                    continue
                began = time.monotonic()
                assert entry.config.tokens is not None, "a comparison counts tokens"
                store, own = create(entry.config, url, problem=problem.under(entry.config))
                there = len(store.trials())
                run(store, own, checkpoints=checkpoints(entry.config.tokens), memory=memory)
                stores[name] = store
            if done is not None and len(store.trials()) > there:
                done(entry, store, time.monotonic() - began)
        if len(stores) == before:
            if helping:
                break
            time.sleep(POLL_SECONDS)
    return [stores[entry.config.name] for entry in entries if entry.config.name in stores]
