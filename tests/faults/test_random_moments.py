"""Kills and signals at moments and at lines of code that nobody chose: the study ends as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from search.merging.baselines import BASELINES
from search.storage.store import MAX_TRIES, StudyStore
from tests.fault_table import Fault
from tests.pico_study import write_study
from tests.study_process import TerminateAfter, ended, merges, results, sound, start, url_in, whole

STRIKES = 20
SPAN = 6.0  # trials that a run gets at most, and half of it on the average
TRIALS = 120
LINES = 200_000  # of Python code, from a trial's evidence to the next one's: nearly all of them work on the storage
TELLING = 30_000  # the first of them

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sampler = {"engine": "optuna", "name": "nsga2", "seed": 3, "population": 12}
    return write_study(tmp_path_factory.mktemp("long"), trials=TRIALS, sampler=sampler)


@pytest.fixture(scope="module")
def peaceful(study: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """The study's storage when it ran uninterrupted, and the seconds that a trial took."""
    folder = tmp_path_factory.mktemp("peaceful")
    url, diary = url_in(folder), folder / "diary"
    process = start(study, url, diary=diary)
    _first_step(process, diary, 0)
    began = time.monotonic()
    assert ended(process, 400) == 0
    return url, (time.monotonic() - began) / (len(BASELINES) + TRIALS)


def _first_step(process: Any, diary: Path, size: int) -> None:
    """Returns when the diary has grown: a trial has begun."""
    while not diary.exists() or diary.stat().st_size <= size:
        assert process.is_alive()
        time.sleep(0.001)


def _moments(seed: int) -> list[float]:
    """One from each twentieth of the span, in random order: trials after the first step of a run."""
    draw = random.Random(seed)
    moments = [SPAN * (index + draw.random()) / STRIKES for index in range(STRIKES)]
    draw.shuffle(moments)
    return moments


def _left_open(url: str, process: Any) -> int:
    """Trials under way that this process, which has ended, was the last to work on."""
    trials = StudyStore.open(url, "pico").trials()
    return sum(not t.finished and t.attributes["worker"]["pid"] == process.pid for t in trials)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.fault(1), id="kill"),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.fault(2), id="term"),
    ],
)
def test_struck_twenty_times_at_random(
    study: Path, peaceful: tuple[str, float], tmp_path: Path, number: signal.Signals, code: int, fault: Fault
) -> None:
    url, diary = url_in(tmp_path), tmp_path / "diary"
    kept: dict[int, Any] = {}
    inside = 0
    for index, moment in enumerate(_moments(seed=number)):
        size = diary.stat().st_size if diary.exists() else 0
        process = start(study, url, diary=diary)
        if number == signal.SIGKILL and index % 5 == 1:
            time.sleep(moment / SPAN)  # seconds after the start: while the study is opened, or soon after
        else:
            _first_step(process, diary, size)
            time.sleep(moment * peaceful[1])
        assert process.is_alive(), "the study is too short for so many strikes"
        os.kill(process.pid, number)
        assert ended(process, 30) == code
        inside += _left_open(url, process)
        assert sound(url)
        fault.kept(kept, kept := results(url))
    fault.struck(STRIKES)
    print(f"{inside} of {STRIKES} strikes met a trial")
    assert inside >= STRIKES // 4
    assert ended(start(study, url, diary=diary), 400) == 0
    fault.kept(kept, results(url))
    assert whole(url) == whole(peaceful[0])
    trials = StudyStore.open(url, "pico").trials()
    assert {t.state for t in trials} == {"complete"}
    assert sound(url)
    # A kill costs a try of the trial that it met; who gives a trial back did not die in it.
    tries, merged = {t.number: int(t.attributes["tries"]) for t in trials}, merges(diary)
    assert sum(tries.values()) - len(trials) <= (inside if number == signal.SIGKILL else 0)
    if number == signal.SIGKILL:
        assert max(tries.values()) < MAX_TRIES
        assert all(merged[trial] <= tries[trial] for trial in tries)
    else:
        assert sum(merged.values()) <= len(trials) + inside


@pytest.mark.fault(2)
def test_a_signal_at_any_line_gives_the_trial_back(
    study: Path,
    peaceful: tuple[str, float],
    storage_url: str,
    tmp_path: Path,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it interrupts is left in order: a cursor left open would keep this very process from the storage."""
    monkeypatch.setenv(
        "MERGEFRONT_EVIDENCE", str(tmp_path / "runs")
    )  # where it is by default, seen from the children
    here = partial(os.chdir, tmp_path)
    draw = random.Random(0)
    struck = [draw.randrange(1, most) for most in (TELLING, LINES) for _ in range(STRIKES)]
    kept: dict[int, Any] = {}
    for lines in struck:
        assert ended(start(study, storage_url, "evidence", 0, TerminateAfter(lines), before=here), 30) == 143
        trials = StudyStore.open(storage_url, "pico").trials()
        assert [t.number for t in trials if t.state == "running"] == [], lines
        fault.kept(kept, kept := results(storage_url))
    fault.struck(len(struck))
    assert ended(start(study, storage_url, before=here), 400) == 0
    assert whole(storage_url) == whole(peaceful[0])
    assert {t.attributes["tries"] for t in StudyStore.open(storage_url, "pico").trials()} == {1}, "none died"
