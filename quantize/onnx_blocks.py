"""Matrices in blocks under one scale each, for ONNX Runtime's MatMulNBits: what a decoder is made of.

A decoder computes one token at a time, so a weight is read once for two operations: its bytes are its time, and 4-bit
blocks multiplied as they are stored are the fastest form there is. Blocks of 32 in 4 bits are those of GGUF's Q4_0, by
the same quantizer: the same numbers, and only the order of a block's values differs. In 8 bits, too, blocks have 32
values, since activations are rounded in blocks as wide; but 128 in the output matrix, a quarter of what an int4 decoder
reads a token: ONNX Runtime keeps 8 bytes a block beside its values, and the product takes a fifth less time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medge.errors import CorruptError, MedgeError
from medge.quantize.ggml_blocks import quantize_rows, widened
from medge.quantize.onnx import Inputs, Linears, to_fp16
from medge.quantize.ordered import ordered
from medge.quantize.scheme import Rule
from medge.quantize.weights import quantize
from medge.spec import FloatArray, Weight

_GGML = 32
"""Values in one of ggml's blocks."""
TABLE_BLOCK = 128
"""Of the output matrix in 8 bits, where it divides a row."""
_ACTIVATIONS = 4
"""MatMulNBits' accuracy level for activations in int8, block by block: the level with vector integer kernels."""
_CONTRIB = "com.microsoft"
ROWS = 512
"""Rows that one thread works on."""


class Blocks(NamedTuple):
    """A matrix (out, in) in the graph."""

    values: str
    """(out, in / block, bytes a block) uint8, the first value in the low bits; zero is the middle of the range."""
    scales: str
    """(out, in / block) float32."""
    shape: tuple[int, int]
    bits: int
    block: int


class BlockLinears(Linears):
    """Linear layers as MatMulNBits, where the rule has fewer than 16 bits."""

    def _dynamic(self, x: str, at: str, weight: Weight, rule: Rule, inputs: Inputs) -> str:
        return self.product(x, self.matrix(at, weight, rule), f"{at}.matmul")

    def matrix(self, at: str, weight: Weight, rule: Rule, block: int = _GGML) -> Blocks:
        """Stream a matrix into the graph, in the rule's blocks or, if it has none, in those asked for."""
        scales: list[FloatArray] = []

        def values() -> Iterator[NDArray[np.uint8]]:
            for piece in ordered(partial(_packed, at, rule, rule.block or block), _pieces(weight)):
                scales.append(piece.scales)
                yield piece.values

        out, blocks, size = self.graph.stream(f"{at}.weight", "uint8", values())
        self.graph.stream(f"{at}.scales", "float32", scales)
        block = size * 8 // rule.bits
        return Blocks(f"{at}.weight", f"{at}.scales", (out, blocks * block), rule.bits, block)

    def product(self, x: str, matrix: Blocks, at: str) -> str:
        """x (…, in) times the matrix transposed."""
        out, inp = matrix.shape
        settings = {"K": inp, "N": out, "bits": matrix.bits, "block_size": matrix.block, "accuracy_level": _ACTIVATIONS}
        y = self.graph.node("MatMulNBits", [x, matrix.values, matrix.scales], at, domain=_CONTRIB, **settings)
        self.graph.shape(y, ["batch", f"{at}.tokens", out])
        return y

    def floats(self, at: str, weight: Weight, bits: int) -> str:
        """Stream a matrix of 32- or 16-bit floats into the graph, in the checkpoint's own order (out, in)."""
        dtype = "float32" if bits == 32 else "float16"
        self.graph.stream(f"{at}.weight", dtype, ordered(partial(_float, at, dtype), _pieces(weight)))
        return self.widened(at, bits)

    def widened(self, at: str, bits: int) -> str:
        """A matrix of floats in the graph, as float32."""
        return f"{at}.weight" if bits == 32 else self.graph.node("Cast", [f"{at}.weight"], f"{at}.weight.float", to=1)


class _Packed(NamedTuple):
    values: NDArray[np.uint8]
    scales: FloatArray


def _pieces(weight: Weight) -> Iterator[NDArray[Any]]:
    """The matrix in pieces that one thread works on."""
    for piece in weight.pieces(ROWS):
        yield from (piece[i : i + ROWS] for i in range(0, len(piece), ROWS))


def _packed(at: str, rule: Rule, block: int, rows: NDArray[Any]) -> _Packed:
    """Rows in MatMulNBits' order."""
    block = block if rows.shape[1] % block == 0 else _GGML
    try:
        if (rule.bits, block) == (4, _GGML):
            return _from_ggml(quantize_rows(rows, "Q4_0"))
        found = quantize(_finite(at, rows), rule.bits, block, rule.method)
    except MedgeError as error:
        raise type(error)(f"'{at}': {error.message}", error.remedy) from error
    levels = (found.values.view(np.uint8) + np.uint8(2 ** (rule.bits - 1))).reshape(len(rows), -1, block)
    return _Packed(levels if rule.bits == 8 else _pairs(levels & np.uint8(15)), found.scales)


def _from_ggml(blocks: NDArray[np.uint8]) -> _Packed:
    """Q4_0: a float16 scale and 16 bytes, which hold value i low and value i + 16 high."""
    each = blocks.reshape(len(blocks), -1, 18)
    scales = np.ascontiguousarray(each[..., :2]).view("<f2")[..., 0].astype(np.float32)
    halves = [_pairs(half) for half in (each[..., 2:] & np.uint8(15), each[..., 2:] >> np.uint8(4))]
    return _Packed(np.concatenate(halves, axis=-1), scales)


def _pairs(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """4-bit values, two a byte."""
    return levels[..., 0::2] | (levels[..., 1::2] << np.uint8(4))


def _float(at: str, dtype: str, rows: NDArray[Any]) -> NDArray[Any]:
    values = _finite(at, rows)
    return values if dtype == "float32" else to_fp16(at, values)


def _finite(at: str, rows: NDArray[Any]) -> FloatArray:
    values = widened(rows)
    if not np.isfinite(values).all():
        raise CorruptError(f"'{at}' holds NaN or infinity", "Use a sound checkpoint")
    return values
