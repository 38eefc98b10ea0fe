"""What an importance matrix is collected on: text in chunks, and prompts with images, as a chat model reads them.

The set that ships with medge (medge/demo/calibration.jsonl) is written for the purpose: reports of nobody, textbook
facts and question–answer pairs in our own words, English but for a line, and questions about crops of openly licensed
images (medge/demo/images/SOURCES.md). It is small, and no sample of clinical practice: give your own data where you
have them. None of its texts, questions or images is in the set that `medge check` asks by default.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from medge.checkpoint import Checkpoint
from medge.errors import UsageError
from medge.prompts import Item, read_prompts
from medge.runtimes.chat import IMAGE_TOKEN, ChatTemplate
from medge.runtimes.generate import Message, Prompt
from medge.runtimes.images import load_image
from medge.runtimes.vocabulary import VOCABULARY, Vocabulary
from medge.samples import list_images, sample_root

BUILT_IN = sample_root().with_name("calibration.jsonl")
CHUNK = 512
"""Tokens of a text chunk, the first of them `<bos>`: llama-imatrix's size."""
CHUNKS, IMAGES = 16, 8
"""At most so many are read: what comes later in a larger set is left out."""
_CHARACTERS = 1_000_000
"""Of text that is tokenized to fill the chunks."""
_QUESTION = "Describe this image."
"""Asked about each image of a folder."""


@dataclass(frozen=True)
class Calibration:
    """Prompts, ready to be read."""

    source: str
    """A description, never a path."""
    prompts: tuple[Prompt, ...]

    @property
    def description(self) -> str:
        """What it is, for a manifest."""
        images = sum(len(prompt.images) for prompt in self.prompts)
        tokens = sum(len(prompt.ids) for prompt in self.prompts)
        return f"{self.source}: {tokens:,} tokens with {images} images, sha256 {self.digest[:16]}"

    @cached_property
    def digest(self) -> str:
        """sha256 over all ids and pixels."""
        found = hashlib.sha256()
        for prompt in self.prompts:
            found.update(np.array([len(prompt.ids), *prompt.ids], "<i8").tobytes())
            for image in prompt.images:
                found.update(str(image.pixels.shape).encode() + np.ascontiguousarray(image.pixels).tobytes())
        return found.hexdigest()


def load(checkpoint: Checkpoint, path: Path | None) -> Calibration:
    """The set that ships with medge or, at `path`, a text file, a JSONL file of prompts, or a folder of images.

    A model without an image tower reads the prompts without images.

    Raises:
        UsageError: nothing there, nothing in it that the model reads, or a malformed line.
        WeightsError, CorruptError: the checkpoint's tokenizer or chat template is missing, or none.
        MissingExtraError: tokenizers is not installed, or what an image needs.
    """
    items = _items(path, sees=checkpoint.chat_spec.image is not None)
    texts, shown = [item for item in items if not item.images], [item for item in items if item.images]
    reader = _Reader(checkpoint)
    prompts = (*reader.chunks(texts), *map(reader.shown, _first(shown)))
    if not prompts:
        raise UsageError(f"{path} holds nothing that this model reads", "Pass texts, or leave 'calibration' out")
    return Calibration("medge's calibration set" if path is None else "own calibration set", prompts)


def _items(path: Path | None, *, sees: bool) -> Sequence[Item]:
    if path is None or path.suffix.lower() in (".jsonl", ".json"):
        return [item for item in read_prompts(path or BUILT_IN) if sees or not item.images]
    if path.is_dir():
        images = list_images(path, IMAGES)
        if not images or not sees:
            reason = "holds no images to calibrate on" if sees else "is of no use: the model reads no images"
            raise UsageError(f"{path} {reason}", "Pass a text file, or one JSON object a line in a .jsonl")
        shown = [Item(one.name, "f1", (Message("user", (one, _QUESTION)),)) for one in images]
        return [*shown, *(item for item in read_prompts(BUILT_IN) if not item.images)]
    try:
        return [Item(path.name, "text", (Message("user", (path.read_text(encoding="utf-8"),)),))]
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no UTF-8 text", "Pass a text, a .jsonl of prompts, or a folder") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "Pass a text file or a folder") from None


def _first(items: Sequence[Item]) -> Iterator[Item]:
    """The prompts whose images are among the first IMAGES."""
    left = IMAGES
    for item in items:
        if len(item.images) <= left:
            left -= len(item.images)
            yield item


class _Reader:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        spec = checkpoint.chat_spec
        self._chat = spec.chat
        self._template = ChatTemplate(checkpoint.chat_template(), spec.chat)
        self._vocabulary = Vocabulary(checkpoint.root / VOCABULARY)

    def chunks(self, items: Sequence[Item]) -> Iterator[Prompt]:
        """All texts, questions with their answers among them, one after another and cut."""
        bos = self._vocabulary.special(self._chat.bos)
        text = "\n\n".join(item.text if item.kind == "text" else self._asked(item)[0] for item in items)
        ids = self._vocabulary.tokenize(text[:_CHARACTERS])[: CHUNKS * (CHUNK - 1)]
        for start in range(0, len(ids), CHUNK - 1):
            yield Prompt((bos, *ids[start : start + CHUNK - 1]))

    def shown(self, item: Item) -> Prompt:
        """A question about images with its answer."""
        texts = self._asked(item)
        ids = [self._vocabulary.special(self._chat.bos), *self._vocabulary.tokenize(texts[0])]
        for text in texts[1:]:
            ids += [self._vocabulary.special(IMAGE_TOKEN)] * self._chat.image_tokens + self._vocabulary.tokenize(text)
        return Prompt(tuple(ids), tuple(load_image(image) for image in item.images))

    def _asked(self, item: Item) -> list[str]:
        """The rendered question with its answer, without `<bos>`, cut where images stand."""
        texts, _ = self._template.pieces(item.messages)
        texts[-1] += item.answer + self._chat.stop[0]
        return [texts[0].removeprefix(self._chat.bos), *texts[1:]]
