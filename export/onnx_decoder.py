"""The operations of a decoder in ONNX, with its cache of keys and values as inputs and outputs.

Attention is com.microsoft's GroupQueryAttention. A caller binds each `past_key_values.N` and its `present.N` to the
same memory, of a capacity that it chooses: the operator writes new keys and values where they belong and copies
nothing. Layers with a window take a cache of little more than that window (`sliding_window_cache`), so that a context
of 8,192 tokens costs MedGemma 4B 0.7 GB and not 2.3.

An image's tokens, computed at once, see each other in both directions, which that operator can do only without a
window. So where `is_image` is true, plain operators attend over what was in the cache before and the image's own keys;
GroupQueryAttention then stores those keys, and what it attended to is dropped.

Inputs beside `inputs_embeds` are named as in ONNX Runtime GenAI: `attention_mask` (1, past + tokens) int64, all ones,
tells the place in the sequence by its length. `logits_to_keep` and `is_image` have defaults: all, and no.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medge.export.onnx_graph import CONTRIB
from medge.export.onnx_image_attention import ImageAttention
from medge.export.onnx_projector import OnnxProjectorOps
from medge.quantize.onnx_blocks import TABLE_BLOCK, BlockLinears
from medge.spec import CausalAttention, Rope, Weight

_INT32 = 6  # onnx.TensorProto.INT32
_ALL = 2**31


@dataclass
class OnnxDecoderOps(OnnxProjectorOps):
    """`medge.spec.DecoderOps` over ONNX values."""

    context: int = 0
    """Positions that rotations are stored for."""
    lengths: list[str] = field(default_factory=list)
    """Once they are in the graph: see `_lengths`."""

    def multiply(self, x: str, y: str, at: str) -> str:
        """A gate."""
        return self.graph.node("Mul", [x, y], f"{at}.out")

    def causal_attention(self, q: str, k: str, v: str, layer: CausalAttention, at: str) -> str:
        """Fused, over a cache that is updated in place; an image's tokens by plain operators."""
        graph, window = self.graph, layer.window
        past = [self._cache("past_key_values", layer, name) for name in ("key", "value")]
        present = [self._cache("present", layer, name) for name in ("key", "value")]
        lengths, rotations = self._lengths(), self._rotations(layer.rope, layer.head_width)
        image = ""
        if layer.images:
            image, lengths[0] = ImageAttention(graph, layer, at).emit([q, k, v], past, lengths, rotations)
        settings: dict[str, Any] = {"num_heads": layer.heads, "kv_num_heads": layer.key_heads, "do_rotary": 1}
        if window:
            settings |= {"local_window_size": window, "sliding_window_cache": 1}
            graph.facts["window"] = str(window)
        inputs, outputs = [q, k, v, *past, *lengths, *rotations], [f"{at}.causal", *present]
        y, *_ = graph.node_many("GroupQueryAttention", inputs, outputs, domain=CONTRIB, scale=layer.scale, **settings)
        graph.shape(y, ["batch", "tokens", layer.heads * layer.head_width])
        return self._first_rows([image, y], f"{at}.out") if image else y

    def kept(self, x: str, at: str) -> str:
        """The last `logits_to_keep` rows."""
        keep = self.graph.input("logits_to_keep", "int64", [1], default=[_ALL])
        first = self.graph.node("Sub", [self._count(x, at), keep], f"{at}.first")
        first = self.graph.node("Max", [first, self._ints(0)], f"{at}.start")
        return self.graph.node("Slice", [x, first, self._ints(_ALL), self._ints(1)], f"{at}.out")

    def logits(self, x: str, table: Weight, at: str) -> str:
        """The table is stored in the order of its rows, which the embedding part reads too."""
        assert isinstance(self.linear, BlockLinears)  # noqa: S101 - what a decoder is built with
        rule = self.linear.scheme.rule(at)
        if rule.bits < 16:
            return self.linear.product(x, self.linear.matrix(at, table, rule, TABLE_BLOCK), f"{at}.logits")
        matrix = self.linear.floats(at, table, rule.bits)
        rows = self.graph.node("Squeeze", [x, self._ints(0)], f"{at}.rows")
        y = self.graph.node("Gemm", [rows, matrix], f"{at}.products", transB=1)
        return self.graph.node("Unsqueeze", [y, self._ints(0)], f"{at}.logits")

    def _cache(self, when: str, layer: CausalAttention, name: str) -> str:
        full = f"{when}.{layer.layer}.{name}"
        shape = [1, layer.key_heads, "window" if layer.window else "context", layer.head_width]
        if when == "present":
            self.graph.output(full, "float32", shape)
            return full
        return self.graph.input(full, "float32", shape)

    def _lengths(self) -> list[str]:
        """Tokens so far less one (1,), and tokens so far (1,), both int32."""
        mask = self.graph.input("attention_mask", "int64", [1, "total"])
        if not self.lengths:
            total = self.graph.node("Shape", [mask], "length.total.int64", start=1)
            last = self.graph.node("Sub", [total, self._ints(1)], "length.last.int64")
            casts = {"length.last": last, "length.total": total}
            self.lengths = [self.graph.node("Cast", [x], name, to=_INT32) for name, x in casts.items()]
        return list(self.lengths)

    def _rotations(self, rope: Rope, width: int) -> list[str]:
        """Cosine and sine (context, width / 2), rounded as transformers rounds them."""
        name = f"rope.{rope.base:g}.{rope.factor:g}"
        pairs = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        frequencies = (np.float32(1) / np.float32(rope.base) ** pairs) / np.float32(rope.factor)
        angles = np.arange(self.context, dtype=np.float32)[:, None] * frequencies
        return [self.graph.weight(f"{name}.{f.__name__}", f(angles)) for f in (np.cos, np.sin)]

    def _first_rows(self, choices: Sequence[str], at: str) -> str:
        """Of one list of rows after another, as many as the second has: it alone where the first is empty."""
        rows = self.graph.node("Concat", list(choices), f"{at}.both", axis=1)
        count = self._count(choices[1], at)
        return self.graph.node("Slice", [rows, self._ints(0), count, self._ints(1)], at)

    def _count(self, x: str, at: str) -> str:
        return self.graph.node("Shape", [x], f"{at}.count", start=1, end=2)

    def _ints(self, *values: int) -> str:
        return self.graph.weight(f"ints.{values}", np.array(values, np.int64))
