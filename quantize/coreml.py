"""How each scheme's rule becomes a Core ML weight: the one place that knows MIL's constexpr operations.

A compressed weight is a constexpr operation that Core ML unfolds when it loads or runs the model; layers compute
in fp16 (fp32 in scheme fp32). Scales are positive, since Core ML's compiler refuses negative ones in quantize and
dequantize (webmachinelearning/webnn issue 822). This module imports no coremltools: it is handed the builder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge.errors import UnsupportedError
from medge.quantize.palette import palettize
from medge.quantize.scheme import Rule
from medge.quantize.weights import quantize
from medge.spec import FloatArray, Weight

_PALETTE_BITS = (1, 2, 4, 6, 8)
_EVEN_BITS = (4, 8)
_GRID = np.linspace(1.0, 0.8, 5, dtype=np.float32)
"""Shrinkings of a block's range that the mse method tries."""


def refusal(rule: Rule) -> tuple[str, str] | None:
    """Why Core ML cannot store a rule's weights, and the nearest scheme that it can; None when it can."""
    palette, even = rule.method == "kmeans", rule.method in ("absmax", "mse") and rule.bits < 16
    cases = (
        (rule.bfloat, "Core ML has no bfloat16", "fp16"),
        (rule.method == "superblock", "Core ML has no blocks of blocks", "int4"),
        (
            rule.method == "nonlinear",
            "Core ML has no fixed uneven levels; its palettes choose 16 levels for the weights at hand",
            "palette4",
        ),
        (palette and rule.bits not in _PALETTE_BITS, f"Core ML has no palettes of {rule.bits} bits", "palette6"),
        (
            even and rule.bits not in _EVEN_BITS,
            f"Core ML has even levels of 4 and 8 bits, not of {rule.bits}",
            "palette6",
        ),
    )
    return next(((reason, nearest) for holds, reason, nearest in cases if holds), None)


def refusal_ios17(rule: Rule) -> str | None:
    """Why the operations before iOS 18 cannot store a rule's weights; None when they can."""
    if rule.bits >= 16:
        return None
    if rule.method == "kmeans":
        return None if rule.group is None else "one palette a tensor, none a group of channels"
    return None if rule.bits == 8 and rule.block is None else "8 bits with one scale an output channel, nothing finer"


def stored_bits(rule: Rule) -> float:
    """Bits a weight, scales and offsets counted; a palette itself is below 0.03 bits."""
    if rule.bits >= 16 or rule.method == "kmeans" or rule.block is None:
        return float(rule.bits)
    offset = 0 if rule.bits == 8 and rule.symmetric else rule.bits
    return rule.bits + (16 + offset) / rule.block


@dataclass(frozen=True)
class Levels:
    """`scales * (values - offsets)`, each scale and offset spread over its block, approximates the weight."""

    values: NDArray[Any]
    """(out, in) int8, or uint8 where there are offsets."""
    scales: NDArray[np.float16]
    """(out, blocks), positive."""
    offsets: NDArray[np.uint8] | None = None
    """(out, blocks): the level that stands for zero."""


def levels(weight: FloatArray, rule: Rule) -> Levels:
    """Even levels as the rule says, none of its accuracy lost to positive scales; `weight` fits float16.

    Raises:
        UnsupportedError: a block does not divide the row.
    """
    if not rule.symmetric:
        return _affine(weight, rule)
    # A block as wide as the row: `quantize` rounds the scales of blocks to float16 before it rounds the weights.
    found = quantize(weight, rule.bits, rule.block or weight.shape[1], rule.method)
    scales = np.where(found.scales == 0, 1, found.scales)
    if rule.bits == 8:
        return Levels(found.values, scales.astype(np.float16))
    return _positive(found.values, scales)


def _positive(values: NDArray[np.int8], scales: FloatArray) -> Levels:
    """Levels -8..7 of a negative scale are -7..8 of a positive one: 0..15 around offset 7 rather than 8."""
    blocks = values.reshape(*scales.shape, -1)
    offsets = np.where(scales > 0, 8, 7).astype(np.uint8)
    signed = np.where((scales > 0)[..., None], blocks, -blocks)
    unsigned = (signed + offsets[..., None]).astype(np.uint8).reshape(values.shape)
    return Levels(unsigned, np.abs(scales).astype(np.float16), offsets)


