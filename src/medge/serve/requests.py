"""The bodies of requests, as OpenAI's API reference has them, and no field that would be ignored in silence.

A field that changes an answer and that this server cannot honour is refused unless it has its neutral value. What
only serves the provider's bookkeeping (`user`, `metadata`, …) is taken and dropped.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_CLOSED = ConfigDict(extra="forbid")
_OPEN = ConfigDict(extra="ignore")
"""For what a client copies back from an earlier answer, with all that its library put there."""

Schema = dict[str, Any]


class TextPart(BaseModel):
    """A text in a message."""

    model_config = _OPEN
    type: Literal["text"] = "text"
    text: str


class ImageUrl(BaseModel):
    """Where an image is: in the URL itself."""

    model_config = _OPEN
    url: str


class ImagePart(BaseModel):
    """An image in a message."""

    model_config = _OPEN
    type: Literal["image_url"]
    image_url: ImageUrl


def _parts(content: Any) -> Any:
    """A text alone is a list of one; no content is an empty one."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [] if content is None else content


def _listed(value: Any) -> Any:
    """One string is a list of one."""
    return [value] if isinstance(value, str) else value


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Strings = Annotated[list[str], BeforeValidator(_listed)]


class CalledFunction(BaseModel):
    """What the model had called."""

    model_config = _OPEN
    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call in an earlier answer."""

    model_config = _OPEN
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """One message of the conversation so far."""

    model_config = _OPEN
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Part], BeforeValidator(_parts)] = []
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(BaseModel):
    """A function that the model may call."""

    model_config = _CLOSED
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str = ""
    parameters: Schema = {"type": "object", "properties": {}}
    strict: bool | None = None


class Tool(BaseModel):
    """A tool; OpenAI's other kinds run on their servers."""

    model_config = _CLOSED
    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """The function that a named choice means."""

    model_config = _CLOSED
    name: str


class NamedTool(BaseModel):
    """The one tool that must be called."""

    model_config = _CLOSED
    type: Literal["function"]
    function: NamedFunction


class NamedSchema(BaseModel):
    """A JSON Schema under a name."""

    model_config = _CLOSED
    name: str
    description: str | None = None
    schema_: Schema = Field(default={"type": "object"}, alias="schema")
    strict: bool | None = None


class TextFormat(BaseModel):
    """Any text."""

    model_config = _CLOSED
    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    """Any JSON object."""

    model_config = _CLOSED
    type: Literal["json_object"]


class JsonSchemaFormat(BaseModel):
    """JSON that fits a schema."""

    model_config = _CLOSED
    type: Literal["json_schema"]
    json_schema: NamedSchema


Format = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StreamOptions(BaseModel):
    """What a stream carries besides the answer."""

    model_config = _CLOSED
    include_usage: bool = False
    include_obfuscation: bool = False


class Bookkeeping(BaseModel):
    """Fields that change no answer."""

    model_config = _CLOSED
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(Bookkeeping):
    """POST /v1/chat/completions."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = None
    stop: Annotated[list[str], Field(max_length=16), BeforeValidator(_listed)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: Format | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    modalities: list[Literal["text"]] | None = None


class EmbeddingRequest(Bookkeeping):
    """POST /v1/embeddings. An input that begins with `data:` is an image, any other a text."""

    model: str
    input: Annotated[Strings, Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class ClassifyRequest(BaseModel):
    """POST /v1/classify: zero-shot, of this server's own."""

    model_config = _CLOSED
    model: str
    image: str
    labels: list[str] = Field(min_length=1)
    templates: list[str] = Field(default=["{}"], min_length=1, max_length=64)
    multilabel: bool = False


class PreviewRequest(BaseModel):
    """POST /v1/preview: an image as a browser shows it, of this server's own."""

    model_config = _CLOSED
    image: str
