"""Run a part on real inputs with its linear layers' inputs tapped: what calibration and sensitivity read.

The tapped graph is the dynamic int8 one: its activations differ from fp32's by 1e-4 in cosine, at a third of
the time and a quarter of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from medge.checkpoint import Checkpoint
from medge.export.onnx_graph import Graph
from medge.export.onnx_ops import OnnxOps
from medge.quantize.calibrate import Layer
from medge.quantize.onnx import Linears
from medge.quantize.scheme import load
from medge.runtimes.base import RunOptions, Tensors
from medge.runtimes.onnx_backend import OnnxSession
from medge.spec import BuildOptions, FloatArray, Part, TensorSpec, Weight

ROWS = 512
"""Rows (tokens) kept of each layer's input, over all samples: 430 MB for MedSigLIP's image tower."""


def observe(
    checkpoint: Checkpoint,
    part: Part,
    samples: Sequence[Tensors],
    folder: Path,
    on_sample: Callable[[], None],
) -> list[Layer]:
    """Every linear layer of the part with rows of its input, over all samples (each a batch of one)."""
    folder.mkdir(parents=True, exist_ok=True)
    taps = _write(checkpoint, part, folder / "observe.onnx", rows=max(1, ROWS // len(samples)))
    session = OnnxSession(str(folder / "observe.onnx"), {}, RunOptions())
    seen: dict[str, list[FloatArray]] = {}
    for sample in samples:
        for name, value in session.run(sample).items():
            if name.startswith("tap:"):
                seen.setdefault(name, []).append(value.reshape(-1, value.shape[-1]))
        on_sample()
    rows = {name: np.concatenate(values) for name, values in seen.items()}
    return [Layer(name, weight, rows[tap], group=tap) for name, (tap, weight) in taps.items()]


def _write(checkpoint: Checkpoint, part: Part, path: Path, rows: int) -> Mapping[str, tuple[str, Weight]]:
    with Graph(path) as graph:
        ops = OnnxOps(graph, Linears(graph, load("int8")), taps={}, tap_rows=rows)
        inputs = {spec.name: spec.name for spec in part.inputs}
        part.graph(ops, inputs, checkpoint.weight, BuildOptions())
        assert ops.taps is not None  # noqa: S101 - given above
        names = dict.fromkeys(tap for tap, _ in ops.taps.values())
        graph.save(part.name, part.inputs, list(_outputs(names)))
    return ops.taps


def _outputs(taps: Mapping[str, None]) -> Iterator[TensorSpec]:
    for tap in taps:
        yield TensorSpec(name=tap, dtype="float32", shape=(f"{tap}.rows", f"{tap}.width"))
