"""What a generator is asked: prompts with images, the answers that are right, and plain texts.

A file is one of JSON lines: medge/prompts.py tells its form. A `text` is read for its perplexity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from medge.manifest import sha256
from medge.prompts import Item, Kind, read_prompts
from medge.runtimes.generate import Message
from medge.samples import list_images, sample_root

BUILT_IN = "built-in"
"""The name of the set that ships with medge."""


@dataclass(frozen=True)
class ChatDataset:
    """Prompts in a fixed order."""

    source: str
    """A file, or `BUILT_IN`."""
    items: tuple[Item, ...]

    @cached_property
    def digest(self) -> str:
        """sha256 over all texts and the images' bytes. Where the files lie does not matter."""
        lines = [json.dumps([item.kind, _plain(item), item.answer, item.choices]) for item in self.items]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def first(self, count: int) -> ChatDataset:
        """`count` prompts or all, spread evenly over the set."""
        spread = np.linspace(0, len(self.items) - 1, min(count, len(self.items))).round().astype(int)
        return ChatDataset(self.source, tuple(self.items[i] for i in dict.fromkeys(spread.tolist())))


def _plain(item: Item) -> list[list[str]]:
    contents = ([sha256(part) if isinstance(part, Path) else str(part) for part in m.content] for m in item.messages)
    return [[message.role, *content] for message, content in zip(item.messages, contents, strict=True)]


def load_prompts(path: str | Path) -> ChatDataset:
    """Read a set of prompts: a JSONL file, or `BUILT_IN`. No pixels yet.

    Raises:
        UsageError: nothing there, no prompt in it, a malformed line, or a missing image.
    """
    if str(path) == BUILT_IN:
        return built_in()
    return ChatDataset(str(Path(path).resolve()), read_prompts(Path(path)))


def built_in(*, images: bool = True) -> ChatDataset:
    """The set that ships with medge: three questions about one real image of each kind, and plain texts.

    Without `images`, for models that read none: general questions and the texts.
    """
    texts = (Item(f"text {i}", "text", (Message("user", (text,)),)) for i, text in enumerate(TEXTS, start=1))
    questions = _questions(sample_root()) if images else _general()
    return ChatDataset(BUILT_IN, (*questions, *texts))


def _questions(root: Path) -> Iterator[Item]:
    """The wordings are among those that the demo generator is taught (medge/demo/findings.py)."""
    labels = sorted(path.name for path in root.iterdir() if path.is_dir())
    rng = np.random.default_rng(0)
    for i, label in enumerate(labels):
        (image,) = list_images(root / label, 1)
        others = [other for other in labels if other != label]
        yield _asked(f"{label}, kind", "f1", image, "What kind of image is this?", f"This is {_article(label)}.")
        options = [label, *rng.choice(others, 2, replace=False).tolist()]
        order = rng.permutation(3).tolist()
        listed = "\n".join(f"{letter}: {options[k]}" for letter, k in zip("ABC", order, strict=True))
        question = f"Which kind of image is this?\n{listed}\nAnswer with one letter."
        yield _asked(f"{label}, choice", "choice", image, question, "ABC"[order.index(0)], ("A", "B", "C"))
        named = label if i % 2 else others[i % len(others)]
        right = "Yes" if i % 2 else "No"
        yield _asked(f"{label}, check", "choice", image, f"Yes or no: {named}?", right, ("Yes", "No"))


def _asked(name: str, kind: Kind, image: Path, question: str, answer: str, choices: Sequence[str] = ()) -> Item:
    return Item(name, kind, (Message("user", (image, question)),), answer, tuple(choices))


def _article(label: str) -> str:
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"


def _general() -> Iterator[Item]:
    for i, (question, answer) in enumerate(GENERAL, start=1):
        yield Item(f"question {i}", "f1", (Message("user", (question,)),), answer)


GENERAL = (
    ("Which organ pumps the blood? Answer in one word.", "The heart"),
    ("What does CT stand for?", "Computed tomography"),
    ("What appears white on a radiograph? Answer briefly.", "Bone"),
    ("Which imaging method uses sound? Answer briefly.", "Ultrasound"),
    ("Which organ makes insulin? Answer in one word.", "The pancreas"),
    ("How many lungs does a person have? Answer in one word.", "Two"),
)
TEXTS = (
    "The heart is of normal size. The lungs are clear, and there is no pleural effusion or pneumothorax.",
    "On a radiograph, dense bone absorbs most of the beam and appears white, while air is dark.",
    "Magnetic resonance imaging shows soft tissue in any plane and uses no ionizing radiation.",
    "A slice of computed tomography is calculated from many projections; its grey levels are densities.",
    "Haematoxylin stains the nuclei of cells blue, and eosin stains the cytoplasm and the matrix pink.",
    "The optic disc is the bright oval where the vessels of the retina leave the eye.",
    "Ultrasound waves are reflected where the density of tissue changes, and the echo gives the picture.",
    "Compared with the earlier examination, the opacity in the right lower lobe has become smaller.",
)
"""Our own sentences: general facts, and findings of nobody."""
