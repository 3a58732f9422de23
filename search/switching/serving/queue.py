"""One generation at a time: a thread of its own owns the writer, and a bounded line of requests waits for it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from dataclasses import dataclass

from search.errors import ConfigError
from search.switching.serving.errors import ApiError, closing, failed, full, invalid, timed_out
from search.switching.writer import Piece, Writer

LOGGER = logging.getLogger("mergefront")


@dataclass(frozen=True)
class Order:
    """What is to be written: one answer to `prompt` for each seed."""

    prompt: tuple[int, ...]
    seeds: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    chat: bool = False


class Ticket:
    """A request in the line, seen from the event loop; only `put` and `cancelled` are for the writer's thread."""

    def __init__(self, desk: Desk, order: Order, deadline: float, seconds: float) -> None:
        self.order = order
        self.cancelled = threading.Event()
        self._desk, self._deadline, self._seconds = desk, deadline, seconds
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Piece] | ApiError | None] = asyncio.Queue()
        self.begun = False  # a piece was put; for the writer's thread alone

    async def next(self) -> tuple[int, Piece] | None:
        """The next piece and its answer's number, None after the last.

        Raises:
            ApiError: 504 after the time limit, 503 when the server stops, 500 if the writer failed, 400 if it refused
                the order before its first piece.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                found = await self._events.get()
        except TimeoutError:
            self.cancel()
            raise timed_out(self._seconds) from None
        if isinstance(found, ApiError):
            self.cancel()
            raise found
        return found

    def cancel(self) -> None:
        """Leaves the line, or ends the generation at its next segment. Harmless after the end."""
        self.cancelled.set()
        self._desk.forget(self)

    def put(self, found: tuple[int, Piece] | ApiError | None) -> None:
        """Hands something over to the event loop, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, found)
        except RuntimeError:  # the loop has ended, and with it the client
            self.cancelled.set()


class Desk:
    """Where requests wait for the writer.

    Args:
        waiting: how many may wait while one is written.
    """

    def __init__(self, writer: Writer, waiting: int) -> None:
        self.writer = writer
        self.waiting = waiting
        self.closed = False
        self._line: deque[Ticket] = deque()
        self._running: Ticket | None = None
        self._changed = threading.Condition()
        # A daemon: a segment that does not end must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def load(self) -> int:
        """Requests that are being answered or wait."""
        with self._changed:
            return len(self._line) + (self._running is not None)

    def check_room(self) -> None:
        """
        Raises:
            ApiError: 503 while closing, 429 if the line is full.
        """
        with self._changed:
            if self.closed:
                raise closing()
            if self.load > self.waiting:
                raise full(self.waiting)

    def submit(self, order: Order, deadline: float, seconds: float) -> Ticket:
        """Puts an order at the end of the line; called on the event loop.

        Args:
            deadline: of the loop's clock, `seconds` after the request began.

        Raises:
            ApiError: as `check_room`.
        """
        ticket = Ticket(self, order, deadline, seconds)
        with self._changed:
            self.check_room()
            self._line.append(ticket)
            self._changed.notify()
        return ticket

    def forget(self, ticket: Ticket) -> None:
        """Frees the place of a ticket that waits; one that is being written keeps it until its segment ends."""
        with self._changed:
            if ticket in self._line:
                self._line.remove(ticket)

    def close(self) -> None:
        """Takes no more orders and refuses those that wait; what is being written goes on until `stop`."""
        with self._changed:
            self.closed = True
            for ticket in self._line:
                ticket.put(closing())
            self._line.clear()
            self._changed.notify()

    def stop(self) -> None:
        """Ends what is being written at its next segment; its client is told at once."""
        self.close()
        with self._changed:
            if self._running is not None:
                self._running.cancelled.set()
                self._running.put(closing())

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Waits for the thread, which ends after `close` once nothing is being written."""
        self._thread.join(seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._line:
                    if self.closed:
                        return
                    self._changed.wait()
                ticket = self._running = self._line.popleft()
            end = None
            try:
                self._write(ticket)
            except Exception as error:
                # Out of memory is among them: the next request may fit again.
                reason = " ".join(str(error).split())
                if isinstance(error, ConfigError) and not ticket.begun:
                    end = invalid(reason)
                else:
                    LOGGER.error("an answer failed: %s: %s", type(error).__name__, reason)
                    LOGGER.debug("where it failed", exc_info=error)
                    end = failed()
            with self._changed:
                self._running = None  # before its client hears of the end, and may ask again
            ticket.put(end)

    def _write(self, ticket: Ticket) -> None:
        order = ticket.order
        for index, seed in enumerate(order.seeds):
            if ticket.cancelled.is_set():
                return
            pieces = self.writer.write(
                order.prompt,
                max_new_tokens=order.max_new_tokens,
                temperature=order.temperature,
                top_p=order.top_p,
                seed=seed,
                stop=order.stop,
                chat=order.chat,
            )
            finish = None
            try:
                for piece in pieces:
                    if ticket.cancelled.is_set():
                        return
                    finish = piece.finish
                    ticket.begun = True
                    ticket.put((index, piece))
                    if finish is not None:
                        break
            finally:
                # A generator lets go of its caches here rather than when it is collected.
                close = getattr(pieces, "close", None)
                if close is not None:
                    close()
            if finish is None:
                raise RuntimeError("the writer's last piece does not say why the answer ends")
