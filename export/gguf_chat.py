"""Gemma 3 in GGUF: the decoder and, as llama.cpp's `mmproj`, the image tower with its projector.

llama.cpp knows both graphs, so a file holds weights, hyperparameters and the tokenizer. Tensor names are gguf-py's
own tables'. Gemma's RMSNorm multiplies by 1 + weight: the 1 is folded in here, as llama.cpp expects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medge.errors import UnsupportedError
from medge.export import gguf_stream
from medge.export.base import PartJob, Written
from medge.export.gguf_keys import Key
from medge.export.gguf_stream import Planned, whole_blocks
from medge.export.gguf_vocabulary import vocabulary
from medge.models.gemma3 import Gemma3Config, TextConfig
from medge.models.gemma3_graph import PROJECTOR, TOWER
from medge.quantize.ggml_blocks import TypeName, engine
from medge.quantize.gguf import PALETTES
from medge.quantize.importance import ImportanceMatrix
from medge.quantize.scheme import Rule, Scheme
from medge.registry import licence_of
from medge.runtimes.gguf_file import ALIGNMENT, ValueType
from medge.spec import AnySpec, FloatArray

WITHOUT_IMPORTANCE: frozenset[TypeName] = frozenset(("F32", "F16", "BF16", "Q8_0"))
"""Types that round every weight alike, whatever it meets."""
MLP_MULTIPLE = 256
"""Zero-padding of the image tower's MLP under block types, which is exact: 4304 = 16 · 269 becomes 4352."""


def plan(job: PartJob) -> list[Planned]:
    """The part's tensors in the checkpoint's order, shard by shard."""
    vision, source = job.part.name == "vision", job.checkpoint
    order = source.by_shard(name for name in source.any_spec.tensors if is_vision(name) is vision)
    rename = names(source.any_spec, vision=vision)
    return [replace(_tensor(job, name, rename(name)), skip=partial(source.done_with, name)) for name in order]


def is_vision(name: str) -> bool:
    """Whether a checkpoint's tensor belongs to the image tower or its projector."""
    return name.startswith((TOWER, PROJECTOR))


