"""How each rule of a scheme is stored in a GGUF file, and the packing of every block type.

Source: ggml's ggml-common.h and ggml-quants.c. Blocks are 32 values of a row with a float16 scale each, and an
offset for the affine types. 4- and 5-bit values lie in halves: a byte holds value i low and value i + 16 high.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medge.errors import UnsupportedError
from medge.quantize.scheme import Rule, Scheme
from medge.quantize.weights import quantize
from medge.runtimes.gguf_file import BlockType
from medge.spec import FloatArray

Bytes = NDArray[np.uint8]
BLOCK = 32
MLP_MULTIPLE = 256
"""Zero-padding of the MLP's hidden width under block types: 4304 = 16 · 269 becomes 4352, in whole blocks."""

LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
"""IQ4_NL's 16 uneven levels (kvalues_iq4nl)."""
_NEAREST = np.abs(np.arange(-128, 128)[:, None] - LEVELS[None].astype(np.int64)).argmin(1).astype(np.uint8)
"""Integer + 128 -> index of its nearest level."""
_SHRINKS = np.linspace(1.1, 0.75, 8, dtype=np.float32)
"""Of an uneven scale, around the one at which the largest weight meets the outermost level."""
_REFITS = 3
"""Rounds of least squares for an affine block: the best scale and offset for its integers, then integers again."""
_CHUNK = 1 << 22
"""Values quantized at once."""
_HALF = 65504.0
"""float16's largest value."""


def block_type(rule: Rule) -> BlockType:
    """What stores a rule's layers: at least the precision asked for.

    Raises:
        UnsupportedError: ggml has no such blocks.
    """
    if rule.bits >= 16:
        return BlockType.F32 if rule.bits == 32 else BlockType.F16
    reason = _obstacle(rule)
    if reason:
        raise UnsupportedError(reason, f"Nearest: --scheme {_nearest(rule)}")
    if rule.method == "nonlinear":
        return BlockType.IQ4_NL
    if rule.bits == 4:
        return BlockType.Q4_0 if rule.symmetric else BlockType.Q4_1
    return BlockType.Q5_1 if rule.bits == 5 else BlockType.Q8_0


def refusal(scheme: Scheme) -> tuple[str, str] | None:
    """Why ggml cannot do a scheme, and the nearest that it can; None if it can."""
    if scheme.activations == "static":
        return "ggml scales activations when it runs: it has no place for calibrated ranges", "int8"
    for rule in scheme.rules:
        if reason := _obstacle(rule):
            return reason, _nearest(rule)
    return None


PALETTES = "ggml has no palettes of a layer's own: its one uneven table is IQ4_NL's"


def _obstacle(rule: Rule) -> str:
    """Why ggml has no blocks for a rule, or nothing."""
    block = rule.block or BLOCK
    cases = (
        (rule.bfloat, "medge's ggml graph has no bfloat16 layers: float16 holds more digits"),
        (
            rule.method == "superblock",
            "ggml's super-blocks have 256 values, and rows of 1152 are no multiple of that",
        ),
        (rule.method == "kmeans", PALETTES),
        (rule.method == "nonlinear" and rule.bits != 4, f"ggml's uneven levels have 4 bits, not {rule.bits}"),
        (rule.bits == 8 and not rule.symmetric, "ggml has no 8-bit blocks with an offset"),
        (block < BLOCK, f"ggml's blocks have {BLOCK} values: {block} is finer"),
    )
    return next((reason for holds, reason in cases if holds), "")


def _nearest(rule: Rule) -> str:
    if rule.bits >= 16:
        return "fp16"
    if rule.method == "kmeans":
        return "int4-nl" if rule.bits == 4 else "int5"
    return "int8" if rule.bits > 5 else f"int{rule.bits}"


