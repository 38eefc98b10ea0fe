"""GGUF parts on ggml's CPU kernels: the architecture of medge.models, built as a ggml graph."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge.errors import CorruptError, UsageError
from medge.manifest import Artifact
from medge.registry import spec_of
from medge.runtimes.base import RunOptions, Session, Tensors, physical_cores
from medge.runtimes.ggml import Ggml, load
from medge.runtimes.ggml_graph import GgmlOps, Node
from medge.runtimes.ggml_weights import UNFOLD, Weights
from medge.runtimes.gguf_file import BlockType, GgufFile
from medge.runtimes.gguf_names import ARCHITECTURE
from medge.spec import BuildOptions, FloatArray, Part, TensorSpec, Weight

_NODES = 64
"""Nodes of the graph for each of the file's tensors: several times what any operation needs."""
_INT32 = 26
"""ggml's number for int32, which ids are looked up by."""
_REMEDY = "Export the artifact again"


class GgufBackend:
    """Opens .gguf parts."""

    def __init__(self) -> None:
        """Load ggml.

        Raises:
            MissingExtraError: it is missing, or none that medge can drive.
        """
        self._ggml = load()
        self.name = f"ggml {self._ggml.release} cpu"

    def open(self, artifact: Artifact, part: str, options: RunOptions) -> Session:
        """Load one part.

        Raises:
            CorruptError: the file is damaged, or its tensors are not those of config.json's architecture.
        """
        file = GgufFile.open(artifact.part_path(part))
        if file.keys.get("general.architecture") != ARCHITECTURE:
            raise CorruptError(f"{file.path} holds another architecture than '{ARCHITECTURE}'", _REMEDY)
        weights = Weights(self._ggml, file, unfold=artifact.manifest.session.get(UNFOLD) == "bf16")
        outputs = artifact.manifest.parts[part].outputs
        return GgufSession(_part(artifact, part), outputs, weights, self._ggml, options.threads or physical_cores())


class GgufSession:
    """One graph, ready to run."""

    def __init__(self, part: Part, outputs: tuple[TensorSpec, ...], weights: Weights, ggml: Ggml, threads: int) -> None:
        self._ggml = ggml
        self._weights = weights
        self._spec = part.inputs[0]
        nodes = _NODES * (len(weights.file.tensors) + 1)
        context = ggml.context(self, nodes, nodes)
        self._input = _new_input(ggml, context, self._spec)
        ops = GgmlOps(ggml, context, weights)
        tapped = len(outputs) > len(part.outputs)
        built = part.graph(ops, {self._spec.name: self._input}, _unread, BuildOptions(), tapped=tapped)
        self._outputs = list(_matched(weights.file.path, built, outputs))
        weights.load()
        self._graph = self._planned(context, nodes)
        self._backend = ggml.backend_dev_init(ggml.device, None)
        weakref.finalize(self, ggml.backend_free, self._backend)
        ggml.set_threads(self._backend, threads)

    def run(self, inputs: Tensors) -> dict[str, FloatArray]:
        """Run the graph once for each input of the batch.

        Raises:
            CorruptError: the graph does not take the inputs that its manifest states.
            UsageError: an id beyond the model's vocabulary, or no memory to compute in.
        """
        rows = [self._run_one(one) for one in self._checked(inputs)]
        return {spec.name: np.concatenate([row[i] for row in rows]) for i, (spec, _) in enumerate(self._outputs)}

    def _run_one(self, one: NDArray[Any]) -> list[FloatArray]:
        self._ggml.write(self._input.tensor, one)
        status = self._ggml.backend_graph_compute(self._backend, self._graph)
        if status != 0:
            raise UsageError(f"ggml cannot compute {self._weights.file.path}: status {status}")
        return [self._ggml.read(node.tensor, _batched(node, spec)) for spec, node in self._outputs]

    def _checked(self, inputs: Tensors) -> NDArray[Any]:
        """The batch, in the type that ggml takes; it would abort over an id without a row."""
        spec, value = self._spec, inputs.get(self._spec.name)
        if value is None or value.dtype != spec.dtype or not value.size or value.shape[1:] != spec.shape[1:]:
            found = "absent" if value is None else f"{value.dtype} {value.shape}"
            raise CorruptError(f"{self._weights.file.path} takes '{spec.name}' as {spec.shape}: it is {found}", _REMEDY)
        if spec.dtype == "float32":
            return np.ascontiguousarray(value)
        if not 0 <= value.min() <= value.max() < self._weights.table_rows:
            raise UsageError(f"An id is none of the {self._weights.table_rows} of {self._weights.file.path}")
        return np.ascontiguousarray(value, np.int32)

    def _planned(self, context: int, nodes: int) -> int:
        """The graph, with memory for every value; values that are not needed at once share it."""
        ggml = self._ggml
        graph: int = ggml.new_graph_custom(context, nodes, False)
        for _, node in self._outputs:
            ggml.set_output(node.tensor)
            ggml.build_forward_expand(graph, node.tensor)
        allocator = ggml.gallocr_new(ggml.backend_dev_buffer_type(ggml.device))
        weakref.finalize(self, ggml.gallocr_free, allocator)
        if not ggml.gallocr_alloc_graph(allocator, graph):
            raise UsageError(f"There is no memory to compute {self._weights.file.path} in")
        return graph


def _part(artifact: Artifact, name: str) -> Part:
    """The architecture, from config.json beside the weights."""
    path = artifact.file("config.json")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is no JSON: {error}", _REMEDY) from None
    if not isinstance(config, dict):
        raise CorruptError(f"{path} holds no JSON object", _REMEDY)
    return spec_of(config, artifact.manifest.source.model).part(name)


def _unread(name: str) -> Weight:
    """A weight by name alone: ggml's operations find theirs in the file, by their place."""

    def read() -> FloatArray:
        raise NotImplementedError(name)

    return Weight(name, read)


def _new_input(ggml: Ggml, context: int, spec: TensorSpec) -> Node:
    shape = tuple(int(size) for size in spec.shape[1:])
    sizes = [*reversed(shape), 1, 1, 1][:4]
    tensor: int = ggml.new_tensor_4d(context, BlockType.F32 if spec.dtype == "float32" else _INT32, *sizes)
    ggml.set_input(tensor)
    return Node(tensor, shape)


def _matched(
    path: Path, built: list[tuple[str, Node]], outputs: tuple[TensorSpec, ...]
) -> Iterator[tuple[TensorSpec, Node]]:
    """The manifest's outputs with the graph's nodes for them."""
    nodes = dict(built)
    for spec in outputs:
        width = spec.shape[-1]
        if spec.name not in nodes or (isinstance(width, int) and nodes[spec.name].shape[-1] != width):
            raise CorruptError(f"{path} gives no '{spec.name}' of {spec.shape}, as manifest.json states", _REMEDY)
        yield spec, nodes[spec.name]


def _batched(node: Node, spec: TensorSpec) -> tuple[int, ...]:
    """The shape of a batch of one: (1, width) or (1, tokens, width)."""
    return (1, *node.shape[1 - len(spec.shape) :])
