"""The end-of-image token: found, missing, or never trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medge.checkpoint import Checkpoint
from medge.demo import GENERATOR
from medge.export import image_marks
from medge.export.image_marks import RESERVED, image_mark_flaw
from medge.export.synth import synthesize
from medge.runtimes.vocabulary import VOCABULARY, Vocabulary
from medge.spec import FloatArray
from medge.tensorfile import Entry

END = 7
FIRST_RESERVED = 1000


class Gemmas(Vocabulary):
    """With the reserved tokens that the tiny vocabulary lacks."""

    def find(self, text: str) -> int | None:
        names = {f"<unused{n}>": FIRST_RESERVED + i for i, n in enumerate(RESERVED)}
        return names.get(text) or super().find(text)


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    synthesize("medgemma-4b-it", "tiny", tmp_path / "chat")
    monkeypatch.setattr(image_marks, "Vocabulary", Gemmas)
    assert Gemmas(tmp_path / "chat" / VOCABULARY).find("<end_of_image>") == END
    return Checkpoint.open(tmp_path / "chat")


def settle(monkeypatch: pytest.MonkeyPatch, *, first: int, also: int | None = None) -> None:
    """From `first` on, embeddings as tokens have that no training has moved: nearly one and the same."""

    def rows(entry: Entry, start: int, stop: int) -> FloatArray:
        rng, width = np.random.default_rng(start), entry.shape[1]
        untrained = start >= first or start == also
        values = untrained * 1.0 + (0.05 if untrained else 1.0) * rng.standard_normal((stop - start, width))
        return np.asarray(values, np.float32)

    monkeypatch.setattr(Entry, "rows", rows)


def test_random_weights_tell_nothing(chat: Checkpoint) -> None:
    assert image_mark_flaw(chat) == ""


def test_a_trained_mark_is_apart_from_the_reserved_tokens(chat: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch, first=FIRST_RESERVED)
    assert image_mark_flaw(chat) == ""


def test_a_mark_that_lies_among_them_was_never_trained(chat: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch, first=FIRST_RESERVED, also=END)
    assert "no training has met. Fetch weights of 2025-07-09" in image_mark_flaw(chat)


def test_a_vocabulary_without_it_is_told(chat: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gemmas, "find", lambda self, text: None)
    assert "has no <end_of_image>. Fetch weights" in image_mark_flaw(chat)


def test_a_text_model_needs_none(tmp_path: Path) -> None:
    synthesize("medgemma-27b-text-it", "tiny", tmp_path / "text")
    assert image_mark_flaw(Checkpoint.open(tmp_path / "text")) == ""


def test_the_demo_generator_is_sound() -> None:
    assert image_mark_flaw(Checkpoint.open(GENERATOR)) == ""
