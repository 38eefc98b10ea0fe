"""The two levels of the runtime: a Session runs one graph; an Embedder or Generator is what users hold.

A backend that runs graphs implements Session and shares the one Embedder (embed.py). A backend that owns its
loop (llama.cpp) implements the upper level itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medge.manifest import Artifact
from medge.spec import FloatArray

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class RunOptions:
    """How to run, the same for every backend."""

    threads: int | None = None
    """Compute threads; None is one a physical core that this process may use."""


def physical_cores() -> int:
    """Threads that help: one a physical core, and no more than this process may use."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or 1, allowed))


class Session(Protocol):
    """Tensors in, tensors out: one part of a model on one backend."""

    def run(self, inputs: Tensors) -> dict[str, FloatArray]:
        """Run the graph once. Keys are the manifest's input and output names."""
        ...


class Backend(Protocol):
    """Opens the parts of artifacts of one format."""

    name: str
    """For reports: engine, version and device, for example "onnxruntime 1.32.0 cpu"."""

    def open(self, artifact: Artifact, part: str, options: RunOptions) -> Session:
        """Load one part; parts are opened when first used."""
        ...


def normalize(x: FloatArray) -> FloatArray:
    """Rows at length one; a zero row stays zero."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.asarray(x / np.maximum(length, 1e-12), np.float32)
