"""The server through OpenAI's own client, over the demo models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from tests.serve.conftest import XRAY, Running, data_url

from medge.runtimes import Generator, open_generator
from medge.runtimes.generate import ChatRunOptions, GenerateOptions, Message, complete

HELLO: Any = [{"role": "user", "content": "Hello"}]
KIND = "What kind of image is this?"
IMAGE: Any = {"type": "image_url", "image_url": {"url": data_url(XRAY.read_bytes())}}
MEASURE: Any = {
    "type": "function",
    "function": {
        "name": "measure",
        "description": "Measures something of the patient.",
        "parameters": {
            "type": "object",
            "properties": {"what": {"$ref": "#/$defs/What"}},
            "required": ["what"],
            "$defs": {"What": {"enum": ["temperature", "pulse"]}},
        },
    },
}
WAIT: Any = {"type": "function", "function": {"name": "wait"}}


@pytest.fixture(scope="module")
def direct(chat_artifact: Path) -> Iterator[Generator]:
    """The same artifact without a server."""
    generator = open_generator(chat_artifact, ChatRunOptions(threads=1))
    yield generator
    generator.close()


def chat(client: openai.OpenAI, messages: Any = HELLO, **more: Any) -> Any:
    return client.chat.completions.create(model="chat", messages=messages, **more)


def test_the_answer_is_the_generator_s(client: openai.OpenAI, direct: Generator) -> None:
    expected = complete(direct, [Message("user", ("Hello",))])
    answer = chat(client)
    choice, usage = answer.choices[0], answer.usage
    assert choice.message.content == expected.text
    assert (choice.message.role, choice.finish_reason, answer.model) == ("assistant", "stop", "chat")
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, len(expected.tokens))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer.timings["decode"] > 0


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI, direct: Generator) -> None:
    expected = complete(direct, [Message("user", ("Hello",))])
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert pieces == [token.text for token in expected.tokens if token.text]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_images_stand_where_they_are_put(client: openai.OpenAI, direct: Generator) -> None:
    expected = complete(direct, [Message("user", (XRAY, KIND))]).text
    answer = chat(client, [{"role": "user", "content": [IMAGE, {"type": "text", "text": KIND}]}])
    assert answer.choices[0].message.content == expected
    assert "chest x-ray" in expected
    other = [{"role": "user", "content": [{"type": "text", "text": KIND}, IMAGE]}]
    after = complete(direct, [Message("user", (KIND, XRAY))])
    assert chat(client, other).choices[0].message.content == after.text


def test_a_conversation_goes_on(client: openai.OpenAI, direct: Generator) -> None:
    asked = [{"role": "user", "content": [IMAGE, {"type": "text", "text": KIND}]}]
    first = chat(client, asked).choices[0].message
    again = chat(client, [*asked, first, {"role": "user", "content": "Explain the contrast."}])
    turns = [Message("user", (XRAY, KIND)), Message("assistant", (first.content,))]
    expected = complete(direct, [*turns, Message("user", ("Explain the contrast.",))])
    assert again.choices[0].message.content == expected.text
    assert again.usage.prompt_tokens_details.cached_tokens > 20


def test_options_reach_the_generator(client: openai.OpenAI, direct: Generator) -> None:
    options = GenerateOptions(temperature=1.5, top_p=0.9, seed=7, max_tokens=12)
    expected = complete(direct, [Message("user", ("Hello",))], options)
    answer = chat(client, temperature=1.5, top_p=0.9, seed=7, max_completion_tokens=12)
    assert answer.choices[0].message.content == expected.text
    assert chat(client, max_tokens=2).choices[0].finish_reason == "length"
    assert chat(client, stop=["medical"]).choices[0].message.content == "Hello. Show me a "


def test_logprobs(client: openai.OpenAI, direct: Generator) -> None:
    expected = complete(direct, [Message("user", ("Hello",))], GenerateOptions(logprobs=1))
    rated = chat(client, logprobs=True).choices[0].logprobs.content
    assert [each.token for each in rated] == [token.text for token in expected.tokens]
    assert [each.logprob for each in rated] == [pytest.approx(token.logprob, abs=1e-3) for token in expected.tokens]


def test_a_json_schema_holds(client: openai.OpenAI) -> None:
    kind = {"enum": ["yes", "no"]}
    schema = {"type": "object", "properties": {"answer": kind}, "required": ["answer"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    found = json.loads(chat(client, response_format=wanted).choices[0].message.content)
    assert found["answer"] in kind["enum"]
    found = json.loads(chat(client, response_format={"type": "json_object"}).choices[0].message.content)
    assert isinstance(found, dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "measure"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_is_made(client: openai.OpenAI, choice: Any, *, stream: bool) -> None:
    tools = [MEASURE] if choice == "required" else [WAIT, MEASURE]
    answer = chat(client, tools=tools, tool_choice=choice, stream=stream)
    if stream:
        chunks = list(answer)
        (call,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        finish = chunks[-1].choices[0].finish_reason
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
    else:
        (call,), finish = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
        assert answer.choices[0].message.content is None
    assert (call.function.name, finish) == ("measure", "tool_calls")
    assert json.loads(call.function.arguments)["what"] in ("temperature", "pulse")


def test_a_call_and_its_result_go_back(client: openai.OpenAI) -> None:
    message = chat(client, tools=[MEASURE], tool_choice="required").choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "37.9"}
    answer = chat(client, [*HELLO, message, result], tools=[MEASURE])
    assert answer.choices[0].message.content is not None


def test_embeddings_are_the_embedder_s(client: openai.OpenAI, embedder: Any) -> None:
    texts = ["a chest x-ray", "a head ct"]
    both = client.embeddings.create(model="embed", input=[texts[0], data_url(XRAY.read_bytes()), texts[1]])
    rows = np.array([each.embedding for each in both.data], np.float32)
    expected = np.stack([*embedder.embed_texts(texts), *embedder.embed_images([XRAY])])
    np.testing.assert_allclose(rows, expected[[0, 2, 1]], atol=1e-6)
    floats = client.embeddings.create(model="embed", input=texts[0], encoding_format="float")
    np.testing.assert_allclose(floats.data[0].embedding, expected[0], atol=1e-6)
    assert [each.index for each in both.data] == [0, 1, 2]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["chat", "embed"]
    chat_model: Any = client.models.retrieve("chat")
    assert chat_model.medge["task"] == "generate"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_are_those_that_the_client_knows(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, [{"role": "user", "content": "word " * 9000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="embeds and does not answer"):
        client.chat.completions.create(model="embed", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="answers and does not embed"):
        client.embeddings.create(model="chat", input="text")
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="embed", input="text", dimensions=3)


def test_zero_shot_scores_are_the_embedder_s(server: Running, embedder: Any) -> None:
    labels, templates = ["chest x-ray", "head ct"], ["{}", "a photo of {}"]
    body = {"model": "embed", "image": data_url(XRAY.read_bytes()), "labels": labels, "templates": templates}
    found = server.post("/v1/classify", **body).json()
    assert [each["label"] for each in found["scores"]] == labels
    scores = [each["score"] for each in found["scores"]]
    np.testing.assert_allclose(scores, embedder.classify([XRAY], labels, templates)[0], atol=1e-5)
    single = server.post("/v1/classify", **body, multilabel=True).json()["scores"]
    expected = embedder.classify([XRAY], labels, templates, multilabel=True)[0]
    np.testing.assert_allclose([each["score"] for each in single], expected, atol=1e-5)
