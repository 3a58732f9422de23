"""Bytes on a connection: uvicorn's HTTP/1.1, with the time limits and the error shape that it lacks.

Uvicorn bounds the size of headers and the time between two requests. It waits for ever for a first request, for the
rest of one that has begun (slow loris) and for a client that does not read what it is sent; it answers what is no HTTP
in plain text, and counts connections only when a request is complete. The time for a body is `body.read_json`'s.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from search.switching.serving.errors import ApiError, invalid
from search.switching.serving.limits import Limits

LOGGER = logging.getLogger("mergefront")


def make_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """The protocol class for `uvicorn.Config(http=...)`."""

    class Bounded(_BoundedProtocol):
        bounds = limits

    return Bounded


class _BoundedProtocol(H11Protocol):
    bounds: Limits
    _headers_due: asyncio.TimerHandle | None = None
    _read_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.bounds.connections:
            message = f"There are {self.bounds.connections} connections already. Try again later."
            headers = {"retry-after": "1"}
            self._refuse(
                ApiError(503, message, kind="server_error", code="too_many_connections", headers=headers)
            )
        else:
            self._watch_headers()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_headers()
        self._forget_read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The buffer is full."""
        super().pause_writing()
        self._read_due = self.loop.call_later(self.bounds.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._forget_read()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(invalid(msg, code="invalid_http"))

    def _watch_headers(self) -> None:
        """The clock runs while a request has not arrived whole; idle time between two is uvicorn's to bound."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._forget_headers()
        elif self._headers_due is None:
            self._headers_due = self.loop.call_later(self.bounds.header_seconds, self._late)

    def _forget_headers(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _forget_read(self) -> None:
        if self._read_due is not None:
            self._read_due.cancel()
            self._read_due = None

    def _late(self) -> None:
        self._headers_due = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            message = f"No request arrived within {self.bounds.header_seconds:g} seconds."
            self._refuse(ApiError(408, message, code="request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answers outside of any request, and hangs up."""
        LOGGER.info("%d: %s", error.status, error)
        self._forget_headers()
        response = error.response()
        head = f"HTTP/1.1 {error.status} \r\n".encode()
        head += b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
        self.transport.write(head + b"connection: close\r\n\r\n" + error.body())
        self.transport.close()
