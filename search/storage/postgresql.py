"""PostgreSQL as a storage: few connections, patience with a server that is busy, and locks that no writer outlives.

A lock is an advisory lock of the session that took it, so a pooler between (such as PgBouncer) has to pool sessions,
not transactions. One that does not is noticed when a lock is given back, and named.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Any, cast

import sqlalchemy
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from search.errors import StorageError
from search.interrupt import is_due, let_through

logger = logging.getLogger("mergefront")

WAIT_SECONDS = 60.0  # how long to wait for a server that restarts, or has no connection left
CONNECT_SECONDS = 10

# A machine that vanished without a word is noticed within a minute, by the worker and by the server.
_ALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
# A session with a lock waits and works as long as it takes, whatever the server's defaults are (those that it has: some
# came with PostgreSQL 14 and 17).
_SESSION = {
    "statement_timeout": 0,
    "lock_timeout": 0,
    "idle_session_timeout": 0,
    "idle_in_transaction_session_timeout": 0,
    "transaction_timeout": 0,
    "tcp_keepalives_idle": 30,
    "tcp_keepalives_interval": 10,
    "tcp_keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}

# What a server says that will take connections again.
FULL = (
    "too many clients",
    "remaining connection slots",
    "too many connections",
    "no more connections allowed",
)
_SOON = ("the database system is", *FULL)
_JITTER = random.Random()
# Of a URL's query; libpq has words for secrets there, and gets new ones.
_PUBLIC = (
    "host",
    "port",
    "user",
    "dbname",
    "sslmode",
    "sslrootcert",
    "target_session_attrs",
    "application_name",
)
_NEVER = ("password authentication failed",)


class _Patience:
    """Pauses, longer and longer, for `WAIT_SECONDS` at most; says once why."""

    def __init__(self) -> None:
        self._began, self._pause, self._said = time.monotonic(), 0.1, False

    def wait(self, error: Exception) -> bool:
        """Waits a moment, unless the patience is over or a signal came; whether it waited."""
        if time.monotonic() - self._began > WAIT_SECONDS or is_due():
            return False
        if not self._said:
            reason = str(error).strip().splitlines()[0]
            logger.warning("waiting up to %.0f s for a connection: %s", WAIT_SECONDS, reason)
            self._said = True
        time.sleep(self._pause * _JITTER.uniform(0.5, 1.0))  # not all workers at once
        self._pause = min(2.0, 1.5 * self._pause)
        return True


class SessionLostError(Exception):
    """The connection that had a lock is gone, and the lock with it: nothing may be written under it any more."""


class FewConnections(NullPool):
    """Closes every connection after its piece of work: a server lends 100 by default, and a study may have hundreds
    of workers, which evaluate most of the time.

    A thread that holds a lock keeps the connection whose session has it, and does all its work through that one. Should
    it drop, the server gives the lock to somebody else; so the thread gets no other one until it has let go.
    """

    def __init__(self, creator: Any, **options: Any) -> None:
        self._create = creator
        self._thread = threading.local()
        self._met = False  # whether the server ever answered
        super().__init__(cast(Any, self._connected), **options)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """While the block runs, this thread uses one connection, which stays open between pieces of work."""
        mine = self._thread
        mine.keeping, mine.kept, mine.locked = True, None, False
        try:
            yield
        finally:
            kept, mine.kept = mine.kept, None
            mine.keeping = mine.locked = False
            if kept is not None:
                kept.close()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While the block runs, this thread does not wait for a server that is away."""
        self._thread.at_once = True
        try:
            yield
        finally:
            self._thread.at_once = False

    def no_other(self, locked: bool) -> None:
        """Whether this thread may not connect anew, since the session that it has cannot be replaced."""
        self._thread.locked = locked

    def _do_get(self) -> ConnectionPoolEntry:
        kept: ConnectionPoolEntry | None = getattr(self._thread, "kept", None)
        self._thread.kept = None
        return super()._do_get() if kept is None else kept

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if getattr(self._thread, "keeping", False) and self._thread.kept is None:
            self._thread.kept = record
        else:
            record.close()

    def _connected(self, record: ConnectionPoolEntry) -> Any:
        if getattr(self._thread, "locked", False):
            raise SessionLostError("the connection was lost while the study was held")
        patience = _Patience()
        while True:
            try:
                connection = self._create(record)
            except Exception as error:
                at_once = getattr(self._thread, "at_once", False)
                if at_once or not self._passes(str(error)) or not patience.wait(error):
                    raise
            else:
                self._met = True
                return connection

    def _passes(self, said: str) -> bool:
        """Whether it is worth waiting; at first sight only for a server that says so, later for one that was there."""
        if any(text in said for text in _NEVER):
            return False
        return self._met or any(text in said for text in _SOON)


