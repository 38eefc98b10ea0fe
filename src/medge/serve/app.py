"""The ASGI application: OpenAI's paths, a few of its own, and the page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from medge.serve.answer import Answer, in_line
from medge.serve.ask import ask
from medge.serve.documents import Completion
from medge.serve.embed import (
    check_classes,
    classification,
    embedding_inputs,
    embeddings,
    embeddings_document,
    preview,
)
from medge.serve.errors import ApiError
from medge.serve.guard import Guard, aside, read
from medge.serve.images import image_bytes
from medge.serve.limits import Limits
from medge.serve.metrics import MEDIA_TYPE, Metrics
from medge.serve.models import Models, Served
from medge.serve.requests import ChatRequest, ClassifyRequest, EmbeddingRequest, PreviewRequest

T = TypeVar("T")
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""Path -> file of the package, media type."""
_DECODED_AT_ONCE = 2
"""Previews: an image of the most pixels takes 150 MB."""
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass
class Service:
    """What is served, and whether still."""

    models: Models
    limits: Limits
    key: str | None = None
    hosts: AbstractSet[str] | None = None
    """Names that a request's Host may have; None takes any."""
    stopping: bool = False

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.models)

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return any(served.line.waiting or served.line.running for served in self.models)

    def stop(self) -> None:
        """Take no more; what waits and runs goes on."""
        self.stopping = True
        for served in self.models:
            served.line.stop()

    def cancel(self) -> None:
        """End what waits and runs."""
        for served in self.models:
            served.line.cancel_all()


def create_app(service: Service) -> Starlette:
    """The application over models that are open."""
    paths = _Paths(service)
    routes = [
        Route("/v1/chat/completions", paths.chat, methods=["POST"]),
        Route("/v1/embeddings", paths.embeddings, methods=["POST"]),
        Route("/v1/classify", paths.classify, methods=["POST"]),
        Route("/v1/preview", paths.preview, methods=["POST"]),
        Route("/v1/models", paths.models),
        Route("/v1/models/{id:path}", paths.model),
        Route("/health", paths.health),
        Route("/metrics", paths.metrics),
        *(Route(path, _page(*file)) for path, file in PAGE.items()),
    ]
    guard = Middleware(
        Guard, limits=service.limits, metrics=service.metrics, key=service.key, hosts=service.hosts
    )  # inside Starlette's own error page, so that none of its texts reaches a client
    return Starlette(routes=routes, middleware=[guard], exception_handlers={HTTPException: _no_route})


def _page(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = (files("medge.serve") / "page" / name).read_bytes()

    async def page(_: Request) -> Response:
        return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    return page


async def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405, in the form of all errors."""
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    what = {404: "There is no such path", 405: f"{request.method} is not for this path"}
    message = what.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, "not_found", headers=error.headers or {}).response()


class _Paths:
    """One method a path."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._models, self._limits, self._metrics = service.models, service.limits, service.metrics
        self._decoding = asyncio.Semaphore(_DECODED_AT_ONCE)

    async def chat(self, request: Request) -> Response:
        asked = await read(request, ChatRequest, self._limits)
        served, model = self._models.generator(asked.model)
        what = await aside(request, partial(ask, asked, model, self._limits))
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        completion = Completion(served.id, what.tools, logprobs=bool(asked.logprobs), with_usage=with_usage)
        return Answer(served, model, what, completion, self._metrics, stream=asked.stream)

    async def embeddings(self, request: Request) -> Response:
        asked = await read(request, EmbeddingRequest, self._limits)
        served, model = self._models.embedder(asked.model)
        inputs = await aside(request, partial(embedding_inputs, asked, self._limits))
        rows, tokens = await self._made(request, served, len(inputs), lambda: embeddings(model, inputs))
        return await run_in_threadpool(lambda: JSONResponse(embeddings_document(asked, rows, tokens)))

    async def classify(self, request: Request) -> Response:
        asked = await read(request, ClassifyRequest, self._limits)
        served, model = self._models.embedder(asked.model)
        check_classes(asked, self._limits)
        image = await aside(request, partial(image_bytes, asked.image, self._limits, "image"))
        inputs = 1 + len(asked.labels) * len(asked.templates)
        scores = await self._made(request, served, inputs, lambda: classification(model, image, asked))
        return JSONResponse(scores)

    async def _made(self, request: Request, served: Served, inputs: int, make: Callable[[], T]) -> T:
        """One thing from an embedder, which cannot be stopped within."""

        def work(_: Callable[[], bool]) -> Generator[tuple[T, float], None, None]:
            start = time.perf_counter()
            yield make(), time.perf_counter() - start

        async with in_line(served.line, work, request.receive) as job:
            made, seconds = await anext(job)
        self._metrics.embedded(served.id, inputs, job.waited, seconds)
        return made

    async def preview(self, request: Request) -> Response:
        asked = await read(request, PreviewRequest, self._limits)
        image = await aside(request, partial(image_bytes, asked.image, self._limits, "image"))
        async with self._decoding:
            return Response(await run_in_threadpool(preview, image), media_type="image/png")

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [served.document() for served in self._models]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._models.get(request.path_params["id"]).document())

    async def health(self, _: Request) -> Response:
        lines = [{"id": m.id, "waiting": m.line.waiting, "running": m.line.running} for m in self._models]
        status = "stopping" if self._service.stopping else "ok"
        return JSONResponse({"status": status, "models": lines}, 503 if self._service.stopping else 200)

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type=MEDIA_TYPE)
