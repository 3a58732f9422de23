"""Storages of both kinds for tests: a SQLite file, or a database on a PostgreSQL server of this test run's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgresql_server import PostgreSQLMissing, Server, running_server


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    """A server for all tests of this process; those that stop one start their own."""
    try:
        with running_server(max_connections=40) as server:
            yield server
    except PostgreSQLMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def postgresql_url(postgresql: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new database on the server, and a folder for the evidence of its studies."""
    monkeypatch.setenv("MERGEFRONT_EVIDENCE", str(tmp_path / "shared"))
    url = postgresql.fresh()
    yield url
    postgresql.sql(f"drop database {url.rpartition('/')[2]} with (force)")


@pytest.fixture(params=["sqlite", "postgresql"])
def storage_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage that does not exist yet (SQLite) or is empty (PostgreSQL): the test is run with both."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    return str(request.getfixturevalue("postgresql_url"))
