"""SIGTERM and Ctrl-C through the real command line: the trial is given back, and the user is told how to go on."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from search.storage.store import StudyStore
from tests.fault_table import Fault
from tests.pico_study import write_study
from tests.study_process import ended, results, sound, start, terminate_self, url_in, whole

TRIALS = 5000  # more than any test waits for
GUARD = 120  # seconds after which a test gives up; what it waits for comes at once, or never

pytestmark = pytest.mark.fault(2)


def test_sigterm_gives_the_trial_back_and_exits_143(
    study: Path, uninterrupted: str, tmp_path: Path, fault: Fault
) -> None:
    url = url_in(tmp_path)
    assert ended(start(study, url, "merged", 12, terminate_self)) == 143
    trials = StudyStore.open(url, "pico").trials()
    assert [t.state for t in trials[-2:]] == ["complete", "waiting"]
    before = results(url)
    assert ended(start(study, url)) == 0
    fault.kept(before, results(url))
    assert whole(url) == whole(uninterrupted)
    assert {int(t.attributes["tries"]) for t in StudyStore.open(url, "pico").trials()} == {1}, (
        "it did not die"
    )


@contextmanager
def launched(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A long study under way in a process of its own, which has printed that a trial is done; and its storage."""
    study, url = write_study(folder / "study", trials=TRIALS), url_in(folder)
    command = [sys.executable, "-m", "search.cli.main", "launch", str(study), "--storage", url, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        while "trial 12" not in (line := process.stderr.readline()):
            assert line, "ended too early"
        yield process, url
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    ("number", "options", "code"),
    [
        (signal.SIGTERM, (), 143),
        pytest.param(signal.SIGINT, (), 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, ("--workers", "2"), 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, ("--workers", "2"), 130, marks=pytest.mark.slow),
    ],
    ids=["term", "int", "term-workers", "int-workers"],
)
def test_a_signal_ends_a_study_in_order(
    tmp_path: Path, number: signal.Signals, options: tuple[str, ...], code: int, fault: Fault
) -> None:
    with launched(tmp_path, *options) as (process, url):
        before = results(url)
        process.send_signal(number)
        assert process.stderr is not None
        err = process.stderr.read()
        assert process.wait(GUARD) == code
        done = len(results(url))
        assert done < TRIALS, "the study went on to its end"
    # A rich console breaks the line where the terminal ends.
    assert f"stopped by {number.name}; nothing is lost: resume" in " ".join(err.split())
    assert "Traceback" not in err
    fault.kept(before, results(url))
    assert [t.number for t in StudyStore.open(url, "pico").trials() if t.state == "running"] == []
    assert sound(url)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, fault: Fault) -> None:
    """The first one waits for the storage, which another process holds; the second one waits for nothing."""
    with launched(tmp_path) as (process, url), open(tmp_path / "study.db.lock", "a") as held:
        while True:  # until a trial is under way, whose end must be written down
            fcntl.flock(held, fcntl.LOCK_EX)
            (*_, last) = StudyStore.open(url, "pico").trials()
            if last.state == "running":
                break
            fcntl.flock(held, fcntl.LOCK_UN)
            time.sleep(0.005)
        before = results(url)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(GUARD) == 130, "it waits for a lock that is never let go"
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    fault.struck(2)
    fault.kept(before, results(url))
    # The trial is a dead worker's now, which the next one adopts.
    store = StudyStore.open(url, "pico")
    with store.exclusive():
        adopted = store.adopt()
    assert adopted is not None
    assert adopted.number == last.number
