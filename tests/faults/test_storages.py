"""Storages that are none, damaged, foreign or not to be written: one line says so, and they are left as they are."""

from __future__ import annotations

import random
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from search.config.study_file import load_study_file
from search.errors import DiskError, MergefrontError, StorageError
from search.merging.baselines import BASELINES
from search.results.board import read_board
from search.running.budget import set_budget
from search.running.launch import create, reopen
from search.storage.database import connect
from search.storage.store import StudyStore
from search.study import run
from tests.conftest import Cli
from tests.fault_table import Fault
from tests.faults.child import in_child
from tests.faults.conftest import TRIALS
from tests.faults.stores import claim, new_store
from tests.small_disk import heed_permissions, make_read_only, make_writable, on_small_disk
from tests.study_process import results, url_in

TOTAL = len(BASELINES) + TRIALS

pytestmark = pytest.mark.fault(13)


def _foreign(path: Path) -> None:
    database = sqlite3.connect(path)
    with database:
        database.execute("create table cats (name text)")
    database.close()


def _truncated(path: Path) -> None:
    _finished(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def _future(path: Path) -> None:
    """As a later Optuna would leave it."""
    new_store(f"sqlite:///{path}")
    database = sqlite3.connect(path)
    with database:
        database.execute("update version_info set schema_version = 99")
        database.execute("update alembic_version set version_num = 'v99.0.0'")
    database.close()


def _finished(path: Path) -> dict[int, Any]:
    """A study of 20 finished trials, closed; returns what was finished."""
    store = new_store(f"sqlite:///{path}")
    for index in range(20):
        store.complete(claim(store, a=index / 20, b=0.5), [index / 20, 0.5], {"evidence": "e" * 64})
    store._storage.engine.dispose()
    return results(store.url, "s")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such storage"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.write_text("just text, not a database"), "found another kind of file"),
        (lambda p: p.write_bytes(b""), "is empty, it holds no study"),
        (_foreign, "database of something else .tables cats"),
        (_truncated, "not a sound SQLite database"),
        (_future, "runtime optuna version"),
    ],
    ids=["missing", "folder", "text", "empty", "foreign", "truncated", "future"],
)
def test_what_is_no_study_is_refused_and_left_untouched(
    tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    path = tmp_path / "study.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StorageError, match=message) as refusal:
        StudyStore.open(f"sqlite:///{path}", "s")
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda p: p.write_text("just text, not a database"), 4, "found another kind of file"),
        (_foreign, 4, "database of something else"),
        (_truncated, 4, "not a sound SQLite database"),
        (_future, 4, "runtime optuna version"),
    ],
    ids=["text", "foreign", "truncated", "future"],
)
def test_a_launch_into_it_is_refused_as_well(
    cli: Cli, study: Path, tmp_path: Path, make: Callable[[Path], Any], code: int, message: str
) -> None:
    path = tmp_path / "study.db"
    make(path)
    before = path.read_bytes()
    found, out, err = cli("launch", study, "--storage", f"sqlite:///{path}")
    assert (found, out, err.count("\n")) == (code, "", 1), err
    assert message in err
    assert path.read_bytes() == before


def test_an_empty_file_or_a_missing_folder_becomes_a_storage_when_launching(tmp_path: Path) -> None:
    (tmp_path / "empty.db").write_bytes(b"")
    new_store(f"sqlite:///{tmp_path / 'empty.db'}")
    new_store(f"sqlite:///{tmp_path / 'a/b/study.db'}")


