"""Reads a Core ML .mlpackage without coremltools: the package, its MIL program, its weights as they are stored.

Sources: Apple's Model.proto and MIL.proto (the field numbers below), and coremltools' MIL BlobStorage format
(StorageFormat.hpp): 64 bytes of header, then 64 bytes of metadata and the data of each tensor. An independent
reader is half of the check: it sees what is in the file, not what the writer meant. Importing coremltools would
also cost 12 CPU seconds; reading a MedSigLIP tower here costs 0.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge.errors import CorruptError
from medge.runtimes.protobuf import Message, MessageError

Array = NDArray[Any]

IMAGE_TYPE, MULTI_ARRAY_TYPE = 4, 5
"""Fields of FeatureType: an input is an image or a tensor."""
_TYPES = {
    **{1: "bool", 2: "string", 10: "fp16", 11: "fp32", 21: "int8", 22: "int16", 23: "int32", 24: "int64"},
    **{25: "int4", 31: "uint8", 32: "uint16", 33: "uint32", 35: "uint4", 36: "uint2", 37: "uint1", 38: "uint6"},
    39: "uint3",
}
"""MIL.proto's DataType."""
_NUMPY = {"bool": np.dtype(bool), "fp16": np.dtype("<f2"), "fp32": np.dtype("<f4")} | {
    f"{sign}int{bits}": np.dtype(f"<{sign or 'i'}{bits // 8}") for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_PACKED = {"int4": 4, "uint4": 4, "uint6": 6, "uint3": 3, "uint2": 2, "uint1": 1}
"""Bits of what is stored in less than a byte, the lowest bits first."""
_BLOB_TYPES = {
    **{"fp16": 1, "fp32": 2, "uint8": 3, "int8": 4, "int16": 6, "uint16": 7, "int4": 8, "uint1": 9, "uint2": 10},
    **{"uint4": 11, "uint3": 12, "uint6": 13, "int32": 14, "uint32": 15},
}
"""The weight file's own numbers for the same types."""
_SENTINEL = 0xDEADBEEF
_HEADER = np.dtype([("count", "<u4"), ("version", "<u4")])
_METADATA = np.dtype([("sentinel", "<u4"), ("type", "<u4"), ("bytes", "<u8"), ("offset", "<u8"), ("padding", "<u8")])
_REMEDY = "Export the artifact again"


@dataclass(frozen=True)
class TensorType:
    """An element type by its MIL name, and a fixed shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return _PACKED.get(self.dtype) or _NUMPY[self.dtype].itemsize * 8

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Weights:
    """The weight file, mapped; every offset and size is checked before anything is read."""

    def __init__(self, path: Path) -> None:
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CorruptError(f"{path} cannot be read: {error}", _REMEDY) from None
        self._path = path
        if self._bytes.size < 64 or self._bytes[: _HEADER.itemsize].view(_HEADER)[0]["version"] != 2:
            raise CorruptError(f"{path} is no Core ML weight file of version 2", _REMEDY)

    def read(self, offset: int, kind: TensorType) -> Array:
        """One tensor; less than a byte an element comes as int8 or uint8.

        Raises:
            CorruptError: the file holds no tensor of that type and size there.
        """
        start, size = self.find(offset, kind)
        return _elements(self._bytes[start : start + size], kind)

    def find(self, offset: int, kind: TensorType) -> tuple[int, int]:
        """Where the bytes of a tensor start and how many they are.

        Raises:
            CorruptError: the file holds no tensor of that type and size there.
        """
        if offset % 64 or offset + 64 > self._bytes.size:
            raise CorruptError(f"{self._path} holds no tensor at {offset}: it is truncated or altered", _REMEDY)
        found = self._bytes[offset : offset + _METADATA.itemsize].view(_METADATA)[0]
        start, size = int(found["offset"]), int(found["bytes"])
        if found["sentinel"] != _SENTINEL or start + size > self._bytes.size:
            raise CorruptError(f"{self._path} is truncated or altered at {offset}", _REMEDY)
        if found["type"] != _BLOB_TYPES.get(kind.dtype) or size != -(-kind.size * kind.bits // 8):
            raise CorruptError(f"{self._path} holds another tensor at {offset} than the model says", _REMEDY)
        return start, size


@dataclass(frozen=True)
class Constant:
    """A value that is known before the program runs: in the specification, or in the weight file."""

    type: TensorType
    value: Array | str | None
    offset: int = 0
    """Where in the weight file, when `value` is None."""


Argument = tuple[str | Constant, ...]
"""What an operation's parameter is bound to: names of values, or constants. More than one for lists of tensors."""


@dataclass(frozen=True)
class Operation:
    """One MIL operation."""

    type: str
    name: str
    inputs: Mapping[str, Argument]
    outputs: tuple[tuple[str, TensorType], ...]


@dataclass(frozen=True)
class Program:
    """The main function of an ML program."""

    opset: str
    inputs: tuple[tuple[str, TensorType], ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]

    def constant_of(self, operation: Operation, parameter: str) -> Constant:
        """The constant that a parameter is bound to, directly or through a const operation.

        Raises:
            KeyError: the parameter is bound to no constant.
        """
        bound = operation.inputs[parameter][0]
        if isinstance(bound, Constant):
            return bound
        return self._constants[bound]

    @cached_property
    def _constants(self) -> dict[str, Constant]:
        consts = (one for one in self.operations if one.type == "const")
        values = {one.outputs[0][0]: one.inputs["val"][0] for one in consts}
        return {name: value for name, value in values.items() if isinstance(value, Constant)}


class Package:
    """A .mlpackage folder, opened: its specification is parsed, its weights are read when they are asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._model_path = _root_model(root)
        try:
            model = Message(self._model_path.read_bytes())
            self.version = model.integer(1)
            """Core ML's specification version: 8 is iOS 17, 9 is iOS 18."""
            self._description = model.message(2)
            self.program = _program(model.message(502))
        except OSError as error:
            raise CorruptError(f"{self._model_path} cannot be read: {error.strerror}", _REMEDY) from None
        except (MessageError, KeyError, UnicodeDecodeError) as error:
            raise CorruptError(f"{self._model_path} is no Core ML program: {error}", _REMEDY) from None

    @cached_property
    def weights(self) -> Weights:
        """The weight file.

        Raises:
            CorruptError: it is missing, or no such file.
        """
        return Weights(self._model_path.parent / "weights" / "weight.bin")

    @cached_property
    def image_inputs(self) -> frozenset[str]:
        """Inputs that Core ML takes as images: RGB levels 0..255, scaled in the program."""
        inputs = self._description.messages(1)
        return frozenset(one.text(1) for one in inputs if one.message(3).has(IMAGE_TYPE))

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What Xcode shows: description, version, author, licence, and what the maker added."""
        found = self._description.message(100)
        names = ("short_description", "version", "author", "licence")
        named = {name: found.text(i + 1) for i, name in enumerate(names)}
        return named | {one.text(1): one.text(2) for one in found.messages(100)}

    def check_weights(self) -> None:
        """Find every tensor that the program refers to, without reading it.

        Raises:
            CorruptError: the weight file is missing, truncated or another one.
        """
        for operation in self.program.operations:
            for one in (one for bound in operation.inputs.values() for one in bound):
                if isinstance(one, Constant) and one.value is None:
                    self.weights.find(one.offset, one.type)

    def constant(self, constant: Constant) -> Array | str:
        """A constant's value."""
        if constant.value is None:
            return self.weights.read(constant.offset, constant.type)
        return constant.value


def _root_model(root: Path) -> Path:
    """The specification that Manifest.json names; it may not lead out of the package."""
    path = root / "Manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        relative = PurePosixPath(item)
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise CorruptError(f"{path} names no model ({type(error).__name__})", _REMEDY) from None
    model = root / "Data" / relative
    if relative.is_absolute() or ".." in relative.parts or not model.is_file():
        raise CorruptError(f"{path} names '{item}', which is not in the package", _REMEDY)
    return model


def _program(message: Message) -> Program:
    functions = {entry.text(1): entry.message(2) for entry in message.messages(2)}
    main = functions["main"]
    opset = main.text(2)
    blocks = {entry.text(1): entry.message(2) for entry in main.messages(3)}
    block = blocks[opset]
    return Program(
        opset,
        tuple(_named_type(one) for one in main.messages(1)),
        tuple(_operation(one) for one in block.messages(3)),
        tuple(block.texts(2)),
    )


def _operation(message: Message) -> Operation:
    """Attributes are parameters too: const's value, and the constexpr operations' before iOS 18."""
    if message.has(4):
        raise MessageError("control flow (nested blocks)")
    attributes = {entry.text(1): _constant(entry.message(2)) for entry in message.messages(5)}
    inputs: dict[str, Argument] = {key: (value,) for key, value in attributes.items() if key != "name"}
    for entry in message.messages(2):
        inputs[entry.text(1)] = tuple(_binding(one) for one in entry.message(2).messages(1))
    name = attributes["name"].value
    return Operation(message.text(1), str(name), inputs, tuple(_named_type(one) for one in message.messages(3)))


def _binding(message: Message) -> str | Constant:
    return message.text(1) if message.has(1) else _constant(message.message(2))


def _named_type(message: Message) -> tuple[str, TensorType]:
    return message.text(1), _type(message.message(2))


def _type(message: Message) -> TensorType:
    if not message.has(1):
        raise MessageError("a value that is no tensor (list, tuple, dictionary or state)")
    tensor = message.message(1)
    dtype = _TYPES.get(tensor.integer(1))
    shape = tuple(_dimension(one) for one in tensor.messages(3))
    if dtype is None or tensor.integer(2) != len(shape):
        raise MessageError(f"a tensor of type {tensor.integer(1)} and rank {tensor.integer(2)}")
    return TensorType(dtype, shape)


def _dimension(message: Message) -> int:
    if not message.has(1):
        raise MessageError("a dimension without a fixed size")
    return message.message(1).integer(1)


def _constant(message: Message) -> Constant:
    kind = _type(message.message(2))
    if message.has(5):
        file = message.message(5)
        if file.text(1) != "@model_path/weights/weight.bin":
            raise MessageError(f"weights in '{file.text(1)}'")
        return Constant(kind, None, file.integer(2))
    return Constant(kind, _immediate(message.message(3).message(1), kind))


def _immediate(tensor: Message, kind: TensorType) -> Array | str:
    """A TensorValue: its field depends on the type, bytes for what is smaller than 32 bits."""
    if kind.dtype == "string":
        return tensor.message(4).text(1)
    if tensor.has(7):
        return _elements(np.frombuffer(tensor.message(7).bytes(1), np.uint8), kind)
    if kind.dtype == "fp32":
        values = np.array(list(tensor.message(1).floats(1)), np.float32)
    else:
        field = {"bool": 3, "int64": 5}.get(kind.dtype, 2)
        values = np.array(list(tensor.message(field).integers(1)), np.int64)
    if values.size != kind.size:
        raise MessageError(f"{values.size} values for shape {kind.shape}")
    return values.astype(_NUMPY[kind.dtype]).reshape(kind.shape)


def _elements(raw: Array, kind: TensorType) -> Array:
    """Stored bytes to elements: a view, or unpacked where an element is less than a byte."""
    bits = _PACKED.get(kind.dtype)
    if len(raw) != -(-kind.size * kind.bits // 8):
        raise MessageError(f"{len(raw)} bytes for {kind.dtype} of shape {kind.shape}")
    if bits is None:
        return raw.view(_NUMPY[kind.dtype]).reshape(kind.shape)
    values = _unpack(raw, bits, kind.size)
    if kind.dtype == "int4":
        values = ((values ^ 8).astype(np.int8) - 8).astype(np.int8)
    return values.reshape(kind.shape)


def _unpack(raw: Array, bits: int, count: int) -> NDArray[np.uint8]:
    """`count` unsigned integers of `bits` each from a bit stream, lowest bits first."""
    period = math.lcm(bits, 8) // 8  # bytes after which the layout repeats: 1 for 4 bits, 3 for 6
    padded = np.zeros(-(-len(raw) // period) * period, np.uint8)
    padded[: len(raw)] = raw
    columns = padded.reshape(-1, period)
    out = np.empty((len(columns), period * 8 // bits), np.uint8)
    for i in range(out.shape[1]):
        byte, shift = divmod(i * bits, 8)
        value = columns[:, byte] >> shift
        if shift + bits > 8:
            value = value | (columns[:, byte + 1] << (8 - shift))
        out[:, i] = value & (2**bits - 1)
    return out.reshape(-1)[:count]
