"""Running a model for one client: work joins the line, tokens go out as they come, all ends when the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from medge.runtimes.generate import Generator as ChatModel
from medge.runtimes.generate import Reply, Tally, Token, answer_text
from medge.serve.ask import Ask
from medge.serve.documents import Completion, event
from medge.serve.errors import refusal
from medge.serve.line import Job, Line, Work
from medge.serve.metrics import Metrics
from medge.serve.models import Served

T = TypeVar("T")


@asynccontextmanager
async def in_line(line: Line, work: Work[T], receive: Receive) -> AsyncIterator[Job[T]]:
    """Work in a model's line for as long as the client stays. Its body must have been read.

    Raises:
        ApiError: the line is full or the server is stopping.
        ClientDisconnect: the client has left; nobody is to be answered.
    """
    job = line.submit(work)
    watch = asyncio.create_task(_leave_with_client(line, job, receive))
    try:
        yield job
    finally:
        watch.cancel()
        line.leave(job)


async def _leave_with_client(line: Line, job: Job[T], receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # whatever else a client sends after its body
    line.leave(job)


def _tokens(model: ChatModel, ask: Ask) -> Work[Reply | Token]:
    """The reply, once its checks have passed; then its tokens."""

    def work(cancelled: Callable[[], bool]) -> Generator[Reply | Token, None, None]:
        reply = model.generate(ask.messages, ask.options, cancelled=cancelled)
        yield reply
        yield from reply

    return work


class Answer(Response):
    """The answer of a chat model, whole or streamed. What fails before its first token has a status of its own."""

    def __init__(
        self, served: Served, model: ChatModel, ask: Ask, completion: Completion, metrics: Metrics, *, stream: bool
    ) -> None:
        self._served = served
        self._work = _tokens(model, ask)
        self._ask = ask
        self._completion = completion
        self._metrics = metrics
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the model and send what it says."""
        self._start = time.perf_counter()
        self._tokens: list[Token] = []
        async with in_line(self._served.line, self._work, receive) as job:
            reply = await anext(job)
            assert isinstance(reply, Reply)  # noqa: S101 - what `_tokens` yields first
            try:
                await (self._streamed(job, reply.tally, send) if self._stream else self._gathered(job))
            finally:
                self._metrics.generated(self._served.id, reply.tally, len(self._tokens), job.waited)
            if not self._stream:
                document = self._completion.whole(self._tokens, reply.tally, job.waited)
                await JSONResponse(document)(scope, receive, send)

    async def _each(self, job: Job[Reply | Token]) -> AsyncIterator[Token]:
        async for token in job:
            assert isinstance(token, Token)  # noqa: S101 - what `_tokens` yields after the reply
            if not self._tokens:
                self._metrics.began(self._served.id, time.perf_counter() - self._start)
            self._tokens.append(token)
            yield token

    async def _gathered(self, job: Job[Reply | Token]) -> None:
        async for _ in self._each(job):
            pass

    async def _streamed(self, job: Job[Reply | Token], tally: Tally, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await _chunk(send, self._completion.first())
            sent = await self._pieces(job, send)
            await self._end(sent, tally, job.waited, send)
        except ClientDisconnect:
            raise
        except Exception as error:  # too late for a status
            await _chunk(send, event(refusal(error).document()))
        await _chunk(send, b"", more=False)

    async def _pieces(self, job: Job[Reply | Token], send: Send) -> int:
        """Send tokens, but hold back what may be a call. How many are sent."""
        sent, holding = 0, bool(self._ask.tools.functions)
        async for token in self._each(job):
            if holding:
                holding = self._ask.tools.may_begin(answer_text(self._tokens))
            if not holding and (self._tokens[sent:] != [token] or token.text):
                await _chunk(send, self._completion.piece(self._tokens[sent:]))
                sent = len(self._tokens)
        return sent

    async def _end(self, sent: int, tally: Tally, waited: float, send: Send) -> None:
        held = self._tokens[sent:]
        calls = [] if sent else self._ask.tools.read(answer_text(held))
        if calls:
            await _chunk(send, self._completion.calls(calls))
        elif held:
            await _chunk(send, self._completion.piece(held))
        await _chunk(send, self._completion.last(tally, len(self._tokens), waited, calls))


async def _chunk(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
    await asyncio.sleep(0)  # neither the line nor the socket need make it wait: others, and a goodbye, get their turn
