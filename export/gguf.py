"""The GGUF exporter: one file a part, in medge's `siglip` layout (docs/gguf.md), streamed tensor by tensor.

A GGUF file begins with the names and places of its tensors. Building the architecture once tells the names and
ranks without reading a weight, so the header's size is known; tensors follow it as they come, and the header is
written last: an unfinished file has no magic and opens nowhere.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from medge.export import gguf_chat
from medge.export.base import PartJob, Support, Written
from medge.export.gguf_keys import Key, keys
from medge.export.onnx import OnnxExporter
from medge.manifest import Format
from medge.quantize.gguf import BLOCK, MLP_MULTIPLE, block_type, pack, refusal
from medge.quantize.scheme import Rule, Scheme, load
from medge.runtimes.ggml_weights import UNFOLD
from medge.runtimes.gguf_file import ALIGNMENT, MAGIC, VERSION, BlockType, ValueType
from medge.runtimes.gguf_names import PROJECTOR, tensor_name
from medge.spec import AnySpec, BuildOptions, ChatSpec, DecoderOps, Ops, Part, ProjectorOps, Weight

_EXACT = Rule(match=".*", bits=32)
"""Biases, norms and positions: a thousandth of the file, and ggml adds in float32."""
_FILE_TYPES = {
    BlockType.F32: 0,
    BlockType.F16: 1,
    BlockType.Q4_0: 2,
    BlockType.Q4_1: 3,
    BlockType.Q8_0: 7,
    BlockType.Q5_1: 9,
    BlockType.IQ4_NL: 25,
}
"""llama.cpp's number for a file whose matrices are mostly of a type (llama_ftype), which viewers show."""


@dataclass(frozen=True)
class Tensor:
    """One tensor to write, unread."""

    name: str
    rank: int
    weight: Weight
    rule: Rule

    def packed(self) -> tuple[BlockType, tuple[int, ...], NDArray[np.uint8]]:
        """Its type, shape and bytes. Rows that no block divides are kept in float16, at least."""
        value = self.weight.read()
        type = block_type(self.rule)
        if value.shape[-1] % type.values:
            type = BlockType.F16
        rows = np.ascontiguousarray(value.reshape(-1, value.shape[-1]))
        return type, value.shape, pack(rows, type, self.rule.method)


@dataclass
class GgufOps:
    """`medge.spec.Ops` that computes nothing: it collects the tensors that the operations will look up."""

    scheme: Scheme
    tensors: list[Tensor] = field(default_factory=list)

    def patches(self, pixels: None, weight: Weight, bias: Weight, at: str) -> None:
        """A kernel of four axes, as llama.cpp stores it."""
        self._weight(at, weight, 4)
        self._bias(at, bias)

    def embedding(self, ids: None, table: Weight, at: str) -> None:
        """A table."""
        self._weight(at, table, 2)

    def add(self, x: None, y: None, at: str) -> None:
        """No weights."""

    def add_weight(self, x: None, y: Weight, at: str) -> None:
        """Added in float32, so stored in it."""
        self.tensors.append(Tensor(tensor_name(at, "weight"), 2, y, _EXACT))

    def layer_norm(self, x: None, gain: Weight, bias: Weight, eps: float, at: str) -> None:
        """Gain and bias."""
        self.tensors.append(Tensor(tensor_name(at, "weight"), 1, gain, _EXACT))
        self._bias(at, bias)

    def linears(self, x: None, layers: Mapping[str, tuple[Weight, Weight | None]]) -> list[None]:
        """Matrices by the scheme's rules."""
        for at, (weight, bias) in layers.items():
            self._weight(at, weight, 2)
            if bias is not None:
                self._bias(at, bias)
        return [None] * len(layers)

    def gelu_tanh(self, x: None, at: str) -> None:
        """No weights."""

    def attention(self, q: None, k: None, v: None, heads: int, width: int, at: str) -> None:
        """No weights."""

    def attention_pool(self, x: None, scores: Weight, value: tuple[Weight, Weight], at: str) -> None:
        """The folded scores in float32, rows by head; the projection by its rule."""
        by_head = scores.map(scores.name, lambda matrix: np.ascontiguousarray(matrix.T))
        self.tensors.append(Tensor(tensor_name(f"{at}.scores", "weight"), 2, by_head, _EXACT))
        self._weight(f"{at}.v_proj", value[0], 2)
        self._bias(f"{at}.v_proj", value[1])

    def token(self, x: None, index: int, at: str) -> None:
        """No weights."""

    def _weight(self, at: str, weight: Weight, rank: int) -> None:
        self.tensors.append(Tensor(tensor_name(at, "weight"), rank, weight, self.scheme.rule(at)))

    def _bias(self, at: str, bias: Weight) -> None:
        self.tensors.append(Tensor(tensor_name(at, "bias"), 1, bias, _EXACT))


