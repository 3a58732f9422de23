"""The routes. Validation is ours throughout, so that every refusal has OpenAI's shape and none FastAPI's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from search.errors import ConfigError
from search.switching.serving.answers import (
    DONE,
    ChatForm,
    Form,
    Health,
    Model,
    ModelList,
    TextForm,
    event,
    to_bytes,
)
from search.switching.serving.body import read_json
from search.switching.serving.errors import (
    ApiError,
    closing,
    from_status,
    invalid,
    no_model,
    timed_out,
    too_long,
)
from search.switching.serving.limits import Limits
from search.switching.serving.middleware import TALLY, Gate, Tally
from search.switching.serving.protocol import COLDEST, NARROWEST, ChatRequest, TextRequest, read_request
from search.switching.serving.queue import Desk, Order, Ticket
from search.switching.writer import Piece, Writer

T = TypeVar("T")
JOIN_SECONDS = 2.0  # for the segment that is being written when the server ends


def make_app(
    writer: Writer,
    limits: Limits | None = None,
    *,
    hosts: Collection[str] | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """The application, whose `state.desk` is the line of requests; its lifespan starts and ends the writer's thread.

    Args:
        hosts: as in `Gate`. api_key: as in `Gate`.
    """
    limits = limits or Limits()
    desk = Desk(writer, limits.waiting)
    service = _Service(writer, limits, desk)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        desk.start()
        yield
        desk.stop()
        service.close()
        await asyncio.to_thread(desk.join, JOIN_SECONDS)

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.desk = desk
    app.add_middleware(Gate, hosts=hosts, api_key=api_key, drained_bytes=16 * limits.body_bytes)

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        path = request.scope.get("raw_path", b"").decode("ascii", "backslashreplace")
        return from_status(error.status_code, request.method, path, error.headers).response()

    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/v1/models", service.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", service.model, methods=["GET"])
    app.add_api_route("/v1/completions", service.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    return app


class _Service:
    def __init__(self, writer: Writer, limits: Limits, desk: Desk) -> None:
        self.writer, self.limits, self.desk = writer, limits, desk
        self._encoder = ThreadPoolExecutor(1, "encoder")  # tokenizers are not made for two threads at once
        self._about = Model(id=writer.name, created=int(time.time()), max_model_len=writer.context)

    def close(self) -> None:
        self._encoder.shutdown(wait=False, cancel_futures=True)

    async def health(self) -> Response:
        if self.desk.closed:
            raise closing()
        return Response(to_bytes(Health(requests=self.desk.load)), media_type="application/json")

    async def models(self) -> Response:
        return Response(to_bytes(ModelList(data=[self._about])), media_type="application/json")

    async def model(self, name: str) -> Response:
        self._known(name)
        return Response(to_bytes(self._about), media_type="application/json")

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, TextRequest, TextForm)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest, ChatForm)

    async def _answer(
        self, request: Request, kind: type[TextRequest] | type[ChatRequest], form: type[Form]
    ) -> Response:
        deadline = asyncio.get_running_loop().time() + self.limits.seconds
        body = await read_json(request, self.limits)
        asked = read_request(kind, body, self.limits)
        self._known(asked.model)
        self.desk.check_room()  # before the work of encoding
        order = await self._order(asked, deadline)
        tally: Tally = request.scope[TALLY]
        ticket = tally.ticket = self.desk.submit(order, deadline, self.limits.seconds)
        made = tally.form = form(
            self.writer.name, len(order.prompt), asked.n, include_usage=asked.include_usage
        )
        if asked.stream:
            # The status waits for the first piece: what fails before it is an HTTP error, not an event.
            first = await while_connected(request.receive, ticket.next())
            assert first is not None
            return EventStream(ticket, made, first)
        await while_connected(request.receive, _collect(ticket, made))
        return Response(made.whole(), media_type="application/json")

    async def _order(self, asked: TextRequest | ChatRequest, deadline: float) -> Order:
        limits, context = self.limits, self.writer.context
        param = "prompt" if isinstance(asked, TextRequest) else "messages"
        encoding = asyncio.get_running_loop().run_in_executor(
            self._encoder, self.writer.encode, asked.written
        )
        try:
            async with asyncio.timeout_at(deadline):
                prompt = await encoding
        except TimeoutError:
            raise timed_out(limits.seconds) from None
        except ConfigError as error:
            raise invalid(str(error), param) from None
        room, wanted = self.writer.room(prompt), asked.wanted_tokens
        if room < 1:
            raise too_long(len(prompt), None, room, context, param)
        if len(prompt) > limits.prompt_tokens:
            message = f"At most {limits.prompt_tokens} tokens are read here (found {len(prompt)})."
            raise invalid(message, param, "context_length_exceeded")
        if wanted is not None and wanted > limits.new_tokens:
            raise invalid(f"max_tokens: at most {limits.new_tokens} (found {wanted}).", "max_tokens")
        if wanted is not None and wanted > room:
            raise too_long(len(prompt), wanted, room, context, param)
        return Order(
            prompt=prompt,
            seeds=asked.seeds(),
            max_new_tokens=wanted or min(asked.default_tokens or room, room, limits.new_tokens),
            temperature=max(asked.temperature, COLDEST),
            top_p=max(asked.top_p, NARROWEST),
            stop=asked.stop,
            chat=isinstance(asked, ChatRequest),
        )

    def _known(self, name: str | None) -> None:
        if name is not None and name != self.writer.name:
            raise no_model(name, self.writer.name)


class EventStream(Response):
    """Server-sent events of one request."""

    media_type = "text/event-stream"

    def __init__(self, ticket: Ticket, form: Form, first: tuple[int, Piece]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._ticket, self._form, self._first = ticket, form, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        form = self._form
        found: tuple[int, Piece] | None = self._first
        for data in form.opening():
            yield data
        try:
            while found is not None:
                form.add(*found)
                for data in form.delta(*found):
                    yield data
                found = await self._ticket.next()
        except ApiError as error:  # too late for a status
            yield event(error.body())
            yield DONE
            return
        for data in form.ending():
            yield data


async def _collect(ticket: Ticket, form: Form) -> None:
    while (found := await ticket.next()) is not None:
        form.add(*found)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves; the body must have been read.

    Raises:
        ClientDisconnect: it left.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
