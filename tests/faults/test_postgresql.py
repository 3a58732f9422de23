"""Workers and servers that die while a study is on PostgreSQL: real processes, a real server, real restarts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import search.storage.postgresql
from search.merging.baselines import BASELINES
from search.storage.store import StudyStore
from tests.fault_table import Fault
from tests.faults.conftest import TRIALS
from tests.postgresql_server import PostgreSQLMissing, Server, running_server
from tests.study_process import STEPS, ended, results, said, start, whole

TOTAL = len(BASELINES) + TRIALS


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """One that the test may stop."""
    monkeypatch.setenv("MERGEFRONT_EVIDENCE", str(tmp_path / "shared"))
    try:
        with running_server() as own:
            yield own
    except PostgreSQLMissing as missing:
        pytest.skip(str(missing))


def set_up(folder: str, patience: float = 60.0) -> None:
    """What a child does first: the evidence of all workers lies in one folder."""
    os.environ["MERGEFRONT_EVIDENCE"] = f"{folder}/shared"
    search.storage.postgresql.WAIT_SECONDS = patience


def slow_down() -> None:
    time.sleep(0.3)


def pause(folder: str) -> None:
    """Says that the step is reached, once, and waits until it may go on."""
    try:
        os.mkdir(f"{folder}/reached")
    except FileExistsError:
        return
    while not os.path.exists(f"{folder}/go"):
        time.sleep(0.02)


def reached(folder: Path, process: Any) -> None:
    deadline = time.monotonic() + 90
    while not (folder / "reached").exists():
        assert process.is_alive(), "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.fault(7)
@pytest.mark.slow
def test_two_workers_one_killed_five_times_meet_the_budget_and_keep_every_finished_trial(
    study: Path, postgresql_url: str, tmp_path: Path, fault: Fault
) -> None:
    """Oracle: counting, and the results of finished trials as they stood at each kill."""
    share = partial(set_up, str(tmp_path))
    other = start(study, postgresql_url, "merged", 0, slow_down, before=share)
    seen: dict[int, Any] = {}
    for step in (*STEPS[:4], "evidence"):
        victim = start(study, postgresql_url, step, 0, before=share)
        assert ended(victim) == -signal.SIGKILL, step
        after = results(postgresql_url)
        fault.kept(seen, after)
        seen = after
    fault.struck(5)
    assert len(seen) < TOTAL, "the study was over before the last kill"
    heir = start(study, postgresql_url, before=share)
    assert [ended(heir), ended(other)] == [0, 0]
    fault.kept(seen, results(postgresql_url))
    trials = StudyStore.open(postgresql_url, "pico").trials()
    assert [(t.number, t.state) for t in trials] == [(number, "complete") for number in range(TOTAL)]
    assert sum(t.attributes["tries"] - 1 for t in trials) == 5, "each kill interrupted one trial"


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("mode", "step"), [("fast", "merged"), pytest.param("immediate", "evidence", marks=pytest.mark.slow)]
)
def test_a_server_that_restarts_is_waited_for(
    study: Path, uninterrupted: str, server: Server, tmp_path: Path, fault: Fault, mode: str, step: str
) -> None:
    """The worker evaluates when the server stops, and has a result to tell before the server is back."""
    share = partial(set_up, str(tmp_path))
    url = server.url()
    worker = start(study, url, step, 13, partial(pause, str(tmp_path)), before=share)
    reached(tmp_path, worker)
    before = results(url)
    assert set(before) == set(range(13))
    server.stop(mode)
    (tmp_path / "go").touch()
    time.sleep(1.5)
    assert worker.is_alive(), "it waits"
    server.start()
    fault.kept(before, results(url))
    assert ended(worker) == 0
    fault.kept(before, results(url))
    assert whole(url) == whole(uninterrupted)


@pytest.mark.fault(13)
@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_worker_in_one_line(
    study: Path, uninterrupted: str, server: Server, tmp_path: Path, fault: Fault
) -> None:
    share, diary = partial(set_up, str(tmp_path), 1.0), tmp_path / "diary"
    url = server.url()
    worker = start(study, url, "evaluated", 12, partial(pause, str(tmp_path)), before=share, diary=diary)
    reached(tmp_path, worker)
    before = results(url)
    server.stop("immediate")
    (tmp_path / "go").touch()
    assert ended(worker) == 4
    error = said(diary)
    assert "no connection" in error
    assert len(error.splitlines()) == 1
    assert server.password not in error
    server.start()
    fault.kept(before, results(url))
    assert ended(start(study, url, before=share)) == 0
    fault.kept(before, results(url))
    assert whole(url) == whole(uninterrupted)


@pytest.mark.fault(13)
@pytest.mark.slow
def test_a_server_that_fails_again_and_again_costs_no_finished_trial(
    study: Path, server: Server, tmp_path: Path, fault: Fault
) -> None:
    """The server fails as its machine might, at moments that nobody chose. A worker survives it, or exits with 4."""
    share, url = partial(set_up, str(tmp_path)), server.url()
    diaries = [tmp_path / "one", tmp_path / "two"]

    def begin(diary: Path) -> Any:
        return start(study, url, "merged", 0, slow_down, before=share, diary=diary)

    workers = [begin(diary) for diary in diaries]
    seen: dict[int, Any] = {}
    ends: list[int] = []
    crashes = 0
    while any(worker.is_alive() for worker in workers):
        time.sleep(1.7)
        if crashes < 6:
            crashes += 1
            server.stop("immediate")
            server.start()
            if crashes > 1 or seen:
                fault.kept(seen, results(url))
            seen = results(url) if _launched(url) else {}
        for index, worker in enumerate(workers):
            if not worker.is_alive() and worker.exitcode != 0:
                ends.append(worker.exitcode)
                assert len(said(diaries[index]).splitlines()) == 1
                workers[index] = begin(diaries[index])
    fault.struck(crashes)
    assert crashes >= 3
    assert set(ends) <= {4}
    assert [ended(worker) for worker in workers] == [0, 0]
    fault.kept(seen, results(url))
    trials = StudyStore.open(url, "pico").trials()
    assert [(t.number, t.state) for t in trials] == [(number, "complete") for number in range(TOTAL)]


def _launched(url: str) -> bool:
    return StudyStore.find(url, "pico") is not None
