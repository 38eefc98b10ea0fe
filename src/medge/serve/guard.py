"""What stands before every request: host, key, the room that bodies take, and the form that failures get."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from functools import partial
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medge.serve.errors import ApiError, refusal, unreadable
from medge.serve.limits import Limits
from medge.serve.metrics import Metrics

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
_HELD = "medge.held"
"""In a request's scope: what its body takes of the room."""
_LITTLE = 32 * 1024
"""Bytes of a body that are parsed in less than a millisecond."""
_JSON = "application/json"
_KEYED = ("/v1/", "/metrics")
"""Where a key is needed. The page holds nothing, and /health only says whether the server is well."""


class Room:
    """Bytes that all bodies may take together."""

    def __init__(self, size: int) -> None:
        self._free = size

    def take(self, count: int) -> None:
        """Take some for good.

        Raises:
            ApiError: 429, there are not so many.
        """
        if count > self._free:
            raise ApiError(429, "Too many large requests at once", "overloaded", headers={"Retry-After": "5"})
        self._free -= count

    def give(self, count: int) -> None:
        """Give them back."""
        self._free += count


class Guard:
    """ASGI middleware."""

    def __init__(
        self, app: ASGIApp, *, limits: Limits, metrics: Metrics, key: str | None, hosts: AbstractSet[str] | None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._key = None if key is None else _digest(f"Bearer {key}")
        self._hosts = hosts
        self._room = Room(limits.held_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it; either way it ends in an answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # until an answer begins

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope[_HELD] = held = _Held(self._room)
        try:
            self._check(scope)
            await self._app(scope, receive, counted)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Exception as error:
            refused = refusal(error)
            if status == 499:
                await refused.response()(scope, receive, counted)
        finally:
            held.release()
            self._metrics.answered(_path(scope), status)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _host(headers.get("host", "")) not in self._hosts:
            # A page elsewhere can name this machine's loopback address by a name of its own (DNS rebinding).
            raise ApiError(403, "This server answers to the names of this machine only", "forbidden_host")
        if self._key is None or not scope["path"].startswith(_KEYED):
            return
        if not hmac.compare_digest(_digest(headers.get("authorization", "")), self._key):
            raise ApiError(
                401, "The API key is missing or wrong", "invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )


class _Held:
    def __init__(self, room: Room) -> None:
        self._room = room
        self.bytes = 0

    def take(self, count: int) -> None:
        self._room.take(count)
        self.bytes += count

    def release(self) -> None:
        self._room.give(self.bytes)
        self.bytes = 0


async def aside(request: Request, work: Callable[[], T]) -> T:
    """Work on what a request holds: on another thread, unless it is so little that the way there costs more."""
    held: _Held = request.scope[_HELD]
    return work() if held.bytes <= _LITTLE else await run_in_threadpool(work)


async def read(request: Request, kind: type[M], limits: Limits) -> M:
    """A request's body, checked against its model.

    Raises:
        ApiError: no JSON, too large, too slow, or not as the model says.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
        # A page elsewhere can send other kinds without asking first.
        raise ApiError(415, f"The body must be {_JSON}", "unsupported_media_type")
    try:
        async with asyncio.timeout(limits.read_seconds):
            body = await _body(request, limits.body_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {limits.read_seconds} s", "timeout", headers={"Connection": "close"}
        ) from None
    try:
        return await aside(request, partial(kind.model_validate_json, body))
    except ValidationError as error:
        raise unreadable(error) from None


async def _body(request: Request, limit: int) -> bytes:
    held: _Held = request.scope[_HELD]
    body = bytearray()
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    async for chunk in request.stream():
        if len(body) + len(chunk) > limit:
            raise _too_large(limit)
        held.take(len(chunk))
        body += chunk
    return bytes(body)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"The body has more than {limit:,} bytes", "request_too_large", headers={"Connection": "close"}
    )


def _path(scope: Scope) -> str:
    """The route's own path: what a client wrote would make a counter each."""
    return str(getattr(scope.get("route"), "path", "other"))


def _digest(text: str) -> bytes:
    """Of one length for all, so that comparing takes one time for all."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _host(header: str) -> str:
    """Without the port."""
    name, _, port = header.rpartition(":")
    return (name if port.isdecimal() and name else header).lower()
