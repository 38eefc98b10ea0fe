"""MIL's constexpr operations: compressed weights to the floats that they stand for, in numpy.

Definitions: coremltools 9.0, converters/mil/mil/ops/defs/iOS16/constexpr_ops.py and iOS18/compression.py.
"""

from __future__ import annotations

import numpy as np

from medge.runtimes.mil_package import Array


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """scale * (data - offset), each scale and offset spread over its block. Shapes: data (…), scale of equal rank."""
    blocks = _blocks(data.shape, scale.shape)
    parts = tuple(n for pair in zip(scale.shape, blocks, strict=True) for n in pair)
    spread = tuple(n for size in scale.shape for n in (size, 1))
    values = data.astype(np.float32).reshape(parts)
    if offset is not None:
        _require(offset.shape == scale.shape, "offset and scale have different shapes")
        values -= offset.astype(np.float32).reshape(spread)
    values *= scale.astype(np.float32).reshape(spread)
    return values.reshape(data.shape)


def lut_to_dense(indices: Array, lut: Array, vector_axis: Array | None = None) -> Array:
    """Palettes: `lut` has the rank of `indices` plus 2, (groups…, levels, 1)."""
    _require(vector_axis is None and lut.shape[-1:] == (1,), "palettes of vectors are not supported")
    _require(lut.ndim == indices.ndim + 2, "the palette's rank is not that of the indices plus 2")
    levels, groups = lut.shape[-2], lut.shape[:-2]
    blocks = _blocks(indices.shape, groups)
    parts = tuple(n for pair in zip(groups, blocks, strict=True) for n in pair)
    spread = tuple(n for size in groups for n in (size, 1))
    _require(int(indices.max(initial=0)) < levels, "an index lies outside its palette")
    starts = np.arange(lut.size // levels, dtype=np.int32) * levels
    flat = indices.astype(np.int32).reshape(parts) + starts.reshape(spread)
    return np.asarray(np.take(lut.astype(np.float32).reshape(-1), flat)).reshape(indices.shape)


def lut_to_dense_flat(indices: Array, lut: Array, shape: Array) -> Array:
    """iOS 16's form: one palette a tensor, its indices packed in bytes, the lowest bits first."""
    bits = int(lut.size).bit_length() - 1
    count = int(np.prod(shape, dtype=np.int64))
    _require(lut.size == 2**bits and count * bits <= indices.size * 8, "indices, palette and shape contradict")
    stream = np.unpackbits(indices.view(np.uint8), bitorder="little")[: count * bits].reshape(count, bits)
    found = stream @ (1 << np.arange(bits, dtype=np.uint8))
    return np.take(lut.astype(np.float32), found).reshape(tuple(int(n) for n in shape))


def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    """iOS 16's form: scale * (data - zero_point), scalars or one an entry of `axis`."""
    scale, zero = (along(x, quantized_data, int(axis)) for x in (scale, zero_point))
    return (quantized_data.astype(np.float32) - zero) * scale


def along(x: Array, data: Array, axis: int) -> Array:
    """A scalar or vector as float32, shaped to broadcast along one axis of `data`."""
    if x.ndim == 0:
        return x.astype(np.float32)
    _require(x.shape == (data.shape[axis],), "a vector does not fit its axis")
    shape = [1] * data.ndim
    shape[axis] = -1
    return x.astype(np.float32).reshape(shape)


def _blocks(shape: tuple[int, ...], groups: tuple[int, ...]) -> tuple[int, ...]:
    fits = len(shape) == len(groups) and all(g and n % g == 0 for n, g in zip(shape, groups, strict=True))
    _require(fits, f"blocks of {groups} do not divide {shape}")
    return tuple(n // g for n, g in zip(shape, groups, strict=True))


def _require(holds: bool, what: str) -> None:
    """State of the file that the operation's definition rules out; the interpreter turns it into a CorruptError."""
    if not holds:
        raise ValueError(what)
