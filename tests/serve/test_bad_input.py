"""What no client may do to the server, and what it hears instead: one line, a code, the right status."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import numpy as np
import PIL.Image
import pytest
from tests.serve.conftest import XRAY, Running, Scripted, data_url

from medge.errors import UsageError
from medge.serve.limits import Limits
from medge.serve.server import Place

Script = Callable[..., AbstractContextManager[tuple[Scripted, Running]]]
ASK: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "Hello"}]}
KEY = "a-key-that-nobody-guesses"


def png(width: int, height: int) -> bytes:
    """A PNG that states a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def image(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def tool(parameters: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}


def check(answer: httpx2.Response, status: int, code: str, reason: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert reason in error["message"]
    assert "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


INT = {"type": "integer"}
CONTRADICTIONS: list[Any] = [
    {"type": "object", "properties": {"a": {"type": "string", "minLength": 5, "maxLength": 2}}},
    {"type": "object", "properties": {}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"enum": []}}},
    {"type": "object", "properties": {"a": {"type": "integer", "const": "x"}}},
    {"type": "object", "properties": {"a": {"allOf": [{"type": "string"}, INT]}}},
    {"type": "object", "properties": {"a": {"minimum": 3, "maximum": 2}}},
    {"type": "object", "properties": {"a": {"type": "array", "items": INT, "maxItems": 10**8}}},
    {"type": "object", "properties": {"a": {"type": "sting"}}},
]


@pytest.mark.parametrize(
    ("more", "code", "reason"),
    [
        ({"model": "gpt-4"}, "model_not_found", "no such model"),
        ({"messages": []}, "invalid_value", "messages: List should have at least 1 item"),
        ({"messages": [{"role": "user", "content": "a"}] * 10_000}, "invalid_value", "10,000 messages are given; 512"),
        ({"messages": [{"role": "user", "content": ""}]}, "invalid_value", "user message is empty"),
        ({"messages": [{"role": "pope", "content": "a"}]}, "invalid_value", "messages.0.role: Input should be"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "invalid_value", "'text', 'image_url'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "invalid_value", "End with a user message"),
        ({"messages": [{"role": "user", "content": "a <start_of_image>"}]}, "invalid_value", "may not hold"),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, "context_length_exceeded", "room for 8,191"),
        ({"temperature": 3}, "invalid_value", "temperature: Input should be less than or equal to 2"),
        ({"temprature": 1}, "unknown_parameter", "'temprature' is no field"),
        ({"n": 2}, "invalid_value", "n: Input should be 1"),
        ({"presence_penalty": 0.5}, "invalid_value", "presence_penalty"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"stop": [""]}, "invalid_value", "stop string is empty"),
        (image("https://example.com/x.png"), "invalid_value", "nothing is fetched"),
        (image("file:///etc/passwd"), "invalid_value", "nothing is fetched"),
        (image("data:image/png,abc"), "invalid_value", "in base64"),
        (image("data:image/png;base64,@@@"), "invalid_value", "holds no base64"),
        (image("data:image/png;base64,é"), "invalid_value", "holds no base64"),
        (image("data:image/png;base64,"), "invalid_image", "is empty"),
        (image(data_url(b"<svg/>", "image/svg+xml")), "invalid_image", "no image that medge knows"),
        (image(data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n", "image/png")), "invalid_image", "no image that medge knows"),
        (image(data_url(png(60_000, 60_000))), "invalid_image", "million pixels"),
        (image(data_url(png(9_000, 9_000))), "image_too_large", "9000 x 9000 pixels; 50,000,000 are allowed"),
        (image(data_url(png(9, 9))), "invalid_value", "damaged"),
        (image(data_url(XRAY.read_bytes()[:1000])), "invalid_value", "damaged"),
        (image(data_url(bytes(128) + b"DICM" + bytes(100))), "invalid_image", "modality is missing"),
        *((tool(schema), "invalid_schema", "The JSON Schema") for schema in CONTRADICTIONS),
        (tool({"type": "object", "description": "x" * 70_000}), "invalid_schema", "65,536 are allowed"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}}},
         "invalid_schema", "without values"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
         "invalid_value", "no grammar enforces"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_asked(server: Running, more: dict[str, Any], code: str, reason: str, *, stream: bool) -> None:
    status = 404 if code == "model_not_found" else 400
    check(server.post(**{**ASK, **more}, stream=stream), status, code, reason)
    server.until_idle()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"\xff\xfe\x00", "invalid_json"),
        (b'{"model": "chat", "messages": [{"role": "user", "content": "\xff"}]}', "invalid_json"),
        (b'{"model": "chat", "messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"[]", "invalid_value"),
        (b"3", "invalid_value"),
        (json.dumps({**ASK, "model": 3}).encode(), "invalid_value"),
    ],
)
def test_bodies_that_are_no_request(server: Running, body: bytes, code: str) -> None:
    with server.http(headers={"Content-Type": "application/json"}) as client:
        check(client.post("/v1/chat/completions", content=body), 400, code, "")


def test_paths_and_methods_that_are_none(server: Running) -> None:
    with server.http() as client:
        check(client.get("/v1/nothing"), 404, "not_found", "no such path")
        check(client.get("/v1/chat/completions"), 405, "not_found", "GET is not for this path")
        plain = client.post("/v1/chat/completions", content=json.dumps(ASK), headers={"Content-Type": "text/plain"})
        check(plain, 415, "unsupported_media_type", "application/json")


