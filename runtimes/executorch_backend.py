"""ExecuTorch's Python runtime on the CPU: XNNPACK's delegate, and ExecuTorch's kernels for what it leaves.

A file is checked before native code sees it, since that trusts what it maps: a wrong byte ends the process.
ExecuTorch's bindings import torch by themselves; here it only wraps arrays.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from medge.errors import CorruptError, UsageError, require
from medge.manifest import Artifact, File, PartFiles, sha256
from medge.runtimes.base import RunOptions, Session, Tensors, physical_cores
from medge.spec import FloatArray

IDENTIFIER = b"ET12"
"""The file identifier of the program schema that this ExecuTorch reads (schema/program.fbs)."""
_METHOD = "forward"
_SESSIONS: WeakSet[ExecutorchSession] = WeakSet()
"""Programs that are loaded: the thread pool is one a process, and may not change under them."""


class ExecutorchBackend:
    """Opens .pte parts."""

    def __init__(self) -> None:
        self.name = f"executorch {version('executorch')} xnnpack cpu"

    def open(self, artifact: Artifact, part: str, options: RunOptions) -> Session:
        """Load one part.

        Raises:
            CorruptError: the file is altered, truncated, of another ExecuTorch version, or no program.
            MissingExtraError: ExecuTorch's bindings are not installed.
            UsageError: another program of this process is loaded with another number of threads.
        """
        path = artifact.part_path(part)
        files = artifact.manifest.parts[part]
        check(path, files.files[0], artifact.manifest.tools.get("executorch", ""))
        return ExecutorchSession(path, files, options)


class ExecutorchSession:
    """One program, ready to run on one input at a time."""

    def __init__(self, path: Path, files: PartFiles, options: RunOptions) -> None:
        self._torch = require("torch", "executorch")
        with _silent():
            bindings = require("executorch.extension.pybindings.portable_lib", "executorch")
            require("executorch.kernels.quantized", "executorch")  # registers embedding_byte
            _use_threads(bindings, options.threads or physical_cores())
            try:
                self._program = bindings._load_program(
                    str(path), program_verification=bindings.Verification.InternalConsistency
                )
                self._method = self._program.load_method(_METHOD)
            except RuntimeError as error:
                raise _explain(f"ExecuTorch cannot open {path}", error) from error
        meta = self._method.method_meta()
        self._path = path
        self._inputs = [spec.name for spec in files.inputs]
        self._outputs = [spec.name for spec in files.outputs]
        self._shapes = [tuple(meta.input_tensor_meta(i).sizes()) for i in range(meta.num_inputs())]
        if (meta.num_inputs(), meta.num_outputs()) != (len(self._inputs), len(self._outputs)):
            raise CorruptError(f"{path} takes and gives other tensors than its manifest says", "Export it again")
        _SESSIONS.add(self)

    def run(self, inputs: Tensors) -> dict[str, FloatArray]:
        """Run the program once.

        Raises:
            UsageError: an input of another shape than the program's, which has a batch of one.
            CorruptError: ExecuTorch cannot run the program.
        """
        arrays = [np.require(inputs[name], requirements=["C", "W"]) for name in self._inputs]
        for name, array, shape in zip(self._inputs, arrays, self._shapes, strict=True):
            if array.shape != shape:
                raise UsageError(
                    f"{self._path.name} takes {name} of shape {shape}, not {array.shape}",
                    "An ExecuTorch artifact runs one input at a time",
                )
        try:
            values = self._method([self._torch.from_numpy(array) for array in arrays])
        except RuntimeError as error:
            raise _explain(f"ExecuTorch cannot run {self._path}", error) from error
        return {name: value.numpy() for name, value in zip(self._outputs, values, strict=True)}


def check(path: Path, file: File, exporter: str) -> None:
    """The file is a whole program of this ExecuTorch's schema, byte by byte the one that was exported.

    `exporter` is the ExecuTorch version that the manifest states.

    Raises:
        CorruptError: it is not.
    """
    with path.open("rb") as stream:
        head = stream.read(40)
    if len(head) < 40 or not head[4:6] == b"ET" or head[8:12] != b"eh00":
        raise CorruptError(f"{path} is no ExecuTorch program", "Export the artifact again")
    if head[4:8] != IDENTIFIER:
        found = head[4:8].decode("ascii", "replace")
        raise CorruptError(
            f"{path} is a program of another ExecuTorch version (schema {found}, this one reads {IDENTIFIER.decode()})",
            f"Install executorch=={exporter}, or export the artifact again" if exporter else "Export it again",
        )
    program, base, data = (int.from_bytes(head[start : start + 8], "little") for start in (16, 24, 32))
    size = base + data if base else program
    if path.stat().st_size < size:
        raise CorruptError(f"{path} is truncated: {path.stat().st_size} of {size} bytes", "Export the artifact again")
    if sha256(path) != file.sha256:
        raise CorruptError(f"{path} was altered: its sha256 differs", "Export the artifact again")


def _use_threads(bindings: Any, threads: int) -> None:
    """Size ExecuTorch's thread pool. XNNPACK keeps a pointer to it for each loaded program."""
    now = bindings._threadpool_get_thread_count()
    if now == threads:
        return
    if len(_SESSIONS):
        raise UsageError(
            f"ExecuTorch has one thread pool a process, which a loaded model uses with {now} threads",
            f"Ask for {now} threads, or drop the other model first",
        )
    bindings._unsafe_reset_threadpool(threads)


def _explain(what: str, error: Exception) -> CorruptError:
    first = (str(error) or type(error).__name__).splitlines()[0]
    return CorruptError(f"{what}: {first}", "Export the artifact again")


@contextmanager
def _silent() -> Iterator[None]:
    """ExecuTorch's native code logs what it reads of the processor to file descriptor 2, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
