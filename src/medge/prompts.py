"""Prompts in a file, with images and the answers that are right: what gates ask and importance is calibrated on.

One JSON object a line; paths are relative to the file:

{"kind": "f1", "prompt": "What is shown?", "images": ["a.png"], "answer": "a chest x-ray"}
{"kind": "choice", "prompt": "Which one?\\nA: eye\\nB: skin\\nAnswer with one letter.", "images": ["a.png"],
 "choices": ["A", "B"], "answer": "A"}
{"kind": "exact", "messages": [{"role": "system", "content": "Answer yes or no."},
 {"role": "user", "content": ["Is ", {"image": "a.png"}, " a radiograph?"]}], "answer": "yes"}
{"kind": "text", "prompt": "The heart is of normal size."}

`exact` and `f1` are answered freely, `choice` by the likeliest first token among the choices. A `text` is no
question: it is read as it stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from medge.errors import UsageError
from medge.runtimes.generate import Message, Role
from medge.spec import Frozen

Kind = Literal["exact", "f1", "choice", "text"]


@dataclass(frozen=True)
class Item:
    """One prompt. Its images are paths."""

    name: str
    """For reports: where it stands in its file."""
    kind: Kind
    messages: tuple[Message, ...]
    answer: str = ""
    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What a `text` says."""
        return "".join(str(part) for part in self.messages[0].content)

    @property
    def images(self) -> list[Path]:
        """Its images, in order."""
        return [part for message in self.messages for part in message.content if isinstance(part, Path)]


class _Image(Frozen):
    image: str


class _Turn(Frozen):
    role: Role
    content: str | tuple[str | _Image, ...]


class _Line(Frozen):
    kind: Kind
    prompt: str = ""
    images: tuple[str, ...] = ()
    messages: tuple[_Turn, ...] = ()
    answer: str = ""
    choices: tuple[str, ...] = Field(default=(), max_length=26)

    @model_validator(mode="after")
    def _consistent(self) -> _Line:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("give either 'prompt' or 'messages'")
        if self.kind == "text" and (self.messages or self.images):
            raise ValueError("a text is a 'prompt' alone")
        if (self.kind == "text") == bool(self.answer):
            raise ValueError("a question needs its 'answer', and a text has none")
        if (self.kind == "choice") != bool(self.choices):
            raise ValueError("'choices' belong to the kind 'choice'")
        if self.choices and (self.answer not in self.choices or len(set(self.choices)) < 2):
            raise ValueError("'choices' must be at least two, and the 'answer' one of them")
        return self


def read_prompts(path: Path) -> tuple[Item, ...]:
    """Read a JSONL file. No pixels yet.

    Raises:
        UsageError: nothing there, no prompt in it, a malformed line, or a missing image.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no UTF-8 text", "Write one JSON object a line") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "Pass a JSONL file of prompts") from None
    items = tuple(_item(path, i, line) for i, line in enumerate(lines, start=1) if line.strip())
    if not items:
        raise UsageError(f"{path} holds no prompts", "Write one JSON object a line")
    return items


def _item(path: Path, number: int, line: str) -> Item:
    where = f"{path} line {number}"
    try:
        parsed = _Line.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{where}{f', {field}' if field else ''}: {first['msg']}") from None
    messages = tuple(_messages(path.parent, parsed))
    item = Item(f"line {number}", parsed.kind, messages, parsed.answer, parsed.choices)
    for image in item.images:
        if not image.is_file():
            raise UsageError(f"{where}: the image '{image}' is missing", "Paths are relative to the file of prompts")
    return item


def _messages(root: Path, line: _Line) -> Iterator[Message]:
    if line.prompt:
        yield Message("user", (*(root / image for image in line.images), line.prompt))
        return
    for turn in line.messages:
        content = (turn.content,) if isinstance(turn.content, str) else turn.content
        yield Message(turn.role, tuple(part if isinstance(part, str) else root / part.image for part in content))
