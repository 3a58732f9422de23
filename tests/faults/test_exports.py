"""Exports are whole or absent: on disks that are full, killed at any place, and several at once."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import search.export.folder
import search.storage.staging
from search.errors import DiskError, ExportError
from search.results.board import Row, read_board
from search.storage.manifest import read_manifest
from search.storage.store import StudyStore
from tests.export_process import (
    exported,
    in_child,
    kill_before_the_rename,
    kill_between_the_renames,
    kill_in_the_middle,
    limit_files,
    tree,
)
from tests.fault_table import Fault
from tests.small_disk import fill, on_small_disk
from tests.study_process import nothing, results


@pytest.fixture(scope="module")
def url(finished_study: tuple[Path, str]) -> str:
    return finished_study[1]


@pytest.fixture(scope="module")
def row(url: str) -> Row:
    """A search trial: its coefficients differ from group to group."""
    return read_board(StudyStore.open(url, "pico")).of_kind("search")[0]


@pytest.mark.fault(11)
def test_a_full_disk_changes_nothing(url: str, row: Row, tmp_path: Path) -> None:
    folder = exported(url, tmp_path, row.trial, weights=False)
    before = tree(tmp_path)
    process, queue = in_child(url, tmp_path, row.trial, limit_files, overwrite=True)
    assert queue.get() == (
        "DiskError",
        f"{folder}: no space left on the disk: File too large. Nothing was changed; trials are safe.",
    )
    process.join()
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    process, queue = in_child(url, tmp_path / "new" / "deep", row.trial, limit_files)
    assert queue.get()[0] == "DiskError"
    process.join()
    assert not (tmp_path / "new").exists()
    exported(url, tmp_path / "new", row.trial)  # the study is as usable as before


def _on_a_full_disk(disk: Path, url: str, trial: int) -> None:
    """Exports where room ends while the weights are written, then where there is room again."""
    out = disk / "out"
    folder = exported(url, out, trial, weights=False)
    before = tree(disk)
    search.export.folder.check_space = lambda *_: None  # type: ignore[assignment] # another process takes the room
    fill(disk)
    with (disk / "filler").open("r+b") as stream:
        stream.truncate(stream.seek(0, os.SEEK_END) - 50_000)  # for the half of a pico model
    for place, options in ((out, {"overwrite": True}), (disk / "new" / "deep", {})):
        with pytest.raises(
            DiskError, match=r"no space left on the disk.* Nothing was changed; trials are safe\.$"
        ):
            exported(url, place, trial, **options)
        assert {name: digest for name, digest in tree(disk).items() if name != "filler"} == before
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "out"]
        assert [path.name for path in out.iterdir()] == [folder.name]
    (disk / "filler").unlink()
    exported(url, out, trial, overwrite=True)
    read_manifest(folder)
    assert (folder / "model" / "model.safetensors").stat().st_size > 90_000


@pytest.mark.fault(11)
def test_a_disk_that_is_really_full(url: str, row: Row, tmp_path: Path, fault: Fault) -> None:
    before = results(url)
    on_small_disk(tmp_path / "disk", 1024, _on_a_full_disk, url, row.trial)
    fault.struck(2)
    fault.kept(before, results(url))


@pytest.mark.fault(11)
def test_too_little_space_is_said_before_anything_is_written(
    url: str, row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("search.storage.staging.shutil.disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(
        DiskError,
        match=r"no space left on the disk \(needs 1 MiB, 1 MiB free\). Nothing was changed; trials are safe.$",
    ):
        exported(url, tmp_path / "out", row.trial)
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(11)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_meanwhile(
    url: str, row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(_: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(search.storage.staging, "sync_tree", full)
    with pytest.raises(
        DiskError, match=r"no space left on the disk.* Nothing was changed; trials are safe.$"
    ):
        exported(url, tmp_path / "out", row.trial)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(1)
@pytest.mark.parametrize("strike", [kill_in_the_middle, kill_before_the_rename])
def test_killed_it_leaves_nothing_under_the_final_name(
    url: str, row: Row, tmp_path: Path, strike: Callable[[], None]
) -> None:
    process, _ = in_child(url, tmp_path, row.trial, strike)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    name = f"trial-{row.trial:05d}"
    (left,) = tmp_path.iterdir()
    assert left.match(f".{name}.{process.pid}-*.part")
    exported(url, tmp_path, row.trial)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    read_manifest(tmp_path / name)


@pytest.mark.fault(1)
def test_killed_between_two_renames_the_old_export_comes_back(url: str, row: Row, tmp_path: Path) -> None:
    folder = exported(url, tmp_path, row.trial, weights=False)
    before = tree(folder)
    process, _ = in_child(url, tmp_path, row.trial, kill_between_the_renames, overwrite=True)
    process.join()
    assert not folder.exists()
    with pytest.raises(ExportError, match="exists"):
        exported(url, tmp_path, row.trial)
    assert tree(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.fault(9)
def test_of_two_exporters_one_wins_whole(url: str, row: Row, tmp_path: Path) -> None:
    """Both begin at once, so that one finds the folder held, or the export made."""
    both = [in_child(url, tmp_path, row.trial, nothing) for _ in range(2)]
    outcomes = sorted(queue.get() for _, queue in both)
    for process, _ in both:
        process.join()
    assert outcomes[0] == ("", "")
    assert outcomes[1][0] == "ExportError"
    assert "exists" in outcomes[1][1]
    assert [path.name for path in tmp_path.iterdir()] == [f"trial-{row.trial:05d}"]
    read_manifest(tmp_path / f"trial-{row.trial:05d}")


@pytest.mark.fault(9)
def test_who_waits_for_an_export_that_fails_goes_on(tmp_path: Path) -> None:
    """The failed one takes the folder away that it made; the other must not write into the removed one."""
    out, entered, done = tmp_path / "out", threading.Event(), []

    def wait_and_write() -> None:
        entered.wait(10)
        with (
            search.storage.staging.locked_folder(out),
            search.storage.staging.staged_folder(out / "trial-00001") as staging,
        ):
            (staging / "x").write_text("x")
        done.append(1)

    thread = threading.Thread(target=wait_and_write)
    thread.start()

    def fail() -> None:
        with search.storage.staging.locked_folder(out):
            entered.set()
            thread.join(0.3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    thread.join(10)
    assert done
    assert (out / "trial-00001" / "x").read_text() == "x"


@pytest.mark.fault(9)
def test_without_locks_the_rename_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("search.storage.staging.fcntl.flock", no_locks)
    final = tmp_path / "trial-00001"

    def write() -> None:
        with (
            search.storage.staging.locked_folder(tmp_path),
            search.storage.staging.staged_folder(final) as staging,
        ):
            (staging / "x").write_text("mine")
            final.mkdir()
            (final / "x").write_text("theirs")

    with pytest.raises(ExportError, match=r"another export made it meanwhile. It is left as it is.$"):
        write()
    assert (final / "x").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == [final.name]
