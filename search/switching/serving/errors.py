"""Everything that can be refused, in the shape OpenAI's clients read: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

_NO_RETRY = {
    "x-should-retry": "false"
}  # OpenAI's clients repeat 408 and 5xx by themselves unless told not to


class ApiError(Exception):
    """A refusal with its HTTP status.

    Attributes:
        status: HTTP status, 400 or more.
        kind: the error's `type`.
        param: the field it is about, such as `messages[0].content`.
        code: a short name that programs compare.
        headers: that go with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, dict[str, str | None]]:
        """
        >>> invalid("n is 0.", "n").to_json()["error"]["param"]
        'n'
        """
        found = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": found}

    def body(self) -> bytes:
        """JSON in ASCII: what a client sent may be quoted in the message."""
        return json.dumps(self.to_json()).encode("ascii")

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def unsupported(what: str, param: str) -> ApiError:
    """400: the field means something here, and nothing does it."""
    return ApiError(
        400, f"{param}: {what} is not supported. Leave it out.", param=param, code="unsupported_parameter"
    )


def too_long(prompt: int, new: int | None, room: int, context: int, param: str) -> ApiError:
    """400: prompt and answer do not fit into the models' context (`new` None: the prompt alone does not).

    Args:
        room: tokens of an answer that would fit; with the prompt they may be fewer than the context.
    """
    asked = (
        f"the {param} of {prompt} tokens leave no room for an answer"
        if new is None
        else f"you asked for {prompt + new} tokens ({prompt} in the {param}, {new} to write; {room} fit)"
    )
    return ApiError(
        400,
        f"The maximum context length is {context} tokens, and {asked}. Shorten the {param}"
        f"{'' if new is None else ' or ask for fewer tokens'}.",
        param=param,
        code="context_length_exceeded",
    )


def unauthorized() -> ApiError:
    return ApiError(
        401,
        "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def no_model(asked: str, name: str) -> ApiError:
    return ApiError(
        404,
        f"The model {asked[:100]!r} does not exist; this server has {name!r}.",
        param="model",
        code="model_not_found",
    )


def timed_out(seconds: float) -> ApiError:
    return ApiError(
        504,
        f"The answer took longer than {seconds:g} seconds. Ask for fewer tokens.",
        kind="server_error",
        code="timeout",
        headers=_NO_RETRY,
    )


def full(waiting: int) -> ApiError:
    return ApiError(
        429,
        f"{waiting} requests are waiting already. Try again later.",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"retry-after": "1"},
    )


def closing() -> ApiError:
    return ApiError(
        503,
        "The server is shutting down.",
        kind="server_error",
        code="shutting_down",
        headers={"connection": "close"},
    )


def failed() -> ApiError:
    """500: what went wrong is in the log, never in the body."""
    return ApiError(
        500, "The server failed on this request; its log says why.", kind="server_error", headers=_NO_RETRY
    )


def from_status(status: int, method: str, path: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """The router's own refusals: no such route, or no such method there."""
    known = {404: ("There is no", "unknown_url"), 405: ("Not allowed:", "method_not_supported")}
    start, code = known.get(status, ("Refused:", None))
    return ApiError(status, f"{start} {method} {path[:200]} here.", code=code, headers=headers)
