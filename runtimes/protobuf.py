"""Protocol Buffers' wire format, read without a schema: fields by number, strictly bounded.

Source: protobuf.dev/programming-guides/encoding. Only what Core ML's files use; it takes 0.1 s and no dependency.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class MessageError(ValueError):
    """Bytes that are no message, or not the message that was expected."""


class Message:
    """One message. A field that is absent has protobuf's default: 0, "", or an empty message."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._fields: dict[int, list[int | memoryview]] = {}
        for number, value in _fields(memoryview(data)):
            self._fields.setdefault(number, []).append(value)

    def has(self, number: int) -> bool:
        """Whether the field is there."""
        return number in self._fields

    def integer(self, number: int) -> int:
        """A varint, as unsigned 64 bits."""
        value = self._fields.get(number, [0])[-1]
        if not isinstance(value, int):
            raise MessageError(f"field {number} is no integer")
        return value

    def bytes(self, number: int) -> memoryview:
        """A length-delimited field."""
        return self._bytes(number, self._fields.get(number, [memoryview(b"")])[-1])

    def text(self, number: int) -> str:
        """A string."""
        return str(self.bytes(number), "utf-8")

    def texts(self, number: int) -> Iterator[str]:
        """A repeated string."""
        for value in self._fields.get(number, []):
            yield str(self._bytes(number, value), "utf-8")

    def message(self, number: int) -> Message:
        """A nested message."""
        return Message(self.bytes(number))

    def messages(self, number: int) -> Iterator[Message]:
        """A repeated nested message; also a map, as messages of key 1 and value 2."""
        for value in self._fields.get(number, []):
            yield Message(self._bytes(number, value))

    def integers(self, number: int) -> Iterator[int]:
        """A repeated integer, packed or not, as signed 64 bits."""
        for value in self._fields.get(number, []):
            for one in [value] if isinstance(value, int) else _varints(value):
                yield one - (1 << 64) if one >= 1 << 63 else one

    def floats(self, number: int) -> Iterator[float]:
        """A repeated float, packed or not."""
        for value in self._fields.get(number, []):
            packed = self._bytes(number, value)
            if len(packed) % 4:
                raise MessageError(f"field {number} holds no floats")
            yield from struct.unpack(f"<{len(packed) // 4}f", packed)

    def _bytes(self, number: int, value: int | memoryview) -> memoryview:
        if isinstance(value, int):
            raise MessageError(f"field {number} is an integer")
        return value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise MessageError(f"wire type {kind}")
        if at + size > len(data):
            raise MessageError("truncated")
        yield key >> 3, data[at : at + size]
        at += size


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise MessageError("truncated")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at
    raise MessageError("an integer of more than 64 bits")
