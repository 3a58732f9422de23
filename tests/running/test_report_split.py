"""The report split is shared by all workers of a study: every recipe once, and what a dead worker had is taken over."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from search.config.study_file import load_study_file
from search.merging.baselines import BASELINES
from search.running.launch import create
from search.running.observer import Observer
from search.running.report_split import score_report_split, unreported
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord
from search.study import run
from tests.fault_table import Fault
from tests.pico_study import write_study

_context = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The storage of a study whose search is over, and whose report split nobody has looked at."""
    folder = tmp_path_factory.mktemp("searched")
    url = f"sqlite:///{folder / 'study.db'}"
    run(*create(load_study_file(write_study(folder, trials=1)), url, "cpu"), report=False)
    return url


def _score(url: str, log: Path, dies_at: int, together: Any) -> None:
    """One of several equal workers; every score that it begins is a line of `log`."""
    begun = 0

    def score(record: TrialRecord) -> tuple[str, str | None]:
        nonlocal begun
        with log.open("a") as stream:
            stream.write(f"{record.number} {os.getpid()}\n")
        begun += 1
        if begun == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)
        return f"answers of {record.number}", None

    store = StudyStore.open(url, "pico")
    together.wait(60)
    score_report_split(store, store.trials(), score, Observer())
    assert not unreported(store.trials(), store.attributes())


@pytest.mark.fault(7)
def test_workers_share_the_report_split_and_take_over_what_a_dead_one_had(
    searched: str, tmp_path: Path, fault: Fault
) -> None:
    folder = Path(searched.removeprefix("sqlite:///")).parent
    url = f"sqlite:///{tmp_path / 'study.db'}"
    (tmp_path / "study.db").write_bytes((folder / "study.db").read_bytes())
    before = {t.number: t.values for t in StudyStore.open(url, "pico").trials()}
    log = tmp_path / "log"
    # The first one dies while it scores its second recipe: that one is begun twice, every other one once.
    together = _context.Barrier(3)
    processes = [_context.Process(target=_score, args=(url, log, dies, together)) for dies in (2, 0, 0)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0]
    begun = [line.split() for line in log.read_text().splitlines()]
    victim = str(processes[0].pid)
    lost = [number for number, pid in begun if pid == victim][1]
    numbers = [number for number, _ in begun]
    assert sorted(set(numbers), key=int) == [str(number) for number in range(len(BASELINES) + 1)]
    assert [number for number in numbers if numbers.count(number) > 1] == [lost, lost]
    assert len({pid for _, pid in begun}) == 3, "nobody did it all alone"
    store = StudyStore.open(url, "pico")
    known = store.attributes()
    assert all(known[f"report:{t.number}"] == f"answers of {t.number}" for t in store.trials())
    fault.kept(before, {t.number: t.values for t in store.trials()})


def test_a_recipe_that_was_scored_for_another_trial_is_not_scored_again(
    searched: str, tmp_path: Path
) -> None:
    folder = Path(searched.removeprefix("sqlite:///")).parent
    (tmp_path / "study.db").write_bytes((folder / "study.db").read_bytes())
    store = StudyStore.open(f"sqlite:///{tmp_path / 'study.db'}", "pico")
    first, second, *_ = store.trials()
    twin = TrialRecord(
        **{**vars(second), "attributes": {**second.attributes, "recipe": first.attributes["recipe"]}}
    )
    calls: list[int] = []

    def score(record: TrialRecord) -> tuple[str, str | None]:
        calls.append(record.number)
        return "answers", "diversity"

    reported: list[tuple[int, int]] = []
    observer = Observer()
    observer.reporting = lambda done, of: reported.append((done, of))  # type: ignore[method-assign]
    score_report_split(store, [first, twin], score, observer)
    known = store.attributes()
    assert calls == [first.number]
    assert [known[f"{kind}:{n}"] for n in (0, 1) for kind in ("report", "diversity")] == [
        "answers",
        "diversity",
    ] * 2
    assert reported == [(0, 2), (2, 2)]
    score_report_split(store, [first, twin], score, observer)
    assert calls == [first.number]