def pack(weight: FloatArray, type: BlockType, method: str = "absmax") -> Bytes:
    """(out, in) float32 -> (out, bytes a row): ggml's own layout of the type.

    Raises:
        UnsupportedError: a weight that float16 cannot hold, as value or scale.
    """
    packed = np.empty((len(weight), type.size(weight.shape[1:])), np.uint8)
    step = max(1, _CHUNK // weight.shape[1])
    convert = _PACKERS[type]
    for start in range(0, len(weight), step):
        packed[start : start + step] = convert(weight[start : start + step], method).reshape(-1, packed.shape[1])
    return packed


def _float32(weight: FloatArray, method: str) -> Bytes:
    return np.ascontiguousarray(weight, "<f4").view(np.uint8)


def _float16(weight: FloatArray, method: str) -> Bytes:
    return _half(weight).view(np.uint8)


def _even(bits: int, weight: FloatArray, method: str) -> Bytes:
    """medge's own symmetric blocks: the same numbers as in every other format."""
    found = quantize(weight, bits, BLOCK, "mse" if method == "mse" else "absmax")
    values = found.values.reshape(-1, BLOCK)
    body = values.view(np.uint8) if bits == 8 else _nibbles((values + np.int8(8)).astype(np.uint8))
    return np.concatenate([_scale(found.scales), body], axis=1)


def _affine(bits: int, weight: FloatArray, method: str) -> Bytes:
    blocks = weight.reshape(-1, BLOCK)
    found = affine(blocks, bits, refits=_REFITS if method == "mse" else 0)
    parts = [_scale(found.scales), _scale(found.offsets)]
    if bits == 5:
        parts.append(np.packbits(found.levels >> np.uint8(4), axis=1, bitorder="little"))
    return np.concatenate([*parts, _nibbles(found.levels & np.uint8(15))], axis=1)


def _uneven(weight: FloatArray, method: str) -> Bytes:
    scales, indices = uneven(weight.reshape(-1, BLOCK))
    return np.concatenate([_scale(scales), _nibbles(indices)], axis=1)


_PACKERS: dict[BlockType, Callable[[FloatArray, str], Bytes]] = {
    BlockType.F32: _float32,
    BlockType.F16: _float16,
    BlockType.Q8_0: partial(_even, 8),
    BlockType.Q5_1: partial(_affine, 5),
    BlockType.Q4_1: partial(_affine, 4),
    BlockType.Q4_0: partial(_even, 4),
    BlockType.IQ4_NL: _uneven,
}


class Affine(NamedTuple):
    """N blocks of 32: level · scale + offset."""

    scales: FloatArray
    """(N,)"""
    offsets: FloatArray
    """(N,)"""
    levels: Bytes
    """(N, 32)"""

    def dequantize(self) -> FloatArray:
        """(N, 32) float32."""
        return np.asarray(self.levels * self.scales[:, None] + self.offsets[:, None], np.float32)


def affine(blocks: FloatArray, bits: int, refits: int) -> Affine:
    """(N, 32) float32 in blocks with an offset.

    From the block's least to its largest value; then each refit solves the least squares of scale and offset for
    the levels, and keeps what lowers the block's error.
    """
    top = 2**bits - 1
    low, high = blocks.min(1), blocks.max(1)
    best = _levels(blocks, (high - low) / np.float32(top), low, top)
    least = _squares(best.dequantize() - blocks)
    for _ in range(refits):
        tried = _levels(blocks, *_least_squares(blocks, best.levels), top)
        error = _squares(tried.dequantize() - blocks)
        better = error < least
        least = np.where(better, error, least)
        best = Affine(
            np.where(better, tried.scales, best.scales),
            np.where(better, tried.offsets, best.offsets),
            np.where(better[:, None], tried.levels, best.levels),
        )
    return best


def _levels(blocks: FloatArray, scales: FloatArray, offsets: FloatArray, top: int) -> Affine:
    scales, offsets = _rounded(scales), _rounded(offsets)
    values = np.rint((blocks - offsets[:, None]) * _inverse(scales)[:, None])
    return Affine(scales, offsets, np.clip(values, 0, top).astype(np.uint8))


def _inverse(scales: FloatArray) -> FloatArray:
    """1 / scale, and 0 where that overflows: a block of zeros, or as good as."""
    return np.divide(1, scales, out=np.zeros_like(scales), where=np.abs(scales) > np.finfo(np.float32).tiny)


def _squares(difference: FloatArray) -> FloatArray:
    return np.asarray(np.einsum("ni,ni->n", difference, difference), np.float32)


def _least_squares(blocks: FloatArray, values: Bytes) -> tuple[FloatArray, FloatArray]:
    """The line through (level, weight) of each block; a block of one level keeps its mean."""
    x = values.astype(np.float32)
    mean_x, mean_y = x.mean(1), blocks.mean(1)
    x -= mean_x[:, None]
    spread = np.einsum("ni,ni->n", x, x)
    scales = np.divide(np.einsum("ni,ni->n", x, blocks), spread, out=np.zeros_like(spread), where=spread > 0)
    return scales, mean_y - scales * mean_x


def uneven(blocks: FloatArray) -> tuple[FloatArray, Bytes]:
    """(N, 32) -> scales (N,), indices (N, 32) of LEVELS: block = scale · level, by the least squared error.

    The largest weight is led to the outermost level, -127, through a few shrinkings; each gives the indices, and
    those the scale of least squares.
    """
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)[:, 0]
    scales = np.zeros_like(largest)
    indices = np.full(blocks.shape, 8, np.uint8)
    least = np.full(largest.shape, np.inf, np.float32)
    for shrink in _SHRINKS:
        tried = _nearest_levels(blocks, largest / np.float32(LEVELS[0]) * shrink)
        levels = LEVELS[tried].astype(np.float32)
        square, product = np.einsum("ni,ni->n", levels, levels), np.einsum("ni,ni->n", levels, blocks)
        fitted = _rounded(product / square)
        error = fitted * (fitted * square - 2 * product)  # the squared error, less what no choice changes
        better = error < least
        least, scales = np.where(better, error, least), np.where(better, fitted, scales)
        np.copyto(indices, tried, where=better[:, None])
    return scales, indices


def _nearest_levels(blocks: FloatArray, scales: FloatArray) -> Bytes:
    scaled = np.rint(blocks * _inverse(scales)[:, None])
    return np.asarray(_NEAREST[np.clip(scaled, -128, 127).astype(np.int16) + 128])


def _nibbles(values: Bytes) -> Bytes:
    """(N, 32) of 4 bits -> (N, 16) bytes."""
    return np.asarray(values[:, :16] | values[:, 16:] << np.uint8(4), np.uint8)


def _scale(values: FloatArray) -> Bytes:
    """A float16 a block, as the block's first two bytes: (N, 2)."""
    return _half(values.reshape(-1, 1)).view(np.uint8)


def _rounded(values: FloatArray) -> FloatArray:
    """What float16 makes of scales, before values are rounded by them: no further error when they are stored."""
    return _half(values).astype(np.float32)


def _half(values: FloatArray) -> NDArray[np.float16]:
    if np.abs(values).max(initial=0) > _HALF:
        raise UnsupportedError(f"Values beyond {_HALF:.0f} need more than float16", "Use scheme fp32")
    return np.ascontiguousarray(values, "<f2")
