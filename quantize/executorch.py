"""How each scheme's rule becomes operations that XNNPACK takes: the one place that knows its kernels.

XNNPACK has integer kernels for weights of 8 bits with a scale an output channel, and of 4 bits with a scale a
block of 32·n inputs, times activations of 8 bits. It stores scales of blocks as positive bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medge.errors import UnsupportedError
from medge.quantize.calibrate import Range
from medge.quantize.scheme import Rule, Scheme
from medge.quantize.weights import Quantized, quantize
from medge.spec import FloatArray, Weight

BLOCK = 32
"""XNNPACK's 4-bit kernels take blocks of a multiple of this."""
_SHRINK = np.linspace(1.0, 0.7, 7, dtype=np.float32)
"""What the mse method tries of a block's scale; 16 levels gain from clipping more than 8 bits do."""


class Graph(Protocol):
    """What a realisation needs of a graph under construction (export/torch_graph.py)."""

    def call(self, operation: str, *arguments: Any) -> Any:
        """Append an operation, return its output."""
        ...

    def weight(self, name: str, value: NDArray[Any]) -> Any:
        """Append a constant of the array's own dtype."""
        ...

    def dtype(self, name: str) -> Any:
        """A dtype as operations take it."""
        ...


Refusal = tuple[str, str]
"""Why XNNPACK has no kernel, and the nearest scheme that it has one for."""


def refusal(scheme: Scheme) -> Refusal | None:
    """Why a scheme cannot be built, by the first rule without a kernel; None if it can."""
    weights = [found for rule in scheme.rules if (found := _no_kernel(rule))]
    activations = [found for rule in scheme.rules if (found := _no_product(rule, scheme))]
    return next(iter(weights + activations), None)


def _no_kernel(rule: Rule) -> Refusal | None:
    integer, block = rule.bits < 16, rule.block or 0
    cases = (
        (rule.method == "kmeans", "XNNPACK has no kernel that looks weights up in a palette", "int8"),
        (rule.method == "superblock", "XNNPACK has no blocks of blocks", "int4"),
        (rule.bfloat, "XNNPACK has no bfloat16 graph", "fp16"),
        (rule.method == "nonlinear", "XNNPACK has no 4-bit type whose levels are uneven", "int4"),
        (rule.bits in (5, 6), f"XNNPACK has no {rule.bits}-bit type", "int8"),
        (integer and not rule.symmetric, "XNNPACK's integer kernels take weights without an offset", "int4"),
        (rule.bits == 8 and block > 0, "XNNPACK's 8-bit kernels take one scale an output channel", "int8"),
        (rule.bits == 4 and block % BLOCK > 0, f"XNNPACK's 4-bit blocks are multiples of {BLOCK}", "int4"),
    )
    return next(((reason, nearest) for holds, reason, nearest in cases if holds), None)


def _no_product(rule: Rule, scheme: Scheme) -> Refusal | None:
    if rule.bits < 16 and scheme.activations == "none":
        return f"XNNPACK multiplies {rule.bits}-bit weights with 8-bit activations only", "int8"
    if rule.bits == 4 and scheme.activations == "static":
        return "XNNPACK's 4-bit kernels scale activations at run time only", "int4"
    return None


@dataclass
class Inputs:
    """The input that the layers of one call share."""

    node: Any
    range: Range | None
    quantized: Any = None
    """The input after it passed through the integers, once the first layer has asked for it."""


