"""What the demo generator answers about held-out images, and how often rightly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from medge.demo.chats import Encoder, Exchange, message, worded
from medge.demo.findings import KINDS, REPORT, TOPICS, Kind, named, reports

_LIMIT = 40
"""Tokens that an answer may take; the longest right one has 35."""


class Score(NamedTuple):
    """Shares of the images of one kind that are answered rightly, 0 to 1."""

    named: float
    """Asked for its kind, the answer names the right one."""
    exact: float
    """Asked one of all questions, the answer is right word for word."""


class Answers:
    """Greedy answers of a checkpoint about images, through transformers in fp32."""

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from transformers import AutoTokenizer, Gemma3ForConditionalGeneration, Gemma3ImageProcessor

        self._model = Gemma3ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._encoder = Encoder(self._tokenizer, self._model.config.mm_tokens_per_image)
        self._processor = Gemma3ImageProcessor.from_pretrained(checkpoint)

    def __call__(self, chats: list[list[dict[str, Any]]], images: Sequence[Path] = ()) -> list[str]:
        """What the model says next in each conversation; `images` are those of all, in order."""
        import torch

        rows = [self._encoder.ids(chat, prompt=True) for chat in chats]
        width = max(map(len, rows))  # padded on the left: generation goes on from the last token
        ids = torch.tensor([[self._tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
        inputs = {
            "input_ids": ids,
            "attention_mask": (ids != self._tokenizer.pad_token_id).long(),
            "token_type_ids": (ids == self._tokenizer.image_token_id).long(),
        }
        if images:
            shown = [Image.open(file).convert("RGB") for file in images]
            inputs["pixel_values"] = self._processor(shown, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            new = self._model.generate(**inputs, max_new_tokens=_LIMIT, do_sample=False)[:, width:]
        answers: list[str] = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    def ask(self, questions: list[str], images: Sequence[Path]) -> list[str]:
        """One answer for each image, to the question at the same place."""
        return self([[message("user", text, 1)] for text in questions], images)


def _asked(kind: Kind, i: int) -> Exchange:
    """What is asked about the i-th image of a kind: each topic and a report in turn, in one wording after another."""
    subjects = [*((TOPICS[topic], kind.answers(topic)) for topic in TOPICS), (REPORT, reports(kind))]
    questions, answers = subjects[i % len(subjects)]
    return worded(questions, answers, i % len(questions))


def measure(checkpoint: Path, images: Path) -> dict[str, Score]:
    """Label -> shares of a folder a kind, answered in transformers, fp32, greedily."""
    shown = [(kind, i, file) for kind in KINDS for i, file in enumerate(sorted((images / kind.label).glob("*.jpg")))]
    answer, files = Answers(checkpoint), [file for _, _, file in shown]
    asked = [_asked(kind, i) for kind, i, _ in shown]
    names = answer.ask([TOPICS["kind"][0]] * len(files), files)
    words = answer.ask([one.question for one in asked], files)
    found: dict[str, list[tuple[bool, bool]]] = {kind.label: [] for kind in KINDS}
    for (kind, _, _), name, said, one in zip(shown, names, words, asked, strict=True):
        found[kind.label].append((named(name) == kind.label, said == one.answer))
    return {
        label: Score(*(sum(column) / len(rows) for column in zip(*rows, strict=True))) for label, rows in found.items()
    }
