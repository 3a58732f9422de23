"""What is PostgreSQL's alone: how many connections a worker holds, locks that go with a session, errors in one line."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy.exc import OperationalError

import search.study
from search.config.study_file import load_study_file
from search.errors import LostConnectionError, StorageError
from search.running.launch import create
from search.running.observer import Observer, Step
from search.running.problem import Problem
from search.storage.database import exclusive, reserved
from search.storage.postgresql import lock_key
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord
from search.study import run
from tests.conftest import Cli
from tests.faults.stores import claim, new_store
from tests.pico_study import write_study
from tests.postgresql_server import Server, running_server


def sessions(server: Server, url: str) -> int:
    """Connections to a database at this moment; one that is closed takes the server a moment."""
    counts = f"select count(*) from pg_stat_activity where datname = '{url.rpartition('/')[2]}'"
    for _ in range(40):
        found = int(server.sql(counts)[0][0])
        if found == 0:
            break
        time.sleep(0.02)
    return found


def end_sessions(server: Server, url: str) -> int:
    """Ends them, as a restart or a network would; returns how many."""
    name = url.rpartition("/")[2]
    ended = server.sql(
        f"select pg_terminate_backend(pid, 5000) from pg_stat_activity where datname = '{name}'"
    )
    return len(ended)


def test_a_worker_holds_no_connection_while_it_evaluates_and_one_while_it_proposes(
    postgresql: Server, postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the server's own list of sessions, at every step of a study.

    On the report split a recipe's reservation is a session.
    """
    seen: dict[str, set[int]] = defaultdict(set)
    held: set[int] = set()

    class Counting(Observer):
        reports = False

        def step(self, step: Step, trial: TrialRecord) -> None:
            if trial.number in (0, 12):
                (held if self.reports else seen[step]).add(sessions(postgresql, postgresql_url))

        def reporting(self, done: int, of: int) -> None:
            self.reports = True
            if done < 2:
                seen["reporting"].add(sessions(postgresql, postgresql_url))

    propose = search.study._proposed

    def counted(*arguments: Any) -> Any:
        seen["proposing"].add(sessions(postgresql, postgresql_url))
        return propose(*arguments)

    monkeypatch.setattr(search.study, "_proposed", counted)
    run(*create(load_study_file(write_study(tmp_path, trials=2)), postgresql_url, "cpu"), Counting())
    assert seen.pop("proposing") == {1}
    assert set(seen) == {"asked", "merging", "merged", "evaluated", "evidence", "reporting"}
    assert set.union(*seen.values()) == {0}
    assert held == {1}


def test_who_lost_the_session_of_a_lock_writes_nothing_under_it(
    postgresql: Server, postgresql_url: str
) -> None:
    store = new_store(postgresql_url)
    kept = claim(store)

    def work_without_the_lock() -> None:
        with store.exclusive():
            assert end_sessions(postgresql, postgresql_url) == 1
            with exclusive(postgresql_url, "s"):
                pass  # the lock is free: somebody else may have taken it and let it go again
            with pytest.raises(LostConnectionError):
                store.annotate(kept, "late", True)
            store.set_attribute("late", True)

    with pytest.raises(LostConnectionError, match=r"connection was lost.*Finished trials are safe") as loss:
        work_without_the_lock()
    assert "\n" not in str(loss.value)
    again = StudyStore.open(postgresql_url, "s")
    assert again.attribute("late") is None
    assert "late" not in again.trials()[0].attributes
    assert store.complete(kept, [0.5, 0.5]), "the next time it has a session of its own again"


