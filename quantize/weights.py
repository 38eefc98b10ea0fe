"""Numeric kernels: float weights to symmetric integers and scales. No format, no packing.

Weights are (out, in); a "row" is an output channel. Symmetric, since x86's and Arm's fast 8-bit kernels take
signed weights without a zero point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medge.errors import UnsupportedError
from medge.spec import FloatArray

Method = Literal["absmax", "mse", "kmeans", "nonlinear", "superblock"]
"""A rule's methods; only the first two have even levels, and so integers and scales."""
_GRID = np.linspace(1.0, 0.8, 5, dtype=np.float32)
"""Shrinkings of the scale that the mse method tries: clipping one outlier may serve the rest."""


@dataclass(frozen=True)
class Quantized:
    """`values` times `scales`, each scale spread over its block, approximates the weight."""

    values: NDArray[np.int8]
    """(out, in)"""
    scales: FloatArray
    """(out, 1) per channel, or (out, in / block)."""

    def dequantize(self) -> FloatArray:
        """(out, in) float32."""
        out, inp = self.values.shape
        blocks = self.values.reshape(out, self.scales.shape[1], -1)
        return (blocks * self.scales[:, :, None]).reshape(out, inp)


def quantize(weight: FloatArray, bits: int, block: int | None = None, method: Method = "absmax") -> Quantized:
    """Symmetric rounding to `bits`, one scale an output channel or a block of `block` inputs.

    8 bits use -127..127; 4 bits use -8..7 with the sign of the scale chosen so that the largest weight of a
    block meets -8, as in ggml's Q4_0: one more level where it matters. Scales of blocks are rounded to float16
    before the weights are, so that they can be stored in 2 bytes without a further error.

    Raises:
        UnsupportedError: a method of uneven levels; a block that does not divide the row (pad it,
            BuildOptions.mlp_multiple); or a weight so large that float16 cannot hold its block's scale.
    """
    out, inp = weight.shape
    width = block or inp
    if method not in ("absmax", "mse"):
        raise UnsupportedError(f"Method '{method}' has no integers and scales", "Use absmax or mse")
    if inp % width:
        raise UnsupportedError(f"Blocks of {width} do not divide rows of {inp}", "Zero-pad the layer first")
    groups = weight.reshape(out, inp // width, width)
    store = np.float16 if block else np.float32
    extremes = _extremes(groups, bits)
    if np.abs(extremes).max(initial=0) > np.finfo(store).max:
        raise UnsupportedError(
            f"Weights of {np.abs(groups).max():.3g} need block scales beyond float16", "Quantize without blocks"
        )
    values, scales = _round(groups, bits, extremes, store)
    if method == "mse":
        values, scales = _search(groups, bits, values, scales, store)
    return Quantized(values.reshape(out, inp), scales)


def _extremes(groups: FloatArray, bits: int) -> FloatArray:
    """The scale that maps a group's largest weight to the end of the integer range."""
    if bits == 8:
        return np.asarray(np.abs(groups).max(-1) / np.float32(127), np.float32)
    top, bottom = groups.max(-1), groups.min(-1)
    largest = np.where(top > -bottom, top, bottom)
    return np.asarray(largest / np.float32(-(2 ** (bits - 1))), np.float32)


def _round(groups: FloatArray, bits: int, scales: FloatArray, store: type) -> tuple[NDArray[np.int8], FloatArray]:
    low, high = (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    scales = scales.astype(store).astype(np.float32)
    invertible = np.abs(scales) >= np.finfo(np.float32).tiny  # 1 / a subnormal scale may overflow
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=invertible)
    scaled = groups * inverse[..., None]
    np.rint(scaled, out=scaled)
    np.clip(scaled, low, high, out=scaled)
    return scaled.astype(np.int8), scales


def _error(groups: FloatArray, values: NDArray[np.int8], scales: FloatArray) -> FloatArray:
    difference = values * scales[..., None]
    difference -= groups
    return np.asarray(np.einsum("rgi,rgi->rg", difference, difference), np.float32)


def _search(
    groups: FloatArray, bits: int, values: NDArray[np.int8], scales: FloatArray, store: type
) -> tuple[NDArray[np.int8], FloatArray]:
    full, best = scales, _error(groups, values, scales)
    for shrink in _GRID[1:]:
        tried, tried_scales = _round(groups, bits, full * shrink, store)
        error = _error(groups, tried, tried_scales)
        better = error < best
        best = np.where(better, error, best)
        scales = np.where(better, tried_scales, scales)
        np.copyto(values, tried, where=better[..., None])
    return values, scales
