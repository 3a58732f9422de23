"""A request's body: bounded before it is held, in time, and JSON."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request
from starlette.types import Receive

from search.switching.serving.errors import ApiError, invalid
from search.switching.serving.limits import Limits

_DRAINED = (
    16  # times the limit: what is read and dropped so that a client reads its refusal, not a broken pipe
)


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """The body as a JSON object.

    Only `application/json` is read. A web page can send other types to a server on this machine without asking it
    first; for this one the browser asks, and is not answered.

    Raises:
        ApiError: 415 another type, 413 more than `limits.body_bytes` (declared or counted; no more than that is ever
            held), 408 too slow, 400 not a JSON object.
        ClientDisconnect: the client left.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if media != "application/json" or encoding != "identity":
        found = repr(media[:80]) if encoding == "identity" else f"content-encoding {encoding[:40]!r}"
        raise ApiError(
            415, f"The body must be application/json as it is (found {found}).", code="unsupported_media_type"
        )
    try:
        async with asyncio.timeout(limits.body_seconds):
            body = await _read(request, limits.body_bytes)
    except TimeoutError:
        message = f"The body did not arrive within {limits.body_seconds:g} seconds."
        raise ApiError(408, message, code="request_timeout") from None
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise invalid("The body is not a JSON object.", code="invalid_json")
    return found


async def _read(request: Request, most: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(most)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise _too_large(most)
    return bytes(body)


async def drain(receive: Receive, most: int) -> None:
    """Reads and drops what is left of a body, `most` bytes and a second of it.

    A connection that is closed on unread bytes is reset, and its client may lose the answer with it.
    """
    seen = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            while seen <= most:
                message = await receive()
                seen += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The body is larger than {most} bytes.", code="request_too_large")