def test_a_database_cut_short_anywhere_gives_all_it_had_or_one_line(tmp_path: Path, fault: Fault) -> None:
    whole = _finished(tmp_path / "whole.db")
    content = (tmp_path / "whole.db").read_bytes()
    draw = random.Random(0)
    cuts = [1, 15, 16, 100, 4096, 8192, len(content) // 2, len(content) - 4096, len(content) - 1]
    cuts += [draw.randrange(len(content)) for _ in range(6)]
    path, refused = tmp_path / "cut.db", 0
    for cut in cuts:
        path.write_bytes(content[:cut])
        found = _read(path)
        refused += found is None
        if found is not None:
            fault.kept(whole, found)
        assert path.read_bytes() == content[:cut], cut
    fault.struck(len(cuts))
    assert refused >= len(cuts) - 2, (
        "SQLite may do without the unused end of the last page, but not without more"
    )


def _flipped(content: bytes, word: bytes, at: int, bit: int) -> bytes:
    """`content` with one bit of the byte `at` of every match of the pattern `word` turned over.

    Of every match, since pages also hold what rows said earlier, which nothing reads.
    """
    damaged, found = bytearray(content), list(re.finditer(word, content))
    assert found, f"the database holds no {word!r}"
    for match in found:
        damaged[match.start() + at] ^= 1 << bit
    return bytes(damaged)


def test_a_database_with_a_damaged_word_is_refused_in_one_line(tmp_path: Path, fault: Fault) -> None:
    _finished(tmp_path / "whole.db")
    content, path = (tmp_path / "whole.db").read_bytes(), tmp_path / "damaged.db"
    moment = rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d"
    separators = [4, 7, 13, 16]
    places = [(b"COMPLETE", range(8)), (b"MAXIMIZE", range(8)), (b'"search"', [0, 7]), (moment, separators)]
    struck = [(word, at, 5 * at % 7) for word, ats in places for at in ats]
    for word, at, bit in struck:
        path.write_bytes(_flipped(content, word, at, bit))
        assert _read(path) is None, (word, at, bit)
    fault.struck(len(struck))


def test_a_database_with_damaged_bytes_gives_what_is_there_or_one_line(tmp_path: Path, fault: Fault) -> None:
    """Never a traceback. A damaged digit may read as another number: SQLite has no checksums."""
    _finished(tmp_path / "whole.db")
    content = (tmp_path / "whole.db").read_bytes()
    draw, path = random.Random(1), tmp_path / "damaged.db"
    for _ in range(40):
        damaged = bytearray(content)
        damaged[draw.randrange(100, len(content))] ^= 1 << draw.randrange(7)
        path.write_bytes(damaged)
        _read(path)
    fault.struck(40)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("update trials set state = 'COMPLETD'", "COMPLETD"),
        ("update study_directions set direction = 'MAX'", "MAX"),
        (
            "update trial_user_attributes set value_json = '{' where key = 'evidence'",
            "Expecting property name",
        ),
        ("update trials set datetime_complete = 'yesterday'", "yesterday"),
        ("update trial_user_attributes set key = cast(x'6bff' as text) where key = 'evidence'", "UTF-8"),
    ],
    ids=["state", "direction", "json", "time", "text"],
)
def test_rows_that_mean_nothing_are_named(tmp_path: Path, change: str, found: str) -> None:
    path = tmp_path / "study.db"
    _finished(path)
    database = sqlite3.connect(path)
    with database:
        database.execute(change)
    database.close()
    with pytest.raises(StorageError) as refusal:
        results(f"sqlite:///{path}", "s")
    message = str(refusal.value)
    assert message.startswith(f"{path}: holds what cannot be read (")
    assert found in message
    assert message.endswith("). Restore a copy, or give another --storage.")


def _read(path: Path) -> dict[int, Any] | None:
    """The finished trials of the study in a file; None if one line refuses it."""
    url = f"sqlite:///{path}"
    refusal = ""
    try:
        StudyStore.open(url, "s").attributes()
        return results(url, "s")
    except MergefrontError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert str(path) in refusal
    return None