@pytest.mark.parametrize(
    ("path", "more", "reason"),
    [
        ("/v1/embeddings", {"input": []}, "at least 1 item"),
        ("/v1/embeddings", {"input": ["a", ""]}, "An input is empty"),
        ("/v1/embeddings", {"input": [1, 2]}, "input.0"),
        ("/v1/embeddings", {"input": ["a"] * 300}, "300 inputs are given"),
        ("/v1/embeddings", {"input": "data:image/png;base64,AAAA"}, "no image that medge knows"),
        ("/v1/classify", {"image": data_url(XRAY.read_bytes()), "labels": []}, "labels: List should have"),
        ("/v1/classify", {"image": data_url(XRAY.read_bytes()), "labels": ["a", "a"]}, "given twice"),
        ("/v1/classify", {"image": data_url(XRAY.read_bytes()), "labels": ["a"], "templates": ["x"]}, "needs '{}'"),
        ("/v1/classify", {"image": data_url(XRAY.read_bytes()), "labels": [" "]}, "A label is empty"),
        ("/v1/classify", {"image": "x", "labels": ["a"]}, "data URL"),
    ],
)
def test_what_cannot_be_embedded(server: Running, path: str, more: dict[str, Any], reason: str) -> None:
    answer = server.post(path, model="embed", **more)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]["message"]


def test_an_image_for_a_model_that_reads_none(scripted: Script) -> None:
    with scripted(("x",), failure=None) as (model, server):
        model.generate = refuse_images  # type: ignore[method-assign]
        answer = server.post(**{**image(data_url(XRAY.read_bytes())), "model": "scripted"})
        check(answer, 400, "invalid_value", "no image tower")


def refuse_images(*_: Any, **__: Any) -> Any:
    """What `LlamaGenerator.prompt` says of a text model."""
    raise UsageError("An image is given and the model has no image tower", "Use a multimodal model")


def test_a_key_is_needed_and_compared_whole(scripted: Script) -> None:
    with scripted(("fine",), key=KEY) as (_, server), server.http() as client:
        for header in ({}, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY[:-1]}"}, {"Authorization": "é"}):
            sent = {name: value.encode() for name, value in header.items()}
            answer = client.post("/v1/chat/completions", json=ASK, headers=sent)  # type: ignore[arg-type]
            check(answer, 401, "invalid_api_key", "missing or wrong")
        assert client.get("/metrics").status_code == client.get("/v1/models").status_code == 401
        assert client.get("/health").status_code == client.get("/").status_code == 200
        with server.openai(KEY) as ours:
            found = ours.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "x"}])
            assert found.choices[0].message.content == "fine"


def test_another_name_of_this_machine_is_refused(scripted: Script) -> None:
    with scripted(("x",), hosts=frozenset({"127.0.0.1"})) as (_, server), server.http() as client:
        assert client.get("/health").status_code == 200
        check(client.get("/health", headers={"Host": "evil.example"}), 403, "forbidden_host", "this machine only")
        check(client.get("/health", headers={"Host": "evil.example:80"}), 403, "forbidden_host", "this machine only")


def test_a_body_has_its_limit(scripted: Script) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 10_000

    with scripted(("x",), limits=Limits(body_bytes=100_000)) as (_, server):
        with server.http(headers={"Content-Type": "application/json"}) as client:
            declared = client.post("/v1/chat/completions", content=b"x" * 100_001)
            check(declared, 413, "request_too_large", "more than 100,000 bytes")
            assert client.post("/v1/chat/completions", content=b"x" * 100_000).status_code == 400
        cut = contextlib.suppress(httpx2.WriteError)  # the server answers and closes while the client still writes
        with server.http(headers={"Content-Type": "application/json"}) as client, cut:
            check(client.post("/v1/chat/completions", content=endless()), 413, "request_too_large", "")
        with server.http() as client:
            assert 'status="413"' in client.get("/metrics").text


def test_all_bodies_together_have_their_limit(scripted: Script) -> None:
    slow = ("word ",) * 1000
    with scripted(slow, pause=0.01, limits=Limits(held_bytes=150_000)) as (model, server):
        body: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "x" * 100_000}]}
        with server.http() as first, first.stream("POST", "/v1/chat/completions", json={**body, "stream": True}):
            check(server.post(**body), 429, "overloaded", "at once")
        server.until_idle()
        with server.http() as client, client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as ok:
            assert ok.status_code == 200
        assert len(model.asked) == 2


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n", b""),
        (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{",
            b"HTTP/1.1 408 ",
        ),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"HTTP/1.1 400 "),
    ],
)
def test_half_a_request_is_not_waited_for(scripted: Script, sent: bytes, answered: bytes) -> None:
    with scripted(("x",), limits=Limits(read_seconds=1)) as (_, server):
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as half:
            half.sendall(sent)
            assert half.recv(1000).startswith(answered)


def test_a_preview_is_small_and_grey_stays_grey(server: Running) -> None:
    deep = PIL.Image.fromarray(np.arange(3000 * 2000, dtype=np.uint16).reshape(2000, 3000) * 7)
    file = io.BytesIO()
    deep.save(file, "PNG")
    answer = server.post("/v1/preview", image=data_url(file.getvalue()))
    shown = PIL.Image.open(io.BytesIO(answer.content))
    assert (answer.headers["content-type"], shown.mode) == ("image/png", "RGB")
    assert max(shown.size) <= 1024
    assert shown.width / shown.height == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.com"])  # noqa: S104
def test_beyond_this_machine_a_key_is_needed(host: str) -> None:
    with pytest.raises(UsageError, match="no API key"):
        Place(host)
    assert not Place(host, key=KEY).loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert Place(host).loopback
