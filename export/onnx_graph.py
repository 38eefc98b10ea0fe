"""An ONNX graph written node by node, its weights appended to external data as they come.

Nothing but the tensor at hand is in memory, so a model of any size exports in the space of its largest
tensor. The model file holds names, shapes and offsets only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from medge import __version__
from medge.spec import TensorSpec

OPSET = 21  # the first with 4-bit integers and blocked DequantizeLinear, which int4 artifacts need
IR_VERSION = 10
CONTRIB = "com.microsoft"
_ALIGN = 4096  # a page, so that a runtime can map tensors from the file
_INLINE = 128  # bytes; shapes and scalars stay in the model file, where graph optimizers look for them

_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


class Graph:
    """Collects nodes and weights; `save` writes the model. Use as a context manager: it owns the data file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.with_name(path.name + ".data")
        self._stream = self.data.open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}
        self._shapes: list[onnx.ValueInfoProto] = []

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

    def shape(self, name: str, shape: Sequence[int | str]) -> None:
        """State a float value's shape where inference cannot see it: behind a contrib operator."""
        self._shapes.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def save(self, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> list[str]:
        """Write the model file; returns both file names, the model's first."""
        graph = helper.make_graph(
            self._nodes,
            name,
            _infos(inputs),
            _infos(outputs),
            list(self._weights.values()),
            value_info=self._shapes,
        )
        domains = {node.domain for node in self._nodes} - {""}
        opsets = [
            helper.make_opsetid("", OPSET),
            *(helper.make_opsetid(domain, 1) for domain in sorted(domains)),
        ]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="medge", producer_version=__version__)
        model.ir_version = IR_VERSION
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
        self._stream.write(b"\0" * (-self._stream.tell() % (_ALIGN if len(raw) >= _ALIGN else 64)))
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": self.data.name, "offset": str(self._stream.tell()), "length": str(len(raw))}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        self._stream.write(raw)


def _infos(specs: Sequence[TensorSpec]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(s.name, _TYPES[s.dtype], list(s.shape)) for s in specs]
