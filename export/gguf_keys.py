"""The keys of medge's `siglip` GGUF layout: docs/gguf.md says what each is for."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from medge.export.base import PartJob
from medge.models.siglip import SiglipConfig, TextConfig, TowerConfig, VisionConfig
from medge.registry import licence_of
from medge.runtimes.gguf_file import ALIGNMENT, ValueType
from medge.runtimes.gguf_names import ARCHITECTURE

_FORMATS = {ValueType.UINT32: "<I", ValueType.INT32: "<i", ValueType.FLOAT32: "<f", ValueType.BOOL: "<?"}


@dataclass(frozen=True)
class Key:
    """One key of the header. A list is written as an array of the type."""

    name: str
    type: ValueType
    value: Any

    def encoded(self) -> bytes:
        """As in the file."""
        if not isinstance(self.value, list):
            return _text(self.name) + struct.pack("<I", self.type) + self._plain(self.value)
        head = struct.pack("<IIQ", ValueType.ARRAY, self.type, len(self.value))
        return _text(self.name) + head + b"".join(self._plain(value) for value in self.value)

    def _plain(self, value: Any) -> bytes:
        return _text(value) if self.type == ValueType.STRING else struct.pack(_FORMATS[self.type], value)


def keys(job: PartJob, mlp_multiple: int) -> list[Key]:
    """Everything but general.file_type, which is known when the tensors are."""
    config = SiglipConfig.model_validate(job.checkpoint.spec.config)
    vision = job.part.inputs[0].name == "pixel_values"
    tower = "vision" if vision else "text"
    return [
        *_general(job),
        Key("clip.has_vision_encoder", ValueType.BOOL, vision),
        Key("clip.has_text_encoder", ValueType.BOOL, not vision),
        Key("clip.use_gelu", ValueType.BOOL, True),
        *_tower(tower, config.vision_config if vision else config.text_config, mlp_multiple),
        *(_vision(job, config.vision_config) if vision else _text_tower(job, config.text_config)),
        *_scoring(job),
    ]


def _general(job: PartJob) -> Iterator[Key]:
    spec = job.checkpoint.spec
    yield Key("general.architecture", ValueType.STRING, ARCHITECTURE)
    yield Key("general.name", ValueType.STRING, f"{spec.id} {job.part.name}")
    yield Key("general.license", ValueType.STRING, licence_of(spec))
    yield Key("general.alignment", ValueType.UINT32, ALIGNMENT)
    yield Key("general.quantization_version", ValueType.UINT32, 2)


def _tower(prefix: str, config: TowerConfig, mlp_multiple: int) -> Iterator[Key]:
    padded = -(-config.intermediate_size // mlp_multiple) * mlp_multiple
    at = f"clip.{prefix}"
    yield Key(f"{at}.embedding_length", ValueType.UINT32, config.hidden_size)
    yield Key(f"{at}.feed_forward_length", ValueType.UINT32, padded)
    yield Key(f"siglip.{prefix}.feed_forward_length_unpadded", ValueType.UINT32, config.intermediate_size)
    yield Key(f"{at}.block_count", ValueType.UINT32, config.num_hidden_layers)
    yield Key(f"{at}.attention.head_count", ValueType.UINT32, config.num_attention_heads)
    yield Key(f"{at}.attention.layer_norm_epsilon", ValueType.FLOAT32, config.layer_norm_eps)


def _vision(job: PartJob, config: VisionConfig) -> Iterator[Key]:
    image = job.checkpoint.spec.image
    yield Key("clip.projector_type", ValueType.STRING, "janus_pro")
    yield Key("clip.vision.projection_dim", ValueType.UINT32, config.hidden_size)
    yield Key("clip.vision.image_size", ValueType.UINT32, config.image_size)
    yield Key("clip.vision.patch_size", ValueType.UINT32, config.patch_size)
    yield Key("clip.vision.image_mean", ValueType.FLOAT32, list(image.mean))
    yield Key("clip.vision.image_std", ValueType.FLOAT32, list(image.std))
    yield Key("siglip.vision.pooling", ValueType.STRING, "map")
    yield Key("siglip.vision.preprocessing", ValueType.STRING, job.settings.get("variant", image.variant))


def _text_tower(job: PartJob, config: TextConfig) -> Iterator[Key]:
    yield Key("clip.text.context_length", ValueType.UINT32, config.max_position_embeddings)
    yield Key("clip.text.vocab_size", ValueType.UINT32, config.vocab_size)
    yield Key("clip.text.projection_dim", ValueType.UINT32, config.projection)
    yield Key("siglip.text.pooling", ValueType.STRING, "last")
    yield Key("siglip.text.lower_case", ValueType.BOOL, True)
    yield Key("siglip.text.remove_punctuation", ValueType.BOOL, True)
    yield from _tokenizer(job)


def _tokenizer(job: PartJob) -> Iterator[Key]:
    """SentencePiece's unigram model, in the keys that llama.cpp reads for T5's."""
    spec = job.checkpoint.spec.tokenizer
    path = job.checkpoint.tokenizer_file()
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(model.piece_size())
    yield Key("tokenizer.ggml.model", ValueType.STRING, "t5")
    yield Key("tokenizer.ggml.tokens", ValueType.STRING, [model.id_to_piece(i) for i in ids])
    yield Key("tokenizer.ggml.scores", ValueType.FLOAT32, [model.get_score(i) for i in ids])
    yield Key("tokenizer.ggml.token_type", ValueType.INT32, [_piece_type(model, i) for i in ids])
    yield Key("tokenizer.ggml.unknown_token_id", ValueType.UINT32, model.unk_id())
    yield Key("tokenizer.ggml.eos_token_id", ValueType.UINT32, spec.eos_id)
    yield Key("tokenizer.ggml.padding_token_id", ValueType.UINT32, spec.pad_id)
    yield Key("tokenizer.ggml.add_bos_token", ValueType.BOOL, False)
    yield Key("tokenizer.ggml.add_eos_token", ValueType.BOOL, True)
    yield from _normalizer(path)


def _normalizer(path: Path) -> Iterator[Key]:
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    normalizer = proto.normalizer_spec
    yield Key("tokenizer.ggml.add_space_prefix", ValueType.BOOL, normalizer.add_dummy_prefix)
    yield Key("tokenizer.ggml.remove_extra_whitespaces", ValueType.BOOL, normalizer.remove_extra_whitespaces)


def _piece_type(model: sentencepiece.SentencePieceProcessor, i: int) -> int:
    """llama.cpp's llama_token_type: normal 1, unknown 2, control 3, unused 5, byte 6."""
    kinds: Sequence[tuple[bool, int]] = (
        (model.is_unknown(i), 2),
        (model.is_control(i), 3),
        (model.is_unused(i), 5),
        (model.is_byte(i), 6),
    )
    return next((number for is_it, number in kinds if is_it), 1)


def _scoring(job: PartJob) -> Iterator[Key]:
    """What turns a cosine into a logit: exp(scale) · cosine + bias."""
    for name, value in job.checkpoint.scalars().items():
        yield Key(f"siglip.{name}", ValueType.FLOAT32, value)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw
