"""The operations of a decoder computed at once, in numpy, a weight at a time: what a graph would give, and how large.

No runtime holds a 4B model in float32 in the memory that an export may take. Built with these operations, the
architecture runs on real inputs while its weights stream by, and each operation's largest value is noted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge.quantize.ggml_blocks import widened
from medge.spec import CausalAttention, FloatArray, Weight

ROWS = 8192
"""Rows of the embedding table read at once."""


@dataclass
class EagerOps:
    """`medge.spec.DecoderOps` over arrays: (1, N, D), the whole of a short text at once."""

    peaks: dict[str, float] = field(default_factory=dict)
    """The largest absolute value that each operation gave, by its place."""
    dtype: type[np.floating[Any]] = np.float32
    """What each operation's result is rounded to."""

    def embedding(self, ids: NDArray[np.int64], table: Weight, at: str) -> FloatArray:
        """The rows asked for, picked while the table streams by."""
        found, start = dict[int, FloatArray](), 0
        for piece in table.pieces(ROWS):
            for i in {int(i) for i in ids.ravel()} & set(range(start, start + len(piece))):
                found[i] = widened(piece[i - start : i - start + 1])[0]
            start += len(piece)
        return self._noted(np.stack([[found[int(i)] for i in row] for row in ids]), at)

    def scale(self, x: FloatArray, factor: float, at: str) -> FloatArray:
        """A product."""
        return self._noted(x * np.float32(factor), at)

    def add(self, x: FloatArray, y: FloatArray, at: str) -> FloatArray:
        """A residual."""
        return self._noted(x + y, at)

    def multiply(self, x: FloatArray, y: FloatArray, at: str) -> FloatArray:
        """A gate."""
        return self._noted(x * y, at)

    def rms_norm(self, x: FloatArray, gain: Weight, eps: float, heads: int, at: str) -> FloatArray:
        """By heads of the last axis."""
        parts = x.reshape(*x.shape[:-1], heads, -1)
        mean = np.square(parts, dtype=np.float64).mean(-1, keepdims=True)
        normed = (parts / np.sqrt(mean + eps)).astype(np.float32) * gain.read()
        return self._noted(normed.reshape(x.shape), at)

    def linears(self, x: FloatArray, layers: Mapping[str, tuple[Weight, Weight | None]]) -> list[FloatArray]:
        """Products with one matrix after another."""
        return [self._noted(x @ weight.read().T, at) for at, (weight, _) in layers.items()]

    def gelu_tanh(self, x: FloatArray, at: str) -> FloatArray:
        """The tanh form."""
        inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)
        return self._noted(np.float32(0.5) * x * (1 + np.tanh(inner)), at)

    def causal_attention(
        self, q: FloatArray, k: FloatArray, v: FloatArray, layer: CausalAttention, at: str
    ) -> FloatArray:
        """Over this text alone."""
        queries, keys, values = (_heads(x, layer.head_width) for x in (q, k, v))
        queries, keys = (_rotated(x, layer) for x in (queries, keys))
        keys, values = (x.repeat(layer.heads // layer.key_heads, axis=0) for x in (keys, values))
        scores = self._noted(queries @ keys.transpose(0, 2, 1) * np.float32(layer.scale), f"{at}.scores")
        place = np.arange(q.shape[1])
        behind = place[:, None] - place
        seen = (behind >= 0) & (behind < (layer.window or len(place)))
        weights = np.exp(np.where(seen, scores, -np.inf) - np.where(seen, scores, -np.inf).max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True)) @ values
        return self._noted(y.transpose(1, 0, 2).reshape(1, q.shape[1], -1), at)

    def kept(self, x: FloatArray, at: str) -> FloatArray:
        """All."""
        return x

    def logits(self, x: FloatArray, table: Weight, at: str) -> FloatArray:
        """Rows of the table as they stream by."""
        pieces: Iterable[Any] = table.pieces(ROWS)
        return self._noted(np.concatenate([x @ widened(piece).T for piece in pieces], axis=-1), f"{at}.logits")

    def _noted(self, x: Any, at: str) -> FloatArray:
        self.peaks[at] = max(self.peaks.get(at, 0.0), float(np.abs(x).max(initial=0)))
        return np.asarray(np.asarray(x, self.dtype), np.float32)


def _heads(x: FloatArray, width: int) -> FloatArray:
    """(1, N, heads · W) -> (heads, N, W)."""
    rows: FloatArray = x[0].reshape(x.shape[1], -1, width)
    return rows.transpose(1, 0, 2)


def _rotated(x: FloatArray, layer: CausalAttention) -> FloatArray:
    half = layer.head_width // 2
    frequencies = layer.rope.base ** -(np.arange(half) / half) / layer.rope.factor
    angles = np.arange(x.shape[1])[:, None] * frequencies
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