def names(spec: AnySpec, *, vision: bool) -> Callable[[str], str]:
    """A checkpoint's tensor -> GGUF's, in one of the two files.

    The function raises UnsupportedError for a tensor that GGUF has no name for.
    """
    import gguf

    config = spec.config
    text = config.get("text_config", config)
    blocks = (config["vision_config"] if vision else text)["num_hidden_layers"]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ if vision else gguf.MODEL_ARCH.GEMMA3, blocks)

    def rename(name: str) -> str:
        dotted = name.replace("_projection_weight", "_projection.weight").removeprefix("language_model.")
        found: str | None = table.get_name(dotted, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedError(f"GGUF has no name for '{name}'", "Use a Gemma 3 checkpoint")
        return found

    return rename


def _tensor(job: PartJob, source: str, name: str) -> Planned:
    shape = job.checkpoint.any_spec.tensors[source]
    if len(shape) == 1 or "position_embedding" in source:
        return _exact(job, source, name, shape)
    if len(shape) == 4:  # the patches' kernel: ggml's convolution takes float16
        flat = (shape[0] * shape[1] * shape[2], shape[3])
        rows = partial(_whole, job, source, lambda x: x.reshape(flat))
        return Planned(name, shape, "F16", rows)
    if "input_projection" in source:  # llama.cpp transposes it as it is stored, which blocks do not survive
        return Planned(name, shape, "F16", partial(_whole, job, source, lambda x: x))
    shape, change = _padding(job, source, shape)
    type = type_of(job.scheme.rule(source.removesuffix(".weight")))
    if not whole_blocks(type, shape[-1]):
        type = _NARROWER.get(type, "F16")
    if not whole_blocks(type, shape[-1]):
        type = "F16"
    rows = partial(_whole, job, source, change) if change else partial(job.checkpoint.raw_rows, source)
    return Planned(name, shape, type, rows, _importance(job, name, type, shape[-1]))


def _importance(job: PartJob, name: str, type: TypeName, width: int) -> FloatArray | None:
    """(width,) of a tensor's columns; columns of padding, which are zero, have none."""
    if job.importance is None or type in WITHOUT_IMPORTANCE:
        return None
    found = job.importance.of(name)
    return None if found is None else _pad((width,), found)


def _exact(job: PartJob, source: str, name: str, shape: tuple[int, ...]) -> Planned:
    """Norms, biases and positions, in float32."""
    gain = _is_rms_norm(source)
    if len(shape) == 1 and source.endswith("fc1.bias"):
        width = -(-shape[0] // MLP_MULTIPLE) * MLP_MULTIPLE if _padded(job) else shape[0]
        return Planned(name, (width,), "F32", partial(_whole, job, source, partial(_pad, (width,))))
    return Planned(name, shape, "F32", partial(_whole, job, source, lambda x: x + np.float32(1) if gain else x))


def _is_rms_norm(source: str) -> bool:
    return "norm" in source and not source.startswith(TOWER)


def _padded(job: PartJob) -> bool:
    return any(rule.bits < 16 for rule in job.scheme.rules)


def _padding(
    job: PartJob, source: str, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], Callable[[FloatArray], FloatArray] | None]:
    """The image tower's MLP, widened where blocks need it."""
    axis = {"fc1.weight": 0, "fc2.weight": 1}.get(source[-10:])
    if axis is None or not source.startswith(TOWER) or not _padded(job):
        return shape, None
    wide = list(shape)
    wide[axis] = -(-shape[axis] // MLP_MULTIPLE) * MLP_MULTIPLE
    return tuple(wide), partial(_pad, tuple(wide))


def _pad(shape: tuple[int, ...], x: FloatArray) -> FloatArray:
    return np.pad(x, [(0, wide - own) for wide, own in zip(shape, x.shape, strict=True)])


def _whole(job: PartJob, source: str, change: Callable[[FloatArray], FloatArray], step: int) -> Iterator[FloatArray]:
    """A tensor small enough to hold, rewritten; rows of its last axis."""
    value = change(job.checkpoint.read(source))
    yield np.ascontiguousarray(value.reshape(-1, value.shape[-1]), np.float32)


_TYPES: dict[tuple[int, bool, str], TypeName] = {
    (8, True, "even"): "Q8_0",
    (5, False, "even"): "Q5_1",
    (4, True, "even"): "Q4_0",
    (4, False, "even"): "Q4_1",
    (4, True, "nonlinear"): "IQ4_NL",
    (4, True, "superblock"): "Q4_K",
    (5, True, "superblock"): "Q5_K",
    (6, True, "superblock"): "Q6_K",
}
"""(bits, symmetric, how levels lie) -> ggml's type."""

_NARROWER: dict[TypeName, TypeName] = {"Q4_K": "Q5_1", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows that super-blocks of 256 do not divide (640 of Gemma 3 270M, 1152 of 1B): the smallest blocks of 32 with at
least as many bits. llama.cpp does likewise, with Q5_0 for Q4_K."""


def type_of(rule: Rule) -> TypeName:
    """What stores a rule's tensors.

    Raises:
        UnsupportedError: ggml has no such blocks.
    """
    if rule.bits >= 16:
        return "F32" if rule.bits == 32 else "BF16" if rule.bfloat else "F16"
    even = "even" if rule.method in ("absmax", "mse") else rule.method
    if even == "kmeans":
        raise UnsupportedError(PALETTES, "Use scheme int4-nl")
    found = _TYPES.get((rule.bits, rule.symmetric, even))
    if found is None:
        raise UnsupportedError(f"ggml has no {rule.bits}-bit blocks of method '{rule.method}'", "Use scheme int4-k")
    return found


def refusal(scheme: Scheme) -> tuple[str, str] | None:
    """Why llama.cpp cannot run a scheme, and the nearest that it can; None if it can."""
    if scheme.activations == "static":
        return "ggml scales activations when it runs: it has no place for calibrated ranges", "int8"
    if scheme.budget is not None:
        return "medge measures no sensitivity on chat models yet", "int4-k"
    try:
        for rule in scheme.rules:
            type_of(rule)
    except UnsupportedError as error:
        return error.message, "int4-k" if any(rule.bits == 4 for rule in scheme.rules) else "int8"
    return None


def write(job: PartJob, folder: Path) -> Written:
    """Stream the part into one file; one that was cut goes on where it was."""
    tensors = plan(job)
    name = f"{job.part.name}.gguf"
    stored = Counter[str]()
    for tensor in tensors:
        stored[tensor.type] += tensor.bytes
    main = max((t.type for t in tensors if len(t.shape) > 1), key=stored.__getitem__)
    number = _FILE_TYPES["Q4_K_M" if main == "Q4_K" else main]
    matrix = job.importance if any(tensor.importance is not None for tensor in tensors) else None
    used = [] if matrix is None else list(_importance_keys(matrix))
    header = [*keys(job), *used, Key("general.file_type", ValueType.UINT32, number)]
    gguf_stream.write(folder / name, header, tensors, job.on_tensor)
    shares = ", ".join(f"{size / stored.total():.1%} {kind}" for kind, size in stored.most_common())
    facts = {"stored": shares, "quantized by": engine()}
    return Written([name], facts if matrix is None else facts | {"importance": matrix.dataset})


_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_1": 9,
    "Q4_K_M": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "BF16": 32,
}
"""llama.cpp's number for a file mostly of a type (llama_ftype), which viewers show."""


@dataclass(frozen=True)
class _Keys:
    """Keys under one prefix."""

    prefix: str

    def numbers(self, **values: int | float | None) -> Iterator[Key]:
        """One key a value; "__" in a name is a dot, None is left out."""
        for name, value in values.items():
            if value is not None:
                kind = ValueType.FLOAT32 if isinstance(value, float) else ValueType.UINT32
                yield Key(f"{self.prefix}.{name.replace('__', '.')}", kind, value)


def keys(job: PartJob) -> list[Key]:
    """The header's keys."""
    return [*_general(job), *(_vision_keys(job) if job.part.name == "vision" else _text_keys(job))]


def _general(job: PartJob) -> Iterator[Key]:
    spec = job.checkpoint.any_spec
    vision = job.part.name == "vision"
    yield Key("general.architecture", ValueType.STRING, "clip" if vision else "gemma3")
    if vision:
        yield Key("general.type", ValueType.STRING, "mmproj")
    yield Key("general.name", ValueType.STRING, f"{spec.id} {job.part.name}")
    yield Key("general.license", ValueType.STRING, licence_of(spec))
    yield Key("general.alignment", ValueType.UINT32, ALIGNMENT)
    yield Key("general.quantization_version", ValueType.UINT32, 2)


def _importance_keys(matrix: ImportanceMatrix) -> Iterator[Key]:
    """llama-quantize's own, but for the matrix's path."""
    yield Key("quantize.imatrix.dataset", ValueType.STRING, matrix.dataset)
    yield Key("quantize.imatrix.entries_count", ValueType.UINT32, len(matrix.sums))
    yield Key("quantize.imatrix.chunks_count", ValueType.UINT32, matrix.chunks)


def _text_keys(job: PartJob) -> Iterator[Key]:
    config: dict[str, Any] = dict(job.checkpoint.any_spec.config)
    text = TextConfig.model_validate(config.get("text_config", config))
    yield from _Keys("gemma3").numbers(
        context_length=text.max_position_embeddings,
        embedding_length=text.hidden_size,
        block_count=text.num_hidden_layers,
        feed_forward_length=text.intermediate_size,
        attention__head_count=text.num_attention_heads,
        attention__head_count_kv=text.num_key_value_heads,
        attention__key_length=text.head_dim,
        attention__value_length=text.head_dim,
        attention__layer_norm_rms_epsilon=float(text.rms_norm_eps),
        attention__sliding_window=text.sliding_window,
        rope__freq_base=float(text.rope_theta),
        rope__scaling__factor=float(text.rope_scaling.factor) if text.rope_scaling else None,
    )
    if text.rope_scaling:
        yield Key("gemma3.rope.scaling.type", ValueType.STRING, text.rope_scaling.rope_type)
    yield from vocabulary(job.checkpoint, text.vocab_size)


def _vision_keys(job: PartJob) -> Iterator[Key]:
    config = Gemma3Config.model_validate(job.checkpoint.any_spec.config)
    vision = config.vision_config
    multiple = MLP_MULTIPLE if _padded(job) else 1
    side, patches = round(config.mm_tokens_per_image**0.5), vision.image_size // vision.patch_size
    yield Key("clip.has_vision_encoder", ValueType.BOOL, True)
    yield Key("clip.projector_type", ValueType.STRING, "gemma3")
    yield Key("clip.use_gelu", ValueType.BOOL, True)
    yield from _Keys("clip.vision").numbers(
        projection_dim=config.text_config.hidden_size,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        embedding_length=vision.hidden_size,
        feed_forward_length=-(-vision.intermediate_size // multiple) * multiple,
        block_count=vision.num_hidden_layers,
        attention__head_count=vision.num_attention_heads,
        attention__layer_norm_epsilon=float(vision.layer_norm_eps),
        projector__scale_factor=patches // side,
    )
    yield Key("clip.vision.image_mean", ValueType.FLOAT32, [0.5, 0.5, 0.5])
    yield Key("clip.vision.image_std", ValueType.FLOAT32, [0.5, 0.5, 0.5])
