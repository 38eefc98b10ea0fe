"""`medge.spec.Ops` over ggml: a part's graph, built once, its weights looked up in a GGUF file by their place.

ggml checks shapes with assertions that end the process. Every operation checks them here first, so that a file
of other shapes is an error of one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import pi, sqrt

from medge.errors import CorruptError
from medge.runtimes.ggml import Ggml
from medge.runtimes.ggml_weights import Matrix, Weights
from medge.runtimes.gguf_file import BlockType
from medge.runtimes.gguf_names import tensor_name
from medge.spec import Weight

_SLOPE, _CUBE = 2 * sqrt(2 / pi), 0.044715
"""The tanh form of GELU is x · sigmoid(_SLOPE · (x + _CUBE · x³))."""


_L1_ROW = 4608
"""Bytes of a weight row up to which ggml's float kernels keep the rows of a tile in a 48 KB L1 cache."""
_LANES = 64
"""Pieces are whole vectors of every instruction set."""


@dataclass(frozen=True)
class Node:
    """A float32 value of the graph."""

    tensor: int
    """ggml's pointer."""
    shape: tuple[int, ...]
    """numpy's order, without the batch: a graph computes one input at a time."""


@dataclass(frozen=True)
class GgmlOps:
    """The operations, as nodes of one context."""

    ggml: Ggml
    context: int
    weights: Weights

    def patches(self, pixels: Node, weight: Weight, bias: Weight, at: str) -> Node:
        """Patches as rows (im2col), then a matrix product."""
        ggml, context = self.ggml, self.context
        name = tensor_name(at, "weight")
        width, channels, height, side = self._shape(name, 4)
        self._require(channels == pixels.shape[0] and height == side <= pixels.shape[1], name)
        kernel = self.weights.kernel(name)
        rows, columns = ((size - side) // side + 1 for size in pixels.shape[1:])
        shape = (side, side, 0, 0, 1, 1, True, BlockType.F32)
        x = ggml.im2col(context, kernel, pixels.tensor, *shape)
        x = ggml.reshape_2d(context, x, channels * side * side, rows * columns)
        x = ggml.mul_mat(context, ggml.reshape_2d(context, kernel, channels * side * side, width), x)
        return self._biased(Node(x, (rows * columns, width)), tensor_name(at, "bias"))

    def embedding(self, ids: Node, table: Weight, at: str) -> Node:
        """Rows of the table; the ids were checked against it."""
        name = tensor_name(at, "weight")
        _, width = self._shape(name, 2)
        x = self.ggml.get_rows(self.context, self.weights.table(name), ids.tensor)
        return Node(x, (*ids.shape, width))

    def add(self, x: Node, y: Node, at: str) -> Node:
        """A residual."""
        self._require(x.shape == y.shape, at)
        return Node(self.ggml.add(self.context, x.tensor, y.tensor), x.shape)

    def add_weight(self, x: Node, y: Weight, at: str) -> Node:
        """A position embedding."""
        name = tensor_name(at, "weight")
        self._require(self._shape(name, 2) == x.shape, name)
        return Node(self.ggml.add(self.context, x.tensor, self.weights.floats(name)), x.shape)

    def layer_norm(self, x: Node, gain: Weight, bias: Weight, eps: float, at: str) -> Node:
        """Normalized rows, scaled and shifted."""
        name = tensor_name(at, "weight")
        self._require(self._shape(name, 1) == x.shape[-1:], name)
        y = self.ggml.norm(self.context, x.tensor, eps)
        y = self.ggml.mul(self.context, y, self.weights.floats(name))
        return self._biased(Node(y, x.shape), tensor_name(at, "bias"))

    def linears(self, x: Node, layers: Mapping[str, tuple[Weight, Weight | None]]) -> list[Node]:
        """One matrix product a layer."""
        return [self._linear(x, at, biased=bias is not None) for at, (_, bias) in layers.items()]

    def gelu_tanh(self, x: Node, at: str) -> Node:
        """Exact to float32, from vectorized operations: ggml's own GELU is a table of float16, and slower."""
        ggml, context = self.ggml, self.context
        slope = ggml.scale_bias(context, ggml.sqr(context, x.tensor), _SLOPE * _CUBE, _SLOPE)
        gated = ggml.silu(context, ggml.mul(context, x.tensor, slope))
        return Node(ggml.div(context, gated, slope), x.shape)

    def attention(self, q: Node, k: Node, v: Node, heads: int, width: int, at: str) -> Node:
        """ggml's fused attention in float32."""
        self._require(q.shape[-1:] == k.shape[-1:] == v.shape[-1:] == (width,) and k.shape == v.shape, at)
        ggml, context = self.ggml, self.context
        split = [ggml.reshape_3d(context, x.tensor, width // heads, heads, x.shape[0]) for x in (q, k, v)]
        split = [ggml.permute(context, x, 0, 2, 1, 3) for x in split]
        y = ggml.flash_attn_ext(context, *split, None, (width // heads) ** -0.5, 0.0, 0.0)
        return Node(ggml.reshape_2d(context, y, width, q.shape[0]), q.shape)

    def attention_pool(self, x: Node, scores: Weight, value: tuple[Weight, Weight], at: str) -> Node:
        """Softmax over the tokens a head, the tokens' mean a head, then the head's own slice of the projection."""
        ggml, context = self.ggml, self.context
        width = x.shape[-1]
        by_head, projection = tensor_name(f"{at}.scores", "weight"), tensor_name(f"{at}.v_proj", "weight")
        heads, inputs = self._shape(by_head, 2)
        self._require(inputs == width and width % heads == 0, by_head)
        self._require(self._shape(projection, 2) == (width, width), projection)
        y = ggml.mul_mat(context, self.weights.floats(by_head), x.tensor)
        y = ggml.soft_max(context, ggml.cont(context, ggml.transpose(context, y)))  # (heads, tokens)
        y = ggml.mul_mat(context, ggml.cont(context, ggml.transpose(context, x.tensor)), y)  # (heads, width)
        y = ggml.reshape_3d(context, y, width, 1, heads)
        slices = ggml.reshape_3d(context, self.weights.matrix(projection).tensor, width, width // heads, heads)
        y = ggml.reshape_2d(context, ggml.mul_mat(context, slices, y), width, 1)
        return self._biased(Node(y, (1, width)), tensor_name(f"{at}.v_proj", "bias"))

    def token(self, x: Node, index: int, at: str) -> Node:
        """One row."""
        tokens, width = x.shape
        row = 4 * width
        return Node(self.ggml.view_2d(self.context, x.tensor, width, 1, row, index % tokens * row), (1, width))

    def _linear(self, x: Node, at: str, *, biased: bool) -> Node:
        name = tensor_name(at, "weight")
        out, inputs = self._shape(name, 2)
        self._require(inputs == x.shape[-1], name)
        y = Node(self._product(self.weights.linear(name), x, (out, inputs)), (*x.shape[:-1], out))
        return self._biased(y, tensor_name(at, "bias")) if biased else y

    def _product(self, matrix: Matrix, x: Node, shape: tuple[int, int]) -> int:
        """x times the matrix; long rows of floats in pieces, whose sum is the same and whose rows fit the L1 cache."""
        ggml, context, (out, inputs) = self.ggml, self.context, shape
        size, rows = matrix.type.bytes, x.shape[0]
        if matrix.type.values > 1 or inputs * size <= _L1_ROW:
            return int(ggml.mul_mat(context, matrix.tensor, x.tensor))
        step = -(-inputs // -(-inputs * size // _L1_ROW) // _LANES) * _LANES
        sums = 0
        for start in range(0, inputs, step):
            width = min(step, inputs - start)
            weights = ggml.view_2d(context, matrix.tensor, width, out, inputs * size, start * size)
            piece = ggml.view_2d(context, x.tensor, width, rows, inputs * 4, start * 4)
            if matrix.type == BlockType.F32:  # which is multiplied as it is: its fast kernel takes no strides
                piece = ggml.cont(context, piece)
            product = ggml.mul_mat(context, weights, piece)
            sums = ggml.add(context, sums, product) if sums else product
        return sums

    def _biased(self, x: Node, name: str) -> Node:
        self._require(self._shape(name, 1) == x.shape[-1:], name)
        return Node(self.ggml.add(self.context, x.tensor, self.weights.floats(name)), x.shape)

    def _shape(self, name: str, rank: int) -> tuple[int, ...]:
        shape = self.weights.entry(name).shape
        self._require(len(shape) == rank, name)
        return shape

    def _require(self, holds: bool, what: str) -> None:
        """Raises CorruptError where the file's shapes do not fit the architecture."""
        if not holds:
            path = self.weights.file.path
            raise CorruptError(
                f"{path}: '{what}' has a shape that config.json contradicts", "Export the artifact again"
            )