@pytest.mark.parametrize(
    "url",
    [
        "journal.log",
        "journal:///study.log",
        "redis://localhost",
        "mysql://x/y",
        "sqlite:///",
        "sqlite:///:memory:",
    ],
)
def test_storages_that_lose_trials_are_refused_by_their_url(
    cli: Cli, study: Path, url: str, tmp_path: Path
) -> None:
    """A journal file does not survive a torn write; what lies in memory does not survive its process."""
    with pytest.raises(StorageError):
        connect(url, create=True)
    code, out, err = cli("launch", study, "--storage", url)
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_journal_left_by_a_kill_is_rolled_back(tmp_path: Path, fault: Fault) -> None:
    url = url_in(tmp_path)
    store = new_store(url)
    store.complete(claim(store), [0.5, 0.5])
    before = results(url, "s")
    code = f"""
import os, sqlite3
c = sqlite3.connect({str(tmp_path / "study.db")!r}, isolation_level=None)
c.execute("pragma cache_size = 1")
c.execute("pragma cache_spill = 1")
c.execute("begin")
c.execute("create table junk (a)")
c.executemany("insert into junk values (?)", [("x" * 500,)] * 2000)
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code])
    assert (tmp_path / "study.db-journal").exists()
    again = StudyStore.open(url, "s")
    fault.kept(before, results(url, "s"))
    claim(again)


# -- what must not be written -----------------------------------------------------------------------------------


def _may_only_be_read(url: str, study: Path) -> None:
    """The study on it is shown; launching and extending it are refused in one line."""
    path = url.removeprefix("sqlite:///")
    refusal = rf"{path}: cannot be written here\. Check permissions, or give another --storage\.$"
    assert read_board(StudyStore.open(url, "pico")).to_json()["study"] == "pico"
    with pytest.raises(DiskError, match=refusal):
        create(load_study_file(study), url, "cpu")
    store, _ = reopen(url, "pico", "cpu")
    with pytest.raises(DiskError, match=refusal):
        set_budget(store, "+1")


def _with_permission_bits(folder: Path, study: Path) -> None:
    heed_permissions()
    url = url_in(folder)
    (folder / "study.db").chmod(0o444)
    _may_only_be_read(url, study)
    folder.chmod(0o555)
    _may_only_be_read(url, study)
    for place, message in (
        (
            folder / "new.db",
            rf"{folder}: cannot be written\. Check permissions, or give another --storage\.$",
        ),
        (folder / "a" / "new.db", rf"{folder / 'a'}: folder cannot be made: Permission denied\.$"),
    ):
        with pytest.raises(DiskError, match=message):
            create(load_study_file(study), f"sqlite:///{place}", "cpu")
    (folder / "study.db").chmod(0o000)
    with pytest.raises(DiskError, match=rf"{folder / 'study.db'}: cannot be read: Permission denied\.$"):
        StudyStore.open(url, "pico")


def test_a_database_and_a_folder_with_permission_bits(
    study: Path, uninterrupted: str, tmp_path: Path, fault: Fault
) -> None:
    folder = tmp_path / "readable"
    shutil.copytree(Path(uninterrupted.removeprefix("sqlite:///")).parent, folder)
    before = results(url_in(folder))
    try:
        in_child(_with_permission_bits, folder, study)
    finally:
        folder.chmod(0o755)
        (folder / "study.db").chmod(0o644)
    fault.struck(4)
    fault.kept(before, results(url_in(folder)))


def _on_a_read_only_disk(disk: Path, study: Path, finished: Path) -> None:
    shutil.copytree(finished, disk / "runs")
    make_read_only(disk)
    _may_only_be_read(url_in(disk / "runs"), study)
    make_writable(disk)
    store, problem = reopen(url_in(disk / "runs"), "pico", "cpu")
    set_budget(store, "+1")
    run(store, problem)
    assert len(store.trials()) == TOTAL + 1


def test_a_disk_that_is_mounted_read_only(study: Path, uninterrupted: str, tmp_path: Path) -> None:
    finished = Path(uninterrupted.removeprefix("sqlite:///")).parent
    on_small_disk(tmp_path / "disk", 8192, _on_a_read_only_disk, study, finished)
