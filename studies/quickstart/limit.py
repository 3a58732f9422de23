"""How near a comparison's engines come to the limit: the best front that anybody found, everything pooled.

    python studies/quickstart/limit.py --storage sqlite:///runs/quickstart/study.db --storage sqlite:///runs/limit.db

Pools the complete trials of all finished studies in the storages with the parents, groups, questions and objectives
of the first one. The pooled front is chosen on the search split; each of its points is on the front of its own study,
so its report split is scored already. Nothing is merged or scored here.

A row is an entrant of the comparison, over its seeds: the hypervolume of its front as the budget left it, over the
pooled front's, on either split. Brackets: 95 % bootstrap intervals over questions and seeds.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna

from search.front import non_dominated
from search.results.alternatives import Scores
from search.results.compare.judge import Judge, Row, Volume, mean_volume, ratio
from search.results.intervals import Cell
from search.storage.database import connect
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord, front_of

POOLED = "everything, pooled"


@dataclass(frozen=True)
class Member:
    """A study in the pool: its complete trials, and its front with what it scored on the report split."""

    name: str
    done: list[TrialRecord]
    front: list[tuple[TrialRecord, Row]]


def finished(store: StudyStore) -> bool:
    """Whether its front is scored on the report split."""
    done = complete(store)
    numbers = front_of(done, [maximize for _, maximize in store.attribute("objectives") or ()])
    scores = Scores(store)
    return bool(done) and all(scores.digest(number, "report") is not None for number in (0, *numbers))


def complete(store: StudyStore) -> list[TrialRecord]:
    return [record for record in store.trials() if record.state == "complete"]


def member(store: StudyStore, judge: Judge) -> Member:
    scores, done = Scores(store), complete(store)
    numbers = front_of(done, judge.maximize)
    front = [(record, judge.row(scores, record.number)) for record in done if record.number in numbers]
    return Member(store.name, done, front)


def pooled(members: Sequence[Member], judge: Judge) -> list[tuple[TrialRecord, Row]]:
    """The front of all fronts on the search split."""
    everybody = [owner for one in members for owner in one.front]
    kept = non_dominated(np.array([record.values for record, _ in everybody]), maximise=judge.maximize)
    return [owner for owner, on_front in zip(everybody, kept, strict=True) if on_front]


def entrants(members: Sequence[Member]) -> dict[str, list[Member]]:
    """Studies of one entrant of a comparison: `NAME-ENGINE-SEED`, budgets in tokens."""
    found: dict[str, list[Member]] = {}
    for one in members:
        found.setdefault(re.sub(r"-[0-9]+$", "", one.name), []).append(one)
    return found


def volume(owners: Sequence[tuple[TrialRecord, Row]], judge: Judge) -> Volume:
    return judge.volume([row for _, row in owners])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--storage", action="append", required=True, help="repeatable")
    stores = [
        StudyStore.open(url, name)
        for url in parser.parse_args().storage
        for name in sorted(optuna.get_all_study_names(connect(url, create=False)))
    ]
    ready = [store for store in stores if finished(store)]
    if not ready:
        parser.error("none of these studies is finished; resume them first")
    judge, first = Judge(ready[0]), _questions(ready[0])
    pool = [member(store, judge) for store in ready if _questions(store) == first]
    best = pooled(pool, judge)
    limit, searched = volume(best, judge), judge.searched([record for record, _ in best])
    trials = sum(len(one.done) for one in pool)
    recipes = len({record.attributes["recipe"] for one in pool for record in one.done})
    print(f"{len(pool)} studies, {trials:,} trials of {recipes:,} recipes; {len(best)} on the pooled front")
    print("| studies | seeds | trials | HV search | of the limit | HV report | of the limit |")
    print("|---|---|---|---|---|---|---|")
    print(f"| {POOLED} | | {trials:,} | {1000 * searched:.2f} | 1 | {_volume(limit.cell)} | 1 |")
    for label, ones in sorted(entrants(pool).items()):
        found = mean_volume([volume(one.front, judge) for one in ones])
        on_search = float(np.mean([judge.searched(one.done) for one in ones]))
        count = np.mean([len(one.done) for one in ones])
        print(
            f"| {label} | {len(ones)} | {count:.0f} | {1000 * on_search:.2f} | {on_search / searched:.3f} | "
            f"{_volume(found.cell)} | {_share(ratio(found, limit))} |"
        )


def _questions(store: StudyStore) -> tuple[object, object]:
    """Parents, groups, questions and objectives: studies that agree in them can be pooled."""
    attributes = store.attributes()
    return attributes.get("identity"), attributes.get("objectives")


def _volume(cell: Cell) -> str:
    return f"{1000 * cell.value:.2f} [{1000 * cell.low:.2f}, {1000 * cell.high:.2f}]"


def _share(cell: Cell | None) -> str:
    return "-" if cell is None else f"{cell.value:.3f} [{cell.low:.3f}, {cell.high:.3f}]"


if __name__ == "__main__":
    main()
