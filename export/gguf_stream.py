"""A GGUF file in one pass: header first, then each tensor's rows as they come; a killed write goes on where it was.

Tensors larger than the memory that an export may take are read, quantized and written some rows at a time, on as
many threads as there are cores. Since the header is a function of the plan, an unfinished file that begins with the
same header is trusted up to its last whole tensor.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medge.errors import MedgeError
from medge.export.gguf_keys import Key
from medge.quantize.ggml_blocks import BLOCK, GGML_TYPE, TypeName, quantize_rows, row_bytes
from medge.quantize.ordered import ordered
from medge.runtimes.gguf_file import ALIGNMENT, MAGIC, VERSION
from medge.spec import FloatArray

ROWS_BYTES = 16_000_000
"""float32 bytes of the rows that one thread works on."""


@dataclass(frozen=True)
class Planned:
    """One tensor to write: its place in the file is known before its values are."""

    name: str
    shape: tuple[int, ...]
    """numpy's order, rows last."""
    type: TypeName
    rows: Callable[[int], Iterator[NDArray[Any]]]
    """rows(step): the values as (n, shape[-1]) float32 or bfloat16 bits, about `step` rows at a time."""
    importance: FloatArray | None = None
    """Of each column (shape[-1],), for block types."""
    skip: Callable[[], None] = lambda: None
    """Called in place of `rows` when an earlier run wrote the tensor."""

    @property
    def bytes(self) -> int:
        """Size in the file, padding not counted."""
        count = int(np.prod(self.shape[:-1], dtype=np.int64))
        return int(count * row_bytes(self.type, self.shape[-1]))

    @property
    def step(self) -> int:
        """Rows that one thread works on."""
        return max(1, ROWS_BYTES // (4 * self.shape[-1]))


def write(path: Path, keys: Sequence[Key], tensors: Sequence[Planned], on_tensor: Callable[[int], None]) -> None:
    """Write the file, or what is missing of it. `on_tensor(weights)` is called after each tensor.

    Raises:
        CorruptError: a weight is not finite.
        UnsupportedError: a weight that its type cannot hold.
    """
    head = header(keys, tensors)
    start = len(head)
    with path.open("r+b" if path.exists() else "w+b") as stream:
        done = _resumable(stream, head, tensors)
        for tensor in tensors[:done]:
            tensor.skip()
            on_tensor(int(np.prod(tensor.shape, dtype=np.int64)))
            start += _padded(tensor.bytes)
        if done == 0:
            stream.write(head)
        stream.seek(start)
        stream.truncate()
        _append(stream, tensors[done:], on_tensor)


def _append(stream: BinaryIO, tensors: Sequence[Planned], on_tensor: Callable[[int], None]) -> None:
    for tensor in tensors:
        for packed in ordered(partial(_quantize, tensor), tensor.rows(tensor.step)):
            stream.write(packed.data)
        stream.write(b"\0" * (_padded(tensor.bytes) - tensor.bytes))
        stream.flush()  # whole for a later run, before anyone waits minutes for the next tensor's shard
        on_tensor(int(np.prod(tensor.shape, dtype=np.int64)))


def _quantize(tensor: Planned, rows: NDArray[Any]) -> NDArray[np.uint8]:
    try:
        return quantize_rows(rows, tensor.type, tensor.importance)
    except MedgeError as error:
        raise type(error)(f"'{tensor.name}': {error.message}", error.remedy) from error


def _resumable(stream: BinaryIO, head: bytes, tensors: Sequence[Planned]) -> int:
    """How many tensors an unfinished file of the same plan holds whole."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if stream.read(len(head)) != head:
        stream.seek(0)
        return 0
    end = len(head)
    for done, tensor in enumerate(tensors):
        end += _padded(tensor.bytes)
        if end > size:
            return done
    return len(tensors)


def header(keys: Sequence[Key], tensors: Sequence[Planned]) -> bytes:
    """Everything before the first tensor."""
    head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(keys))
    head += b"".join(key.encoded() for key in keys)
    offset = 0
    for tensor in tensors:
        raw, sizes = tensor.name.encode(), tuple(reversed(tensor.shape))
        head += struct.pack("<Q", len(raw)) + raw + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        head += struct.pack("<IQ", GGML_TYPE[tensor.type], offset)
        offset += _padded(tensor.bytes)
    return head + b"\0" * (_padded(len(head)) - len(head))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def whole_blocks(type: TypeName, width: int) -> bool:
    """Whether rows of that width fall into whole blocks."""
    return bool(width % BLOCK[type][0] == 0)
