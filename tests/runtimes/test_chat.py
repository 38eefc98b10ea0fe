"""Prompts are transformers' own, to the id; what a template would garble is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from medge.errors import CorruptError, UsageError
from medge.runtimes.chat import ChatTemplate, Prompter, thought_marks
from medge.runtimes.generate import Message
from medge.spec import ChatFormat

if TYPE_CHECKING:
    from medge.runtimes.generate import Generator

CHAT = ChatFormat(context=100)
SIMPLE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:"
    "{% for c in m.content %}{{ '<start_of_image>' if c.type == 'image' else c.text }}{% endfor %};{% endfor %}"
)
IMAGE = np.zeros((2, 2, 3), np.uint8)
TEXTS = [
    "Describe this chest radiograph.",
    "  spaces   around\n\nand  within \n",
    "naïve 中文 🙂 ≥ 5 µm",
    "<end_of_turn>\n<start_of_turn>model",
    "tab\tand a newline\n",
]


def hugging_face(gemma: Any, messages: list[Message]) -> list[int]:
    import PIL.Image

    plain = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": item}
                if isinstance(item, str)
                else {"type": "image", "image": PIL.Image.fromarray(np.asarray(item))}
                for item in message.content
            ],
        }
        for message in messages
    ]
    ids: list[int] = gemma.processor.apply_chat_template(
        plain, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )["input_ids"][0].tolist()
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_transformers_processor(gemma: Any, generator: Generator, text: str) -> None:
    image = np.full((30, 20, 3), 7, np.uint8)
    several = (Message("user", (text, image, image)), Message("assistant", (text,)), Message("user", (image, text)))
    for messages in (
        [Message("user", (text,))],
        [Message("system", (text,)), Message("user", (text, "and", text))],
        [Message("user", (image, text))],
        [Message("system", (text,)), *several],
    ):
        assert list(generator.prompt(messages).ids) == hugging_face(gemma, messages)


def test_images_keep_their_places() -> None:
    texts, images = ChatTemplate(SIMPLE, CHAT).pieces([Message("user", ("a", IMAGE, "b", IMAGE))])
    assert texts == [
        "<bos>user:a\n\n<start_of_image>",
        "<end_of_image>\n\nb\n\n<start_of_image>",
        "<end_of_image>\n\n;",
    ]
    assert len(images) == 2


def test_a_system_message_of_several_texts_is_kept_whole() -> None:
    texts, _ = ChatTemplate(SIMPLE, CHAT).pieces([Message("system", ("a", "b")), Message("user", ("c",))])
    assert texts == ["<bos>system:ab;user:c;"]


USER = Message("user", ("a",))


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "No message"),
        ([Message("user", ())], "empty"),
        ([Message("user", (" \n",))], "empty"),
        ([USER, Message("assistant", ("b",))], "last message is the assistant's"),
        ([USER, Message("system", ("b",)), USER], "after other messages"),
        ([Message("system", (IMAGE,)), USER], "An image stands in a system message"),
        ([USER, Message("assistant", (IMAGE,)), USER], "An image stands in a assistant message"),
        ([Message("user", ("a <start_of_image> b",))], "1 image places and 0 images"),
        ([Message("user", ("a <start_of_image> b", IMAGE))], "2 image places and 1 images"),
        ([Message("user", ("a <image_soft_token>", IMAGE))], "stands for an image"),
    ],
)
def test_what_no_template_places_is_refused(messages: list[Message], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ChatTemplate(SIMPLE, CHAT).pieces(messages)


def test_a_template_without_images_refuses_them() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}{% endfor %}", CHAT)
    with pytest.raises(UsageError, match="0 image places and 1 images"):
        template.pieces([Message("user", ("a", IMAGE))])


def test_a_templates_own_refusal_is_the_users_error() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", CHAT)
    with pytest.raises(UsageError, match="roles must alternate"):
        template.pieces([USER])


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ 1 + 'a' }}"]
)
def test_a_template_that_is_none_or_reaches_out_is_corrupt(source: str) -> None:
    with pytest.raises(CorruptError):
        ChatTemplate(source, CHAT).pieces([USER])


def test_dates_and_json_render_as_in_transformers() -> None:
    template = ChatTemplate("{{ {'a': '<é>'} | tojson }}{% for i in [1, 2] %}{% break %}{% endfor %}", CHAT)
    assert template.pieces([USER])[0] == ['{"a": "<é>"}']


def test_a_thought_is_known_by_two_tokens_of_their_own() -> None:
    ids = {"<unused94>": [100], "<unused95>": [101]}
    assert thought_marks(ids.__getitem__) == (100, 101)
    assert thought_marks(lambda text: [ord(c) for c in text]) is None


def test_a_prompt_that_fills_the_context_is_refused_with_its_numbers() -> None:
    def prompter(own: int) -> Prompter:
        return Prompter(ChatTemplate(SIMPLE, CHAT), lambda text: [1] * len(text), 7, 16, context=100, own_context=own)

    messages = [Message("user", (IMAGE, "a" * 90))]
    with pytest.raises(UsageError, match=r"\(1 image of 16\); a context of 100 has room for 99.*up to 2,000"):
        prompter(2000).check_fits(prompter(2000)(messages))
    with pytest.raises(UsageError, match="the model takes no more"):
        prompter(100).check_fits(prompter(100)(messages))
    prompter(100).check_fits(prompter(100)([Message("user", (IMAGE, "a"))]))
