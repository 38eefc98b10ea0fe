"""GGUF files, read strictly: everything that ggml would abort the process over is an error here.

Source: github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian. Every count and offset is
compared with the file's size before anything is allocated, so a damaged file costs one read of its header.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from medge.errors import CorruptError

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
"""Bytes, where a file states none."""
MAX_RANK = 4
_LONGEST_NAME = 63
"""Bytes that ggml keeps of a tensor's name."""
_SMALLEST_ENTRY = 13
"""Bytes of the shortest key (an empty name, a type, one byte), shorter than any tensor's entry."""
_REMEDY = "Export the artifact again"


class BlockType(IntEnum):
    """How a tensor's values are stored; ggml's own numbers (ggml_type)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_1 = 7
    Q8_0 = 8
    IQ4_NL = 20
    BF16 = 30

    @property
    def values(self) -> int:
        """Values of a row that share a block."""
        return 1 if self in _FLOATS else 32

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return _BLOCK_BYTES[self]

    @property
    def bits(self) -> float:
        """Bits a value, scales counted."""
        return 8 * self.bytes / self.values

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor whose rows the block divides."""
        return prod(shape) // self.values * self.bytes


_BLOCK_BYTES = {
    BlockType.F32: 4,
    BlockType.F16: 2,
    BlockType.BF16: 2,
    BlockType.Q4_0: 18,
    BlockType.Q4_1: 20,
    BlockType.Q5_1: 24,
    BlockType.Q8_0: 34,
    BlockType.IQ4_NL: 18,
}
_FLOATS = (BlockType.F32, BlockType.F16, BlockType.BF16)


class ValueType(IntEnum):
    """Types of a key's value."""

    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9


_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Value type -> struct format, for all that GGUF knows; `ValueType` names those that medge writes."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    """numpy's order, rows last; the file has ggml's, which is the reverse."""
    offset: int
    """Bytes from the start of the file."""

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.type.size(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """A file whose header was read and found consistent; tensors are read by who needs them."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, TensorEntry]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read the header.

        Raises:
            CorruptError: no GGUF, another version, or a header that contradicts itself or the file's size.
        """
        size = path.stat().st_size
        with path.open("rb") as stream:
            return _Header(path, stream, size).read()


class _Header:
    """Reads one header, never past the end of the file."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self._path = path
        self._stream = stream
        self._size = size

    def read(self) -> GgufFile:
        if self._take(4) != MAGIC:
            raise self._corrupt("is no GGUF file")
        version = self._number("<I")
        if version != VERSION:
            raise self._corrupt(f"has GGUF version {version}, not {VERSION}")
        tensors, keys = self._count(), self._count()
        found = self._unique("key", keys, lambda: (self._string(), self._value()))
        alignment = self._alignment(found)
        entries = self._unique("tensor", tensors, self._tensor)
        start = -(-self._stream.tell() // alignment) * alignment
        placed = {name: self._placed(name, entry, start, alignment) for name, entry in entries.items()}
        self._check_overlap(placed)
        return GgufFile(self._path, found, placed)

    def _unique(self, kind: str, count: int, read: Callable[[], tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            name, value = read()
            if name in found:
                raise self._corrupt(f"has the {kind} '{name}' twice")
            found[name] = value
        return found

    def _alignment(self, keys: dict[str, Any]) -> int:
        value = keys.get("general.alignment", ALIGNMENT)
        if type(value) is not int or value < 8 or value & (value - 1):
            raise self._corrupt(f"has alignment {value!r}, which is no power of two from 8 on")
        return value

    def _tensor(self) -> tuple[str, tuple[BlockType, tuple[int, ...], int]]:
        name = self._string()
        rank = self._number("<I")
        if not 1 <= rank <= MAX_RANK or len(name.encode()) > _LONGEST_NAME:
            raise self._corrupt(f"has a tensor '{name[:_LONGEST_NAME]}' of rank {rank}: no tensor of ggml's")
        shape = tuple(reversed([self._number("<Q") for _ in range(rank)]))
        number, offset = self._number("<I"), self._number("<Q")
        if number not in BlockType.__members__.values():
            raise self._corrupt(f"stores '{name}' as ggml type {number}, which medge does not run")
        return name, (BlockType(number), shape, offset)

    def _placed(
        self, name: str, entry: tuple[BlockType, tuple[int, ...], int], start: int, alignment: int
    ) -> TensorEntry:
        type, shape, offset = entry
        if min(shape) < 1 or prod(shape) > 8 * self._size or shape[-1] % type.values:
            raise self._corrupt(f"has a tensor '{name}' of shape {shape}, which {type.name} blocks cannot hold")
        if offset % alignment:
            raise self._corrupt(f"has its tensor '{name}' at {offset}, off its alignment of {alignment} bytes")
        placed = TensorEntry(name, type, shape, start + offset)
        if placed.offset + placed.bytes > self._size:
            raise self._corrupt(f"ends before its tensor '{name}' does: it is truncated")
        return placed

    def _check_overlap(self, placed: dict[str, TensorEntry]) -> None:
        end = 0
        for entry in sorted(placed.values(), key=lambda entry: entry.offset):
            if entry.offset < end:
                raise self._corrupt(f"has its tensor '{entry.name}' inside another")
            end = entry.offset + entry.bytes

    def _value(self) -> Any:
        type = self._number("<I")
        if type != ValueType.ARRAY:
            return self._plain(type)
        item, count = self._number("<I"), self._number("<Q")
        if item in _SCALARS:
            return self._numbers(item, count)
        self._check_count(count, 8)
        return [self._plain(item) for _ in range(count)]

    def _plain(self, type: int) -> Any:
        if type == ValueType.STRING:
            return self._string()
        if type not in _SCALARS:
            raise self._corrupt(f"has a value of type {type}, which GGUF has not")
        return self._numbers(type, 1)[0]

    def _numbers(self, type: int, count: int) -> list[Any]:
        format = _SCALARS[type]
        width = struct.calcsize(format)
        self._check_count(count, width)
        return [value for (value,) in struct.iter_unpack(format, self._take(count * width))]

    def _string(self) -> str:
        raw = self._take(self._number("<Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._corrupt("has a name or text that is no UTF-8") from None

    def _count(self) -> int:
        count = self._number("<Q")
        self._check_count(count, _SMALLEST_ENTRY)
        return count

    def _check_count(self, count: int, width: int) -> None:
        if count * width > self._size - self._stream.tell():
            raise self._corrupt(f"counts {count} entries, more than it has bytes for")

    def _number(self, format: str) -> int:
        return int(struct.unpack(format, self._take(struct.calcsize(format)))[0])

    def _take(self, count: int) -> bytes:
        if count > self._size - self._stream.tell():
            raise self._corrupt("ends inside its header: it is truncated")
        return self._stream.read(count)

    def _corrupt(self, what: str) -> CorruptError:
        return CorruptError(f"{self._path} {what}", _REMEDY)
