"""Connecting to a storage: what may be opened, the lock over it, and its errors in one line."""

from __future__ import annotations

import fcntl
import json
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import optuna
import sqlalchemy
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from search.errors import DiskError, LostConnectionError, MergefrontError, StorageError
from search.interrupt import held_back, let_through
from search.storage.postgresql import (
    FULL,
    WAIT_SECONDS,
    SessionLostError,
    engine_options,
    is_lost,
    server_url,
    session_lock,
    session_try,
    without_secrets,
)

_DAMAGED = ("Could not decode", "can't decode", "isoformat", "unknown state")  # what readers of rows say
BUSY_SECONDS = 60  # how long a writer waits for another process that holds the database


def sqlite_path(url: str) -> Path | None:
    """The file of a `sqlite:///` URL, None for a server's URL."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def shown(url: str) -> str:
    """The URL as it may be printed: SQLite as its path, a server without its password."""
    path = sqlite_path(url)
    if path is not None:
        return str(path)
    scheme, sign, _ = url.partition("://")
    if not sign:
        return "..." if set(url) & set("=@") else url  # the server's own notation; else somebody's file
    try:
        return without_secrets(server_url(url)).render_as_string(hide_password=True)
    except (SQLAlchemyError, ValueError):  # who knows which part is the password
        return f"{scheme}://..." if re.fullmatch(r"[A-Za-z0-9+]+", scheme) else "..."


def connect(url: str, *, create: bool) -> RDBStorage:
    """An Optuna storage: SQLite on a local disk, or PostgreSQL for several machines.

    Args:
        url: `sqlite:///PATH` or `postgresql+psycopg://...`.
        create: whether a SQLite file (and its folder) may be made.

    Raises:
        StorageError: another kind of URL, no such file, no database, or a database that is not Optuna's.
        DiskError: no permission or no space.
    """
    path = sqlite_path(url)
    if path is not None:
        _check_sqlite(path, create)
        arguments: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}}
    elif url.startswith(("postgresql://", "postgresql+psycopg://")):
        try:
            arguments = engine_options(url)
        except (SQLAlchemyError, ValueError) as error:
            raise StorageError(
                f"{shown(url)}: not a URL of a server, wanted postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE. "
                "Write special characters of user and password as %XX: @ is %40."
            ) from error
    else:
        raise StorageError(f"{shown(url)}: wanted sqlite:///PATH or postgresql+psycopg://USER@HOST/DATABASE.")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Optuna makes its tables at the first connection, and two processes that do so at once collide.
    with translated(url), exclusive(url) if create else nullcontext():
        return RDBStorage(_with_driver(url), engine_kwargs=arguments)


@contextmanager
def exclusive(url: str, name: str = "", engine: sqlalchemy.Engine | None = None) -> Iterator[None]:
    """One process at a time, over all that use this storage; let go by the system if the process dies.

    Signals are held back while the block runs, and let through while it waits for another process.

    Args:
        name: on a server, processes at other studies need not wait.
        engine: of a server's storage. What this thread does with it meanwhile fails once the lock is lost.
    """
    path = sqlite_path(url)
    with held_back(), ExitStack() as held:
        with translated(url):  # the lock alone: what goes wrong while it is held is not the storage's fault
            if path is not None:
                handle = held.enter_context(open(f"{path}.lock", "a"))
                with let_through():
                    fcntl.flock(handle, fcntl.LOCK_EX)
            else:
                held.enter_context(session_lock(engine or _server(url), name))
        yield


@contextmanager
def reserved(url: str, name: str, *, purpose: str = "reserved") -> Iterator[bool]:
    """Whether this process is the one that works on `name`, over all that use this storage; it never waits.

    A process may reserve one name at a time of each purpose. The system lets go of it if the process dies.
    """
    path = sqlite_path(url)
    with ExitStack() as held:
        with translated(url):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)  # the storage itself may not exist yet
                handle = held.enter_context(open(f"{path}.{purpose}", "a"))
                try:
                    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, crc32(name.encode()))
                    mine = True
                except BlockingIOError:
                    mine = False
            else:
                mine = held.enter_context(session_try(_server(url), f"{purpose}:{name}"))
        yield mine


@cache
def _server(url: str) -> sqlalchemy.Engine:
    return sqlalchemy.create_engine(_with_driver(url), **engine_options(url))


def _with_driver(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turns what a storage raises into one line that names the true cause, which Optuna hides in `__cause__`.

    Signals are held back while the block runs.
    """
    try:
        with held_back():
            yield
    except MergefrontError:
        raise
    except (OptunaError, SQLAlchemyError, SessionLostError, sqlite3.Error, OSError, ValueError) as error:
        raise _one_line(shown(url), error) from error
    except ModuleNotFoundError as error:
        raise StorageError(
            f"{shown(url)}: PostgreSQL needs the package {error.name}: pip install 'mergefront[postgresql]'."
        ) from error
    except LookupError as error:
        if type(error) is LookupError:  # SQLAlchemy: a word that the column's enumeration does not have
            raise _one_line(shown(url), error) from error
        raise
    except RuntimeError as error:
        if "runtime optuna version" in str(error):  # the schema is newer or older than this Optuna
            raise StorageError(f"{shown(url)}: {' '.join(str(error).split())}") from error
        raise


