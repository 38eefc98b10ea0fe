"""A GGUF text model in llama.cpp, through the C interface that llama-cpp-python binds: weights and vocabulary.

llama.cpp logs to stderr, the prompt among it. Here it is silent for good; what it says of a file that it cannot load
becomes the error, and a failed assertion, which would abort the process with a backtrace, ends it with one line.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medge.errors import CorruptError, MissingExtraError, UsageError, require
from medge.runtimes.mapped import release

_ERROR = 4
"""ggml's log level (GGML_LOG_LEVEL_ERROR)."""
_COMPLAINTS: list[str] = []
_LISTENING = False


@functools.cache
def library() -> Any:
    """llama.cpp's functions, silenced.

    Raises:
        MissingExtraError: llama-cpp-python is not installed, or too old.
    """
    api: Any = require("llama_cpp", "gguf")
    if not hasattr(api, "LLAMA_LOAD_MODE_MMAP"):
        raise MissingExtraError(f"llama-cpp-python {api.__version__} is too old", "Run: pip install -U 'medge[gguf]'")
    vision: Any = require("llama_cpp.mtmd_cpp", "gguf")
    ggml(api).ggml_set_abort_callback(_GIVE_UP)
    api.llama_backend_init()
    for install in (api.llama_log_set, vision.mtmd_log_set, vision.mtmd_helper_log_set):
        install(_listener(api), None)
    return api


def ggml(api: Any) -> Any:
    """libggml-base as llama.cpp itself has loaded it: a second copy would log on its own."""
    if sys.platform == "win32":  # where a library does not show its dependencies' functions
        return ctypes.CDLL(str(Path(str(api.__file__)).with_name("lib") / "ggml-base.dll"))
    return api.llama_cpp._lib


def _give_up(message: bytes) -> None:
    """End the process, as ggml itself does right after: "file:line: GGML_ASSERT(condition) failed" is its message."""
    reason = message.decode("utf-8", "replace").partition(": ")[2].partition("\n")[0]
    sys.stdout.flush()
    os.write(2, f"error: llama.cpp gave up: {reason}. Run: medge verify ARTIFACT\n".encode())
    os._exit(CorruptError.exit_code)


_GIVE_UP = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(_give_up)
"""Here, because C keeps a pointer to it as long as the process lives."""


@functools.cache
def _listener(api: Any) -> Any:
    return api.llama_log_callback(_listen)


def _listen(level: int, text: bytes | None, _: Any) -> None:
    if _LISTENING and level == _ERROR and text:
        _COMPLAINTS.append(text.decode("utf-8", "replace").strip())


@contextmanager
def complaints() -> Iterator[list[str]]:
    """What llama.cpp reports as errors within. Only around loading: elsewhere it may quote a prompt."""
    global _LISTENING  # noqa: PLW0603
    _COMPLAINTS.clear()
    _LISTENING = True
    try:
        yield _COMPLAINTS
    finally:
        _LISTENING = False


def refused(path: Path, said: list[str]) -> CorruptError:
    """The error for a file that llama.cpp does not load. Its first complaint is the nearest to the cause."""
    first = said[0].splitlines()[0] if said else "no reason given"
    reason = (first.partition(": ")[2] or first).removeprefix("error: ")  # after the function's name
    return CorruptError(f"llama.cpp cannot load {path}: {reason}", "Export the artifact again")


class _Release:
    """Gives the mapped pages back while llama.cpp loads, a twentieth at a time, so that no second copy builds up."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = 0.0

    def __call__(self, done: float, _: Any) -> bool:
        if done >= self._next:
            release(self._path)
            self._next = done + 0.05 if done < 0.95 else 1.0
        return True


class Model:
    """Weights, mapped from the file, and the vocabulary."""

    def __init__(self, path: Path) -> None:
        """Map a file.

        Raises:
            CorruptError: llama.cpp cannot load it.
        """
        self.api = library()
        self.path = path
        settings = self.api.llama_model_default_params()
        settings.load_mode = self.api.LLAMA_LOAD_MODE_MMAP
        settings.progress_callback = self.api.llama_progress_callback(_Release(path))
        with complaints() as said:
            self.handle = self.api.llama_model_load_from_file(bytes(path), settings)
        if not self.handle:
            raise refused(path, said)
        self.close = weakref.finalize(self, self.api.llama_model_free, self.handle)
        self._vocabulary = self.api.llama_model_get_vocab(self.handle)
        self.vocabulary_size: int = self.api.llama_vocab_n_tokens(self._vocabulary)
        self.width: int = self.api.llama_model_n_embd(self.handle)
        self.window: int = self.api.llama_model_n_swa(self.handle)
        """Tokens that sliding-window layers see; 0 without such layers."""
        self._piece = ctypes.create_string_buffer(256)

    @property
    def vocabulary(self) -> Any:
        """llama.cpp's handle of the vocabulary."""
        return self._vocabulary

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, special tokens read as such, nothing added.

        Raises:
            UsageError: the text holds a lone surrogate, which no UTF-8 can express.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise UsageError("A text holds bytes that are no UTF-8", "Give it as UTF-8") from None
        room = len(data) + 1  # no token is shorter than a byte
        ids = (ctypes.c_int32 * room)()
        count = self.api.llama_tokenize(self._vocabulary, data, len(data), ids, room, False, True)
        return list(ids[:count])

    def special(self, text: str) -> int:
        """The id of a special token.

        Raises:
            CorruptError: the vocabulary has no such token.
        """
        ids = self.tokenize(text)
        if len(ids) != 1:
            raise CorruptError(f"{self.path} has no token '{text}'", "Export the artifact again")
        return ids[0]

    def piece(self, token: int) -> bytes:
        """A token's bytes; none for special tokens. Part of a character where the token is a byte."""
        length = self.api.llama_token_to_piece(self._vocabulary, token, self._piece, len(self._piece), 0, False)
        if length < 0:
            self._piece = ctypes.create_string_buffer(-length)
            return self.piece(token)
        return self._piece.raw[:length]

    def ends(self, token: int) -> bool:
        """Whether the vocabulary itself says that a token ends a turn."""
        return bool(self.api.llama_vocab_is_eog(self._vocabulary, token))
