"""Folders that are whole or absent: built beside their place, synced, then renamed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from search.errors import DiskError, ExportError

logger = logging.getLogger("mergefront")

_PART, _OLD = ".part", ".old"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MIB = 2**20


@contextmanager
def locked_folder(
    out: Path,
    *,
    stale: str = "trial-*",
    other: str = "another export into this folder",
    remedy: str = "Give another --out.",
) -> Iterator[None]:
    """Makes the folder and holds it for this process alone; clears away what dead processes left in it.

    Another process that asks meanwhile waits. The system lets go of the lock when this process ends, however it ends,
    so whatever unfinished folder lies there belongs to nobody. (Where a file system has no locks, nothing is cleared;
    the rename still lets only one of two exports win.)

    Args:
        stale: names (a glob) of the folders that are staged here; unfinished ones of these are cleared away.
        other: what this process says that it waits for.
        remedy: what to do when the folder cannot be made or opened.

    Raises:
        ExportError: `out` is no folder. DiskError: it cannot be made or written.
    """
    made = _make(out, remedy)
    handle, locked = _lock(out, other, remedy)
    try:
        if locked:
            _clear(out, stale)
        yield
    except BaseException:
        with suppress(OSError):  # empty ones only: what was exported before the error stays
            for folder in made:
                folder.rmdir()
        raise
    finally:
        os.close(handle)


@contextmanager
def staged_folder(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write into, which is `final` once the block ends, and gone if it raises.

    Call it while the parent folder is held by `locked_folder`.

    Raises:
        ExportError: `final` exists, and not `overwrite`. DiskError: no space or no permission.
    """
    # Not the process alone: a killed one may have had its number, or one in another container have it now.
    staging = final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}{_PART}")
    try:
        with disk_errors(final):
            staging.mkdir()
            yield staging
            sync_tree(staging)
            _put(staging, final, overwrite)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def lone_folder(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """`staged_folder` for one folder anywhere: holds the folder around it, and clears up after dead processes.

    Raises:
        ExportError, DiskError: as `locked_folder` and `staged_folder`.
    """
    with (
        locked_folder(final.parent, stale=escape(final.name)),
        staged_folder(final, overwrite=overwrite) as staging,
    ):
        yield staging


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole: staged beside, synced, renamed. A link to another file's content is replaced, not followed.

    Raises:
        OSError: the disk refused; an earlier file stays as it was.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
    try:
        with staged.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turns what the operating system says about a disk into one line."""
    try:
        yield
    except OSError as error:
        at = error.filename if isinstance(error.filename, str) else ""
        file = f" (while writing {Path(at).name})" if at else ""
        if error.errno in FULL:
            why = "" if error.errno == errno.ENOSPC else f": {error.strerror}"
            raise DiskError(
                f"{where}: no space left on the disk{why}{file}. Nothing was changed; trials are safe."
            ) from error
        raise DiskError(
            f"{where}: cannot be written: {error.strerror or error}{file}. Nothing was changed."
        ) from error


def check_space(where: Path, needed: int) -> None:
    """Raises DiskError if the disk that holds `where`, which may not exist yet, has less than `needed` bytes free."""
    existing = where.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DiskError(
            f"{where}: no space left on the disk (needs {_shown(needed)}, {_shown(free)} free). "
            "Nothing was changed; trials are safe."
        )


def sync_tree(folder: Path) -> None:
    """Flushes every file and folder below, the inner ones first, so that a rename cannot come before the content."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(path) / name)
        _sync(Path(path))


def _put(staging: Path, final: Path, overwrite: bool) -> None:
    old = final.with_name(f".{final.name}{_OLD}")
    aside = overwrite and final.exists()
    try:
        if aside:
            os.rename(final, old)
        os.rename(staging, final)
    except BaseException as error:
        if aside and old.exists() and not final.exists():
            os.rename(old, final)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise ExportError(f"{final}: another export made it meanwhile. It is left as it is.") from error
        raise
    _sync(final.parent)
    if aside:
        shutil.rmtree(old, ignore_errors=True)


def _make(out: Path, remedy: str) -> list[Path]:
    """Makes the folder; returns the folders that were made, the innermost first."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out}: is a file. Give a folder.")
    missing = [folder for folder in (out.absolute(), *out.absolute().parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ExportError(f"{out}: a part of this path is a file. Give a folder.") from error
    except OSError as error:
        raise DiskError(f"{out}: folder cannot be made: {error.strerror}. {remedy}") from error
    return missing


def _lock(out: Path, other: str, remedy: str) -> tuple[int, bool]:
    """A handle of the folder, and whether it is locked."""
    while True:
        try:
            handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
        except PermissionError as error:
            raise DiskError(f"{out}: folder cannot be opened: {error.strerror}. {remedy}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: waiting for %s", out, other)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a network file system that locks no folders
            return handle, False
        if out.exists() and os.path.samestat(os.fstat(handle), out.stat()):
            return handle, True
        os.close(handle)  # the other one failed and took the folder away again
        _make(out, remedy)


def _clear(out: Path, stale: str) -> None:
    for path in out.glob(f".{stale}.*{_PART}"):
        shutil.rmtree(path, ignore_errors=True)
    for path in out.glob(f".{stale}{_OLD}"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(_OLD))
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:  # the process died between the two renames of an overwrite
            os.rename(path, final)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _shown(size: int) -> str:
    return f"{size / MIB:,.0f} MiB" if size >= MIB else f"{size:,} bytes"
