"""Ids equal to transformers' slow SiglipTokenizer, on fixed texts, random ones, and another vocabulary."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from medge.errors import CorruptError, UsageError
from medge.runtimes.tokenizer import SiglipTokenizer
from medge.spec import TokenizerSpec

FOLDER = Path(__file__).parents[2] / "src/medge/models/siglip_tokenizer"
GOLDENS = json.loads((Path(__file__).parents[1] / "goldens/tokenizer.json").read_bytes())

pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has")


@cache
def ours() -> SiglipTokenizer:
    return SiglipTokenizer(FOLDER / "spiece.model", TokenizerSpec())


@cache
def reference() -> Any:
    pytest.importorskip("google.protobuf")
    return pytest.importorskip("transformers").SiglipTokenizer.from_pretrained(FOLDER)


def expected(text: str, tokenizer: Any = None, length: int = 64) -> list[int]:
    tokenizer = tokenizer or reference()
    ids: list[int] = tokenizer(text, padding="max_length", truncation=True, max_length=length)["input_ids"]
    return ids


def test_goldens() -> None:
    cases = GOLDENS["cases"]
    assert len(cases) >= 300
    ids = ours()([case["text"] for case in cases])
    assert ids.dtype == np.int64
    assert ids.shape == (len(cases), 64)
    for row, case in zip(ids.tolist(), cases, strict=True):
        padding = [GOLDENS["pad_id"]] * (64 - len(case["ids"]))
        assert row == case["ids"] + padding, repr(case["text"])


def test_the_goldens_are_what_transformers_says_today() -> None:
    for case in GOLDENS["cases"]:
        assert expected(case["text"])[: len(case["ids"])] == case["ids"], repr(case["text"])


special = ["</s>", "<unk>", "</S>", "<UNK>", "<pad>", "<", "/", "s", ">", "▁", " ", "\n", "\t", "!", "\0"]
awkward = ["Σ", "İ", "ﬁ", "e\u0301", "\u200d", "\u00a0", "\u3000", "Ａ", "\u2028", "²", "ẞ", "胸", "שלום", "X-Ray"]
hostile = st.sampled_from(special + awkward)


@given(st.lists(hostile, max_size=16).map("".join))
@settings(max_examples=400, deadline=None)
def test_equal_to_transformers_around_special_tokens(text: str) -> None:
    assert ours()([text])[0].tolist() == expected(text)


@given(st.text(max_size=120))
@settings(max_examples=300, deadline=None)
def test_equal_to_transformers_on_any_text(text: str) -> None:
    assert ours()([text])[0].tolist() == expected(text)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary with other ids, no byte fallback, and so with unknown characters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a chest x ray of pneumonia", "no finding", "the heart is enlarged"] * 20),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        unk_id=1,
        eos_id=3,
        bos_id=2,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("small") / "spiece.model"
    path.write_bytes(model.getvalue())
    return path


def test_another_vocabulary_with_other_ids(small: Path) -> None:
    theirs = pytest.importorskip("transformers").SiglipTokenizer(str(small), pad_token="<pad>")  # noqa: S106
    tokenizer = SiglipTokenizer(small, TokenizerSpec(length=16, pad_id=0, eos_id=3))
    texts = ["", "A chest X-ray of pneumonia", "ζ unknown ☃ here", "☃", "<pad> no", "</s>", "a<unk>b", "x " * 40]
    for text, row in zip(texts, tokenizer(texts).tolist(), strict=True):
        assert row == expected(text, theirs, 16), repr(text)


def test_no_text_gives_no_row() -> None:
    assert ours()([]).shape == (0, 64)


def test_a_lone_surrogate_is_a_clear_error() -> None:
    with pytest.raises(UsageError, match="no UTF-8"):
        ours()(["bad \udcff byte"])


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_a_file_that_is_no_model(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"spiece\.model is no SentencePiece model") as caught:
        SiglipTokenizer(path, TokenizerSpec())
    assert caught.value.exit_code == 5


def test_a_cut_model(tmp_path: Path) -> None:
    data = (FOLDER / "spiece.model").read_bytes()
    path = tmp_path / "spiece.model"
    for length in (1, 100, len(data) // 2, len(data) - 1000):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptError):
            SiglipTokenizer(path, TokenizerSpec())


def test_a_missing_model_and_ids_outside_it(small: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        SiglipTokenizer(small.with_name("gone.model"), TokenizerSpec())
    with pytest.raises(CorruptError, match="too few for the ids"):
        SiglipTokenizer(small, TokenizerSpec(pad_id=31_999))
