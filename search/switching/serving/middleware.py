"""Around every request: who may ask, under which name of this machine, a line in the log, and the last resort."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from search.switching.serving.answers import Form
from search.switching.serving.body import drain
from search.switching.serving.errors import ApiError, closing, failed, invalid, unauthorized
from search.switching.serving.queue import Ticket

LOGGER = logging.getLogger("mergefront")
TALLY = "mergefront.tally"


@dataclass
class Tally:
    """What a request has at the desk: the log counts it, and at the request's end, whichever it is, it is let go."""

    ticket: Ticket | None = None
    form: Form | None = None


class Gate:
    """ASGI middleware, outermost.

    Args:
        hosts: values of the Host header (without port) that are answered; None answers all. A page of another site
            whose name was pointed at this machine (DNS rebinding) carries its own name there.
        drained_bytes: of a body that a refusal leaves unread are read and dropped.
        api_key: what /v1 asks for as a bearer token; None asks for none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str] | None = None,
        api_key: str | None = None,
        drained_bytes: int = 1 << 24,
    ) -> None:
        self.app = app
        self.drained_bytes = drained_bytes
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self.api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = Headers(scope=scope)
        tally = scope[TALLY] = Tally()
        status: int | None = None
        ended = False
        unread = int(headers.get("content-length") or 0) > 0 or "transfer-encoding" in headers

        async def receiving() -> Message:
            nonlocal unread
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                unread = False
            return message

        async def sending(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                if unread and "expect" not in headers:  # who asks first sends nothing
                    await drain(receiving, self.drained_bytes)
                if unread:  # still: what follows must not be taken for the next request
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        try:
            try:
                self._check(scope, headers)
                await self.app(scope, receiving, sending)
            except ApiError as error:
                await error.response()(scope, receiving, sending)
            except ClientDisconnect:
                pass
            except asyncio.CancelledError:  # the server waits no longer for this request
                if status is None:
                    await closing().response()(scope, receiving, sending)
            except Exception as error:
                LOGGER.error("a request failed: %s: %s", type(error).__name__, " ".join(str(error).split()))
                LOGGER.debug("where it failed", exc_info=error)
                if status is None:
                    await failed().response()(scope, receiving, sending)
        finally:
            if tally.ticket is not None:
                tally.ticket.cancel()
            _log(scope, status, ended, tally, time.perf_counter() - began)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if self.hosts is not None:
            host = headers.get("host", "")
            name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
            if name.lower() not in self.hosts:
                raise invalid(f"Host {host[:100]!r} is not this server.", code="invalid_host")
        if self.api_key is not None and scope["path"].startswith("/v1"):
            kind, _, key = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(key.strip().encode("latin-1"), self.api_key)
            if kind.lower() != "bearer" or not right:
                raise unauthorized()


def _log(scope: Scope, status: int | None, ended: bool, tally: Tally, seconds: float) -> None:
    path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200]  # quoted: no line breaks
    form = tally.form
    tokens = "" if form is None else f", {form.prompt_tokens}+{form.new_tokens} tokens"
    left = "" if ended else ", client left"
    level = logging.DEBUG if path == "/health" else logging.INFO
    found = "-" if status is None else status
    LOGGER.log(level, "%s %s %s%s, %.2f s%s", scope["method"], path, found, tokens, seconds, left)