class GgufExporter:
    """Writes image_encoder.gguf, text_encoder.gguf, …"""

    format: Format = "gguf"
    extra = "gguf"
    operators = (Ops, ProjectorOps, DecoderOps)  # llama.cpp has a graph of its own for the latter two

    def parts(self, spec: AnySpec) -> tuple[Part, ...]:
        """Not the embedding: it is a tensor of the decoder's file."""
        return tuple(part for part in spec.parts if part.name != "embedding")

    def supports(self, spec: AnySpec, part: Part, scheme: Scheme) -> Support:
        """SigLIP and Gemma 3, in the schemes whose rules ggml has blocks for."""
        refused = gguf_chat.refusal(scheme) if isinstance(spec, ChatSpec) else refusal(scheme)
        return Support(True) if refused is None else Support(False, *refused)

    def stored_bits(self, rule: Rule) -> float:
        """A block's bits over its 32 values."""
        return block_type(rule).bits

    def write(self, job: PartJob, folder: Path) -> Written:
        """Stream the part into one file; an image tower into ONNX where the settings say so."""
        if job.part.name == "vision" and job.settings.get("vision") == "onnx":
            written = OnnxExporter().write(replace(job, scheme=load("int8")), folder)
            return Written(written.files, {"scheme": "int8"} | written.facts)
        return gguf_chat.write(job, folder) if job.part.operators is not Ops else self._dual(job, folder)

    def _dual(self, job: PartJob, folder: Path) -> Written:
        ops = GgufOps(job.scheme)
        blocks = _has_blocks(job.scheme)
        multiple = MLP_MULTIPLE if blocks else 1
        job.graph(ops, {spec.name: None for spec in job.part.inputs}, BuildOptions(mlp_multiple=multiple))
        tensors = [*ops.tensors, *_projector(job, blocks)]
        name = f"{job.part.name}.gguf"
        with (folder / name).open("wb") as stream:
            types = _write(stream, tensors, keys(job, multiple))
        return Written([name], {"stored": _shares(types), "gelu": "tanh"})

    def session(self, scheme: Scheme) -> dict[str, str]:
        """Blocks may be unfolded to bfloat16 at load, where the CPU multiplies that and has no kernel for them."""
        return {UNFOLD: "bf16"} if _has_blocks(scheme) else {}

    def tools(self) -> dict[str, str]:
        """The format's version: medge writes it by itself."""
        return {"gguf": str(VERSION)}


def _has_blocks(scheme: Scheme) -> bool:
    return any(rule.bits < 16 for rule in scheme.rules)


def _shares(types: Counter[BlockType]) -> str:
    """ "97.4 % Q8_0, 1.9 % F32": of the file's bytes."""
    total = types.total()
    return ", ".join(f"{count / total:.1%} {type.name}" for type, count in types.most_common())


def _projector(job: PartJob, blocks: bool) -> Iterator[Tensor]:
    """Behind the image tower, what llama.cpp's loader wants there. Ones and zeros are exact in blocks of 4 bits."""
    width = job.part.outputs[0].shape[-1]
    if job.part.inputs[0].name != "pixel_values" or not isinstance(width, int):
        return
    eye = np.eye(width, dtype=np.float32)
    rule = Rule(match=".*", bits=4, block=BLOCK) if blocks else Rule(match=".*", bits=16)
    for name, matrix in zip(PROJECTOR, (np.concatenate([eye, -eye]), np.concatenate([eye, -eye], 1)), strict=True):
        bias = np.zeros(len(matrix), np.float32)
        yield Tensor(f"{name}.weight", 2, Weight(name, partial(np.copy, matrix)), rule)
        yield Tensor(f"{name}.bias", 1, Weight(name, partial(np.copy, bias)), _EXACT)


def _write(stream: BinaryIO, tensors: list[Tensor], keys: list[Key]) -> Counter[BlockType]:
    """The data in one pass, then the header in front of it; returns the bytes that each type stores."""
    head = _head(len(tensors), [*keys, Key("general.file_type", ValueType.UINT32, 0)])
    size = len(head) + sum(_entry_size(tensor) for tensor in tensors)
    start = _aligned(size)
    stream.seek(start)
    entries, types, matrices = [], Counter[BlockType](), Counter[BlockType]()
    for tensor in tensors:
        type, shape, data = tensor.packed()
        entries.append(_entry(tensor.name, type, shape, stream.tell() - start))
        stream.write(data.data)
        stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
        types[type] += data.nbytes
        matrices[type] += len(shape) > 1
    main = matrices.most_common(1)[0][0]
    stream.seek(0)
    stream.write(_head(len(tensors), [*keys, Key("general.file_type", ValueType.UINT32, _FILE_TYPES[main])]))
    stream.write(b"".join(entries))
    stream.write(b"\0" * (start - size))
    return types


def _head(tensors: int, keys: list[Key]) -> bytes:
    fixed = MAGIC + struct.pack("<IQQ", VERSION, tensors, len(keys))
    return fixed + b"".join(key.encoded() for key in keys)


def _entry_size(tensor: Tensor) -> int:
    return 8 + len(tensor.name.encode()) + 4 + 8 * tensor.rank + 4 + 8


def _entry(name: str, type: BlockType, shape: tuple[int, ...], offset: int) -> bytes:
    raw = name.encode()
    sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return struct.pack("<Q", len(raw)) + raw + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", type, offset)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
