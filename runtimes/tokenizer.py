"""SigLIP's tokenizer, equal to transformers' slow `SiglipTokenizer`, on the sentencepiece library alone.

Raw SentencePiece is not it: SigLIP lower-cases character by character, removes ASCII punctuation, and keeps
`</s>`, `<unk>` and the padding piece whole where they stand in a text. The fast tokenizer of transformers
differs too (transformers #29925); the reference is `SiglipTokenizer` of transformers 4.57.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from medge.errors import CorruptError, UsageError
from medge.spec import TokenizerSpec

_UNDERLINE = "▁"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""`normalizer_spec { add_dummy_prefix: false }` as protobuf. Appended, it merges: one field is set."""


class SiglipTokenizer:
    """Text to ids: cut to `length` with the end token kept, padded to `length`."""

    def __init__(self, path: Path, spec: TokenizerSpec) -> None:
        """Load `path`, a SentencePiece model.

        Raises:
            UsageError: there is no such file.
            CorruptError: it is no SentencePiece model, or has no piece for the ids of `spec`.
        """
        self._spec = spec
        self._model = _load(path)
        ids = {spec.pad_id, spec.eos_id, self._model.unk_id()}
        if not all(0 <= i < self._model.piece_size() for i in ids):
            raise CorruptError(
                f"{path} has {self._model.piece_size()} pieces, too few for the ids {sorted(ids)}",
                "Use the tokenizer of the model",
            )
        self._unknown: str = self._model.id_to_piece(self._model.unk_id())
        self._guard = len(self._model.encode(self._unknown))
        self._special = {self._model.id_to_piece(i) for i in ids}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Ids of N texts, (N, length) int64.

        Raises:
            UsageError: a text holds a lone surrogate, which no UTF-8 can express.
        """
        ids = np.full((len(texts), self._spec.length), self._spec.pad_id, dtype=np.int64)
        for row, text in zip(ids, texts, strict=True):
            found = self._ids(_utf8(text))
            row[: len(found)] = found
        return ids

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._model.piece_to_id(self._pieces(text))[: self._spec.length - 1]
        # As the reference does, a text that already ends in the end token gets no second one.
        return ids if ids and ids[-1] == self._spec.eos_id else [*ids, self._spec.eos_id]

    def _pieces(self, text: str) -> list[str]:
        """Pieces of one text; the special ones stand at the odd places of a split by themselves."""
        parts = self._split(_UNDERLINE + text.replace(_UNDERLINE, " "))
        lowered = "".join(part if i % 2 else _lower(part) for i, part in enumerate(parts))
        pieces: list[str] = []
        for i, part in enumerate(self._split(lowered)):  # again: lower-casing made "</s>" of "</S>"
            pieces += [part] if i % 2 else self._plain(part)
        if len(pieces) > 1 and pieces[0] == _UNDERLINE and pieces[1] in self._special:
            return pieces[1:]
        return pieces

    def _plain(self, text: str) -> list[str]:
        """Pieces of text without special ones.

        SentencePiece strips leading spaces; the reference hides them behind "<unk>" and drops its pieces.
        """
        text = re.sub(r"\s+", " ", text.translate(_NO_PUNCTUATION)).strip()
        pieces: list[str] = self._model.encode(self._unknown + text, out_type=str)
        return pieces[self._guard :] if len(pieces) >= self._guard else pieces


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("A text holds bytes that are no UTF-8", "Give it as UTF-8") from None
    return text


def _lower(text: str) -> str:
    """Character by character, as the reference does: a final sigma becomes σ, not ς."""
    return "".join(map(str.lower, text))


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes() + _NO_DUMMY_PREFIX)
    except OSError as error:
        raise UsageError(f"The tokenizer {path} cannot be read: {error.strerror}", "Check the path") from None
    except Exception:  # sentencepiece raises whatever its C++ threw
        raise CorruptError(f"{path} is no SentencePiece model", "Fetch or export it again") from None
    return model
