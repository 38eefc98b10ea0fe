"""The operations of a language model's smaller parts in ONNX: what projects an image's states, and the embedding table.

The table is also the output matrix, and the largest tensor of the model. The decoder's file holds it; the embedding
part's refers to its bytes there, and reads the rows that it is asked for without the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from medge.export.onnx_graph import CONTRIB
from medge.export.onnx_ops import OnnxOps
from medge.spec import Weight


@dataclass
class OnnxProjectorOps(OnnxOps):
    """`medge.spec.ProjectorOps` over ONNX values."""

    decoder: Path | None = None
    """The decoder's file, which holds the embedding table."""

    def embedding(self, ids: str, table: Weight, at: str) -> str:
        """Rows of the decoder's table, made float32 after they are gathered."""
        assert self.decoder is not None  # noqa: S101 - a projector has no table
        model = onnx.load(self.decoder, load_external_data=False)
        rule = self.linear.scheme.rule(at)
        rows, *blocks = next(tensor.dims for tensor in model.graph.initializer if tensor.name == f"{at}.weight")
        if rule.bits >= 16:
            matrix = self.graph.borrow(f"{at}.weight", model, (rows, *blocks))
            found = self.graph.node("Gather", [matrix, ids], f"{at}.rows")
            return found if rule.bits == 32 else self.graph.node("Cast", [found], f"{at}.out", to=1)
        matrix = self.graph.borrow(f"{at}.weight", model, (rows, int(np.prod(blocks))))
        scales = self.graph.borrow(f"{at}.scales", model, (rows, blocks[0]))
        block = blocks[1] * 8 // rule.bits
        settings = {"bits": rule.bits, "block_size": block, "quantize_axis": 1, "gather_axis": 0}
        y = self.graph.node("GatherBlockQuantized", [matrix, ids, scales], f"{at}.out", domain=CONTRIB, **settings)
        self.graph.shape(y, ["batch", "tokens", blocks[0] * block])
        return y

    def scale(self, x: str, factor: float, at: str) -> str:
        """A product with a constant."""
        return self.graph.node("Mul", [x, self.graph.weight(f"{at}.factor", np.array(factor, np.float32))], f"{at}.out")

    def rms_norm(self, x: str, gain: Weight, eps: float, heads: int, at: str) -> str:
        """ONNX's own RMSNormalization; of heads, between two reshapes that move no data."""
        weight = gain.read()
        if heads > 1:
            x = self._reshape(x, (0, 0, heads, len(weight)), f"{at}.heads")
        y = self.graph.node(
            "RMSNormalization", [x, self.graph.weight(f"{at}.weight", weight)], f"{at}.normed", axis=-1, epsilon=eps
        )
        return self._reshape(y, (0, 0, heads * len(weight)), f"{at}.out") if heads > 1 else y

    def pool(self, x: str, side: int, square: int, at: str) -> str:
        """Means over the rows and the columns of each square."""
        y = self._reshape(x, (0, side, square, side, square, -1), f"{at}.squares")
        axes = self.graph.weight(f"{at}.axes", np.array([2, 4], np.int64))
        y = self.graph.node("ReduceMean", [y, axes], f"{at}.means", keepdims=0)
        return self._reshape(y, (0, side * side, -1), f"{at}.out")

    def _reshape(self, x: str, shape: tuple[int, ...], at: str) -> str:
        stated = self.graph.weight(f"shape.{shape}", np.array(shape, np.int64))
        return self.graph.node("Reshape", [x, stated], at)