def server_url(url: str) -> sqlalchemy.URL:
    """The parts of a server's URL.

    Raises:
        ValueError, sqlalchemy.exc.ArgumentError: it is no URL, or part of a password would be taken for something else.
    """
    parts = sqlalchemy.make_url(url)
    where = f"{parts.host or ''}{parts.database or ''}"
    query = url.partition("?")[2]
    if "@" in where or set(f"{parts.username or ''}{parts.host or ''}") & set("?&="):
        raise ValueError("an @ that ends no password")
    if query and ("@" in query if parts.username else not all("=" in one for one in query.split("&"))):
        raise ValueError("an @ in the query")
    return parts


def without_secrets(parts: sqlalchemy.URL) -> sqlalchemy.URL:
    """The URL with what is known to be no secret in its query; the password before the host is SQLAlchemy's to hide."""
    return parts.set(query={key: value for key, value in parts.query.items() if key in _PUBLIC})


def engine_options(url: str) -> dict[str, Any]:
    """Arguments of `sqlalchemy.create_engine`; what the URL says itself stays.

    Raises:
        ValueError, sqlalchemy.exc.ArgumentError: as `server_url`.
    """
    said = server_url(url).query
    arguments = {"connect_timeout": CONNECT_SECONDS, **_ALIVE}
    kept = {key: value for key, value in arguments.items() if key not in said}
    return {"poolclass": FewConnections, "connect_args": kept}


@contextmanager
def session_lock(engine: sqlalchemy.Engine, name: str) -> Iterator[None]:
    """Holds a lock of this name, and lets this thread's work with `engine` pass through the session that has it.

    Not re-entrant. The server lets go of it when the process or its machine dies.

    Raises:
        StorageError: when the block ended well, but the session did not have the lock to give back.
    """
    pool = engine.pool
    assert isinstance(pool, FewConnections)
    with pool.keeping():
        _wait(engine, name)
        pool.no_other(True)
        try:
            yield
        except BaseException:
            with suppress(SQLAlchemyError, SessionLostError):
                _asked(engine, "pg_advisory_unlock", name)
            raise
        try:
            had = _asked(engine, "pg_advisory_unlock", name)
        except (SQLAlchemyError, SessionLostError) as error:
            logger.debug("lost after its work was done: %s", error)  # all was written, and the lock is free
        else:
            if had is False:
                raise _pooled(engine)


@contextmanager
def session_try(engine: sqlalchemy.Engine, name: str) -> Iterator[bool]:
    """Whether a lock of this name could be had at once; then it is held while the block runs.

    Raises:
        StorageError: as `session_lock`.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        _settle(connection)
        mine = bool(_call(connection, "pg_try_advisory_lock", name))
        try:
            yield mine
        except BaseException:
            if mine:
                with suppress(SQLAlchemyError):  # should the session be gone, so is the lock
                    _call(connection, "pg_advisory_unlock", name)
            raise
        if not mine:
            return
        try:
            had = _call(connection, "pg_advisory_unlock", name)
        except SQLAlchemyError:
            logger.warning("the server let go of '%s' meanwhile: another process may work on it, too", name)
        else:
            if had is False:
                raise _pooled(engine)


def _pooled(engine: sqlalchemy.Engine) -> StorageError:
    return StorageError(
        f"{engine.url.host}: this session did not have its lock any more. If there is a pooler such as "
        "PgBouncer between, let it pool sessions, not transactions; then resume."
    )


def lock_key(name: str) -> int:
    """The 64-bit number by which the server knows a lock."""
    return int.from_bytes(sha256(f"mergefront:{name}".encode()).digest()[:8], "big", signed=True)


def is_lost(error: BaseException | None) -> bool:
    """Whether a connection broke, as said by an error or by what caused it."""
    while error is not None:
        if isinstance(error, SessionLostError) or (
            isinstance(error, DBAPIError) and error.connection_invalidated
        ):
            return True
        error = error.__cause__
    return False


def _wait(engine: sqlalchemy.Engine, name: str) -> None:
    """Waits for the lock; a server that restarts meanwhile is asked again."""
    patience = _Patience()
    while True:
        began = time.monotonic()
        try:
            _asked(engine, "pg_advisory_lock", name)
            return
        except DBAPIError as error:
            if time.monotonic() - began > WAIT_SECONDS:
                patience = _Patience()  # it waited in the queue until it was cut
            if not error.connection_invalidated or not patience.wait(error):
                raise


def _asked(engine: sqlalchemy.Engine, function: str, name: str) -> Any:
    # Without a transaction, which would stand open while the lock is waited for.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if function != "pg_advisory_lock":
            return _call(connection, function, name)
        _settle(connection)
        with let_through():  # it may wait for another process
            return _call(connection, function, name)


def _settle(connection: sqlalchemy.Connection) -> None:
    values = ", ".join(f"('{key}', '{value}')" for key, value in _SESSION.items())
    known = f"(values {values}) as ours (name, value) where current_setting(name, true) is not null"
    connection.execute(sqlalchemy.text(f"select set_config(name, value, false) from {known}"))


def _call(connection: sqlalchemy.Connection, function: str, name: str) -> Any:
    return connection.scalar(sqlalchemy.text(f"select {function}(:key)"), {"key": lock_key(name)})
