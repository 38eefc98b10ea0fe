"""Weights to GGUF's blocks: every type that medge writes, with or without an importance of each input column.

The work is done by a C extension (ggml_blocks.c) that quantizes 4 to 16 blocks at once, in the order of operations
of ggml's scalar reference: its bytes equal llama-quantize's on every processor, in a twelfth of the time on AVX-512.
Where the extension was not built, ggml's own function does the same, if llama-cpp-python brings it; `engine` tells.
Asked for least squares, it gives lower errors than ggml's heuristics: -11 % (Q4_0), -21 % (Q4_1), -3 % (Q4_K).
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from medge.errors import CorruptError, MissingExtraError, UnsupportedError, UsageError
from medge.quantize import ggml_reference
from medge.spec import FloatArray

TypeName = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K"]
Objective = Literal["ggml", "least-squares"]
"""What scales are chosen for. ggml: its own rules, the largest weight or a least squares that favours large weights.
least-squares: the sum of importance times squared error, no more; levels are rounded by the scale that is stored."""
_COMPILED: tuple[TypeName, ...] = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K")
"""In the order of the extension's numbers."""

GGML_TYPE: dict[TypeName, int] = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "BF16": 30,
}
"""ggml's own numbers (ggml_type), as a file's tensor entries have them."""

BLOCK: dict[TypeName, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_1": (32, 24),
    "IQ4_NL": (32, 18),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
"""(values, bytes) of a block."""

_REMEDY = "Install gcc 12 or clang 15, then run: pip install --force-reinstall --no-deps --no-binary medge medge"


def row_bytes(type: TypeName, k: int) -> int:
    """Bytes of a row of k values.

    Raises:
        UsageError: no such type.
        UnsupportedError: blocks do not divide the row.
    """
    if type not in BLOCK:
        raise UsageError(f"'{type}' is no block type", f"Types: {', '.join(get_args(TypeName))}")
    values, size = BLOCK[type]
    if k % values or k == 0:
        raise UnsupportedError(f"Blocks of {values} do not divide rows of {k}", "Zero-pad the layer, or use F16")
    return k // values * size


def quantize_rows(
    rows: FloatArray | NDArray[np.uint16],
    type: TypeName,
    importance: FloatArray | None = None,
    objective: Objective = "ggml",
) -> NDArray[np.uint8]:
    """(n, k) weights -> (n, bytes a row): ggml's layout of the type.

    Thread-safe; the interpreter's lock is released. Under ggml's objective the bytes are ggml_quantize_chunk's, with
    an importance and without.

    Args:
        rows: float32, or the bits of bfloat16 as uint16, which saves the caller a copy twice as large.
        importance: (k,) what an error of each column costs, at least 0: the mean squared activation that it meets
            (quantize/importance.py). The float types and Q8_0 have no use for it.
        objective: what the error means.

    Raises:
        UsageError: no such type; an importance of another length, with a negative or non-finite value, or all zero.
        UnsupportedError: blocks do not divide the row; or a weight so large that float16 cannot hold it or its scale.
        CorruptError: a weight is infinite or not a number.
        MissingExtraError: the extension was not built, and ggml cannot stand in for it.
    """
    n, k = rows.shape
    out = np.empty((n, row_bytes(type, k)), np.uint8)
    values = np.require(rows, np.uint16 if rows.dtype == np.uint16 else np.float32, ("C", "ALIGNED"))
    if importance is not None:
        importance = _checked_importance(importance, k)
    if type == "F32":
        return _float32(values)
    _REFUSALS[_quantize(values, type, importance, objective, out)](values)
    return out


def engine() -> str:
    """Which code quantizes here, for a record of how a file was made.

    Raises:
        MissingExtraError: the extension was not built, and llama-cpp-python brings no ggml either.
    """
    if _compiled() is not None:
        return "medge's, compiled"
    return f"ggml's own, slower: medge was installed without a C compiler. {_REMEDY}"


def _quantize(
    rows: NDArray[Any],
    type: TypeName,
    importance: FloatArray | None,
    objective: Objective,
    out: NDArray[np.uint8],
) -> int:
    compiled = _compiled()
    squares = objective == "least-squares"
    if compiled is not None:
        bfloat16 = rows.dtype == np.uint16
        return int(compiled.quantize(_COMPILED.index(type), bfloat16, squares, rows, *rows.shape, importance, out, 0))
    if squares:
        raise MissingExtraError("Least squares need medge's compiled quantizers", _REMEDY)
    return ggml_reference.quantize(widened(rows), GGML_TYPE[type], importance, out)


@cache
def _compiled() -> ModuleType | None:
    """The extension; None where it was not built, and a line of ggml's own code is to do its work."""
    try:
        from medge.quantize import _ggml_blocks
    except ImportError:
        try:
            ggml_reference.load()
        except MissingExtraError as error:
            raise MissingExtraError("medge's quantizers were not compiled when it was installed", _REMEDY) from error
        return None
    return _ggml_blocks


def widened(rows: NDArray[Any]) -> FloatArray:
    """float32, of float32 or of bfloat16's bits."""
    return (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows


def _checked_importance(importance: FloatArray, k: int) -> FloatArray:
    if importance.shape != (k,):
        raise UsageError(f"An importance of shape {importance.shape} for rows of {k}", "Collect it with this model")
    if not np.isfinite(importance).all() or importance.min() < 0 or not importance.any():
        raise UsageError("An importance has negative or non-finite values, or only zeros", "Collect it again")
    return np.ascontiguousarray(importance, np.float32)


def _float32(rows: NDArray[Any]) -> NDArray[np.uint8]:
    values = np.ascontiguousarray(widened(rows), "<f4")
    if not np.isfinite(values).all():
        _not_finite(values)
    return values.view(np.uint8)


def _not_finite(rows: NDArray[Any]) -> None:
    count = int((~np.isfinite(widened(rows))).sum())
    raise CorruptError(f"{count} weights are infinite or not a number", "Download or convert the checkpoint again")


def _beyond_half(rows: NDArray[Any]) -> None:
    largest = float(np.abs(widened(rows)).max())
    raise UnsupportedError(f"Weights of {largest:.3g} need values or block scales beyond float16", "Use scheme fp32")


_REFUSALS = (lambda rows: None, _not_finite, _beyond_half)
"""By the extension's status."""
