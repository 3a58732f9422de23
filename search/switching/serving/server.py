"""Runs the application on a socket until a signal ends it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any

import uvicorn

from search.errors import ConfigError
from search.interrupt import Interrupted
from search.switching.serving.app import make_app
from search.switching.serving.connection import make_protocol
from search.switching.serving.limits import Limits
from search.switching.writer import Writer

LOGGER = logging.getLogger("mergefront")
API_KEY = "MERGEFRONT_API_KEY"
_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Server(uvicorn.Server):
    """Uvicorn's server, which says when it is ready and lets the running answer end.

    Args:
        listener: from `listen`; closed at the end.
        ready: called with the URL of the API.
    """

    def __init__(self, app: Any, listener: socket.socket, limits: Limits, ready: Any = None) -> None:
        config = uvicorn.Config(
            app,
            http=make_protocol(limits),
            ws="none",
            lifespan="on",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=limits.header_bytes,
            timeout_keep_alive=max(1, round(limits.idle_seconds)),
            # Whatever still runs when the grace is over is cancelled; it has been told to end before.
            timeout_graceful_shutdown=round(limits.grace_seconds) + 2,
        )
        super().__init__(config)
        self._app, self._listener, self._limits, self._ready = app, listener, limits, ready

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets=[self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None:
            self._ready(url(self._listener))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        desk = self._app.state.desk
        desk.close()
        asyncio.get_running_loop().call_later(self._limits.grace_seconds, desk.stop)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the server, a second one the process; then `Interrupted` is raised."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        arrived: list[int] = []

        def handle(number: int, frame: FrameType | None) -> None:
            if arrived:
                os._exit(128 + number)
            arrived.append(number)
            self.should_exit = True

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if arrived:
            raise Interrupted(arrived[0])


def serve(
    writer: Writer,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    listener: socket.socket | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM. One line on stderr says where, once requests are answered.

    The environment variable MERGEFRONT_API_KEY, if it is set and not empty, is the key that clients must send.

    Args:
        host: an address of this machine; on a loopback one, only requests for a loopback name are answered.
        port: 0 takes a free one.
        listener: from `listen` for this host and port, if the caller opened it; closed at the end.

    Raises:
        ConfigError: no such address, or the port is taken; nothing has been printed then.
        Interrupted: a signal ended it, with the exit code.
    """
    limits = limits or Limits()
    key = os.environ.get(API_KEY) or None
    listener = listener or listen(host, port)
    with closing(listener), _uvicorn_log():
        local = is_loopback(listener)
        if not local and key is None:
            LOGGER.warning(
                "%s can be reached from other machines, and there is no authentication: whoever reaches it may ask. "
                "Set %s, or serve on 127.0.0.1.",
                host,
                API_KEY,
            )
        app = make_app(writer, limits, hosts={*_NAMES, host} if local else None, api_key=key)
        try:
            Server(app, listener, limits, lambda at: _say(f"serving {writer.name} at {at}")).run()
        except Interrupted as stop:
            if app.state.desk.alive:
                # Its thread is inside a model, whose code need not survive the interpreter's end; nothing is lost.
                os._exit(stop.exit_code)
            raise


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: no such address, no permission, or the port is taken.
    """
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port {port}: is no port (wanted 0 to 65535).")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"--host {host} --port {port}: cannot be listened on ({reason}). Give an address of this machine and a "
            "free port; 0 takes one."
        ) from None


def is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def url(listener: socket.socket) -> str:
    """Base URL of the API, with the port that is really used."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Forward(logging.Handler):
    """Uvicorn's own lines: what matters has been said by us, its errors have not."""

    def emit(self, record: logging.LogRecord) -> None:
        level = logging.WARNING if record.levelno >= logging.ERROR else logging.DEBUG
        LOGGER.log(level, "%s", " ".join(record.getMessage().split()))


@contextmanager
def _uvicorn_log() -> Iterator[None]:
    theirs, handler = logging.getLogger("uvicorn"), _Forward()
    before, theirs.propagate = theirs.propagate, False
    theirs.addHandler(handler)
    try:
        yield
    finally:
        theirs.removeHandler(handler)
        theirs.propagate = before
