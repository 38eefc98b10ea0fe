"""A chat request, checked and turned into what a `Generator` takes: all that needs no model."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from medge.errors import MedgeError
from medge.runtimes.generate import GenerateOptions, Generator, Message
from medge.serve.conversation import chat
from medge.serve.errors import known
from medge.serve.limits import Limits
from medge.serve.requests import ChatRequest, JsonSchemaFormat, Schema, TextFormat
from medge.serve.tools import Toolbox, check_given_schema, toolbox

_SEEDS = 2**32 - 1
"""As many as `GenerateOptions` takes."""


@dataclass(frozen=True)
class Ask:
    """What is asked of the model."""

    messages: list[Message]
    options: GenerateOptions
    tools: Toolbox


def ask(request: ChatRequest, generator: Generator, limits: Limits) -> Ask:
    """Check a request and translate it. Images are checked by their headers and not decoded.

    Raises:
        ApiError: what it asks for cannot be.
    """
    tools = toolbox(request, limits)
    try:
        options = _options(request, tools, generator, limits)
        return Ask(chat(request.messages, tools, limits), options, tools)
    except MedgeError as error:
        raise known(error) from None


def _options(request: ChatRequest, tools: Toolbox, generator: Generator, limits: Limits) -> GenerateOptions:
    """The library's defaults hold where the request says nothing: greedy, as MedGemma's card has it."""
    asked = request.max_completion_tokens or request.max_tokens or generator.context
    seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed % _SEEDS
    given = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    return GenerateOptions(
        max_tokens=min(asked, limits.answer_tokens),
        seed=seed,
        stop=tuple(request.stop or ()),
        schema=tools.schema(_wanted(request, limits)),
        logprobs=int(bool(request.logprobs)),
        **{name: value for name, value in given.items() if value is not None},
    )


def _wanted(request: ChatRequest, limits: Limits) -> Schema | None:
    """What a text answer must fit."""
    wanted = request.response_format
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    if not isinstance(wanted, JsonSchemaFormat):
        return {"type": "object"}
    schema = wanted.json_schema.schema_
    check_given_schema(schema, "response_format.json_schema.schema", limits)
    return schema
