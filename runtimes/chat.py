"""Messages to the very prompt that transformers builds: the checkpoint's own template, images kept in their places.

Source: transformers 4.57, `apply_chat_template` (utils/chat_template_utils.py) and Gemma3Processor, which puts each
image as "\\n\\n<start_of_image>", its tokens, "<end_of_image>\\n\\n". As there, special tokens written in a text are
read as such.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from medge.errors import ContextError, CorruptError, MedgeError, UsageError
from medge.runtimes.generate import Message, Prompt
from medge.runtimes.images import ImageLike, load_image
from medge.spec import ChatFormat

IMAGE_TOKEN = "<image_soft_token>"  # noqa: S105
"""What stands for each of an image's embeddings in a Gemma 3 prompt."""
THOUGHT_BEGIN, THOUGHT_END = "<unused94>", "<unused95>"
"""The tokens around what MedGemma 1.5 and 27B think before they answer. Source: Google-Health/medgemma, quick start."""
_AROUND = "\n\n"


class ChatTemplate:
    """Renders messages."""

    def __init__(self, source: str, chat: ChatFormat) -> None:
        """Compile a Jinja template.

        Raises:
            CorruptError: it is none.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        self._chat = chat
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CorruptError(f"The chat template is no Jinja template: {error}", "Export it again") from None

    @classmethod
    def open(cls, path: Path, chat: ChatFormat) -> ChatTemplate:
        """Compile the template in a file.

        Raises:
            CorruptError: it is none.
        """
        try:
            return cls(path.read_text(encoding="utf-8"), chat)
        except UnicodeDecodeError:
            raise CorruptError(f"{path} is no UTF-8", "Export the artifact again") from None

    def pieces(self, messages: Sequence[Message]) -> tuple[list[str], list[ImageLike]]:
        """The prompt's texts and the images between them: one text more than images.

        Raises:
            UsageError: no message, turns out of order, an empty one, or one that the template cannot place.
        """
        _check(messages)
        images: list[ImageLike] = [
            item for message in messages for item in message.content if not isinstance(item, str)
        ]
        texts = self._rendered(messages).split(self._chat.image_begin)
        if len(texts) != len(images) + 1:
            raise UsageError(
                f"The rendered chat has {len(texts) - 1} image places and {len(images)} images are given",
                f"A text may not hold {self._chat.image_begin}, and the template must place every image",
            )
        if any(IMAGE_TOKEN in text for text in texts):
            raise UsageError(f"A text holds {IMAGE_TOKEN}, which stands for an image", "Remove it")
        end = f"{self._chat.image_end}{_AROUND}"
        begin = f"{_AROUND}{self._chat.image_begin}"
        texts = [text + begin for text in texts[:-1]] + texts[-1:]
        return [text if i == 0 else end + text for i, text in enumerate(texts)], images

    def _rendered(self, messages: Sequence[Message]) -> str:
        try:
            rendered: str = self._template.render(
                messages=[_plain(message) for message in messages],
                add_generation_prompt=True,
                bos_token=self._chat.bos,
            )
        except MedgeError:
            raise
        except Exception as error:  # a template is a program, and may fail as any does
            raise CorruptError(f"The chat template fails: {error}", "Export the artifact again") from None
        return rendered


@dataclass(frozen=True)
class Prompter:
    """Messages to the ids that one model reads."""

    template: ChatTemplate
    tokenize: Callable[[str], list[int]]
    image_id: int
    """What stands for each part of an image; -1 where the model reads none."""
    image_tokens: int
    context: int
    own_context: int
    """Tokens that the model was made for; `context` may be fewer."""

    def __call__(self, messages: Sequence[Message]) -> Prompt:
        """The ids that transformers' processor gives, and the images, decoded.

        Raises:
            UsageError: as from `ChatTemplate.pieces`; an image that the model or medge cannot read.
        """
        texts, images = self.template.pieces(messages)
        first, *others = texts
        ids = self.tokenize(first)
        for text in others:
            if self.image_id < 0:
                raise UsageError(
                    "An image is given and the model has no image tower",
                    "Use a multimodal model, or leave the image out",
                )
            ids += [self.image_id] * self.image_tokens + self.tokenize(text)
        return Prompt(tuple(ids), tuple(load_image(image) for image in images))

    def check_fits(self, prompt: Prompt) -> None:
        """Refuse a prompt before any work on it.

        Raises:
            ContextError: it leaves no room for an answer.
        """
        if len(prompt.ids) < self.context:
            return
        count = len(prompt.images)
        images = f" ({count} image{'s' * (count > 1)} of {self.image_tokens})" if count else ""
        wider = f"open the model with a larger context (--set context=N): it takes up to {self.own_context:,}"
        raise ContextError(
            f"The prompt has {len(prompt.ids):,} tokens{images}; a context of {self.context:,} has room for "
            f"{self.context - 1:,} beside an answer",
            f"Shorten it, or {wider}" if self.context < self.own_context else "Shorten it: the model takes no more",
        )


def thought_marks(tokenize: Callable[[str], list[int]]) -> tuple[int, int] | None:
    """Ids of the tokens around a thought; None where the vocabulary has none."""
    begin, end = tokenize(THOUGHT_BEGIN), tokenize(THOUGHT_END)
    return (begin[0], end[0]) if len(begin) == len(end) == 1 else None


def _check(messages: Sequence[Message]) -> None:
    """What templates would drop or garble without a word."""
    if not messages:
        raise UsageError("No message given")
    for message in messages:
        if not any(not isinstance(item, str) or item.strip() for item in message.content):
            raise UsageError(f"A {message.role} message is empty")
        if message.role != "user" and not all(isinstance(item, str) for item in message.content):
            raise UsageError(f"An image stands in a {message.role} message", "Put it in a user message")
    if any(later.role == "system" for _, later in pairwise(messages)):
        raise UsageError("A system message stands after other messages", "Give one, as the first message")
    if messages[-1].role != "user":
        raise UsageError(f"The last message is the {messages[-1].role}'s", "End with a user message")


def _plain(message: Message) -> dict[str, Any]:
    """Hugging Face's form. A system message becomes one text: Gemma's template reads only its first item."""
    if message.role == "system":
        return {"role": "system", "content": [{"type": "text", "text": "".join(map(str, message.content))}]}
    items = [{"type": "text", "text": item} if isinstance(item, str) else {"type": "image"} for item in message.content]
    return {"role": message.role, "content": items}


def _refuse(reason: str) -> NoReturn:
    """What a template calls `raise_exception`."""
    raise UsageError(f"The chat template refuses the messages: {reason}")


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Without Jinja's HTML escapes, as transformers has it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
