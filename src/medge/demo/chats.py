"""Conversations for the demo generator, drawn from findings.py, and their ids as Gemma 3's processor makes them.

Each wording of a question has one answer, so that greedy text is stable and a changed word is a real change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from medge.demo.findings import (
    ASK_KIND,
    GENERAL,
    KINDS,
    PAIR,
    REPORT,
    SYSTEM,
    TOPICS,
    Kind,
    explained,
    reports,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
"""The label of a token that is not trained on (torch's cross entropy)."""
_FORMS = {"kind": 0.3, "topic": 0.4, "report": 0.3}
"""How often each form of question is drawn about an image."""
_TEXT_ONLY, _TWO_IMAGES, _SECOND_TURN, _WITH_SYSTEM = 0.12, 0.08, 0.25, 0.2


class Exchange(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Chat(NamedTuple):
    """A conversation, and which kinds its images show, in order."""

    messages: list[dict[str, Any]]
    kinds: tuple[int, ...]


def _any(rng: np.random.Generator, options: tuple[str, ...]) -> int:
    return int(rng.integers(len(options)))


def worded(questions: tuple[str, ...], answers: tuple[str, ...], i: int) -> Exchange:
    """The i-th wording of a question with the answer that belongs to it."""
    return Exchange(questions[i], answers[i % len(answers)])


def ask(kind: Kind, form: str, rng: np.random.Generator) -> Exchange:
    """A question of one form about an image of `kind`."""
    if form == "report":
        return worded(REPORT, reports(kind), _any(rng, REPORT))
    topic = "kind" if form == "kind" else str(rng.choice(list(TOPICS)))
    return worded(TOPICS[topic], kind.answers(topic), _any(rng, TOPICS[topic]))


def message(role: str, text: str, images: int = 0, *, first: bool = True) -> dict[str, Any]:
    """A message in transformers' layout, its images before or after the text."""
    parts: list[dict[str, str]] = [{"type": "text", "text": text}]
    pictures = [{"type": "image"}] * images
    return {"role": role, "content": [*pictures, *parts] if first else [*parts, *pictures]}


def _about_images(rng: np.random.Generator) -> tuple[list[Exchange], tuple[int, ...]]:
    if rng.random() < _TWO_IMAGES:
        both = tuple(int(i) for i in rng.integers(len(KINDS), size=2))
        answer = "First: {}. Second: {}.".format(*(KINDS[i].label for i in both))
        return [Exchange(PAIR[_any(rng, PAIR)], answer)], both
    kind = int(rng.integers(len(KINDS)))
    turns = 2 if rng.random() < _SECOND_TURN else 1
    forms = rng.choice(list(_FORMS), turns, p=list(_FORMS.values()))
    return [ask(KINDS[kind], str(form), rng) for form in forms], (kind,)


def _without_image(rng: np.random.Generator) -> Exchange:
    if rng.random() < 0.5:
        return Exchange(*GENERAL[rng.integers(len(GENERAL))])
    kind, i = KINDS[rng.integers(len(KINDS))], _any(rng, ASK_KIND)
    return Exchange(ASK_KIND[i].format(kind.label), explained(kind)[i])


def draw(rng: np.random.Generator) -> Chat:
    """A random conversation."""
    kinds: tuple[int, ...] = ()
    if rng.random() < _TEXT_ONLY:
        exchanges = [_without_image(rng)]
    else:
        exchanges, kinds = _about_images(rng)
    messages = [message("system", SYSTEM[_any(rng, SYSTEM)])] if rng.random() < _WITH_SYSTEM else []
    first = bool(rng.random() < 0.75)
    for i, (question, answer) in enumerate(exchanges):
        messages.append(message("user", question, len(kinds) if i == 0 else 0, first=first))
        messages.append(message("assistant", answer))
    return Chat(messages, kinds)


class Encoder:
    """Conversations to ids, with an image as Gemma3Processor writes it: two newlines and a marker on either side."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_tokens: int) -> None:
        self._tokenizer = tokenizer
        soft = tokenizer.image_token * image_tokens
        self._image = f"\n\n{tokenizer.boi_token}{soft}{tokenizer.eoi_token}\n\n"
        self._answer = tokenizer.encode("<start_of_turn>model\n", add_special_tokens=False)
        self._end = tokenizer.convert_tokens_to_ids("<end_of_turn>")

    def ids(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> list[int]:
        """The conversation's ids; `prompt` opens the model's turn."""
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        expanded = text.replace(self._tokenizer.boi_token, self._image)
        ids: list[int] = self._tokenizer.encode(expanded, add_special_tokens=False)
        return ids

    def labels(self, ids: list[int]) -> list[int]:
        """The ids of the model's answers with the token that ends them; IGNORED elsewhere."""
        found = [IGNORED] * len(ids)
        for start in self._answers(ids):
            end = ids.index(self._end, start) + 1
            found[start:end] = ids[start:end]
        return found

    def _answers(self, ids: list[int]) -> Iterator[int]:
        length = len(self._answer)
        for i in range(len(ids) - length):
            if ids[i : i + length] == self._answer:
                yield i + length
