"""What one request, and all of them together, may ask of the server."""

from __future__ import annotations

import math
from dataclasses import dataclass

from search.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Bounds that hold for every request.

    Attributes:
        body_bytes: of a request's body; more is refused before it is read.
        prompt_tokens: of a prompt; the models' context bounds it anyway.
        new_tokens: of one answer.
        answers: of one request (`n`).
        waiting: requests that may wait while one is being answered; one more is refused (429).
        seconds: wall time of one request, its wait included.
        header_seconds: until a connection has sent a whole request line and headers.
        body_seconds: until it has sent the whole body.
        send_seconds: that it may leave a full buffer unread.
        idle_seconds: that a connection may stay open between two requests.
        header_bytes: of request line and headers.
        connections: open at once; one more is refused (503).
        grace_seconds: that the running answer has left once the server is asked to stop.

    Raises:
        ConfigError: a value that is not above 0 (`waiting` and `grace_seconds` may be 0).
    """

    body_bytes: int = 1 << 20
    prompt_tokens: int = 32_768
    new_tokens: int = 4_096
    answers: int = 8
    waiting: int = 16
    seconds: float = 600.0
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    idle_seconds: float = 5.0
    header_bytes: int = 32_768
    connections: int = 256
    grace_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("waiting", "grace_seconds") else None
            if not math.isfinite(value) or value < 0 or (value == 0 and least is None):
                wanted = "above 0" if least is None else "0 or more"
                raise ConfigError(f"limits: {name} is {value} (wanted a number {wanted}).")