def _affine(weight: FloatArray, rule: Rule) -> Levels:
    """From the least to the largest weight of a block, zero exactly representable."""
    out, inp = weight.shape
    width = rule.block or inp
    if inp % width:
        raise UnsupportedError(f"Blocks of {width} do not divide rows of {inp}", "Zero-pad the layer first")
    groups = weight.reshape(out, inp // width, width)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    best: tuple[Any, ...] = ()
    for shrink in _GRID if rule.method == "mse" else _GRID[:1]:
        tried = _round_affine(groups, low * shrink, high * shrink, rule.bits)
        if not best:
            best = tried
            continue
        better = tried[0] < best[0]
        best = tuple(
            np.where(better[..., None] if b.ndim == 3 else better, t, b) for t, b in zip(tried, best, strict=True)
        )
    _, values, scales, offsets = best
    return Levels(values.reshape(out, inp), scales.astype(np.float16), offsets)


def _round_affine(groups: FloatArray, low: FloatArray, high: FloatArray, bits: int) -> tuple[Any, ...]:
    """Squared error (out, blocks), values, scales, offsets."""
    top = 2**bits - 1
    scales = ((high - low) / np.float32(top)).astype(np.float16).astype(np.float32)
    scales = np.where(scales == 0, 1, scales)
    offsets = np.clip(np.rint(-low / scales), 0, top)
    values = np.rint(groups / scales[..., None])
    values += offsets[..., None]
    np.clip(values, 0, top, out=values)
    difference = (values - offsets[..., None]) * scales[..., None] - groups
    error = np.einsum("rgi,rgi->rg", difference, difference)
    return error, values.astype(np.uint8), scales, offsets.astype(np.uint8)


def check_half(at: str, value: FloatArray) -> None:
    """Refuse what float16 cannot hold.

    Raises:
        UnsupportedError: a value beyond 65504.
    """
    if np.abs(value).max(initial=0) > np.finfo(np.float16).max:
        raise UnsupportedError(f"{at} holds weights beyond 65504, which float16 cannot", "Use --scheme fp32")


@dataclass(frozen=True)
class StoredWeights:
    """Puts weights into a MIL program under construction."""

    builder: Any
    """coremltools' mil.Builder."""
    small: Mapping[int, Any]
    """Bits -> numpy type of coremltools' unsigned integers below a byte."""
    half: bool
    """Compute in fp16, or in fp32."""
    ios18: bool

    def floats(self, at: str, value: FloatArray) -> NDArray[Any]:
        """A weight that stays a float, in the type that the program computes in."""
        if not self.half:
            return value
        check_half(f"'{at}'", value)
        return value.astype(np.float16)

    def matrix(self, at: str, weight: Weight, rule: Rule) -> Any:
        """(out, in), as the rule says."""
        value, name = weight.read(), f"{at}.weight"
        if rule.bits >= 16:
            return self.floats(name, value)
        check_half(f"'{name}'", value)
        if rule.method == "kmeans":
            return self._palette(name, value, rule)
        found = levels(value, rule)
        return self._blocks(name, found, rule.bits) if self.ios18 else self._channels(name, found)

    def _blocks(self, name: str, found: Levels, bits: int) -> Any:
        if found.offsets is None:
            return self.builder.constexpr_blockwise_shift_scale(data=found.values, scale=found.scales, name=name)
        data, offset = (x.astype(self.small.get(bits, np.uint8)) for x in (found.values, found.offsets))
        return self.builder.constexpr_blockwise_shift_scale(data=data, scale=found.scales, offset=offset, name=name)

    def _channels(self, name: str, found: Levels) -> Any:
        zeros = np.zeros(len(found.values), np.int8) if found.offsets is None else found.offsets[:, 0]
        return self.builder.constexpr_affine_dequantize(
            quantized_data=found.values, zero_point=zeros, scale=found.scales[:, 0], axis=np.int32(0), name=name
        )

    def _palette(self, name: str, value: FloatArray, rule: Rule) -> Any:
        found = palettize(value, rule.bits, rule.group)
        centres = found.centres.astype(np.float16)
        if not self.ios18:
            packed = _packed(found.indices, rule.bits)
            shape = np.array(value.shape, np.uint32)
            return self.builder.constexpr_lut_to_dense(indices=packed, lut=centres[0], shape=shape, name=name)
        indices = found.indices.astype(self.small.get(rule.bits, np.uint8))
        lut = centres[:, None, :, None]
        return self.builder.constexpr_lut_to_dense(indices=indices, lut=lut, name=name)


def _packed(indices: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """A stream of `bits` each, the lowest bits first."""
    each = np.unpackbits(indices.reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return np.packbits(each.reshape(-1), bitorder="little")
