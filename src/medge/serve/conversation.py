"""OpenAI's messages to a chat of alternating turns, which is all that Gemma's template takes.

- What the system or a developer says first becomes the system message, the functions' instruction after it.
- What they say later stands in the user's turn at that place.
- A function's result is the user's turn too: the model reads it as something it is told.
- Turns of one side that follow each other become one, with an empty line between them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Literal

from medge.runtimes.generate import Message
from medge.runtimes.images import ImageLike
from medge.serve.errors import invalid
from medge.serve.images import image_bytes
from medge.serve.limits import Limits
from medge.serve.requests import ChatMessage, ImagePart, TextPart
from medge.serve.tools import Toolbox, result, written

_SYSTEM = ("system", "developer")
_BETWEEN, _WITHIN = "\n\n", "\n"
"""Between turns of one side, and between texts of one message."""
Side = Literal["user", "assistant"]
Content = list[str | ImageLike]


def chat(messages: Sequence[ChatMessage], tools: Toolbox, limits: Limits) -> list[Message]:
    """Messages for a `Generator`.

    Raises:
        ApiError: too many messages or images, an image that is none, or a result of no call.
    """
    if len(messages) > limits.messages:
        raise invalid(f"{len(messages):,} messages are given; {limits.messages:,} are allowed", "messages")
    images = sum(isinstance(part, ImagePart) for message in messages for part in message.content)
    if images > limits.images:
        raise invalid(f"{images} images are given; {limits.images} are allowed", "messages")
    opening = list(takewhile(lambda message: message.role in _SYSTEM, messages))
    said = [_text(message, f"messages.{i}") for i, message in enumerate(opening)]
    system = _BETWEEN.join(text for text in (*said, tools.instruction) if text)
    turns = _turns(messages[len(opening) :], len(opening), limits)
    return [*([Message("system", (system,))] if system else []), *turns]


def _turns(messages: Sequence[ChatMessage], first: int, limits: Limits) -> Iterator[Message]:
    names: dict[str, str] = {}
    side: Side | None = None
    content: Content = []
    for i, message in enumerate(messages, first):
        names |= {call.id: call.function.name for call in message.tool_calls or ()}
        its_side: Side = "assistant" if message.role == "assistant" else "user"
        if side not in (None, its_side):
            yield Message(side, tuple(content))
            content = []
        side = its_side
        _append(content, _content(message, names, f"messages.{i}", limits))
    if side:
        yield Message(side, tuple(content))


def _append(content: Content, more: Content) -> None:
    """Texts that meet become one: a template would trim what stands between them."""
    for i, item in enumerate(more):
        last = content[-1] if content else None
        if isinstance(item, str) and isinstance(last, str):
            content[-1] = f"{last}{'' if not last else _WITHIN if i else _BETWEEN}{item}"
        else:
            content.append(item)


def _content(message: ChatMessage, names: dict[str, str], where: str, limits: Limits) -> Content:
    if message.role == "tool":
        name = names.get(message.tool_call_id or "")
        if name is None:
            raise invalid("A tool's message answers no call of the messages before it", f"{where}.tool_call_id")
        return [result(name, _text(message, where))]
    if message.role == "assistant":
        return [_said(message, where)]
    content: Content = []
    for j, part in enumerate(message.content):
        content.append(
            part.text
            if isinstance(part, TextPart)
            else image_bytes(part.image_url.url, limits, f"{where}.content.{j}.image_url.url")
        )
    return content


def _said(message: ChatMessage, where: str) -> str:
    calls = [
        written({"name": call.function.name, "parameters": _arguments(call.function.arguments, where)})
        for call in message.tool_calls or ()
    ]
    several = [f"[{', '.join(calls)}]"] if len(calls) > 1 else calls
    return _BETWEEN.join(text for text in (_text(message, where), *several) if text)


def _arguments(text: str, where: str) -> object:
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise invalid("The arguments of an earlier call are no JSON", f"{where}.tool_calls") from None


def _text(message: ChatMessage, where: str) -> str:
    if not all(isinstance(part, TextPart) for part in message.content):
        raise invalid(f"An image stands in a {message.role} message; put it in a user message", where)
    return _WITHIN.join(part.text for part in message.content if isinstance(part, TextPart))
