"""How each scheme's rule becomes ONNX nodes: the one place that knows what ONNX Runtime runs fast.

x86 and Arm have fast kernels for uint8 activations times int8 weights; int8 times int8 has none on x86.
Every form below is plain ONNX, which ONNX Runtime fuses into its integer kernels when it loads the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from medge.errors import UnsupportedError
from medge.quantize.calibrate import Range
from medge.quantize.scheme import Rule, Scheme
from medge.quantize.weights import Quantized, quantize
from medge.spec import FloatArray, Weight

_FLOAT = 1  # onnx.TensorProto.FLOAT; this module needs no onnx

UNFOLD = {"session.disable_quant_qdq": "1"}
"""Lets ONNX Runtime compute DequantizeLinear(int4) -> QuantizeLinear(int8) once, at load. Without it the pair
is taken for a quantization of activations and moved about: 5 times slower."""


class Graph(Protocol):
    """What a realisation needs of a graph under construction (export/onnx_graph.py)."""

    def node(self, op: str, inputs: Sequence[str], at: str, *, domain: str = "", **attributes: Any) -> str:
        """Append a node, return its output."""
        ...

    def node_many(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node with several outputs."""
        ...

    def weight(self, name: str, value: np.ndarray[Any, Any]) -> str:
        """Append an initializer."""
        ...

    def stream(self, name: str, dtype: str, pieces: Iterable[np.ndarray[Any, Any]]) -> tuple[int, ...]:
        """Append an initializer piece by piece; returns its shape."""
        ...

    def shape(self, name: str, shape: Sequence[int | str]) -> None:
        """State a value's shape behind a contrib operator."""
        ...

    def weight_int4(self, name: str, value: np.ndarray[Any, Any]) -> str:
        """Append a 4-bit initializer."""
        ...


@dataclass
class Inputs:
    """The input that the layers of one call share."""

    range: Range | None
    quantized: list[str] = field(default_factory=list)
    """Its quantization in the graph, once the first layer has asked for it."""


