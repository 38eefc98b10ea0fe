"""Attention among an image's tokens in a decoder, as the branch of an If: each sees all of them, and what came before.

It must read the cache before GroupQueryAttention writes to the same memory. So the If also hands on the length that
that operator needs: whoever orders the nodes has to run this first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medge.export.onnx_graph import CONTRIB, Graph
from medge.spec import CausalAttention

_FLOAT, _INT64 = 1, 7  # onnx.TensorProto
_FORBIDDEN = np.float32(-1e30)


@dataclass(frozen=True)
class ImageAttention:
    """One layer's."""

    graph: Graph
    layer: CausalAttention
    at: str

    def emit(
        self, qkv: Sequence[str], past: Sequence[str], lengths: Sequence[str], rotations: Sequence[str]
    ) -> list[str]:
        """(1, N, heads · W) where the tokens are an image's, else (1, 0, heads · W); and the first of `lengths`."""

        def branch(name: str, build: Callable[[], str]) -> Any:
            return self.graph.branch(
                f"{self.at}.{name}",
                lambda: [(build(), "float32"), (self._node("Identity", [lengths[0]], f"{name}.length"), "int32")],
            )

        is_image = self.graph.input("is_image", "bool", [1], default=[False])
        branches = {
            "then_branch": branch("image", lambda: self._attended(qkv, past, lengths[1], rotations)),
            "else_branch": branch("text", self._nothing),
        }
        outputs = [f"{self.at}.attended", f"{self.at}.length"]
        return self.graph.node_many("If", [is_image], outputs, **branches)

    def _nothing(self) -> str:
        width = self.layer.heads * self.layer.head_width
        empty = self.graph.weight(f"empty.{width}", np.zeros((1, 0, width), np.float32))
        return self._node("Identity", [empty], "text.rows")

    def _attended(self, qkv: Sequence[str], past: Sequence[str], total: str, rotations: Sequence[str]) -> str:
        layer, (q, k, v) = self.layer, qkv
        count = self._node("Shape", [q], "count", start=1, end=2)
        before = self._node("Sub", [self._node("Cast", [total], "total", to=_INT64), count], "before")
        rows = self._resident(before, past[0])
        positions = self._node("Add", [self._range(count, "steps"), before], "positions")
        position_ids = self._node("Unsqueeze", [positions, self._ints(0)], "position_ids")
        q, k = (
            self._node("RotaryEmbedding", [x, position_ids, *rotations], f"{n}.rotated", domain=CONTRIB)
            for n, x in (("q", q), ("k", k))
        )
        keys, values = (
            self._joined(name, cache, rows, new) for name, cache, new in zip("kv", past, (k, v), strict=True)
        )
        scores = self._node(
            "MatMul", [self._queries(q), self._node("Transpose", [keys], "kT", perm=[0, 1, 3, 2])], "scores"
        )
        if layer.window:
            scores = self._windowed(scores, before, rows, positions, count)
        y = self._node("MatMul", [self._node("Softmax", [scores], "p", axis=-1), values], "weighted")
        groups = layer.heads // layer.key_heads
        y = self._reshape(y, (0, layer.key_heads, groups, -1, layer.head_width), "groups")
        y = self._node("Transpose", [y], "tokens", perm=[0, 3, 1, 2, 4])
        return self._reshape(y, (0, 0, layer.heads * layer.head_width), "image.rows")

    def _resident(self, before: str, cache: str) -> str:
        """Rows that the cache holds: all before, or by GroupQueryAttention's rule what it has not evicted yet."""
        if not self.layer.window:
            return before
        capacity = self._node("Shape", [cache], "capacity", start=2, end=3)
        gap = self._node("Sub", [capacity, self._ints(self.layer.window - 1)], "gap")
        over = self._node("Sub", [self._node("Add", [before, gap], "past.gap"), capacity], "past.over")
        over = self._node("Max", [self._node("Sub", [over, self._ints(1)], "past.above"), self._ints(0)], "past.excess")
        evictions = self._node("Div", [over, gap], "evictions")
        return self._node("Sub", [before, self._node("Mul", [evictions, gap], "evicted")], "resident")

    def _joined(self, name: str, cache: str, rows: str, new: str) -> str:
        """(1, key heads, rows + N, W): the cache's rows and the new ones."""
        old = self._node("Slice", [cache, self._ints(0), rows, self._ints(2)], f"{name}.past")
        new = self._reshape(new, (0, 0, self.layer.key_heads, self.layer.head_width), f"{name}.heads")
        new = self._node("Transpose", [new], f"{name}.new", perm=[0, 2, 1, 3])
        return self._node("Concat", [old, new], f"{name}.all", axis=2)

    def _queries(self, q: str) -> str:
        """(1, key heads, group · N, W), scaled."""
        layer = self.layer
        q = self._reshape(q, (0, 0, layer.key_heads, layer.heads // layer.key_heads, layer.head_width), "q.groups")
        q = self._node("Transpose", [q], "q.heads", perm=[0, 2, 3, 1, 4])
        q = self._reshape(q, (0, layer.key_heads, -1, layer.head_width), "q.rows")
        scale = self.graph.weight(f"scale.{layer.scale:.9g}", np.array(layer.scale, np.float32))
        return self._node("Mul", [q, scale], "q.scaled")

    def _windowed(self, scores: str, before: str, rows: str, positions: str, count: str) -> str:
        """Scores with those of keys that lie before a token's window taken out."""
        first = self._node("Sub", [before, rows], "first")
        keys = self._node("Add", [self._range(rows, "rows.steps"), first], "past.positions")
        edge = self._node("Sub", [positions, self._ints(self.layer.window or 0)], "edge")
        edge = self._node("Unsqueeze", [edge, self._ints(1)], "edge.column")
        outside = self._node("LessOrEqual", [keys, edge], "outside")
        bias = self._node(
            "Mul", [self._node("Cast", [outside], "outside.float", to=_FLOAT), self._forbidden()], "bias.past"
        )
        shape = self._node("Concat", [count, count], "bias.shape", axis=0)
        bias = self._node("Concat", [bias, self._node("ConstantOfShape", [shape], "bias.image")], "bias", axis=1)
        grouped = self._node("Shape", [scores], "scores.shape")
        wide = self._node("Concat", [self._ints(-1), self._node("Shape", [bias], "bias.all")], "scores.rows", axis=0)
        scores = self._node("Add", [self._node("Reshape", [scores, wide], "scores.wide"), bias], "scores.biased")
        return self._node("Reshape", [scores, grouped], "scores.masked")

    def _range(self, count: str, at: str) -> str:
        limit = self._node("Squeeze", [count], f"{at}.limit")
        zero, one = (self.graph.weight(f"int.{i}", np.array(i, np.int64)) for i in (0, 1))
        return self._node("Range", [zero, limit, one], at)

    def _forbidden(self) -> str:
        return self.graph.weight("forbidden", np.array(_FORBIDDEN))

    def _ints(self, *values: int) -> str:
        return self.graph.weight(f"ints.{values}", np.array(values, np.int64))

    def _reshape(self, x: str, shape: tuple[int, ...], at: str) -> str:
        stated = self.graph.weight(f"shape.{shape}", np.array(shape, np.int64))
        return self._node("Reshape", [x, stated], at)

    def _node(self, op: str, inputs: Sequence[str], at: str, **attributes: Any) -> str:
        return self.graph.node(op, list(inputs), f"{self.at}.image.{at}", **attributes)
