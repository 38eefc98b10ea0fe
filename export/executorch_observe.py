"""The range of each linear layer's output, on real inputs: XNNPACK's static kernels write integers.

Ranges of inputs are measured once for every format (evidence.py); what a layer gives is this format's need alone.
Imports torch: import this module where a part is calibrated, not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from medge.export.base import PartJob
from medge.export.torch_graph import Graph, TorchOps
from medge.quantize.calibrate import Range, activation_range
from medge.quantize.executorch import Linears
from medge.quantize.scheme import Calibration, load
from medge.spec import BuildOptions, FloatArray

ROWS = 16
"""Tokens of a sample that are looked at, evenly spread, as in the observation of inputs."""


def output_ranges(job: PartJob, calibration: Calibration) -> dict[str, Range]:
    """Layer -> range of its output, for the layers whose input has one; runs the part in fp32, its size in memory."""
    graph = Graph()
    ops = TorchOps(graph, Linears(graph, load("fp32")))
    inputs = {spec.name: graph.input(spec) for spec in job.part.inputs}
    unseen = replace(job, on_tensor=lambda count: None, tapped=False)  # the weights are read, and counted, again
    module = graph.module([value for _, value in unseen.graph(ops, inputs, BuildOptions())])
    observer = _Observer(module, {node.name: name for name, node in ops.layers.items() if name in job.ranges})
    with torch.no_grad():
        for done, sample in enumerate(job.samples(calibration.samples)):
            job.on_step(f"calibrate {job.part.name}", done, calibration.samples)
            observer.run(*(torch.from_numpy(sample[spec.name]) for spec in job.part.inputs))
    return {name: activation_range(np.concatenate(rows), calibration) for name, rows in observer.rows.items()}


class _Observer(torch.fx.Interpreter):
    """Runs a module and keeps some rows of what some nodes give."""

    def __init__(self, module: torch.fx.GraphModule, layers: Mapping[str, str]) -> None:
        super().__init__(module)
        self._layers = layers
        self.rows: dict[str, list[FloatArray]] = {}

    def run_node(self, n: Any) -> Any:
        value = super().run_node(n)
        if n.name in self._layers:
            rows = value.reshape(-1, value.shape[-1])
            picked = rows[torch.arange(ROWS) * len(rows) // ROWS]
            self.rows.setdefault(self._layers[n.name], []).append(picked.numpy())
        return value