@dataclass
class Linears:
    """Emits linear layers as the scheme's rules say. Layers of one call share the quantization of their input."""

    graph: Graph
    scheme: Scheme
    ranges: Mapping[str, Range] = field(default_factory=dict)
    """Calibrated input ranges by layer name; a layer without one gets dynamic activations."""

    def emit(self, x: str, layers: Mapping[str, tuple[Weight, Weight | None]]) -> list[str]:
        """x (…, in) -> one (…, out) a layer."""
        inputs = Inputs(self.ranges.get(next(iter(layers))))
        return [self._linear(x, at, weight, bias, inputs) for at, (weight, bias) in layers.items()]

    def stored(self, at: str, value: FloatArray, bits: int) -> str:
        """A float weight that no integer kernel takes (embeddings, patches), stored in 32 or 16 bits."""
        if bits == 32:
            return self.graph.weight(at, value)
        half = self.graph.weight(f"{at}.fp16", to_fp16(at, value))
        return self.graph.node("Cast", [half], at, to=_FLOAT)

    def rows(self, at: str, table: Weight) -> tuple[str, str]:
        """An embedding table (V, D) as int8 rows with a scale each (V, 1)."""
        quantized = quantize(table.read(), 8)
        matrix = self.graph.weight(f"{at}.weight", quantized.values)
        return matrix, self.graph.weight(f"{at}.weight.scale", quantized.scales)

    def _linear(self, x: str, at: str, weight: Weight, bias: Weight | None, inputs: Inputs) -> str:
        rule = self.scheme.rule(at)
        if rule.bits >= 16 or self.scheme.activations == "none":
            y = self._float(x, at, weight, rule)
        elif inputs.range is not None:
            y = self._static(x, at, weight, rule, inputs)
        else:
            y = self._dynamic(x, at, weight, rule, inputs)
        if bias is None:
            return y
        return self.graph.node("Add", [y, self.graph.weight(f"{at}.bias", bias.read())], f"{at}.out")

    def _float(self, x: str, at: str, weight: Weight, rule: Rule) -> str:
        matrix = self.stored(f"{at}.weight", weight.read().T, rule.bits)
        return self.graph.node("MatMul", [x, matrix], f"{at}.matmul")

    def _dynamic(self, x: str, at: str, weight: Weight, rule: Rule, inputs: Inputs) -> str:
        if not inputs.quantized:
            outputs = [f"{at}.input.{name}" for name in ("quantized", "scale", "zero")]
            inputs.quantized = self.graph.node_many("DynamicQuantizeLinear", [x], outputs)
        quantized, scale, zero = inputs.quantized
        matrix, scales = self._integer(at, weight, rule)
        product = self.graph.node("MatMulInteger", [quantized, matrix, zero], f"{at}.matmul")
        product = self.graph.node("Cast", [product], f"{at}.matmul.float", to=_FLOAT)
        scales = self.graph.node("Mul", [scale, scales], f"{at}.scales")
        return self.graph.node("Mul", [product, scales], f"{at}.scaled")

    def _static(self, x: str, at: str, weight: Weight, rule: Rule, inputs: Inputs) -> str:
        assert inputs.range is not None  # noqa: S101 - the caller asked
        if not inputs.quantized:
            scale, zero = inputs.range.affine()
            affine = [
                self.graph.weight(f"{at}.input.scale", np.array(scale)),
                self.graph.weight(f"{at}.input.zero", np.array(zero)),
            ]
            quantized = self.graph.node("QuantizeLinear", [x, *affine], f"{at}.input.quantized")
            inputs.quantized = [self.graph.node("DequantizeLinear", [quantized, *affine], f"{at}.input")]
        matrix, scales = self._integer(at, weight, rule)
        matrix = self.graph.node("DequantizeLinear", [matrix, scales], f"{at}.weight.float", axis=1)
        return self.graph.node("MatMul", [*inputs.quantized, matrix], f"{at}.matmul")

    def _integer(self, at: str, weight: Weight, rule: Rule) -> tuple[str, str]:
        """An int8 matrix (in, out) with one scale an output channel, however the file stores it."""
        quantized = quantize(weight.read(), rule.bits, rule.block, rule.method)
        if rule.bits == 4:
            return self._unfolded(at, quantized)
        matrix = self.graph.weight(f"{at}.weight", quantized.values.T)
        return matrix, self.graph.weight(f"{at}.weight.scale", quantized.scales[:, 0])

    def _unfolded(self, at: str, quantized: Quantized) -> tuple[str, str]:
        """4-bit blocks in the file; ONNX Runtime folds the two nodes to an int8 matrix when it loads.

        Between the two the weights are float16: ONNX Runtime holds all layers' at once, and half of 1.7 GB is
        already too much for a phone.
        """
        block = quantized.values.shape[1] // quantized.scales.shape[1]
        channel = to_fp16(at, np.abs(quantized.dequantize()).max(1, keepdims=True) / np.float32(127))[:, 0]
        channel = np.where(channel == 0, np.float16(1), channel)  # a padded channel: any scale but 0
        zeros = self.graph.weight(f"{at}.weight.zero", np.zeros(len(channel), np.int8))
        packed = self.graph.weight_int4(f"{at}.weight.int4", np.ascontiguousarray(quantized.values.T))
        blocks = self.graph.weight(f"{at}.weight.blocks", quantized.scales.T.astype(np.float16))
        name = f"{at}.weight"
        matrix = self.graph.node("DequantizeLinear", [packed, blocks], f"{name}.fp16", axis=0, block_size=block)
        half = self.graph.weight(f"{name}.scale.fp16", channel)
        matrix = self.graph.node("QuantizeLinear", [matrix, half, zeros], name, axis=1)
        return matrix, self.graph.weight(f"{name}.scale", channel.astype(np.float32))


def to_fp16(at: str, value: FloatArray) -> np.ndarray[Any, Any]:
    """float16, refusing what it cannot hold."""
    if np.abs(value).max(initial=0) > 65504:
        raise UnsupportedError(f"'{at}' holds values beyond 65504, which float16 cannot", "Use scheme int8 or fp32")
    return value.astype(np.float16)
