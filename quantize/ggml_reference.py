"""ggml's own quantizer, from the libggml-base that llama-cpp-python brings: the measure of ours, and its stand-in.

It is scalar code for SSE2, an order of magnitude slower than ggml_blocks.c, and gives the same bytes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medge.errors import MissingExtraError
from medge.spec import FloatArray

_REMEDY = "Run: pip install -U 'medge[gguf]'"
DONE, NOT_FINITE, BEYOND_HALF = range(3)


@cache
def load() -> ctypes.CDLL:
    """libggml-base, once a process.

    Raises:
        MissingExtraError: llama-cpp-python is not installed, or its library cannot be loaded.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("'llama_cpp' is not installed", _REMEDY)
    name = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}.get(sys.platform, "libggml-base.so")
    try:
        library = ctypes.CDLL(str(Path(spec.submodule_search_locations[0]) / "lib" / name))
    except OSError as error:
        raise MissingExtraError(f"libggml-base cannot be loaded: {error}", _REMEDY) from None
    library.ggml_quantize_init.argtypes = (c_int,)
    library.ggml_quantize_chunk.restype = c_size_t
    library.ggml_quantize_chunk.argtypes = (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)
    library.ggml_validate_row_data.restype = c_bool
    library.ggml_validate_row_data.argtypes = (c_int, c_void_p, c_size_t)
    return library


def quantize(rows: FloatArray, type: int, importance: FloatArray | None, out: NDArray[np.uint8]) -> int:
    """(n, k) float32, contiguous -> `out`, in ggml's type of that number. Returns DONE or why not."""
    if not np.isfinite(rows).all():
        return NOT_FINITE
    library = load()
    library.ggml_quantize_init(type)
    weights = None if importance is None else importance.ctypes.data
    library.ggml_quantize_chunk(type, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights)
    return DONE if library.ggml_validate_row_data(type, out.ctypes.data, out.nbytes) else BEYOND_HALF
