"""An ONNX graph written node by node, its weights appended to external data as they come.

Nothing but the tensor at hand is in memory, so a model of any size exports in the space of its largest
tensor. The model file holds names, shapes and offsets only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from medge import __version__
from medge.spec import TensorSpec

OPSET = 21  # the first with 4-bit integers and blocked DequantizeLinear, which int4 artifacts need
DECODER_OPSET = 23  # the first with RMSNormalization
IR_VERSION = 10
CONTRIB = "com.microsoft"
_ALIGN = 4096  # a page, so that a runtime can map tensors from the file
_INLINE = 128  # bytes; shapes and scalars stay in the model file, where graph optimizers look for them

DType = Literal["float32", "int64", "int32", "bool"]
_TYPES = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}


class Graph:
    """Collects nodes and weights; `save` writes the model. Use as a context manager: it owns the data file."""

    def __init__(self, path: Path, opset: int = OPSET) -> None:
        self.path, self._opset = path, opset
        self.data = path.with_name(path.name + ".data")
        self._stream = self.data.open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}
        self._shapes: list[onnx.ValueInfoProto] = []
        self._inputs: dict[str, onnx.ValueInfoProto] = {}
        self._outputs: list[onnx.ValueInfoProto] = []
        self.facts: dict[str, str] = {}
        """What whoever runs the model must know: its metadata."""
        self.borrowed: set[str] = set()
        """Data files of other models that this one reads too."""

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def node(self, op: str, inputs: Sequence[str], at: str, *, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output, named after its place; returns the output."""
        return self.node_many(op, inputs, [at], domain=domain, **attributes)[0]

    def node_many(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node with named outputs."""
        node = helper.make_node(op, list(inputs), list(outputs), name=outputs[0], domain=domain, **attributes)
        self._nodes.append(node)
        return list(outputs)

    def weight(self, name: str, value: np.ndarray[Any, Any]) -> str:
        """Append an initializer of the array's own dtype; a name already there is not written again."""
        dtype = helper.np_dtype_to_tensor_dtype(value.dtype)
        return self._add(name, dtype, value.shape, np.ascontiguousarray(value).tobytes())

    def weight_int4(self, name: str, value: np.ndarray[Any, Any]) -> str:
        """Append an INT4 initializer from int8 values in -8..7: two a byte, the first in the low half."""
        flat = value.reshape(-1)
        packed = (flat[0::2] & 15) | ((flat[1::2] & 15) << 4)
        return self._add(name, TensorProto.INT4, value.shape, packed.astype(np.uint8).tobytes())

    def stream(self, name: str, dtype: str, pieces: Iterable[np.ndarray[Any, Any]]) -> tuple[int, ...]:
        """Append an initializer whose rows come piece by piece, in order; returns its shape."""
        start, rows, width = self._begin(_ALIGN), 0, tuple[int, ...]()
        for piece in pieces:
            assert piece.dtype == dtype, (name, piece.dtype)  # noqa: S101 - our own quantizers
            self._stream.write(np.ascontiguousarray(piece).data)
            rows, width = rows + len(piece), piece.shape[1:]
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), dims=(rows, *width))
        self._refer(tensor, self.data.name, start, self._stream.tell() - start)
        self._weights[name] = tensor
        return rows, *width

    def borrow(self, name: str, other: onnx.ModelProto, shape: Sequence[int]) -> str:
        """Add an initializer whose bytes another model of the same folder keeps, seen in a shape of our own."""
        found = next(tensor for tensor in other.graph.initializer if tensor.name == name)
        tensor = TensorProto()
        tensor.CopyFrom(found)
        self.borrowed |= {entry.value for entry in found.external_data if entry.key == "location"}
        tensor.dims[:] = shape
        self._weights[name] = tensor
        return name

    def input(self, name: str, dtype: DType, shape: Sequence[int | str], default: Any = None) -> str:
        """Add an input that the part's own signature does not name; with a default, a caller may leave it out."""
        if name not in self._inputs:
            self._inputs[name] = helper.make_tensor_value_info(name, _TYPES[dtype], list(shape))
            if default is not None:
                self.weight(name, np.asarray(default, dtype))
        return name

    def output(self, name: str, dtype: DType, shape: Sequence[int | str]) -> None:
        """Add an output that the part's own signature does not name."""
        self._outputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], list(shape)))

    def branch(self, name: str, build: Callable[[], Sequence[tuple[str, DType]]]) -> onnx.GraphProto:
        """What `build` appends, as the branch of an If; it gives the branch's outputs. Weights stay the graph's own."""
        outer, self._nodes = self._nodes, []
        try:
            outputs = [helper.make_tensor_value_info(value, _TYPES[dtype], None) for value, dtype in build()]
            return helper.make_graph(self._nodes, name, [], outputs)
        finally:
            self._nodes = outer

    def shape(self, name: str, shape: Sequence[int | str]) -> None:
        """State a float value's shape where inference cannot see it: behind a contrib operator."""
        self._shapes.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def save(self, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[str]:
        """Write the model file; returns both file names, the model's first."""
        graph = helper.make_graph(
            self._nodes,
            name,
            [*_infos(inputs), *self._inputs.values()],
            [*_infos(outputs), *self._outputs],
            list(self._weights.values()),
            value_info=self._shapes,
        )
        domains = {node.domain for node in self._nodes} - {""}
        opsets = [
            helper.make_opsetid("", self._opset),
            *(helper.make_opsetid(domain, 1) for domain in sorted(domains)),
        ]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="medge", producer_version=__version__)
        model.ir_version = IR_VERSION
        helper.set_model_props(model, self.facts)
        self._stream.close()
        onnx.save(model, self.path)
        if not self.data.stat().st_size:
            self.data.unlink()
            return [self.path.name]
        return [self.path.name, self.data.name]

    def _add(self, name: str, dtype: int, shape: Sequence[int], raw: bytes) -> str:
        if name not in self._weights:
            tensor = TensorProto(name=name, data_type=dtype, dims=shape)
            if len(raw) <= _INLINE:
                tensor.raw_data = raw
            else:
                self._append(tensor, raw)
            self._weights[name] = tensor
        return name

    def _append(self, tensor: onnx.TensorProto, raw: bytes) -> None:
        start = self._begin(_ALIGN if len(raw) >= _ALIGN else 64)
        self._refer(tensor, self.data.name, start, len(raw))
        self._stream.write(raw)

    def _begin(self, alignment: int) -> int:
        """Pad the data file; returns where it continues."""
        self._stream.write(b"\0" * (-self._stream.tell() % alignment))
        return self._stream.tell()

    def _refer(self, tensor: onnx.TensorProto, location: str, start: int, length: int) -> None:
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": str(start), "length": str(length)}.items():
            tensor.external_data.add(key=key, value=value)


def _infos(specs: Sequence[TensorSpec]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(s.name, _TYPES[s.dtype], list(s.shape)) for s in specs]
