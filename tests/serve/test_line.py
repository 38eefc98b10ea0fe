"""One at a time, a bounded number behind, and what happens when a client leaves or the server stops."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import pytest
from tests.serve.conftest import THOUGHT, Running, Scripted

from medge.errors import CorruptError
from medge.serve.limits import Limits

Script = Callable[..., AbstractContextManager[tuple[Scripted, Running]]]
HELLO: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}
LONG: Sequence[str] = ("word ",) * 2000


def eventually(question: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.005)


def test_the_line_is_bounded_and_says_when_to_come_back(scripted: Script) -> None:
    with scripted(LONG, pause=0.01, limits=Limits(queue=2)) as (model, server), ThreadPoolExecutor(3) as pool:
        kept = [pool.submit(server.post, **HELLO) for _ in range(1)]
        eventually(lambda: bool(model.asked))
        kept += [pool.submit(server.post, **HELLO) for _ in range(2)]
        line = next(iter(server.service.models)).line
        eventually(lambda: line.waiting == 2)
        refused = server.post(**HELLO)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert (line.running, len(model.asked)) == (1, 1)
        server.service.cancel()
        assert [each.result().status_code for each in kept] == [503] * 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(scripted: Script, *, stream: bool) -> None:
    with scripted(LONG, ("next",), pause=0.005) as (model, server):
        leave(server, model, stream=stream)
        server.until_idle(seconds=2)
        assert model.said < len(LONG)
        assert server.post(**HELLO).json()["choices"][0]["message"]["content"] == "next"
        with server.http() as client:
            assert 'medge_cancelled_total{model="scripted"} 1.0' in client.get("/metrics").text


def leave(server: Running, model: Scripted, *, stream: bool) -> None:
    """Ask, and go while the answer is made."""
    with server.http() as client:
        try:
            with client.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": stream}, timeout=0.3) as answer:
                next(answer.iter_bytes())
        except httpx2.ReadTimeout:
            assert not stream
    assert len(model.asked) == 1


def test_a_client_that_leaves_the_line_makes_room_and_is_never_asked_for(scripted: Script) -> None:
    with scripted(LONG, pause=0.01, limits=Limits(queue=1)) as (model, server), ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post, **HELLO)
        eventually(lambda: bool(model.asked))
        with server.http() as client, pytest.raises(httpx2.ReadTimeout):
            client.post("/v1/chat/completions", json=HELLO, timeout=0.2)
        line = next(iter(server.service.models)).line
        eventually(lambda: line.waiting == 0)
        server.service.cancel()
        assert first.result().status_code == 503
        server.until_idle()
        assert len(model.asked) == 1


def test_a_slow_reader_does_not_hold_the_model(scripted: Script) -> None:
    answer = ("x" * 1000,) * 2000
    with scripted(answer, ("quick",)) as (model, server), server.http() as client:
        with client.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as slow:
            events = slow.iter_lines()
            next(events)
            assert server.post(**HELLO).json()["choices"][0]["message"]["content"] == "quick"
            assert sum(line.count("x" * 1000) for line in events) == 2000
        server.until_idle()
        assert len(model.asked) == 2


def test_a_reader_that_stands_still_is_cut_off(scripted: Script) -> None:
    answer = ("x" * 100_000,) * 300
    with scripted(answer, limits=Limits(write_seconds=1)) as (_, server), server.http() as client:
        with client.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as stuck:
            time.sleep(2)
            with pytest.raises(httpx2.HTTPError):
                for _ in stuck.iter_bytes():
                    pass
        server.until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_model_that_fails_within_its_answer_says_so(scripted: Script, *, stream: bool) -> None:
    failure = CorruptError("llama.cpp gives no numbers", "Run: medge verify ARTIFACT")
    with scripted(("one", "two"), failure=failure) as (_, server):
        answer = server.post(**HELLO, stream=stream)
        if stream:
            error = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
        else:
            assert answer.status_code == 500
            error = answer.json()["error"]
        assert (error["message"], error["code"]) == (str(failure), "corrupt_model")


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_of_our_own_names_no_content(
    scripted: Script, caplog: pytest.LogCaptureFixture, *, stream: bool
) -> None:
    with scripted(("one", "two"), failure=RuntimeError("the patient's name")) as (_, server):
        answer = server.post(**HELLO, stream=stream)
        assert '"code":"internal_error"' in answer.text
        assert answer.status_code == (200 if stream else 500)
        assert "internal error: RuntimeError in conftest.py, line" in caplog.text
        assert "patient" not in answer.text + caplog.text
        assert server.post(**HELLO).status_code == 500


def test_a_stopping_server_finishes_what_it_has_and_says_so(scripted: Script) -> None:
    with scripted(("word ",) * 60, pause=0.02) as (model, server), ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(server.post, **HELLO) for _ in range(2)]
        line = next(iter(server.service.models)).line
        eventually(lambda: bool(model.asked) and line.waiting == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        eventually(lambda: server.service.stopping)
        with server.http() as client:
            health = client.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "stopping")
        refused = server.post(**HELLO)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        contents = [each.result().json()["choices"][0]["message"]["content"] for each in asked]
        assert contents == ["word " * 60] * 2


@pytest.mark.parametrize("stream", [True, False])
def test_what_outlasts_the_grace_is_cancelled(scripted: Script, *, stream: bool) -> None:
    with scripted(LONG, pause=0.01, limits=Limits(grace_seconds=1)) as (model, server), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, **HELLO, stream=stream)
        eventually(lambda: bool(model.asked))
        start = time.monotonic()
        server.server.handle_exit(signal.SIGTERM, None)
        answer = asked.result()
        assert 0.9 < time.monotonic() - start < 5
        assert '"code":"stopping"' in answer.text
        assert answer.status_code == (200 if stream else 503)
        assert 10 < model.said < len(LONG)


def test_requests_of_one_model_come_in_order(scripted: Script) -> None:
    with scripted(("a",), pause=0.05) as (model, server):
        threads = []
        for i in range(6):
            body = {"model": "scripted", "messages": [{"role": "user", "content": str(i)}]}
            threads.append(threading.Thread(target=server.post, kwargs=body))
            threads[-1].start()
            eventually(lambda: len(model.asked) + next(iter(server.service.models)).line.waiting > len(threads) - 1)
        for thread in threads:
            thread.join()
        assert [messages[0].content[0] for messages, _ in model.asked] == [str(i) for i in range(6)]


def test_metrics_and_health(scripted: Script) -> None:
    with scripted(("a", "b")) as (_, server), server.http() as client:
        server.post(**HELLO)
        server.post("/nowhere", **HELLO)
        assert client.get("/health").json() == {
            "status": "ok", "models": [{"id": "scripted", "waiting": 0, "running": 0}]
        }  # fmt: skip
        text = client.get("/metrics").text
    expected: Any = [
        'medge_requests_total{path="/v1/chat/completions",status="200"} 1.0',
        'medge_requests_total{path="other",status="404"} 1.0',
        'medge_tokens_total{kind="prompt",model="scripted"} 7.0',
        'medge_tokens_total{kind="generated",model="scripted"} 2.0',
        'medge_first_token_seconds_count{model="scripted"} 1.0',
        'medge_waiting{model="scripted"} 0.0',
    ]
    assert [line for line in expected if line not in text] == []


def test_a_thought_is_no_part_of_the_answer(scripted: Script) -> None:
    with scripted((f"{THOUGHT}a heart", "Hello")) as (_, server):
        message = server.post(**HELLO).json()["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == ("Hello", "a heart")
        assert "heart" not in server.post(**HELLO, stream=True).text
