"""`medge serve` as a process: where it listens, how it stops, and what reaches its terminal."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

import medge
from medge.errors import UsageError
from medge.serve.limits import Limits
from medge.serve.models import open_models
from medge.serve.server import read_key

Cli = Callable[..., tuple[int, str, str]]
PRIVATE = "the patient is Mrs Miller"
ASK: dict[str, Any] = {"model": "demo-generator", "messages": [{"role": "user", "content": PRIVATE}]}


@contextmanager
def process(*arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server, and its address."""
    command = [sys.executable, "-m", "medge.cli", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
    source = {"PYTHONPATH": str(Path(medge.__file__).parent.parent)}
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | source | environment)
    assert started.stderr is not None
    try:
        first = started.stderr.readline()
        found = re.search(r"http://[0-9.]+:\d+", first)
        assert found, first + started.stderr.read()
        yield started, found[0]
    finally:
        started.kill()
        started.wait()
        started.stderr.close()


def stop(started: subprocess.Popen[str], signals: int = 1) -> tuple[int, str]:
    for _ in range(signals):
        started.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert started.stderr is not None
    return started.wait(20), started.stderr.read()


def test_it_serves_stops_and_says_nothing_of_what_it_was_asked(chat_artifact: Path) -> None:
    with process(chat_artifact) as (started, url), httpx2.Client(base_url=url, timeout=30) as client:
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
        assert client.post("/v1/chat/completions", json={**ASK, "n": PRIVATE}).status_code == 400
        bad = client.post("/v1/chat/completions", content=PRIVATE, headers={"Content-Type": "application/json"})
        assert PRIVATE not in bad.text
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 403
        assert stop(started) == (0, "")


def test_a_signal_lets_an_answer_end(chat_artifact: Path) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 60, "maxItems": 60}
    long = {**ASK, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    with process(chat_artifact) as (started, url), httpx2.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/v1/chat/completions", json={**long, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            started.send_signal(signal.SIGTERM)
            assert "data: [DONE]" in list(lines)
        assert started.wait(20) == 0


def test_two_signals_do_not_wait(chat_artifact: Path) -> None:
    with process(chat_artifact, "--set", "grace_seconds=60") as (started, url), httpx2.Client(base_url=url) as client:
        schema = {"type": "array", "items": {"type": "integer"}, "minItems": 1000, "maxItems": 1000}
        format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with client.stream(
            "POST", "/v1/chat/completions", json={**ASK, "response_format": format, "stream": True}
        ) as a:
            lines = a.iter_lines()
            next(lines)
            for _ in range(2):
                started.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            assert any('"code":"stopping"' in line for line in lines)
        assert started.wait(20) == 0


def test_a_key_comes_from_the_environment_or_a_file(chat_artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("from-a-file-that-is-ours\n")
    with process(chat_artifact, "--api-key-file", file, MEDGE_API_KEY="from-the-environment") as (started, url):
        key = {"Authorization": "Bearer from-a-file-that-is-ours"}
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        assert httpx2.get(f"{url}/v1/models", headers=key).status_code == 200
        code, said = stop(started)
        assert (code, "from-a-file" in said) == (0, False)


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDGE_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("MEDGE_API_KEY", "a-long-enough-secret")
    assert read_key(None) == "a-long-enough-secret"
    (tmp_path / "short").write_text("abc")
    (tmp_path / "binary").write_bytes(b"\xff" * 40)
    for name, reason in (("short", "fewer than 16"), ("binary", "cannot be read"), ("none", "cannot be read")):
        with pytest.raises(UsageError, match=reason):
            read_key(tmp_path / name)


def test_what_cannot_be_served(cli: Cli, chat_artifact: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, said = cli("serve", chat_artifact, "--port", port)
        assert (code, f"Cannot listen on 127.0.0.1, port {port}" in said) == (2, True)
    for arguments, reason in (
        ([chat_artifact, "--host", "0.0.0.0"], "there is no API key"),  # noqa: S104
        ([tmp_path], "is no artifact"),
        ([chat_artifact, chat_artifact], "Two artifacts have the id 'demo-generator'"),
        ([f"a b={chat_artifact}"], "'a b' is no id"),
        ([chat_artifact, "--set", "quue=3"], "no such setting"),
        ([chat_artifact, "--set", "queue=three"], "no whole number"),
        ([chat_artifact, "--set", "queue=0"], "Give 1 or more"),
        ([chat_artifact, "--set", "context=1000000"], "A context of 1,000,000 tokens"),
    ):
        code, out, said = cli("serve", *arguments)
        assert (code, out, reason in said) == (2, "", True), said
        assert len(said.splitlines()) == 1


def test_a_damaged_artifact_is_found_before_anything_is_served(cli: Cli, own_artifact: Path) -> None:
    graph = own_artifact / "text_encoder.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    code, _, said = cli("serve", own_artifact)
    assert (code, "text_encoder" in said) == (5, True), said


def test_the_server_closes_what_it_opened(chat_artifact: Path) -> None:
    from medge.runtimes.generate import ChatRunOptions

    (served,) = open_models([str(chat_artifact)], ChatRunOptions(threads=1, context=512), queue=1)
    assert served.document()["medge"]["context"] == 512
    served.line.stop()
    assert served.line.join(5)
    served.close()
    with pytest.raises(UsageError, match="closed"):
        served.model.tokenize("x")  # type: ignore[union-attr]


def test_limits_have_sane_defaults() -> None:
    limits = Limits.parse({"queue": "3"})
    assert limits == Limits(queue=3)
    assert limits.image_bytes * 4 / 3 < limits.body_bytes < limits.held_bytes
