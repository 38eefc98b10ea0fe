"""The operations of image and text towers in ONNX: each is the operator that ONNX Runtime has a fast kernel for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medge.export.onnx_graph import CONTRIB, Graph
from medge.quantize.onnx import Linears
from medge.quantize.onnx_attention import IntegerAttention
from medge.spec import Weight


@dataclass
class OnnxOps:
    """`medge.spec.Ops` over ONNX values, which are names."""

    graph: Graph
    linear: Linears
    integer_attention: int | None = None
    """How many tokens attend to each other, where that is to be done in integers."""
    taps: dict[str, tuple[str, Weight]] | None = None
    """When a dict: filled with each linear layer's weight and a graph value that samples its input."""
    tap_rows: int = 16
    """How many rows (tokens) of a layer's input a tap samples, evenly spread."""

    def patches(self, pixels: str, weight: Weight, bias: Weight, at: str) -> str:
        """A strided convolution, then (B, D, H, W) -> (B, N, D)."""
        kernel = weight.read()
        bits = self.linear.scheme.rule(at).bits
        stored = self.linear.stored(f"{at}.weight", kernel, bits)
        strides = list(kernel.shape[2:])
        inputs = [pixels, stored, self.graph.weight(f"{at}.bias", bias.read())]
        y = self.graph.node("Conv", inputs, f"{at}.conv", strides=strides, kernel_shape=strides)
        shape = self.graph.weight(f"{at}.shape", np.array([0, len(kernel), -1], np.int64))
        y = self.graph.node("Reshape", [y, shape], f"{at}.flat")
        return self.graph.node("Transpose", [y], f"{at}.out", perm=[0, 2, 1])

    def embedding(self, ids: str, table: Weight, at: str) -> str:
        """Rows of a table; 8 bits: int8 rows and a scale each, multiplied after the gather."""
        rule = self.linear.scheme.rule(at)
        if rule.bits > 8:
            return self.graph.node(
                "Gather", [self.linear.stored(f"{at}.weight", table.read(), rule.bits), ids], f"{at}.out"
            )
        matrix, scales = self.linear.rows(at, table)
        rows = self.graph.node("Gather", [matrix, ids], f"{at}.rows")
        rows = self.graph.node("Cast", [rows], f"{at}.rows.float", to=1)
        return self.graph.node("Mul", [rows, self.graph.node("Gather", [scales, ids], f"{at}.scales")], f"{at}.out")

    def add(self, x: str, y: str, at: str) -> str:
        """A residual."""
        return self.graph.node("Add", [x, y], f"{at}.out")

    def add_weight(self, x: str, y: Weight, at: str) -> str:
        """A position embedding."""
        bits = self.linear.scheme.rule(at).bits
        return self.graph.node("Add", [x, self.linear.stored(f"{at}.weight", y.read(), max(bits, 16))], f"{at}.out")

    def layer_norm(self, x: str, gain: Weight, bias: Weight, eps: float, at: str) -> str:
        """ONNX's own LayerNormalization."""
        weights = [
            self.graph.weight(f"{at}.weight", gain.read()),
            self.graph.weight(f"{at}.bias", bias.read()),
        ]
        return self.graph.node("LayerNormalization", [x, *weights], f"{at}.out", axis=-1, epsilon=eps)

    def linears(self, x: str, layers: Mapping[str, tuple[Weight, Weight | None]]) -> list[str]:
        """Quantized by the scheme's rules."""
        if self.taps is not None:
            tap = self._tap(x, next(iter(layers)))
            self.taps |= {name: (tap, weight) for name, (weight, _) in layers.items()}
        return self.linear.emit(x, layers)

    def gelu_tanh(self, x: str, at: str) -> str:
        """ONNX's Gelu in its tanh form."""
        return self.graph.node("Gelu", [x], f"{at}.out", approximate="tanh")

    def attention(self, q: str, k: str, v: str, heads: int, width: int, at: str) -> str:
        """Fused in floats, in blocks that fit the cache; or in integers where the scheme says so and it pays."""
        if self.integer_attention:
            return IntegerAttention(self.graph, heads, self.integer_attention, at).emit(q, k, v, width // heads)
        y = self.graph.node("MultiHeadAttention", [q, k, v], f"{at}.attended", domain=CONTRIB, num_heads=heads)
        self.graph.shape(y, ["batch", f"{at}.tokens", f"{at}.width"])
        return y

    def attention_pool(self, x: str, scores: Weight, value: tuple[Weight, Weight], at: str) -> str:
        """Softmax over the tokens a head, the tokens' mean a head, then the head's own slice of the projection."""
        weight, bias = value[0].read(), value[1].read()
        matrix = scores.read()
        heads, (out, inp) = matrix.shape[1], weight.shape
        y = self.graph.node("MatMul", [x, self.graph.weight(f"{at}.scores", matrix)], f"{at}.scores.tokens")
        y = self.graph.node("Transpose", [y], f"{at}.scores.heads", perm=[0, 2, 1])
        y = self.graph.node("Softmax", [y], f"{at}.probabilities", axis=-1)
        y = self.graph.node("MatMul", [y, x], f"{at}.means")  # (B, H, D)
        y = self.graph.node(
            "Unsqueeze", [y, self.graph.weight(f"{at}.axis", np.array([2], np.int64))], f"{at}.means.row"
        )
        by_head = np.ascontiguousarray(weight.reshape(heads, out // heads, inp).transpose(0, 2, 1))
        bits = max(16, self.linear.scheme.rule(f"{at}.v_proj").bits)
        y = self.graph.node("MatMul", [y, self.linear.stored(f"{at}.v_proj.weight", by_head, bits)], f"{at}.values")
        shape = self.graph.weight(f"{at}.shape", np.array([0, 1, -1], np.int64))
        y = self.graph.node("Reshape", [y, shape], f"{at}.joined")
        return self.graph.node("Add", [y, self.graph.weight(f"{at}.v_proj.bias", bias)], f"{at}.out")

    def token(self, x: str, index: int, at: str) -> str:
        """One token of each sequence."""
        return self.graph.node(
            "Gather", [x, self.graph.weight(f"{at}.index", np.array(index, np.int64))], f"{at}.out", axis=1
        )

    def _tap(self, x: str, at: str) -> str:
        """(rows, in): tokens i * n / rows of the flattened input, so that any token count is sampled evenly."""
        width = self.graph.node("Shape", [x], f"{at}.tap.width", start=-1)
        shape = self.graph.node(
            "Concat",
            [self.graph.weight("tap.any", np.array([-1], np.int64)), width],
            f"{at}.tap.shape",
            axis=0,
        )
        flat = self.graph.node("Reshape", [x, shape], f"{at}.tap.rows")
        count = self.graph.node("Shape", [flat], f"{at}.tap.count", start=0, end=1)
        steps = self.graph.weight("tap.steps", np.arange(self.tap_rows, dtype=np.int64))
        scaled = self.graph.node("Mul", [steps, count], f"{at}.tap.scaled")
        rows = self.graph.weight("tap.count", np.array([self.tap_rows], np.int64))
        index = self.graph.node("Div", [scaled, rows], f"{at}.tap.index")
        return self.graph.node("Gather", [flat, index], f"tap:{at}", axis=0)
