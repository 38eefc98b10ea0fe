"""A torch.fx graph written operation by operation: `Ops` for every format that starts from torch.export.

The graph is written directly, not traced from a module: the architecture has one definition (models/), and one
tensor at a time is read. Imports torch: import this module where a graph is built, not before.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medge.errors import UnsupportedError
from medge.quantize.executorch import Inputs, Linears
from medge.spec import FloatArray, TensorSpec, Weight

Shape = tuple[int, ...]


def single(spec: TensorSpec) -> Shape:
    """The shape of a batch of one."""
    return tuple(1 if isinstance(size, str) else size for size in spec.shape)


class Graph:
    """Operations, and a module that holds their constants."""

    def __init__(self, *, half: bool = False) -> None:
        self.half = half
        """Whether floats are stored, and computed, in 16 bits."""
        self._root = torch.nn.Module()
        self._graph = torch.fx.Graph()
        self._reads: dict[str, Any] = {}

    def input(self, spec: TensorSpec) -> Tensor:
        """A placeholder of its own dtype; floats go on in 16 bits in a half-precision graph."""
        node = self._graph.placeholder(spec.name)
        if self.half and spec.dtype == "float32":
            node = self.call("aten.to.dtype", node, torch.float16)
        return Tensor(node, single(spec))

    def call(self, operation: str, *arguments: Any) -> Any:
        """Append an operation by its name in torch.ops, or "getitem"."""
        target = operator.getitem if operation == "getitem" else reduce(getattr, operation.split("."), torch.ops)
        return self._graph.call_function(target, arguments)

    def weight(self, name: str, value: NDArray[Any]) -> Any:
        """A constant; a name already there is not stored again."""
        if name not in self._reads:
            attribute = name.replace(".", "_")
            self._root.register_buffer(attribute, torch.from_numpy(self._stored(name, value)))
            self._reads[name] = self._graph.get_attr(attribute)
        return self._reads[name]

    def dtype(self, name: str) -> Any:
        """torch's dtype of that name."""
        return getattr(torch, name)

    def module(self, outputs: list[Tensor]) -> torch.fx.GraphModule:
        """The finished module, which returns a tuple of float32."""
        nodes = [value.node for value in outputs]
        if self.half:
            nodes = [self.call("aten.to.dtype", node, torch.float32) for node in nodes]
        self._graph.output(tuple(nodes))
        self._graph.lint()
        return torch.fx.GraphModule(self._root, self._graph)

    def _stored(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        if self.half and value.dtype == np.float32:
            if np.abs(value).max(initial=0) > np.finfo(np.float16).max:
                raise UnsupportedError(f"'{name}' holds values beyond float16", "Use scheme int8 or fp32")
            return value.astype(np.float16)
        return np.require(value, requirements=["C", "W"])


@dataclass(frozen=True)
class Tensor:
    """A value of the graph: its node and its shape, batch first."""

    node: Any
    shape: Shape


@dataclass(frozen=True)
class Wide:
    """The result of a layer wider than its input, not computed yet: a function a piece of its columns.

    What follows is applied piece by piece, so that a piece stays in a processor's caches from the first product to
    the last: MedSigLIP's hidden layer is 18 MB at once.
    """

    pieces: tuple[Callable[[], Tensor], ...]
    bounds: tuple[int, ...]
    """Columns where pieces begin, and the end."""


PIECE = 1 << 20
"""About how many values a piece has: 4 MB of floats."""
ALIGN = 32
"""Pieces begin at multiples of this, for blocks of 4 bits."""


def bounds(rows: int, width: int) -> tuple[int, ...]:
    """Where the pieces of (rows, width) begin, and the end."""
    count = max(1, round(rows * width / PIECE))
    step = -(-width // count // ALIGN) * ALIGN
    return (*range(0, width, step), width)


TILE = 1 << 20
"""Attention scores computed at once. 4 MB of floats stay in a processor's caches between the two products and the
softmax; all heads at once would not: MedSigLIP's 64 MB a layer take twice as long."""
ROWS = 256
"""Queries a tile: enough for a matrix kernel to be at its best, and several heads still fit."""


def tiles(heads: int, queries: int, keys: int) -> tuple[int, int]:
    """Heads and queries that one tile of attention takes; the heads divide all heads."""
    rows = min(queries, ROWS)
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and n * rows * keys <= TILE]
    return max(fitting, default=1), rows


class TorchOps:
    """`medge.spec.Ops` over `Tensor`."""

    def __init__(self, graph: Graph, linear: Linears) -> None:
        self.graph = graph
        self.linear = linear
        self.layers: dict[str, Tensor] = {}
        """What each linear layer gave, for who observes it."""

    def patches(self, pixels: Tensor, weight: Weight, bias: Weight, at: str) -> Tensor:
        """Patches as rows, then a linear layer: the same sums as the convolution, and no change of layout."""
        kernel = weight.read()
        out, channels, size, _ = kernel.shape
        grid = pixels.shape[2] // size
        x = self._reshape(pixels, channels, grid, size, grid, size)
        x = self._reshape(self._permute(x, 1, 3, 0, 2, 4), 1, grid * grid, channels * size * size)
        matrix = Weight(weight.name, lambda: kernel.reshape(out, -1))
        found: list[Tensor] = self.linears(x, {at: (matrix, bias)})
        return found[0]

    def embedding(self, ids: Tensor, table: Weight, at: str) -> Tensor:
        """Rows of a table."""
        rows = table.read()
        return Tensor(self.linear.embedding(ids.node, at, rows), (*ids.shape, rows.shape[1]))

    def add(self, x: Tensor, y: Tensor, at: str) -> Tensor:
        """A residual."""
        return self._same(x, "aten.add.Tensor", y.node)

    def add_weight(self, x: Tensor, y: Weight, at: str) -> Tensor:
        """A position embedding."""
        return self._same(x, "aten.add.Tensor", self.graph.weight(f"{at}.weight", y.read()))

    def layer_norm(self, x: Tensor, gain: Weight, bias: Weight, eps: float, at: str) -> Tensor:
        """torch's own; XNNPACK has none, so that it stays on ExecuTorch's optimized kernel."""
        weights = [self.graph.weight(f"{at}.weight", gain.read()), self.graph.weight(f"{at}.bias", bias.read())]
        return self._same(x, "aten.layer_norm.default", [x.shape[-1]], *weights, eps)

    def linears(self, x: Any, layers: Mapping[str, tuple[Weight, Weight | None]]) -> list[Any]:
        """Quantized by the scheme's rules. A lone wide layer gives a `Wide` where pieces pay, and the next takes it."""
        if isinstance(x, Wide):
            return [self._narrow(x, at, *layer) for at, layer in layers.items()]
        if len(layers) == 1 and self.linear.splits:
            ((at, (weight, bias)),) = layers.items()
            matrix = weight.read()
            cuts = bounds(x.shape[1], len(matrix)) if len(x.shape) == 3 else ()
            if len(cuts) > 2 and len(matrix) > 2 * x.shape[-1]:
                return [self._wide(x, at, matrix, bias, cuts)]
            layers = {at: (Weight(weight.name, lambda: matrix), bias)}
        found = [Tensor(y, (*x.shape[:-1], out)) for y, out in self.linear.emit(x.node, layers)]
        self.layers |= zip(layers, found, strict=True)
        return found

    def _wide(self, x: Tensor, at: str, matrix: FloatArray, bias: Weight | None, cuts: tuple[int, ...]) -> Wide:
        shared = Inputs(x.node, None)

        def piece(i: int) -> Tensor:
            rows = slice(cuts[i], cuts[i + 1])
            own = None if bias is None else bias.map(bias.name, lambda b: b[rows])
            node, out = self.linear.piece(shared, at, i, matrix[rows], own)
            return Tensor(node, (*x.shape[:-1], out))

        return Wide(tuple(partial(piece, i) for i in range(len(cuts) - 1)), cuts)

    def _narrow(self, x: Wide, at: str, weight: Weight, bias: Weight | None) -> Tensor:
        """The sum over the pieces of each piece's product with its own columns."""
        matrix, total = weight.read(), None
        for i, piece in enumerate(x.pieces):
            value = piece()
            columns = np.ascontiguousarray(matrix[:, x.bounds[i] : x.bounds[i + 1]])
            node, out = self.linear.piece(Inputs(value.node, None), at, i, columns, bias if i == 0 else None)
            product = Tensor(node, (*value.shape[:-1], out))
            total = product if total is None else self.add(total, product, at)
        assert total is not None  # noqa: S101 - a layer has pieces
        return total

    def rows(self, x: Tensor, count: int) -> Tensor:
        """(1, N, D) -> (1, about `count`, D): evenly spread tokens. (1, D), a token already, stays."""
        if len(x.shape) == 2:
            return x
        step = max(1, x.shape[1] // count)
        shape = (1, -(-x.shape[1] // step), x.shape[2])
        return Tensor(self.graph.call("aten.slice.Tensor", x.node, 1, 0, x.shape[1], step), shape)

    def gelu_tanh(self, x: Any, at: str) -> Any:
        """x · sigmoid(2u), u = √(2/π)(x + 0.044715 x³): the same as x/2 · (1 + tanh u). Of each piece of a `Wide`.

        aten.gelu would become XNNPACK's, which is the erf form whatever `approximate` says.
        """
        if isinstance(x, Wide):
            return Wide(tuple(partial(self._gelu_of, piece) for piece in x.pieces), x.bounds)
        return self._gelu(x)

    def _gelu_of(self, piece: Callable[[], Tensor]) -> Tensor:
        return self._gelu(piece())

    def _gelu(self, x: Tensor) -> Tensor:
        slope = 2 * math.sqrt(2 / math.pi)
        y = self._same(x, "aten.mul.Tensor", x.node)
        y = self._same(y, "aten.mul.Tensor", slope * 0.044715)
        y = self._same(y, "aten.add.Tensor", slope)
        y = self._same(y, "aten.mul.Tensor", x.node)
        return self._same(self._same(y, "aten.sigmoid.default"), "aten.mul.Tensor", x.node)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int, width: int, at: str) -> Tensor:
        """Plain products, which XNNPACK takes (not its SDPA operation), in tiles that stay in cache."""
        size, keys = width // heads, k.shape[1]
        group, rows = tiles(heads, q.shape[1], keys)
        q = self._same(q, "aten.mul.Tensor", size**-0.5)
        found = []
        for start in range(0, width, group * size):
            query, key, value = (self._heads(x, start, group, size) for x in (q, k, v))
            y = self._attend(query, self._permute(key, 0, 2, 1), value, rows)
            found.append(self._reshape(self._permute(y, 1, 0, 2), 1, q.shape[1], group * size))
        return self._join(found, -1)

    def attention_pool(self, x: Tensor, scores: Weight, value: tuple[Weight, Weight], at: str) -> Tensor:
        """Softmax over the tokens a head, the tokens' mean a head, then the head's own slice of the projection."""
        matrix = scores.read().T
        heads, width = matrix.shape
        y = self.graph.call("aten.linear.default", x.node, self.graph.weight(f"{at}.scores", matrix))
        y = self._permute(Tensor(y, (1, x.shape[1], heads)), 0, 2, 1)
        means = self._product(self._same(y, "aten.softmax.int", -1), x)
        # All heads' means through all of the projection, of which each keeps its own columns: 0.002 % of the tower.
        (y,) = self.linears(means, {f"{at}.v_proj": value})
        y = self._reshape(y, 1, heads * heads, width // heads)
        return self._join([self._slice(y, 1, i, i + 1) for i in range(0, heads * heads, heads + 1)], 2)

    def token(self, x: Tensor, index: int, at: str) -> Tensor:
        """One token of each sequence."""
        start = index % x.shape[1]
        return self._reshape(self._slice(x, 1, start, start + 1), 1, x.shape[2])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, rows: int) -> Tensor:
        """(H, M, d), (H, d, N), (H, N, d) -> (H, M, d), `rows` queries at a time."""
        found = []
        for start in range(0, query.shape[1], rows):
            scores = self._product(self._slice(query, 1, start, min(start + rows, query.shape[1])), key)
            found.append(self._product(self._same(scores, "aten.softmax.int", -1), value))
        return self._join(found, 1)

    def _heads(self, x: Tensor, start: int, group: int, size: int) -> Tensor:
        """(1, N, D) -> (group, N, size): some neighbouring heads."""
        x = self._reshape(self._slice(x, 2, start, start + group * size), x.shape[1], group, size)
        return self._permute(x, 1, 0, 2)

    def _same(self, x: Tensor, operation: str, *arguments: Any) -> Tensor:
        return Tensor(self.graph.call(operation, x.node, *arguments), x.shape)

    def _reshape(self, x: Tensor, *shape: int) -> Tensor:
        return Tensor(self.graph.call("aten.reshape.default", x.node, list(shape)), shape)

    def _permute(self, x: Tensor, *order: int) -> Tensor:
        return Tensor(self.graph.call("aten.permute.default", x.node, list(order)), tuple(x.shape[i] for i in order))

    def _slice(self, x: Tensor, axis: int, start: int, end: int) -> Tensor:
        if (start, end) == (0, x.shape[axis]):
            return x
        shape = (*x.shape[:axis], end - start, *x.shape[axis + 1 :])
        return Tensor(self.graph.call("aten.slice.Tensor", x.node, axis, start, end), shape)

    def _product(self, x: Tensor, y: Tensor) -> Tensor:
        return Tensor(self.graph.call("aten.bmm.default", x.node, y.node), (*x.shape[:2], y.shape[2]))

    def _join(self, found: list[Tensor], axis: int) -> Tensor:
        if len(found) == 1:
            return found[0]
        shape = list(found[0].shape)
        shape[axis] = sum(x.shape[axis] for x in found)
        return Tensor(self.graph.call("aten.cat.default", [x.node for x in found], axis), tuple(shape))
