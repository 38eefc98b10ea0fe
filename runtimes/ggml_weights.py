"""A GGUF file's weights in ggml's memory, each in the layout that this CPU multiplies fastest.

Read in the order of the file, one tensor high beside what stays. Where a type has a repacked layout (Q4_0 and
IQ4_NL on x86, more on Arm) it is used. Blocks without one are slow on x86: where the CPU multiplies bfloat16
itself they are unfolded to it, 2.5 to 6 times faster for 2 bytes a weight, and exact to bfloat16's 8 bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medge.errors import CorruptError, UsageError
from medge.runtimes.ggml import Ggml
from medge.runtimes.gguf_file import BlockType, GgufFile, TensorEntry

UNFOLD = "ggml.unfold"
"""The manifest's session setting: "bf16" lets slow blocks be unfolded, anything else keeps them as in the file."""
_VALUES = 1 << 22
"""Converted at once, so that no whole tensor is in memory as float32."""


class Matrix(NamedTuple):
    """A tensor that multiplies."""

    tensor: int
    """ggml's pointer."""
    type: BlockType
    """As it lies in memory."""


class Weights:
    """Tensors by name. Asked for while a graph is built, then filled by `load`."""

    def __init__(self, ggml: Ggml, file: GgufFile, *, unfold: bool) -> None:
        self.file = file
        self.table_rows = 0
        """Rows of the table that ids look up."""
        self._ggml = ggml
        self._unfold = unfold and ggml.features.get("AVX512_BF16") == "1"
        self._contexts: dict[int, int] = {}
        self._tensors: dict[str, Matrix] = {}
        self._repacked: dict[tuple[BlockType, tuple[int, ...]], int | None] = {}

    def entry(self, name: str) -> TensorEntry:
        """What the file says of a tensor.

        Raises:
            CorruptError: it has no such tensor.
        """
        if name not in self.file.tensors:
            raise CorruptError(f"{self.file.path} lacks the tensor '{name}'", "Export the artifact again")
        return self.file.tensors[name]

    def floats(self, name: str) -> int:
        """A tensor that is added or multiplied elementwise, in float32."""
        return self._tensor(name, BlockType.F32).tensor

    def kernel(self, name: str) -> int:
        """A convolution's kernel: float16 stays, blocks cannot be cut into patches."""
        return self._tensor(name, BlockType.F16 if self.entry(name).type == BlockType.F16 else BlockType.F32).tensor

    def table(self, name: str) -> int:
        """A table whose rows are looked up, as in the file."""
        self.table_rows = self.entry(name).shape[0]
        return self._tensor(name, self.entry(name).type).tensor

    def matrix(self, name: str) -> Matrix:
        """A matrix that is cut by rows before it multiplies, which no repacked layout allows."""
        return self._tensor(name, self.entry(name).type)

    def linear(self, name: str) -> Matrix:
        """A linear layer's matrix, where this CPU multiplies it fastest."""
        entry = self.entry(name)
        key = entry.type, entry.shape
        if key not in self._repacked:
            self._repacked[key] = self._repacking(entry)
        place = self._repacked[key]
        slow = place is None and entry.type.values > 1
        return self._tensor(name, BlockType.BF16 if slow and self._unfold else entry.type, place)

    def load(self) -> None:
        """Allocate, and read the file once."""
        for place, context in self._contexts.items():
            buffer = self._ggml.backend_alloc_ctx_tensors_from_buft(context, place)
            if not buffer:
                raise UsageError(f"There is no memory for the weights of {self.file.path}")
            weakref.finalize(self, self._ggml.backend_buffer_free, buffer)
        with self.file.path.open("rb") as stream:
            for name in sorted(self._tensors, key=lambda name: self.file.tensors[name].offset):
                tensor, type = self._tensors[name]
                entry = self.file.tensors[name]
                stream.seek(entry.offset)
                raw = np.empty(entry.bytes, np.uint8)
                if stream.readinto(raw.data) != raw.nbytes:
                    raise CorruptError(f"{self.file.path} was cut while it was read", "Export the artifact again")
                self._ggml.write(tensor, self._converted(raw, entry, type))

    def _tensor(self, name: str, type: BlockType, place: int | None = None) -> Matrix:
        """One tensor a name: a part uses each in one way."""
        if name not in self._tensors:
            place = place or self._ggml.backend_dev_buffer_type(self._ggml.device)
            self._tensors[name] = Matrix(self._new(self._context(place), type, self.entry(name).shape), type)
        return self._tensors[name]

    def _new(self, context: int, type: BlockType, shape: tuple[int, ...]) -> int:
        sizes = [*reversed(shape), 1, 1, 1]
        return int(self._ggml.new_tensor_4d(context, type, *sizes[:4]))

    def _context(self, place: int) -> int:
        if place not in self._contexts:
            self._contexts[place] = self._ggml.context(self, len(self.file.tensors))
        return self._contexts[place]

    def _repacking(self, entry: TensorEntry) -> int | None:
        """The first buffer type whose kernels take such a matrix: asked of ggml with a small one of its kind."""
        if entry.type.values == 1:
            return None
        return next((place for place in self._ggml.extra_buffer_types if self._takes(place, entry)), None)

    def _takes(self, place: int, entry: TensorEntry) -> bool:
        trial = _Trial()
        context = self._ggml.context(trial, 3)
        matrix = self._new(context, entry.type, entry.shape)
        buffer = self._ggml.backend_alloc_ctx_tensors_from_buft(context, place)
        if not buffer:
            return False
        weakref.finalize(trial, self._ggml.backend_buffer_free, buffer)
        x = self._new(context, BlockType.F32, (64, entry.shape[-1]))
        product = self._ggml.mul_mat(context, matrix, x)
        return bool(self._ggml.backend_dev_supports_op(self._ggml.device, product))

    def _converted(self, raw: NDArray[np.uint8], entry: TensorEntry, type: BlockType) -> NDArray[Any]:
        if type == entry.type:
            return raw
        if type == BlockType.F32:
            return np.concatenate(list(self._floats(raw, entry)))
        return np.concatenate([self._bfloats(chunk) for chunk in self._floats(raw, entry)])

    def _floats(self, raw: NDArray[np.uint8], entry: TensorEntry) -> Iterator[NDArray[np.float32]]:
        name = "fp16_to_fp32_row" if entry.type == BlockType.F16 else f"dequantize_row_{entry.type.name.lower()}"
        step = _VALUES // entry.type.values * entry.type.bytes
        for start in range(0, raw.size, step):
            chunk = raw[start : start + step]
            values = np.empty(chunk.size // entry.type.bytes * entry.type.values, np.float32)
            getattr(self._ggml, name)(chunk.ctypes.data, values.ctypes.data, values.size)
            yield values

    def _bfloats(self, values: NDArray[np.float32]) -> NDArray[np.uint16]:
        halves = np.empty(values.size, np.uint16)
        self._ggml.fp32_to_bf16_row(values.ctypes.data, halves.ctypes.data, values.size)
        return halves


class _Trial:
    """Owns what asking ggml a question needs."""