def _one_line(where: str, error: BaseException) -> MergefrontError:
    causes: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(str(getattr(cause, "orig", None) or cause))
        cause = cause.__cause__ or getattr(cause, "orig", None)
    text = " ".join(" ".join(causes).split())
    if "disk is full" in text or "No space left" in text:
        return DiskError(
            f"{where}: no space left on the disk. Finished trials are safe; make room and resume."
        )
    if "disk I/O error" in text or "File too large" in text:
        return DiskError(
            f"{where}: the disk refused a write. Finished trials are safe; check space and quota, resume."
        )
    if "database is locked" in text:
        return StorageError(
            f"{where}: another process held the database for {BUSY_SECONDS} s. Resume when it is free."
        )
    if "readonly" in text or "Permission denied" in text or "unable to open" in text or "Read-only" in text:
        return DiskError(f"{where}: cannot be written here. Check permissions, or give another --storage.")
    if "not a database" in text or "malformed" in text:
        return StorageError(
            f"{where}: not a sound SQLite database. Restore a copy, or give another --storage."
        )
    if is_lost(error):
        return LostConnectionError(
            f"{where}: the connection was lost: {_first_line(causes[-1])}. Finished trials are safe; resume."
        )
    if any(said in text for said in FULL):
        return StorageError(
            f"{where}: the server has had no connection left for {WAIT_SECONDS:.0f} s. Raise its max_connections, or "
            "start fewer workers; then resume."
        )
    if "failed to resolve" in text or ("connection" in text and "failed" in text):
        return StorageError(f"{where}: no connection: {_first_line(causes[-1])}.")
    if isinstance(error, LookupError | json.JSONDecodeError) or any(sign in text for sign in _DAMAGED):
        return StorageError(
            f"{where}: holds what cannot be read ({' '.join(causes[-1].split())[:200]}). "
            "Restore a copy, or give another --storage."
        )
    return StorageError(f"{where}: {' '.join(causes[-1].split())[:300]}.")


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(".") if text.strip() else "no reason given"


def _check_sqlite(path: Path, create: bool) -> None:
    where = str(path)
    if where in ("", ":memory:", "/:memory:"):
        raise StorageError("sqlite:///: a study in memory cannot be resumed. Give a file.")
    if path.is_dir():
        raise StorageError(f"{where}: is a folder. Give the file of a database, such as {path / 'study.db'}.")
    if not path.exists():
        if not create:
            raise StorageError(f"{where}: no such storage. Launch a study first, or give --storage.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"{path.parent}: folder cannot be made: {error.strerror}.") from error
        if not os.access(path.parent, os.W_OK):
            raise DiskError(
                f"{path.parent}: cannot be written. Check permissions, or give another --storage."
            )
        return
    try:
        with path.open("rb") as handle:
            head = handle.read(16)
    except OSError as error:
        raise DiskError(f"{where}: cannot be read: {error.strerror}.") from error
    if not head:
        if not create:
            raise StorageError(f"{where}: is empty, it holds no study. Launch one first.")
        return
    if head != b"SQLite format 3\0":
        raise StorageError(
            f"{where}: found another kind of file, wanted a SQLite database. It is left untouched."
        )
    with translated(f"sqlite:///{where}"):
        # Writable if it may be: what a killed process left half done is rolled back by the first writer alone.
        mode = "rw" if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK) else "ro"
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=BUSY_SECONDS)
        try:
            tables = {
                row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")
            }
            if tables and connection.execute("pragma quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("database disk image is malformed")
        finally:
            connection.close()
    if tables and not {"studies", "trials", "version_info"} <= tables:
        raise StorageError(
            f"{where}: a SQLite database of something else (tables {', '.join(sorted(tables)[:3])}...), "
            "not an Optuna storage. It is left untouched."
        )