@dataclass
class Linears:
    """Emits linear layers as the scheme's rules say. Layers of one call share the quantization of their input."""

    graph: Graph
    scheme: Scheme
    inputs: Mapping[str, Range] = field(default_factory=dict)
    """Calibrated input ranges by layer name; a layer without one gets dynamic activations."""
    outputs: Mapping[str, Range] = field(default_factory=dict)
    """Calibrated output ranges of the same layers: XNNPACK's static kernels write integers."""

    def emit(self, x: Any, layers: Mapping[str, tuple[Weight, Weight | None]]) -> list[tuple[Any, int]]:
        """x (…, in) -> one (…, out) a layer, with its `out`."""
        shared = Inputs(x, self.inputs.get(next(iter(layers))))
        return [self._linear(shared, at, at, weight.read(), bias) for at, (weight, bias) in layers.items()]

    @property
    def splits(self) -> bool:
        """Whether a wide layer may be computed in pieces: each piece of its result then has scales of its own."""
        return self.scheme.activations == "dynamic"

    def piece(self, x: Inputs, at: str, index: int, weight: FloatArray, bias: Weight | None) -> tuple[Any, int]:
        """Some rows or columns of the layer `at`."""
        return self._linear(x, at, f"{at}.{index}", weight, bias)

    def embedding(self, ids: Any, at: str, table: FloatArray) -> Any:
        """Rows of a table: int8 rows and a scale each under a rule of 8 bits or fewer, else floats."""
        if self.scheme.rule(at).bits > 8:
            return self.graph.call("aten.embedding.default", self.graph.weight(f"{at}.weight", table), ids)
        quantized = quantize(table, 8)
        arguments = [
            self.graph.weight(f"{at}.weight", quantized.values),
            self.graph.weight(f"{at}.scale", _positive(quantized.scales)),
            None,
        ]
        return self.graph.call("quantized_decomposed.embedding_byte.default", *arguments, -127, 127, ids)

    def _linear(self, x: Inputs, at: str, name: str, weight: FloatArray, bias: Weight | None) -> tuple[Any, int]:
        """`at` finds the layer's rule and ranges, `name` is its constants'."""
        rule = self.scheme.rule(at)
        offset = None if bias is None else self.graph.weight(f"{name}.bias", bias.read())
        if rule.bits >= 16:
            matrix, y = self.graph.weight(f"{name}.weight", weight), x.node
        else:
            matrix, y = self._matrix(name, weight, rule), self._activations(x, at)
        y = self.graph.call("aten.linear.default", y, matrix, offset)
        if rule.bits < 16 and x.range is not None:
            y = self._through_integers(y, self.outputs[at])
        return y, len(weight)

    def _activations(self, x: Inputs, at: str) -> Any:
        if x.quantized is None:
            x.quantized = self._by_token(x.node) if x.range is None else self._through_integers(x.node, x.range)
        return x.quantized

    def _by_token(self, x: Any) -> Any:
        """Each token with a scale and a zero point of its own, found at run time."""
        int8, float32 = self.graph.dtype("int8"), self.graph.dtype("float32")
        found = self.graph.call("quantized_decomposed.choose_qparams_per_token_asymmetric.default", x, int8)
        affine = [self.graph.call("getitem", found, index) for index in (0, 1)]
        y = self.graph.call("quantized_decomposed.quantize_per_token.default", x, *affine, -128, 127, int8)
        operation = "quantized_decomposed.dequantize_per_token.default"
        return self.graph.call(operation, y, *affine, -128, 127, int8, float32)

    def _through_integers(self, x: Any, found: Range) -> Any:
        """The whole tensor with one calibrated scale and zero point; XNNPACK fuses the pair into its neighbours."""
        scale, zero = found.affine()
        affine = (float(scale), int(zero) - 128, -128, 127, self.graph.dtype("int8"))
        y = self.graph.call("quantized_decomposed.quantize_per_tensor.default", x, *affine)
        return self.graph.call("quantized_decomposed.dequantize_per_tensor.default", y, *affine)

    def _matrix(self, at: str, weight: FloatArray, rule: Rule) -> Any:
        int8 = self.graph.dtype("int8")
        if rule.bits == 8:
            quantized = quantize(weight, 8, None, rule.method)
        else:
            quantized = quantize_blocks(at, weight, rule.block or weight.shape[1], search=rule.method == "mse")
        scales = _positive(quantized.scales)
        values = self.graph.weight(f"{at}.weight", quantized.values)
        if rule.bits == 8:
            affine = [self.graph.weight(f"{at}.scale", scales[:, 0]), self._zeros(at, len(scales))]
            operation = "quantized_decomposed.dequantize_per_channel.default"
            return self.graph.call(operation, values, *affine, 0, -127, 127, int8)
        affine = [self.graph.weight(f"{at}.scale", scales), self._zeros(at, *scales.shape)]
        operation = "quantized_decomposed.dequantize_per_channel_group.default"
        block = weight.shape[1] // scales.shape[1]
        return self.graph.call(operation, values, *affine, -8, 7, int8, block, self.graph.dtype("float32"))

    def _zeros(self, at: str, *shape: int) -> Any:
        return self.graph.weight(f"{at}.zero", np.zeros(shape, np.int64))


def quantize_blocks(at: str, weight: FloatArray, block: int, *, search: bool) -> Quantized:
    """Symmetric rounding to 4 bits, -8..7, whose scales are positive and exact in bfloat16, as XNNPACK stores them.

    `quantize` of weights.py gives the scale the sign that lets the largest weight meet -8; XNNPACK refuses
    negative scales, so here the side that reaches further meets -8 or 7.

    Raises:
        UnsupportedError: the block does not divide the row.
    """
    out, inp = weight.shape
    if inp % block:
        raise UnsupportedError(f"Blocks of {block} do not divide the rows of {inp} of '{at}'", "Zero-pad the layer")
    groups = weight.reshape(out, -1, block)
    full = np.maximum(groups.max(-1) / np.float32(7), groups.min(-1) / np.float32(-8))
    values, scales, best = _round(groups, full)
    for shrink in _SHRINK[1:] if search else ():
        tried, tried_scales, error = _round(groups, full * shrink)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, tried_scales, scales)
        np.copyto(values, tried, where=better[..., None])
    return Quantized(values.reshape(out, inp), scales)


def _round(groups: FloatArray, scales: FloatArray) -> tuple[NDArray[np.int8], FloatArray, FloatArray]:
    """Integers, scales rounded to bfloat16, and the squared error a block."""
    scales = _positive(_to_bfloat16(scales))
    levels = groups / scales[..., None]
    np.clip(np.rint(levels, out=levels), -8, 7, out=levels)
    difference = levels * scales[..., None]
    difference -= groups
    return levels.astype(np.int8), scales, np.asarray(np.einsum("rgi,rgi->rg", difference, difference), np.float32)


def _to_bfloat16(x: FloatArray) -> FloatArray:
    """float32 whose lower 16 bits are zero, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def _positive(scales: FloatArray) -> FloatArray:
    """A block of zeros (padding) may have any scale but 0, and XNNPACK takes no subnormal one."""
    return np.asarray(np.where(scales >= np.finfo(np.float32).tiny, scales, np.float32(1)), np.float32)
