"""Disks and databases that fill up in a study: the cause is named, finished trials stay, and it goes on later."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from search.config.study_file import load_study_file
from search.errors import DiskError
from search.running.launch import create, reopen
from search.storage.store import StudyStore
from search.study import run
from tests.fault_table import Fault
from tests.faults.stores import claim, new_store
from tests.small_disk import fill, on_small_disk
from tests.study_process import AFTER_TELL, Striker, ended, results, said, sound, start, url_in, whole


def _once_more_in_one_process(disk: Path, study: Path) -> list[Any]:
    """What a notebook does: the same process makes room and runs the study again."""
    store, problem = create(load_study_file(study), url_in(disk), "cpu")
    try:
        run(store, problem, Striker("evaluated", 12, partial(fill, disk)))
    except DiskError as error:
        (disk / "filler").unlink()
        store, problem = reopen(url_in(disk), "pico", "cpu")
        run(store, problem)
        return [str(error), whole(url_in(disk))]
    raise AssertionError("the disk was not full")


@pytest.mark.fault(12)
def test_the_process_that_met_a_full_disk_may_run_the_study_again(
    study: Path, uninterrupted: str, tmp_path: Path
) -> None:
    """It could not give its trial back, and must not wait for itself."""
    message, ended_as = on_small_disk(tmp_path / "disk", 4096, _once_more_in_one_process, study)
    assert "no space left on the disk" in message
    assert ended_as == whole(uninterrupted)


def _full_and_later_not(disk: Path, study: Path, step: str, diary: Path) -> tuple[Any, ...]:
    """Runs a study whose disk fills up at a step of trial 12, looks at it, makes room and runs it to its end."""
    url = url_in(disk)
    full = partial(fill, disk)
    assert ended(start(study, url, step, 12, full, diary=diary, forked=True)) == DiskError.exit_code
    assert sound(url)
    before, leftovers = results(url), [path.name for path in disk.rglob("*new-*")]
    (disk / "filler").unlink()
    assert ended(start(study, url, diary=diary, forked=True)) == 0
    assert sound(url)
    return said(diary), before, results(url), leftovers, whole(url)


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    ("step", "file"),
    [
        ("evaluated", "evidence"),
        pytest.param("evidence", "study.db", marks=pytest.mark.slow),
        pytest.param(AFTER_TELL, "study.db", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_up_in_a_trial(
    study: Path, uninterrupted: str, tmp_path: Path, step: str, file: str, fault: Fault
) -> None:
    outcome = on_small_disk(tmp_path / "disk", 4096, _full_and_later_not, study, step, tmp_path / "diary")
    message, before, after, leftovers, ended_as = outcome
    assert message.startswith(f"{tmp_path / 'disk' / file}: no space left on the disk")
    assert "resume" in message
    assert len(before) >= 12
    assert leftovers == []
    fault.kept(before, after)
    assert ended_as == whole(uninterrupted)


@pytest.mark.fault(12)
def test_a_full_database_is_named_and_can_go_on_later(tmp_path: Path) -> None:
    url = url_in(tmp_path)
    store = new_store(url)
    kept = claim(store)
    store.complete(kept, [0.5, 0.5])
    pages = store._storage.engine.connect().exec_driver_sql("pragma page_count").scalar()
    limit = lambda c, _: c.execute(f"pragma max_page_count = {pages}")  # noqa: E731
    engine = store._storage.engine
    engine.dispose()
    sqlalchemy.event.listen(engine, "connect", limit)

    def fill() -> None:
        for index in range(2000):
            claim(store, **{f"group.{index}.{j}": 0.5 for j in range(20)})

    with pytest.raises(DiskError, match=r"study\.db: no space left on the disk\. Finished trials are safe"):
        fill()
    assert sound(url)
    again = StudyStore.open(url, "s")
    assert again.trials()[0].values == (0.5, 0.5)
    claim(again)
