"""safetensors, streamed: one tensor in memory at a time, plain reads instead of a mapping.

The safetensors package maps a file, and every touched page then counts as resident memory: 3.5 GB for
MedSigLIP. Exports promise less, so this module reads and writes the same format tensor by tensor.
Format: 8 bytes little-endian header length, a JSON header, then raw little-endian tensors
(github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medge.errors import CorruptError
from medge.spec import FloatArray

_MAX_HEADER = 100_000_000  # the reference implementation's own limit
DType = Literal["F32", "BF16"]
"""What medge writes."""
ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes of one value."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self) -> FloatArray:
        """The tensor as float32.

        Raises:
            CorruptError: the file ends early or is gone (it changed after its header was read).
        """
        return self.rows(0, self.shape[0]) if self.shape else self._read(0, 1).reshape(())

    def rows(self, start: int, stop: int) -> FloatArray:
        """Rows `start` to `stop` of the first axis as float32: a part of a tensor too large to hold.

        Raises:
            CorruptError: the file ends early.
        """
        width = math.prod(self.shape[1:])
        return self._read(start * width, (stop - start) * width).reshape(stop - start, *self.shape[1:])

    def raw_rows(self, start: int, stop: int) -> NDArray[Any]:
        """As `rows`, but bfloat16 stays as its bits, uint16: half the memory for who can use them."""
        if self.dtype != "BF16":
            return self.rows(start, stop)
        width = math.prod(self.shape[1:])
        return self._raw(start * width, (stop - start) * width).reshape(stop - start, *self.shape[1:])

    def _read(self, first: int, count: int) -> FloatArray:
        return _to_float32(self._raw(first, count), self.dtype)

    def _raw(self, first: int, count: int) -> NDArray[Any]:
        offset = self.start + first * ITEMSIZE[self.dtype]
        try:
            raw = np.fromfile(self.path, _numpy_dtype(self.dtype), count, offset=offset)
        except FileNotFoundError:
            raise CorruptError(f"{self.path} went away while it was read", "Does another export use it?") from None
        if raw.size != count:
            raise CorruptError(f"{self.path} ends inside '{self.name}'", "Download or copy it again")
        return raw


def _numpy_dtype(dtype: str) -> str:
    return {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype]


def _to_float32(raw: np.ndarray[Any, Any], dtype: str) -> FloatArray:
    if dtype == "BF16":  # bfloat16 is the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32, copy=False)


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file, with offsets proven to lie inside it.

    Raises:
        CorruptError: truncated, no safetensors, or of a dtype that is no float.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, _MAX_HEADER):
            raise CorruptError(f"{path} is no safetensors file, or truncated", "Download or copy it again")
        header = _parse(path, stream.read(length))
    header.pop("__metadata__", None)
    return {name: _entry(path, name, value, 8 + length, size) for name, value in header.items()}


def entries(path: Path, header: Mapping[str, Any], size: int) -> dict[str, Entry]:
    """As `read_header`, of a file that is not there yet: its header's tensors and its size are known.

    Raises:
        CorruptError: the header contradicts itself or the size.
    """
    try:
        base = size - max((int(value["data_offsets"][1]) for value in header.values()), default=0)
    except (KeyError, IndexError, TypeError, ValueError):
        raise CorruptError(f"The recorded header of {path} is malformed", "Write the folder again") from None
    return {name: _entry(path, name, value, base, size) for name, value in header.items()}


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CorruptError(f"{path} is no safetensors file: its header is no JSON", "Download or copy it again")
    return header


def _entry(path: Path, name: str, value: Any, base: int, size: int) -> Entry:
    try:
        dtype, shape = str(value["dtype"]), tuple(int(n) for n in value["shape"])
        start, end = (base + int(offset) for offset in value["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CorruptError(f"{path}: the header entry of '{name}' is malformed", "Download it again") from None
    if dtype not in ITEMSIZE:
        raise CorruptError(
            f"{path}: '{name}' has dtype {dtype}, weights are F32, F16 or BF16", "Use the original checkpoint"
        )
    if min(shape, default=0) < 0 or end - start != ITEMSIZE[dtype] * math.prod(shape) or start < base:
        raise CorruptError(f"{path}: offsets of '{name}' contradict its shape {shape}", "Download it again")
    if end > size:
        raise CorruptError(f"{path} is truncated: '{name}' ends at byte {end} of {size}", "Download or copy it again")
    return Entry(path, name, dtype, shape, start)


def write(path: Path, tensors: Mapping[str, tuple[int, ...]], produce: Callable[[str], FloatArray]) -> int:
    """Write float32 tensors one by one, asking `produce(name)` for each when its turn comes. Returns bytes."""

    def whole(name: str) -> Iterator[FloatArray]:
        value = np.asarray(produce(name), "<f4", order="C")
        assert value.shape == tensors[name], (name, value.shape)  # noqa: S101 - our own producer
        yield value

    return write_chunks(path, tensors, "F32", whole)


Produce = Callable[[str], Iterable[np.ndarray[Any, Any]]]
"""A tensor's name -> its raw little-endian values, piece by piece."""


def write_chunks(path: Path, tensors: Mapping[str, tuple[int, ...]], dtype: DType, produce: Produce) -> int:
    """Write tensors of any size. Returns the bytes of their values."""
    with path.open("wb") as stream:
        for chunk in chunks(tensors, dtype, produce):
            stream.write(chunk)
    return sum(ITEMSIZE[dtype] * math.prod(shape) for shape in tensors.values())


def chunks(tensors: Mapping[str, tuple[int, ...]], dtype: DType, produce: Produce) -> Iterator[bytes | memoryview]:
    """The file's bytes, for who writes or hashes them."""
    raw = json.dumps({"__metadata__": {"format": "pt"}, **layout(tensors, dtype)}).encode()
    raw += b" " * (-len(raw) % 8)
    yield struct.pack("<Q", len(raw)) + raw
    for name, shape in tensors.items():
        written = 0
        for piece in produce(name):
            yield piece.data
            written += piece.nbytes
        assert written == ITEMSIZE[dtype] * math.prod(shape), (name, written, shape)  # noqa: S101 - our own producer


def layout(tensors: Mapping[str, tuple[int, ...]], dtype: DType) -> dict[str, dict[str, Any]]:
    """The header's entry of each tensor, one after the other."""
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + ITEMSIZE[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return header


def shard(
    tensors: Mapping[str, tuple[int, ...]], limit: int, itemsize: int = 4
) -> Iterable[dict[str, tuple[int, ...]]]:
    """Split an ordered set of tensors into files of at most `limit` bytes (one tensor at least)."""
    part: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in tensors.items():
        count = itemsize * math.prod(shape)
        if part and size + count > limit:
            yield part
            part, size = {}, 0
        part[name] = shape
        size += count
    yield part
