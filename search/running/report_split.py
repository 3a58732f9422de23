"""The report split, once the search is over: shared by all workers of a study, every recipe scored by one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from search.interrupt import check_interrupted, pause
from search.running.observer import Observer
from search.storage.database import reserved
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord

POLL_SECONDS = 2.0

# SHA-256 of the evidence of a recipe's answers and, where answers are sampled, of its diversity.
Scored = tuple[str, str | None]


def unreported(records: Sequence[TrialRecord], known: Mapping[str, Any]) -> list[TrialRecord]:
    """Those trials that are not scored on the report split yet; `known` are the study's attributes."""
    return [record for record in records if f"report:{record.number}" not in known]


def score_report_split(
    store: StudyStore,
    records: Sequence[TrialRecord],
    score: Callable[[TrialRecord], Scored],
    observer: Observer,
) -> None:
    """Sees to it that all of these trials are scored on the report split, by this worker or by others.

    A recipe is scored by the worker that reserves it. If that one dies, the system lets go of it, and another takes it.

    Args:
        score: what a trial's recipe answers to the report split, stored as evidence.
    """
    left = unreported(records, store.attributes())
    of = len(left)
    observer.reporting(0, of)
    while left:
        for record in left:
            check_interrupted()
            # A purpose of its own: who runs a comparison's entries holds a reservation meanwhile.
            name = f"{store.name}:{record.attributes['recipe']}"
            with reserved(store.url, name, purpose="report") as mine:
                if mine:
                    _report(store, record, records, score)
        before, left = len(left), unreported(records, store.attributes())
        if len(left) < before:
            observer.reporting(of - len(left), of)
        else:
            pause(POLL_SECONDS)  # others have the last ones; should they die, these are ours


def _report(
    store: StudyStore,
    record: TrialRecord,
    records: Sequence[TrialRecord],
    score: Callable[[TrialRecord], Scored],
) -> None:
    known = store.attributes()
    if not unreported([record], known):
        return
    twins = (twin for twin in records if twin.attributes["recipe"] == record.attributes["recipe"])
    twin = next((twin for twin in twins if f"report:{twin.number}" in known), None)
    if twin is None:
        answered, sampled = score(record)
    else:
        answered, sampled = known[f"report:{twin.number}"], known.get(f"diversity:{twin.number}")
    if sampled is not None:
        store.set_attribute(f"diversity:{record.number}", sampled)
    store.set_attribute(f"report:{record.number}", answered)  # last: its presence says that all is there
