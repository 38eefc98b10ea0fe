"""The range of each linear layer's output, on real inputs: XNNPACK's static kernels write integers.

Ranges of inputs are measured once for every format (evidence.py); what a layer gives is this format's need alone.
Imports torch: import this module where a part is calibrated, not before.
"""

from __future__ import annotations

from dataclasses import replace

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
    names, module = _observed(job)
    rows: dict[str, list[FloatArray]] = {name: [] for name in names}
    for done, sample in enumerate(job.samples(calibration.samples)):
        job.on_step(f"calibrate {job.part.name}", done, calibration.samples)
        with torch.no_grad():
            found = module(*(torch.from_numpy(sample[spec.name]) for spec in job.part.inputs))
        for name, value in zip(names, found, strict=True):
            rows[name].append(value.reshape(-1, value.shape[-1]).numpy())
    return {name: activation_range(np.concatenate(seen), calibration) for name, seen in rows.items()}


def _observed(job: PartJob) -> tuple[list[str], torch.fx.GraphModule]:
    """The part in floats, giving some rows of what each calibrated layer gives."""
    graph = Graph()
    ops = TorchOps(graph, Linears(graph, load("fp32")))
    inputs = {spec.name: graph.input(spec) for spec in job.part.inputs}
    unseen = replace(job, on_tensor=lambda count: None)  # the weights are read, and counted, once more
    unseen.graph(ops, inputs, BuildOptions())
    names = [name for name in ops.layers if name in job.ranges]
    return names, graph.module([ops.rows(ops.layers[name], ROWS) for name in names])
