"""A worker that is frozen past its grace, as a moving virtual machine is: another takes over, its thaw does no harm."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from search.merging.baselines import BASELINES
from search.storage.store import StudyStore
from search.storage.worker import this_worker
from tests.fault_table import Fault
from tests.faults.conftest import TRIALS
from tests.faults.stores import claim, new_store
from tests.study_process import ended, merges, results, start, url_in

TOTAL = len(BASELINES) + TRIALS
FROZEN = 12  # the trial

pytestmark = pytest.mark.fault(3)


def _elsewhere(log: str) -> None:
    """Another machine, as far as anybody can tell: a process of this one is known to live, however long it sleeps."""
    socket.gethostname = lambda: "elsewhere"
    logging.basicConfig(filename=log, level=logging.INFO, format="%(levelname)s %(message)s", force=True)


def _freeze(once: Path) -> None:
    """Once: it may draw other trials after its thaw."""
    if not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGSTOP)


def _wait_in_the_trial(diary: Path, go: Path) -> None:
    """In the trial that was taken over, and in no other one: the diary's last line says where this process is."""
    if diary.read_text().splitlines()[-1].endswith(f" {FROZEN}"):
        while not go.exists():
            time.sleep(0.02)


def _until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _state(process: Any) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.parametrize("thaw", ["afterwards", pytest.param("meanwhile", marks=pytest.mark.slow)])
def test_a_frozen_worker_is_replaced_and_its_late_result_dropped(
    study: Path, tmp_path: Path, thaw: str, fault: Fault
) -> None:
    url, log, diary, go = url_in(tmp_path), tmp_path / "log", tmp_path / "diary", tmp_path / "go"
    freeze = partial(_freeze, tmp_path / "frozen")
    frozen = start(study, url, "merged", FROZEN, freeze, before=partial(_elsewhere, str(log)))
    _until(lambda: _state(frozen) == "T")
    before = results(url)
    assert max(before) == FROZEN - 1
    # The heir draws what is left, and after its grace takes over the trial.
    wait = partial(_wait_in_the_trial, diary, go)
    heir = start(study, url, "merged", FROZEN, wait, diary=diary, grace=1.0 if thaw == "afterwards" else 5.0)
    late = f"WARNING trial {FROZEN} was taken over by another worker; this late result is dropped"
    if thaw == "afterwards":
        go.touch()
        assert ended(heir) == 0
        fault.kept(before, before := results(url))
        os.kill(frozen.pid, signal.SIGCONT)
    else:
        _until(lambda: diary.exists() and merges(diary)[FROZEN])
        os.kill(frozen.pid, signal.SIGCONT)
        _until(lambda: late in log.read_text())
        go.touch()
        assert ended(heir) == 0
    assert ended(frozen) == 0
    assert late in log.read_text()
    fault.kept(before, results(url))
    trials = StudyStore.open(url, "pico").trials()
    assert [(t.number, t.state) for t in trials] == [(number, "complete") for number in range(TOTAL)]
    (taken,) = (t for t in trials if t.attributes["tries"] != 1)
    assert (taken.number, taken.attributes["tries"], taken.attributes["worker"]["pid"]) == (
        FROZEN,
        2,
        heir.pid,
    )
    (recipe,) = (t.attributes["recipe"] for t in trials if t.number == FROZEN)
    assert sum(t.attributes["recipe"] == recipe for t in trials) == 1, "one result for that recipe"


def test_a_late_result_of_a_frozen_worker_is_dropped(tmp_path: Path) -> None:
    url = url_in(tmp_path)
    frozen, other = new_store(url), StudyStore.open(url, "s")
    number = claim(frozen)
    other.trials()
    other.annotate(number, "worker", replace(this_worker(), host="elsewhere").to_json())
    assert not frozen.complete(number, [0.9, 0.9])
    frozen.fail(number, "late")
    frozen.give_back_all()
    assert other.trials()[0].state == "running"
