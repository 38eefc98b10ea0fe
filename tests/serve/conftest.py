"""A server on a loopback port, in a thread: over the demo models, and over a model that says what a test wants."""

from __future__ import annotations

import asyncio
import base64
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from medge.demo import GENERATOR, IMAGES
from medge.manifest import Artifact
from medge.runtimes import open_embedder
from medge.runtimes.generate import GenerateOptions, Message, Reply, Tally, Token
from medge.serve.app import Service
from medge.serve.limits import Limits
from medge.serve.line import Line
from medge.serve.models import Models, Served, open_models
from medge.serve.server import Place, Server

XRAY = next(iter(sorted((IMAGES / "chest x-ray").glob("*.jpg"))))


def data_url(data: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@dataclass
class Running:
    """A server that runs."""

    url: str
    service: Service
    server: Server

    def http(self, **more: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=30, **more)

    def openai(self, key: str = "none", retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=retries, timeout=60)

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx2.Response:
        with self.http() as client:
            return client.post(path, json=body)

    def until_idle(self, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while self.service.busy:
            assert time.monotonic() < end, "the line does not get empty"
            time.sleep(0.005)


@contextmanager
def running(
    models: Models, limits: Limits | None = None, key: str | None = None, hosts: frozenset[str] | None = None
) -> Iterator[Running]:
    limits = limits or Limits()
    service = Service(models, limits, key, hosts)
    server, listener = Server(service), Place(port=0).bind()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, server)
    finally:
        server.handle_exit(signal.SIGTERM, None)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        assert not thread.is_alive()
        for served in models:
            served.line.stop()
            assert served.line.join(10)


@pytest.fixture(scope="session")
def chat_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo generator in GGUF, int8."""
    pytest.importorskip("llama_cpp")
    from medge.checkpoint import Checkpoint
    from medge.export.pipeline import export
    from medge.export.request import Request
    from medge.quantize.scheme import load

    root = tmp_path_factory.mktemp("serve") / "demo-generator"
    export(Request(Checkpoint.open(GENERATOR), "gguf", load("int8"), root, {"parity": "off"}))
    return root


@pytest.fixture(scope="session")
def server(chat_artifact: Path, artifact: Path) -> Iterator[Running]:
    """The demo generator as `chat`, the tiny MedSigLIP as `embed`."""
    from medge.runtimes.generate import ChatRunOptions

    names = [f"chat={chat_artifact}", f"embed={artifact}"]
    with running(open_models(names, ChatRunOptions(threads=1), queue=32)) as found:
        yield found


@pytest.fixture(scope="session")
def client(server: Running) -> openai.OpenAI:
    return server.openai()


THOUGHT = "(thinking) "
"""Marks a scripted token as part of a thought."""


@dataclass
class Scripted:
    """A generator that says what it was told to, and notes what it was asked."""

    answers: list[Sequence[str]] = field(default_factory=list)
    """Tokens of each answer; the last one is given again and again."""
    pause: float = 0.0
    """Seconds before each token."""
    failure: Exception | None = None
    """Raised after the first token."""
    name: str = "scripted"
    context: int = 1000
    image: Any = None
    image_tokens: int = 16
    asked: list[tuple[Sequence[Message], GenerateOptions]] = field(default_factory=list)
    said: int = 0
    """Tokens of the last answer that were asked beyond."""
    closed: bool = False

    def generate(
        self, messages: Sequence[Message], options: GenerateOptions | None = None, *, cancelled: Callable[[], bool]
    ) -> Reply:
        assert options is not None
        self.asked.append((messages, options))
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        tally = Tally(prompt_tokens=7)
        return Reply(self._said(answer, tally, cancelled), tally)

    def _said(self, answer: Sequence[str], tally: Tally, cancelled: Callable[[], bool]) -> Iterator[Token]:
        for i, text in enumerate(answer):
            time.sleep(self.pause)
            if cancelled():
                tally.finish = "cancelled"
                return
            if i and self.failure:
                raise self.failure
            yield Token(i, text.removeprefix(THOUGHT), thought=text.startswith(THOUGHT))
            self.said = i + 1
        tally.finish = "stop"

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def scripted(chat_artifact: Path) -> Callable[..., Any]:
    """`with scripted(answers, …) as (model, server)`."""

    @contextmanager
    def run(
        *answers: Sequence[str], limits: Limits | None = None, key: str | None = None,
        hosts: frozenset[str] | None = None, **more: Any,
    ) -> Iterator[tuple[Scripted, Running]]:  # fmt: skip
        model: Any = Scripted(list(answers), **more)
        line = Line("scripted", (limits or Limits()).queue)
        served = Served("scripted", Artifact.open(chat_artifact).manifest, model, line)
        with running(Models([served]), limits, key, hosts) as found:
            yield model, found

    return run


@pytest.fixture(scope="session")
def embedder(artifact: Path) -> Any:
    return open_embedder(artifact)