def test_a_beat_that_finds_its_connection_dead_does_not_open_another_for_who_holds_the_lock(
    postgresql: Server, postgresql_url: str
) -> None:
    """SQLAlchemy renews all connections of a pool once one was found dead."""
    store = new_store(postgresql_url)
    number = claim(store)

    def work_without_the_lock() -> None:
        with store.exclusive():
            end_sessions(postgresql, postgresql_url)
            beat = threading.Thread(target=store.annotate, args=(number, "beat", 1))
            beat.start()
            beat.join()
            store.set_attribute("late", True)

    with pytest.raises(LostConnectionError):
        work_without_the_lock()
    assert store.attribute("late") is None
    assert store.trials()[0].attributes["beat"] == 1


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_result_is_told_once_more_when_the_connection_breaks(
    postgresql: Server, postgresql_url: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Oracle: `complete` says true, and there is one trial with its values, whether the first try was stored or not."""
    store = new_store(postgresql_url)
    number, set_state, cuts = claim(store), store._set_state, iter([True])

    def cut(*arguments: Any, **options: Any) -> None:
        first = next(cuts, False)
        if first and moment == "before":
            end_sessions(postgresql, postgresql_url)
        set_state(*arguments, **options)
        if first:
            raise LostConnectionError("the answer to the commit did not arrive")

    monkeypatch.setattr(store, "_set_state", cut)
    assert store.complete(number, [0.25, 0.5], {"evidence": "e"})
    (record,) = StudyStore.open(postgresql_url, "s").trials()
    assert (record.state, record.values, record.attributes["evidence"]) == ("complete", (0.25, 0.5), "e")
    assert not store.complete(number, [0.75, 0.5]), "it is over"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_trial_is_asked_for_once_more_when_the_connection_breaks(
    postgresql: Server, postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The lock is lost while a trial is claimed. Oracle: the same study that was not cut, in a SQLite file."""
    config = load_study_file(write_study(tmp_path, trials=2))
    uncut, _ = create(config, f"sqlite:///{tmp_path / 'study.db'}", "cpu")
    run(uncut, problem := Problem.open(config, "cpu"), report=False)
    claim, cuts = StudyStore.claim, iter([False] * len(problem.baselines) + [True])

    def cut(*arguments: Any) -> TrialRecord:
        if not next(cuts, False):
            return claim(*arguments)
        if moment == "after":
            claim(*arguments)
        assert end_sessions(postgresql, postgresql_url) == 1
        return claim(*arguments)

    monkeypatch.setattr(StudyStore, "claim", cut)
    store, problem = create(config, postgresql_url, "cpu", problem=problem)
    run(store, problem, report=False)

    def drawn(one: StudyStore) -> list[Any]:
        return [(t.number, t.state, dict(t.coefficients), t.attributes["tries"]) for t in one.trials()]

    assert drawn(store) == drawn(uncut)
    assert len(drawn(store)) == len(problem.baselines) + 2
    assert next(cuts, None) is None


def test_a_lock_is_waited_for_whatever_the_servers_time_limits_are(
    postgresql: Server, postgresql_url: str
) -> None:
    new_store(postgresql_url)
    limits = ("statement_timeout", "lock_timeout", "idle_session_timeout", "transaction_timeout")
    for (limit,) in postgresql.sql(f"select name from pg_settings where name in {limits}"):
        postgresql.sql(f"alter database {postgresql_url.rpartition('/')[2]} set {limit} = '200ms'")
    got: list[float] = []

    def wait() -> None:
        with exclusive(postgresql_url, "s"):
            got.append(time.monotonic())

    with StudyStore.open(postgresql_url, "s").exclusive():
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(1.0)
        assert not got
    waiting.join(20)
    assert got
    with reserved(postgresql_url, "one") as mine:
        assert mine
        time.sleep(0.5)
        with reserved(postgresql_url, "one") as twice:
            assert not twice


def test_who_waits_for_a_lock_is_patient_not_hasty(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A balancer that takes every login and cuts every question, since its server is away."""
    store, asked = new_store(postgresql_url), iter(range(1000))

    def cut(*_: Any) -> None:
        assert next(asked) < 20, "it asks again and again"
        raise OperationalError("select", None, Exception("server closed"), connection_invalidated=True)

    monkeypatch.setattr("search.storage.postgresql._asked", cut)
    monkeypatch.setattr("search.storage.postgresql.WAIT_SECONDS", 1.0)
    with pytest.raises(LostConnectionError, match="server closed"), store.exclusive():
        pass


def test_a_reservation_that_the_server_dropped_is_told(
    postgresql: Server, postgresql_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mergefront"), "propagate", True)
    with reserved(postgresql_url, "one") as mine:
        assert mine
        end_sessions(postgresql, postgresql_url)
    assert "let go of 'reserved:one' meanwhile: another process may work on it, too" in caplog.text


def test_a_read_is_repeated_once(
    postgresql: Server, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(postgresql_url)
    number, refresh, cuts = claim(store), store._history.refresh, iter([True])

    def cut() -> None:
        if next(cuts, False):
            raise OperationalError("select", None, Exception("server closed"), connection_invalidated=True)
        refresh()

    monkeypatch.setattr(store._history, "refresh", cut)
    assert [t.number for t in store.trials()] == [number]


def test_a_session_that_has_a_lock_is_watched_by_the_server(postgresql_url: str) -> None:
    """A machine that loses its power while it holds a lock says nothing; the default is to notice after two hours."""
    store = new_store(postgresql_url)
    with store.exclusive(), store._storage.engine.connect() as connection:
        shown = [
            connection.exec_driver_sql(f"show {name}").scalar()
            for name in ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count")
        ]
        assert shown == ["30", "10", "3"]
        assert connection.exec_driver_sql("show tcp_user_timeout").scalar() in ("60000", "1min")


def test_a_pooler_of_transactions_is_noticed(postgresql_url: str) -> None:
    """Through such a pooler a lock is given back in another session than it was taken in."""
    store = new_store(postgresql_url)
    engine = store._storage.engine
    with (
        pytest.raises(StorageError, match="PgBouncer between, let it pool sessions"),
        store.exclusive(),
        engine.connect() as connection,
    ):
        connection.exec_driver_sql("select pg_advisory_unlock_all()")


def test_locks_have_64_bits() -> None:
    """`plumless` and `buckeroo` have the same CRC-32."""
    keys = {lock_key(name) for name in ("plumless", "buckeroo", "", "reserved:plumless")}
    assert len(keys) == 4
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert max(abs(key) for key in keys) > 2**32


def test_a_signal_ends_who_waits_for_a_lock(postgresql_url: str) -> None:
    new_store(postgresql_url)
    code = """
import sys
from search.storage.database import exclusive
from search.interrupt import Interrupted, interruptible
try:
    with interruptible():
        print("waiting", flush=True)
        with exclusive(sys.argv[1], "s"):
            sys.exit(7)
except Interrupted as stop:
    sys.exit(stop.exit_code)
"""
    with exclusive(postgresql_url, "s"):
        child = subprocess.Popen(
            [sys.executable, "-c", code, postgresql_url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        time.sleep(0.5)
        child.send_signal(signal.SIGTERM)
        _, error = child.communicate(timeout=60)  # the lock is never let go
        assert (child.returncode, error) == (143, "")


def test_what_is_wrong_with_a_server_is_said_in_one_line(postgresql: Server, cli: Cli) -> None:
    url = postgresql.url()
    cases = {
        url.replace(f":{postgresql.port}/", ":1/"): "no connection: .*refused",
        url.replace(postgresql.password, "wrong-secret"): "password authentication failed",
        url.replace("/postgres", "/nowhere"): 'database "nowhere" does not exist',
        url.replace("127.0.0.1", "no-such-host.invalid"): "no connection: .*no-such-host.invalid",
    }
    for wrong, reason in cases.items():
        for command in (("status", "pico"), ("front", "pico"), ("resume", "pico")):
            code, out, err = cli(*command, "--storage", wrong)
            assert (code, out) == (4, ""), err
            assert re.search(reason, err), err
            assert len(err.strip().splitlines()) == 1, f"a line more says that it waited: {err}"
            assert postgresql.password not in err
            assert "wrong-secret" not in err


def test_a_server_without_a_connection_left_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(max_connections=4, superuser_reserved_connections=1) as server:
        url = server.url()
        new_store(url)
        server.sql("create role guest login password 'guest' superuser")
        plain = url.replace("+psycopg", "")
        taken = [psycopg.connect(plain) for _ in range(4)]
        began = time.monotonic()
        free = threading.Timer(1.0, lambda: [connection.close() for connection in taken])
        free.start()
        assert StudyStore.open(url, "s").trials() == []
        assert time.monotonic() - began > 0.9
        monkeypatch.setattr("search.storage.postgresql.WAIT_SECONDS", 0.3)
        taken = [psycopg.connect(plain) for _ in range(4)]
        with pytest.raises(
            StorageError, match=r"no connection left for \d+ s\. Raise its max_connections"
        ) as full:
            StudyStore.open(url, "s")
        assert server.password not in str(full.value)
        for connection in taken:
            connection.close()
