"""What the server costs: the same generator asked directly and over HTTP, in turns, in one process.

    python -m medge.serve.overhead ARTIFACT [ROUNDS [TOKENS]]

A round asks the same question four ways: directly and over HTTP, for one token and for TOKENS. What a request costs is
its wall time less what the model says it took, over HTTP less directly, at one token: connection, body, checks, the
line, the answer. What streaming costs is the time of the further tokens, over HTTP by directly. The prompt is in the
cache from the second time on, so that prefill hides nothing. The client reads in the same process, so its own work is
counted against the server.
"""

from __future__ import annotations

import asyncio
import json
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from typing import NamedTuple

from medge.runtimes import Generator
from medge.runtimes.generate import PHASES, ChatRunOptions, GenerateOptions, Message
from medge.serve.app import Service
from medge.serve.limits import Limits
from medge.serve.models import open_models
from medge.serve.server import Place, Server

ROUNDS, TOKENS = 20, 64
QUESTION = "Hello"


class Asked(NamedTuple):
    """One answer."""

    wall: float
    """Seconds from the question to the end."""
    model: float
    """Of these, what the model's phases took."""
    tokens: int


class Round(NamedTuple):
    """The four ways."""

    direct_one: Asked
    http_one: Asked
    direct: Asked
    http: Asked

    @property
    def request(self) -> float:
        """Seconds that a request costs."""
        return (self.http_one.wall - self.http_one.model) - (self.direct_one.wall - self.direct_one.model)

    @property
    def decode(self) -> float:
        """Seconds a token over HTTP, by those without."""
        return (self.http.wall - self.http_one.wall) / (self.direct.wall - self.direct_one.wall)

    @property
    def speed(self) -> float:
        """Tokens a second, asked directly."""
        return (self.direct.tokens - 1) / (self.direct.wall - self.direct_one.wall)


def measure(artifact: str, rounds: int, tokens: int) -> list[Round]:
    """Rounds after one that only warms up.

    Raises:
        MedgeError: as `medge.open_generator`.
    """
    models = open_models(["model=" + artifact], ChatRunOptions(), queue=1)
    _, model = models.generator("model")
    with _serving(Service(models, Limits())) as port:
        found = [_round(model, port, tokens) for _ in range(rounds + 1)]
    return found[1:]


@contextmanager
def _serving(service: Service) -> Iterator[int]:
    server, listener = Server(service), Place(port=0).bind()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join()


def _round(model: Generator, port: int, tokens: int) -> Round:
    one, same, direct, http = (
        ask(count) for count in (1, tokens) for ask in (partial(_direct, model), partial(_over_http, port))
    )
    assert direct.tokens == http.tokens  # noqa: S101 - greedy: the answer is one
    return Round(one, same, direct, http)


def _direct(model: Generator, tokens: int) -> Asked:
    start = time.perf_counter()
    reply = model.generate([Message("user", (QUESTION,))], GenerateOptions(max_tokens=tokens))
    count = sum(1 for _ in reply)
    return Asked(time.perf_counter() - start, sum(reply.tally.seconds.values()), count)


def _over_http(port: int, tokens: int) -> Asked:
    """A streamed answer over a connection of its own."""
    start = time.perf_counter()
    messages = [{"role": "user", "content": QUESTION}]
    options = {"max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    connection = HTTPConnection("127.0.0.1", port)
    body = json.dumps({"model": "model", "messages": messages, **options})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    *_, last, usage = [line for line in connection.getresponse() if line.startswith(b"data: {")]
    wall = time.perf_counter() - start
    connection.close()
    timings, counts = (json.loads(line.removeprefix(b"data: ")) for line in (last, usage))
    phases = sum(timings["timings"][phase] for phase in PHASES)
    return Asked(wall, phases, counts["usage"]["completion_tokens"])


def main(arguments: Sequence[str]) -> None:
    """ARTIFACT [ROUNDS [TOKENS]]: a line for people, one of JSON."""
    rounds, tokens = (int(arguments[i]) if len(arguments) > i else default for i, default in ((1, ROUNDS), (2, TOKENS)))
    found = measure(arguments[0], rounds, tokens)
    request = statistics.median(each.request for each in found) * 1000
    decode = (statistics.median(each.decode for each in found) - 1) * 100
    speed = statistics.median(each.speed for each in found)
    sys.stdout.write(
        f"{request:.2f} ms a request (goal: 5); {decode:+.2f} % of decode (goal: 3) at {speed:.1f} tokens/s;"
        f" medians of {rounds} rounds, {found[0].direct.tokens} tokens\n"
    )
    sys.stdout.write(json.dumps({"request_ms": request, "decode_percent": decode, "tokens_per_second": speed}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
