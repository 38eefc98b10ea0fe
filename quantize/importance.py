"""An importance matrix: how large the activations are that each column of a weight meets, on calibration inputs.

An error e of a weight in column j moves the layer's output by e times its input j; over many tokens that costs e²
times the mean of the squared input. That mean is the importance that quantize_rows takes. Files are llama.cpp's
(tools/imatrix/imatrix.cpp: GGUF, `NAME.in_sum2` and `NAME.counts`), so llama-quantize takes ours and we take its.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge.errors import CorruptError, UnsupportedError, UsageError, require
from medge.runtimes.gguf_file import BlockType, GgufFile, TensorEntry
from medge.spec import FloatArray

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_FLOOR = np.float32(1e-6)
"""Of the mean importance, for columns that no calibration input lit: with 0 a block of them would decode to zeros."""


@dataclass
class ImportanceMatrix:
    """Sums of squared inputs by tensor name, gathered one batch of activations after another."""

    dataset: str
    """What it was collected on: a description, never a path."""
    chunk_size: int
    """Tokens of a chunk: llama.cpp counts inputs in chunks."""
    sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """(in,) of each tensor."""
    counts: dict[str, int] = field(default_factory=dict)
    """Tokens behind each sum."""

    def add(self, tensor: str, inputs: FloatArray) -> None:
        """Count a batch of a tensor's inputs, (..., in): one row a token.

        Raises:
            UsageError: rows of another width than before.
            CorruptError: an activation is not finite, as fp16's overflow in Gemma 3 makes them.
        """
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.add_squares(tensor, np.einsum("ni,ni->i", rows, rows, dtype=np.float64), len(rows))

    def add_squares(self, tensor: str, squares: NDArray[np.float64], count: int) -> None:
        """Count a batch whose sum of squares, (in,) over `count` tokens, is known.

        Raises:
            UsageError, CorruptError: as `add`.
        """
        if not np.isfinite(squares).all():
            raise CorruptError(f"Inputs of '{tensor}' are not finite", "Collect activations in bf16 or fp32")
        if tensor in self.sums and self.sums[tensor].shape != squares.shape:
            raise UsageError(f"Inputs of '{tensor}' have {len(squares)} columns, and had {len(self.sums[tensor])}")
        self.sums[tensor] = self.sums.get(tensor, 0) + squares
        self.counts[tensor] = self.counts.get(tensor, 0) + count

    @property
    def chunks(self) -> int:
        """Whole chunks that were read."""
        return max(self.counts.values(), default=0) // self.chunk_size

    def of(self, tensor: str) -> FloatArray | None:
        """(in,) the mean squared input, above zero everywhere; None: the tensor met no input, or only zeros."""
        if not self.counts.get(tensor) or not self.sums[tensor].any():
            return None
        means = (self.sums[tensor] / self.counts[tensor]).astype(np.float32)
        return np.asarray(np.maximum(means, means.mean() * _FLOOR), np.float32)

    def save(self, path: Path) -> None:
        """Write llama.cpp's GGUF form; the same matrix gives the same bytes.

        Raises:
            MissingExtraError: gguf is not installed.
        """
        writer = require("gguf", "gguf").GGUFWriter(path, arch="")
        writer.kv_data[0].clear()  # an architecture, which this file has not
        writer.add_type("imatrix")
        writer.add_array(_DATASETS, [self.dataset])
        writer.add_uint32(_CHUNKS, self.chunks)
        writer.add_uint32(_CHUNK_SIZE, self.chunk_size)
        for tensor, sums in sorted(self.sums.items()):
            writer.add_tensor(tensor + _SUMS, sums.astype(np.float32)[None])
            writer.add_tensor(tensor + _COUNTS, np.array([[self.counts[tensor]]], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    @classmethod
    def load(cls, path: Path) -> ImportanceMatrix:
        """Read llama.cpp's GGUF form.

        Raises:
            UsageError: the file cannot be read.
            CorruptError: no importance matrix, or one that contradicts itself.
            UnsupportedError: a matrix of a mixture of experts.
        """
        try:
            file = GgufFile.open(path)
            values = {name: _values(path, entry) for name, entry in file.tensors.items()}
        except OSError as error:
            raise UsageError(f"Importance matrix {path} cannot be read: {error.strerror}") from None
        chunk_size = file.keys.get(_CHUNK_SIZE)
        if file.keys.get("general.type") != "imatrix" or type(chunk_size) is not int or chunk_size < 1:
            raise _corrupt(path, "is no importance matrix")
        matrix = cls(", ".join(map(str, file.keys.get(_DATASETS, []))), chunk_size)
        for name, sums in values.items():
            if name.endswith(_SUMS):
                tensor = name.removesuffix(_SUMS)
                matrix.sums[tensor] = sums
                matrix.counts[tensor] = _count(path, tensor, values)
        return matrix


def _values(path: Path, entry: TensorEntry) -> NDArray[np.float64]:
    if entry.type != BlockType.F32:
        raise _corrupt(path, f"stores '{entry.name}' as {entry.type.name}, not F32")
    if entry.name.endswith(_COUNTS) and entry.shape not in ((1, 1), (1,)):
        raise UnsupportedError(f"{path} counts experts for '{entry.name}'", "Collect it on a model without experts")
    values = np.fromfile(path, "<f4", entry.bytes // 4, offset=entry.offset).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0:
        raise _corrupt(path, f"has negative or non-finite values in '{entry.name}'")
    return values


def _count(path: Path, tensor: str, values: dict[str, Any]) -> int:
    if tensor + _COUNTS not in values:
        raise _corrupt(path, f"has sums of '{tensor}' without their count")
    return int(values[tensor + _COUNTS][0])


def _corrupt(path: Path, what: str) -> CorruptError:
    return CorruptError(f"{path} {what}", "Collect it again")
