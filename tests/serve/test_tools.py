"""Functions in the prompt, calls out of the answer, and OpenAI's messages as alternating turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.serve.conftest import XRAY, Running, Scripted, data_url

from medge.runtimes.chat import ChatTemplate
from medge.runtimes.llama_sampler import gbnf
from medge.serve.conversation import chat
from medge.serve.errors import ApiError
from medge.serve.limits import Limits
from medge.serve.requests import ChatMessage, ChatRequest, Function
from medge.serve.tools import Call, Toolbox, toolbox
from medge.spec import ChatFormat

Script = Callable[..., AbstractContextManager[tuple[Scripted, Running]]]
WHAT = {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}
MEASURE = Function(name="measure", parameters=WHAT)
WAIT = Function(name="wait")
TOOLS = [{"type": "function", "function": {"name": "measure", "parameters": WHAT}}]
CALL = '{"name": "measure", "parameters": {"what": "pulse"}}'
MEASURED = Call("measure", '{"what": "pulse"}')


def turns(*messages: dict[str, Any], tools: Toolbox | None = None) -> list[tuple[str, tuple[Any, ...]]]:
    parsed = [ChatMessage.model_validate(message) for message in messages]
    return [(message.role, message.content) for message in chat(parsed, tools or Toolbox(), Limits())]


@pytest.mark.parametrize(
    "answer",
    [
        CALL,
        f"  {CALL}\n",
        f"```json\n{CALL}\n```",
        f"```tool_code\n{CALL}\n```",
        f"```\n{CALL}```",
        f"[{CALL}]",
        '{"name": "measure", "arguments": {"what": "pulse"}}',
    ],
)
def test_what_is_a_call(answer: str) -> None:
    tools = Toolbox((MEASURE, WAIT))
    assert tools.read(answer) == [MEASURED]
    assert all(tools.may_begin(answer[:length]) for length in range(len(answer)))


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I would measure the pulse.",
        f"Let me see: {CALL}",
        '{"name": "operate", "parameters": {}}',
        '{"name": "measure", "parameters": "pulse"}',
        '{"name": "measure", "parameters": {}, "reason": "why"}',
        '{"name": 3}',
        "{",
        "[]",
        "3",
        f"[{CALL}, 3]",
        '{"name": "measure", "parameters": {"what": NaN}}',
        "[" * 100_000,
    ],
)
def test_what_is_a_text(answer: str) -> None:
    assert Toolbox((MEASURE, WAIT)).read(answer) == []


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.sampled_from(["measure", "wait", "x"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["name", "parameters", "arguments", "x"]), inner, max_size=3)
        ),
    )
)
def test_whatever_a_model_writes_is_read(found: Any) -> None:
    for call in Toolbox((MEASURE, WAIT)).read(json.dumps(found)):
        assert call.name in ("measure", "wait")
        assert isinstance(json.loads(call.arguments), dict)


def test_several_calls_where_they_are_allowed() -> None:
    both = f'[{CALL}, {{"name": "wait"}}]'
    assert Toolbox((MEASURE, WAIT)).read(both) == [MEASURED, Call("wait", "{}")]
    assert Toolbox((MEASURE, WAIT), several=False).read(both) == []


def test_the_instruction_holds_the_functions() -> None:
    text = Toolbox((MEASURE,)).instruction
    assert text.startswith("You have access to functions.")
    assert json.dumps({"name": "measure", "description": "", "parameters": WHAT}) in text
    assert "MUST invoke measure now" in Toolbox((MEASURE,), required=True).instruction
    assert Toolbox().instruction == ""


def test_constrained_to_a_call_or_the_wanted_form() -> None:
    wanted = {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": "integer"}}}
    assert Toolbox((MEASURE,)).schema(None) is None
    assert Toolbox().schema(wanted) == wanted
    union = Toolbox((MEASURE, WAIT)).schema(wanted)
    assert union is not None
    assert union["$defs"]["2"]["properties"]["x"] == {"$ref": "#/$defs/2/$defs/X"}
    assert [each["$ref"] for each in union["anyOf"]] == ["#/$defs/0", "#/$defs/1", "#/$defs/2"]
    assert "measure" in gbnf(union)
    call = Toolbox((Function(name="f", parameters={**wanted, "required": ["x"]}),), required=True).schema(None)
    assert call is not None
    parameters = call["$defs"]["0"]["properties"]["parameters"]
    assert parameters["properties"]["x"] == {"$ref": "#/$defs/0/properties/parameters/$defs/X"}
    assert "integer" in gbnf(call)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tools": TOOLS * 2}, "given twice"),
        ({"tools": TOOLS * 65}, "65 tools are given; 64 are allowed"),
        ({"tool_choice": "required"}, "no tools are given"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "wait"}}}, "none of the tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "of type obj"),
    ],
)
def test_tools_that_cannot_be(more: dict[str, Any], reason: str) -> None:
    request = ChatRequest.model_validate({"model": "x", "messages": [{"role": "user", "content": "x"}], **more})
    with pytest.raises(ApiError, match=reason):
        toolbox(request, Limits())


def test_turns_alternate_whoever_speaks() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "measure", "arguments": '{"what": "pulse"}'}}
    found = turns(
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}, {"type": "text", "text": "Always."}]},
        {"role": "user", "content": "Look."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": "80"},
        {"role": "system", "content": "Hurry."},
        tools=Toolbox((MEASURE,)),
    )
    assert [role for role, _ in found] == ["system", "user", "assistant", "user"]
    assert found[0][1][0].startswith("Be brief.\n\nBe kind.\nAlways.\n\nYou have access to functions.")
    assert found[1][1] == ("Look.\n\nWhat is it?",)
    assert found[2][1] == (CALL,)
    assert found[3][1] == ('```tool_output\n{"name": "measure", "content": "80"}\n```\n\nHurry.',)


def test_images_keep_their_places() -> None:
    file = XRAY.read_bytes()
    image = {"type": "image_url", "image_url": {"url": data_url(file), "detail": "high"}}
    text = {"type": "text", "text": "a"}
    found = turns({"role": "user", "content": [text, image, text]}, {"role": "user", "content": [text, image]})
    assert found == [("user", ("a", file, "a\n\na", file))]


def test_the_template_takes_what_is_folded() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}:{{ m.content[0].text }};{% endfor %}", CHAT)
    parsed = [ChatMessage(role="user", content=[]), ChatMessage.model_validate({"role": "user", "content": "b"})]
    texts, _ = template.pieces(chat(parsed, Toolbox((WAIT,)), Limits()))
    assert texts[0].endswith("user:b;")


CHAT = ChatFormat(context=100)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "tool", "tool_call_id": "9", "content": "x"}, "answers no call"),
        ({"role": "tool", "content": "x"}, "answers no call"),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]},
            "are no JSON",
        ),
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}, "in a user mess"),
    ],
)
def test_messages_that_cannot_be(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(ApiError, match=reason) as refused:
        turns({"role": "user", "content": "x"}, message)
    assert refused.value.param is not None
    assert refused.value.param.startswith("messages.1")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("answer", "called"),
    [
        (("{", '"name": "measure", ', '"parameters": {"what": "pulse"}}'), True),
        (("```", "json\n", CALL, "\n```"), True),
        (("Fine", ", ", "then."), False),
        (("{", "not a call"), False),
    ],
)
def test_a_model_that_may_choose(scripted: Script, answer: Any, called: bool, *, stream: bool) -> None:
    with scripted(answer) as (model, server), server.openai() as client:
        messages: Any = [{"role": "user", "content": "How is he?"}]
        tools: Any = TOOLS
        found: Any = client.chat.completions.create(model="scripted", messages=messages, tools=tools, stream=stream)
        if stream:
            chunks = list(found)
            deltas = [chunk.choices[0].delta for chunk in chunks]
            text = "".join(delta.content or "" for delta in deltas)
            calls = [call for delta in deltas for call in delta.tool_calls or ()]
            finish = chunks[-1].choices[0].finish_reason
        else:
            message, finish = found.choices[0].message, found.choices[0].finish_reason
            text, calls = message.content or "", message.tool_calls or []
        assert [(call.function.name, call.function.arguments) for call in calls] == [
            ("measure", MEASURED.arguments)
        ] * called
        assert (text, finish) == (("", "tool_calls") if called else ("".join(answer), "stop"))
        (asked, options) = model.asked[0]
        assert (asked[0].role, options.schema) == ("system", None)


def test_tool_choice_none_shows_no_functions(scripted: Script) -> None:
    with scripted((CALL,)) as (model, server):
        body: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "x"}]}
        answer = server.post(**body, tools=TOOLS, tool_choice="none").json()
        assert answer["choices"][0]["message"]["content"] == CALL
        assert [message.role for message in model.asked[0][0]] == ["user"]
