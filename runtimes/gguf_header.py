"""A look into a GGUF file's header with ggml's own reader, which knows every block type that llama.cpp does."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

from medge.errors import CorruptError
from medge.runtimes.llama_model import ggml, library

_UINT32 = 4
"""GGUF's number for a value type."""
F32, F16 = 0, 1
"""ggml's numbers for a tensor's type."""


class _InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


class GgufHeader:
    """Keys and tensors by name; no tensor's data is read."""

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            CorruptError: it is no GGUF file, or its header is damaged.
        """
        self._ggml = _library()
        self._handle = self._ggml.gguf_init_from_file(bytes(path), _InitParams(True, None))
        if not self._handle:
            raise CorruptError(f"{path} is no GGUF file, or its header is damaged", "Export the artifact again")

    def __enter__(self) -> GgufHeader:
        return self

    def __exit__(self, *_: object) -> None:
        self._ggml.gguf_free(self._handle)

    def number(self, key: str) -> int | None:
        """The value of a key; None where it is missing or no unsigned 32-bit number."""
        place = self._ggml.gguf_find_key(self._handle, key.encode())
        if place < 0 or self._ggml.gguf_get_kv_type(self._handle, place) != _UINT32:
            return None
        return int(self._ggml.gguf_get_val_u32(self._handle, place))

    def type(self, tensor: str) -> int | None:
        """ggml's number for a tensor's type; None where there is no such tensor."""
        place = self._ggml.gguf_find_tensor(self._handle, tensor.encode())
        return None if place < 0 else int(self._ggml.gguf_get_tensor_type(self._handle, place))


@functools.cache
def _library() -> Any:
    """ggml's reader of headers."""
    reader = ggml(library())
    for name, result, arguments in (
        ("gguf_init_from_file", ctypes.c_void_p, (ctypes.c_char_p, _InitParams)),
        ("gguf_free", None, (ctypes.c_void_p,)),
        ("gguf_find_key", ctypes.c_int64, (ctypes.c_void_p, ctypes.c_char_p)),
        ("gguf_get_kv_type", ctypes.c_int, (ctypes.c_void_p, ctypes.c_int64)),
        ("gguf_get_val_u32", ctypes.c_uint32, (ctypes.c_void_p, ctypes.c_int64)),
        ("gguf_find_tensor", ctypes.c_int64, (ctypes.c_void_p, ctypes.c_char_p)),
        ("gguf_get_tensor_type", ctypes.c_int, (ctypes.c_void_p, ctypes.c_int64)),
    ):
        function = getattr(reader, name)
        function.restype, function.argtypes = result, arguments
    return reader
