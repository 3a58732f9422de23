"""Runs the studies of a comparison: one process after the other's share, everything in one storage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from search.compare.entrants import Entry
from search.materials import Materials
from search.opening import create
from search.storage import StudyStore
from search.study import Memory, run

logger = logging.getLogger("mergefront")

SHARES = (0.2, 0.5, 1.0)  # of the budget: when the fronts are looked at


def checkpoints(tokens: int) -> tuple[int, ...]:
    """Scored tokens at which the fronts are looked at."""
    return tuple(int(share * tokens) for share in SHARES)


def run_entries(
    entries: Sequence[Entry],
    materials: Materials,
    url: str,
    *,
    done: Callable[[Entry, StudyStore, float], None] | None = None,
) -> list[StudyStore]:
    """Runs every entry to its budget and scores its fronts on the report split; finished ones are left as they are.

    What one entry scored is not scored again for another, but counted in full.

    Args:
        done: called after each entry with its store and the seconds it took.
    """
    memory = Memory()
    stores = []
    for entry in entries:
        began = time.monotonic()
        assert entry.config.tokens is not None, "a comparison counts tokens"
        store, own = create(entry.config, url, materials=materials.under(entry.config))
        run(store, own, checkpoints=checkpoints(entry.config.tokens), memory=memory)
        stores.append(store)
        if done is not None:
            done(entry, store, time.monotonic() - began)
    return stores
