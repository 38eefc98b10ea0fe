"""Many clients at once, some slow, some broken, some leaving: no answer lost, none given to another."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from tests.serve.conftest import XRAY, data_url
from tests.serve.test_server import process, stop

from medge.demo.findings import ASK_KIND, GENERAL, KINDS, TOPICS
from medge.runtimes import open_generator
from medge.runtimes.generate import ChatRunOptions, Message, complete

CLIENTS = 16
SLACK = 8 << 20
"""Bytes that a process may gain: the allocator's, once all threads have worked."""
IMAGE = {"type": "image_url", "image_url": {"url": data_url(XRAY.read_bytes())}}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def questions() -> list[tuple[str, Any]]:
    """A name and a user's content each: texts of training, so that one token decides and rounding does not."""
    texts = [question for question, _ in GENERAL] + [ask.format(kind.label) for kind in KINDS for ask in ASK_KIND]
    about = [(f"image {text}", [IMAGE, {"type": "text", "text": text}]) for text in (*TOPICS["kind"], *TOPICS["made"])]
    return [*zip(texts, texts, strict=True), *about]


@pytest.fixture(scope="module")
def answers(chat_artifact: Path) -> dict[str, str]:
    """What each question is answered with, by the library alone."""
    model = open_generator(chat_artifact, ChatRunOptions(threads=1))
    found = {}
    for name, content in questions():
        parts = (content,) if isinstance(content, str) else (XRAY, content[1]["text"])
        model.forget()
        found[name] = complete(model, [Message("user", parts)]).text
    model.close()
    assert len({*found.values()}) > 30
    return found


class Crowd:
    """Clients that work off one list of requests, each in a way drawn by the seed."""

    def __init__(self, url: str, answers: dict[str, str], count: int) -> None:
        self._url = url
        self._answers = answers
        draw = random.Random(0)  # noqa: S311
        asked = questions()
        self._todo = [(draw.choice(asked), draw.choices(WAYS, SHARES)[0]) for _ in range(count)]
        self._next = iter(self._todo)
        self._lock = threading.Lock()
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []

    def run(self) -> None:
        threads = [threading.Thread(target=self._work) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self) -> None:
        with httpx2.Client(base_url=self._url, timeout=120) as client:
            while (job := self._take()) is not None:
                (name, content), way = job
                fault = self._try(way, client, content, name)
                with self._lock:
                    self.done[way.__name__] += 1
                    if fault:
                        self.faults.append(f"{way.__name__}, {name}: {fault}")

    def _take(self) -> Any:
        with self._lock:
            return next(self._next, None)

    def _try(self, way: Callable[..., str], client: httpx2.Client, content: Any, name: str) -> str:
        try:
            return way(client, content, self._answers[name])
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def body(content: Any, **more: Any) -> dict[str, Any]:
    return {"model": "demo-generator", "messages": [{"role": "user", "content": content}], **more}


def compared(found: str, expected: str) -> str:
    return "" if found == expected else f"{found!r} instead of {expected!r}"


def whole(client: httpx2.Client, content: Any, expected: str) -> str:
    answer = client.post("/v1/chat/completions", json=body(content))
    return compared(answer.json()["choices"][0]["message"]["content"], expected)


def streamed(client: httpx2.Client, content: Any, expected: str, pause: float = 0.0) -> str:
    with client.stream("POST", "/v1/chat/completions", json=body(content, stream=True)) as answer:
        return compared("".join(pieces(answer, pause)), expected)


def slowly(client: httpx2.Client, content: Any, expected: str) -> str:
    return streamed(client, content, expected, pause=0.02)


def pieces(answer: httpx2.Response, pause: float) -> Iterator[str]:
    for line in answer.iter_lines():
        time.sleep(pause)
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")


def leaving(client: httpx2.Client, content: Any, expected: str) -> str:
    with client.stream("POST", "/v1/chat/completions", json=body(content, stream=True)) as answer:
        next(answer.iter_lines())
        return "" if answer.status_code == 200 else f"status {answer.status_code}"


def half(client: httpx2.Client, content: Any, expected: str) -> str:
    """A request that breaks off in its head or its body."""
    whole_request = HEAD + b"Content-Length: 5000\r\n\r\n" + json.dumps(body(content)).encode()[:4000]
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        connection.sendall(whole_request[: len(expected) * 5 % len(whole_request) + 1])
    return ""


def no_utf8(client: httpx2.Client, content: Any, expected: str) -> str:
    return _refused(client, b'{"model": "demo-generator", "messages": [{"role": "user", "content": "\xc3\x28"}]}')


def no_json(client: httpx2.Client, content: Any, expected: str) -> str:
    return _refused(client, json.dumps(body(content)).encode()[:-1])


def _refused(client: httpx2.Client, sent: bytes) -> str:
    answer = client.post("/v1/chat/completions", content=sent, headers={"Content-Type": "application/json"})
    return "" if answer.status_code == 400 else f"status {answer.status_code}"


WAYS = (whole, streamed, slowly, leaving, half, no_utf8, no_json)
SHARES = (40, 30, 8, 8, 6, 4, 4)


def memory(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def check(answers: dict[str, str], artifact: Path, warm: int, count: int) -> tuple[int, int]:
    """Two crowds at one server; how much memory the second one left, and how many descriptors."""
    with process(artifact) as (started, url):
        measured = []
        for size in (warm, count):
            crowd = Crowd(url, answers, size)
            crowd.run()
            assert crowd.faults == []
            assert crowd.done.total() == size
            _until_idle(url)
            measured.append((memory(started.pid), psutil.Process(started.pid).num_fds()))
        with httpx2.Client(base_url=url) as client:
            text = client.get("/metrics").text
        assert 'status="500"' not in text
        assert stop(started) == (0, "")
    (before, fds_before), (after, fds_after) = measured
    return after - before, fds_after - fds_before


def _until_idle(url: str) -> None:
    end = time.monotonic() + 30
    with httpx2.Client(base_url=url) as client:
        while any(model["waiting"] or model["running"] for model in client.get("/health").json()["models"]):
            assert time.monotonic() < end
            time.sleep(0.05)
    time.sleep(0.5)  # for the ends of connections to arrive


def test_a_hundred_requests(answers: dict[str, str], chat_artifact: Path) -> None:
    grown, descriptors = check(answers, chat_artifact, 60, 100)
    assert grown < SLACK
    assert descriptors <= 2


@pytest.mark.slow
def test_a_thousand_requests(answers: dict[str, str], chat_artifact: Path) -> None:
    grown, descriptors = check(answers, chat_artifact, 200, 1000)
    assert grown < SLACK
    assert descriptors <= 2
