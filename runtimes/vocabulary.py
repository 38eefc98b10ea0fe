"""Text to ids and back by a chat model's tokenizer.json, for runtimes that have no tokenizer of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from medge.errors import CorruptError, UsageError, WeightsError, require

VOCABULARY = "tokenizer.json"
"""Its name in checkpoints and artifacts."""


class Vocabulary:
    """A tokenizer.json of the tokenizers library."""

    def __init__(self, path: Path, size: int | None = None) -> None:
        """Read the file; `size` is the model's number of tokens, where that is known to be another.

        Raises:
            WeightsError: it is missing.
            CorruptError: it is none.
        """
        self._path = path
        if not self._path.is_file():
            raise WeightsError(f"{self._path} is missing", "Copy it from the model's page beside the weights")
        try:
            self._tokenizer: Any = require("tokenizers", "chat").Tokenizer.from_file(str(self._path))
        except Exception as error:  # the library raises nothing narrower
            raise CorruptError(f"{self._path} is no tokenizer: {error}", "Download it again") from None
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token for token, entry in added.items() if entry.special}
        self.vocabulary_size: int = size or self._tokenizer.get_vocab_size()

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, special tokens read as such, nothing added.

        Raises:
            UsageError: the text holds a lone surrogate, which no UTF-8 can express.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError("A text holds bytes that are no UTF-8", "Give it as UTF-8") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def special(self, text: str) -> int:
        """The id of a special token.

        Raises:
            CorruptError: there is no such token.
        """
        token = self.find(text)
        if token is None:
            raise CorruptError(f"{self._path} has no token '{text}'", "Download it again")
        return token

    def find(self, text: str) -> int | None:
        """The id of a token; None where there is none."""
        token: int | None = self._tokenizer.token_to_id(text)
        return token

    def piece(self, token: int) -> bytes:
        """A token's bytes; none for special tokens. Part of a character where the token is a byte."""
        name = self._tokenizer.id_to_token(token)
        if name is None or token in self._special:  # some ids of the output matrix name no token
            return b""
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
        return bytes([int(byte[1], 16)]) if byte else bytes(name.replace("▁", " ").encode())

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def ends(self, token: int) -> bool:
        """Never: which tokens end a turn is the chat format's to say."""
        return False
