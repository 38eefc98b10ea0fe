"""SigLIP dual encoders: MedSigLIP-448 (so400m), and any checkpoint of the same architecture.

Sources: the SigLIP paper (arXiv:2303.15343), transformers' modeling_siglip.py, and the MedSigLIP model card.
MedSigLIP: 448 px, patch 14, 1,024 tokens; 27 layers of 1152 in each tower, 16 heads, MLP 4304; the image
tower is pooled by attention with one learned query (MAP head), the text tower by its last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from medge.spec import (
    BuildOptions,
    FloatArray,
    ImageSpec,
    ModelSpec,
    Ops,
    Part,
    Read,
    TensorSpec,
    TokenizerSpec,
    Weight,
)

V = TypeVar("V")


class TowerConfig(BaseModel):
    """What both towers share; Hugging Face's names and defaults."""

    model_config = ConfigDict(extra="ignore")

    hidden_size: int = Field(default=768, gt=0)
    intermediate_size: int = Field(default=3072, gt=0)
    num_hidden_layers: int = Field(default=12, gt=0, le=1000)
    num_attention_heads: int = Field(default=12, gt=0)
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"

    @model_validator(mode="after")
    def _consistent(self) -> TowerConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if self.hidden_act != "gelu_pytorch_tanh":
            raise ValueError(f"hidden_act '{self.hidden_act}': SigLIP has gelu_pytorch_tanh")
        return self


class VisionConfig(TowerConfig):
    """The image tower."""

    image_size: int = Field(default=224, gt=0)
    patch_size: int = Field(default=16, gt=0)
    num_channels: Literal[3] = 3

    @property
    def tokens(self) -> int:
        """Patches an image."""
        return (self.image_size // self.patch_size) ** 2


class TextConfig(TowerConfig):
    """The text tower."""

    vocab_size: int = Field(default=32000, gt=0)
    max_position_embeddings: int = Field(default=64, gt=0)
    projection_size: int | None = None

    @property
    def projection(self) -> int:
        """Width of the text embedding."""
        return self.projection_size or self.hidden_size


class SiglipConfig(BaseModel):
    """config.json of a SiglipModel."""

    model_config = ConfigDict(extra="ignore")

    model_type: str = "siglip"
    vision_config: VisionConfig
    text_config: TextConfig


_SO400M: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
FULL: dict[str, Any] = {
    "architectures": ["SiglipModel"],
    "model_type": "siglip",
    "vision_config": {
        "model_type": "siglip_vision_model",
        **_SO400M,
        "num_attention_heads": 16,
        "image_size": 448,
        "patch_size": 14,
    },
    "text_config": {
        "model_type": "siglip_text_model",
        **_SO400M,
        "num_attention_heads": 16,
        "vocab_size": 32000,
        "max_position_embeddings": 64,
        "projection_size": 1152,
    },
}
"""MedSigLIP-448's config, in the keys that matter."""

_TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 240,  # 16 * 15: no block of 32 divides it, as none divides 4304
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY: dict[str, Any] = {
    **FULL,
    "vision_config": {**FULL["vision_config"], **_TINY, "image_size": 56},
    "text_config": {**FULL["text_config"], **_TINY, "projection_size": 64},
}
"""The same architecture with the same pitfalls, small enough for a unit test."""


def _linear(read: Read, name: str) -> tuple[Weight, Weight]:
    return read(f"{name}.weight"), read(f"{name}.bias")


def _pad_rows(multiple: int, x: FloatArray) -> FloatArray:
    return np.pad(x, [(0, -len(x) % multiple)] + [(0, 0)] * (x.ndim - 1))


def _pad_columns(multiple: int, x: FloatArray) -> FloatArray:
    return np.pad(x, [(0, 0), (0, -x.shape[1] % multiple)])


def _mlp(ops: Ops[V], read: Read, x: V, at: str, options: BuildOptions) -> V:
    rows, columns = (partial(pad, options.mlp_multiple) for pad in (_pad_rows, _pad_columns))
    w1, b1 = (w.map(w.name, rows) for w in _linear(read, f"{at}.fc1"))
    w2, b2 = _linear(read, f"{at}.fc2")
    (hidden,) = ops.linears(x, {f"{at}.fc1": (w1, b1)})
    hidden = ops.gelu_tanh(hidden, f"{at}.gelu")
    (out,) = ops.linears(hidden, {f"{at}.fc2": (w2.map(w2.name, columns), b2)})
    return out


def _norm(ops: Ops[V], read: Read, x: V, at: str, eps: float) -> V:
    return ops.layer_norm(x, *_linear(read, at), eps, at)


def _block(ops: Ops[V], read: Read, x: V, at: str, config: TowerConfig, options: BuildOptions) -> V:
    attn = f"{at}.self_attn"
    y = _norm(ops, read, x, f"{at}.layer_norm1", config.layer_norm_eps)
    layers: dict[str, tuple[Weight, Weight | None]] = {
        f"{attn}.{n}": _linear(read, f"{attn}.{n}") for n in ("q_proj", "k_proj", "v_proj")
    }
    # The key's bias adds the same to all scores of a query, and softmax drops it: exact, and one operation less.
    layers[f"{attn}.k_proj"] = (read(f"{attn}.k_proj.weight"), None)
    q, k, v = ops.linears(y, layers)
    y = ops.attention(q, k, v, config.num_attention_heads, config.hidden_size, attn)
    (y,) = ops.linears(y, {f"{attn}.out_proj": _linear(read, f"{attn}.out_proj")})
    x = ops.add(x, y, f"{at}.residual1")
    y = _norm(ops, read, x, f"{at}.layer_norm2", config.layer_norm_eps)
    return ops.add(x, _mlp(ops, read, y, f"{at}.mlp", options), f"{at}.residual2")


def _encoder(ops: Ops[V], read: Read, x: V, tower: str, config: TowerConfig, options: BuildOptions) -> V:
    for i in range(config.num_hidden_layers):
        x = _block(ops, read, x, f"{tower}.encoder.layers.{i}", config, options)
    return x


def _map_head(ops: Ops[V], read: Read, x: V, config: VisionConfig, options: BuildOptions) -> V:
    """Multi-head attention pooling. Its query is a constant, so all that leads to the scores folds into one matrix."""
    at, d = "vision_model.head", config.hidden_size
    weight, bias = read(f"{at}.attention.in_proj_weight"), read(f"{at}.attention.in_proj_bias")
    probe = read(f"{at}.probe")

    def fold(p: FloatArray) -> FloatArray:
        """(D, H): key projection times query, by head. The key's bias shifts all scores of a head: softmax drops it."""
        w, heads = weight.read(), config.num_attention_heads
        query = (p.reshape(d) @ w[:d].T + bias.read()[:d]).reshape(heads, -1)
        keys = w[d : 2 * d].reshape(heads, -1, d)
        return np.asarray(np.einsum("hde,hd->eh", keys, query) * (d // heads) ** -0.5, np.float32)

    scores = probe.map(f"{at}.attention.scores", fold)
    name = f"{at}.attention.v_proj"
    value = (weight.map(f"{name}.weight", lambda w: w[2 * d :]), bias.map(f"{name}.bias", lambda b: b[2 * d :]))
    y = ops.attention_pool(x, scores, value, f"{at}.attention")
    (y,) = ops.linears(y, {f"{at}.attention.out_proj": _linear(read, f"{at}.attention.out_proj")})
    z = _norm(ops, read, y, f"{at}.layernorm", config.layer_norm_eps)
    y = ops.add(y, _mlp(ops, read, z, f"{at}.mlp", options), f"{at}.residual")
    return ops.token(y, 0, f"{at}.pooled")


def image_states(ops: Ops[V], pixels: V, read: Read, tower: str, config: VisionConfig, options: BuildOptions) -> V:
    """(B, 3, S, S) in [-1, 1] -> (B, N, D): the normalized states of all patches, before any pooling.

    `tower` is the checkpoint's prefix of the image tower.
    """
    at = f"{tower}.embeddings"
    x = ops.patches(pixels, *_linear(read, f"{at}.patch_embedding"), f"{at}.patch_embedding")
    x = ops.add_weight(x, read(f"{at}.position_embedding.weight"), f"{at}.position_embedding")
    x = _encoder(ops, read, x, tower, config, options)
    return _norm(ops, read, x, f"{tower}.post_layernorm", config.layer_norm_eps)


def image_encoder(
    ops: Ops[V], inputs: Mapping[str, V], read: Read, options: BuildOptions, *, config: VisionConfig
) -> V:
    """pixel_values (B, 3, S, S) in [-1, 1] -> image_embeds (B, D), not normalized."""
    x = image_states(ops, inputs["pixel_values"], read, "vision_model", config, options)
    return _map_head(ops, read, x, config, options)


def text_encoder(ops: Ops[V], inputs: Mapping[str, V], read: Read, options: BuildOptions, *, config: TextConfig) -> V:
    """input_ids (B, 64), always padded to the full length, no mask -> text_embeds (B, D), not normalized."""
    at = "text_model.embeddings"
    x = ops.embedding(inputs["input_ids"], read(f"{at}.token_embedding.weight"), f"{at}.token_embedding")
    x = ops.add_weight(x, read(f"{at}.position_embedding.weight"), f"{at}.position_embedding")
    x = _encoder(ops, read, x, "text_model", config, options)
    x = ops.token(x, -1, "text_model.last_token")  # a layer norm acts on each token alone: pool first
    x = _norm(ops, read, x, "text_model.final_layer_norm", config.layer_norm_eps)
    (x,) = ops.linears(x, {"text_model.head": _linear(read, "text_model.head")})
    return x


def _linear_shapes(name: str, out: int, inp: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, inp)
    yield f"{name}.bias", (out,)


def _norm_shapes(name: str, d: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (d,)
    yield f"{name}.bias", (d,)


def _mlp_shapes(at: str, config: TowerConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _linear_shapes(f"{at}.fc1", config.intermediate_size, config.hidden_size)
    yield from _linear_shapes(f"{at}.fc2", config.hidden_size, config.intermediate_size)


def _encoder_shapes(tower: str, config: TowerConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    d = config.hidden_size
    for i in range(config.num_hidden_layers):
        at = f"{tower}.encoder.layers.{i}"
        yield from _norm_shapes(f"{at}.layer_norm1", d)
        for n in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear_shapes(f"{at}.self_attn.{n}", d, d)
        yield from _norm_shapes(f"{at}.layer_norm2", d)
        yield from _mlp_shapes(f"{at}.mlp", config)


def vision_shapes(config: VisionConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The image tower's tensors, pooling head included."""
    d, at = config.hidden_size, "vision_model.embeddings"
    yield f"{at}.patch_embedding.weight", (d, config.num_channels, config.patch_size, config.patch_size)
    yield f"{at}.patch_embedding.bias", (d,)
    yield f"{at}.position_embedding.weight", (config.tokens, d)
    yield from _encoder_shapes("vision_model", config)
    yield from _norm_shapes("vision_model.post_layernorm", d)
    yield "vision_model.head.probe", (1, 1, d)
    yield "vision_model.head.attention.in_proj_weight", (3 * d, d)
    yield "vision_model.head.attention.in_proj_bias", (3 * d,)
    yield from _linear_shapes("vision_model.head.attention.out_proj", d, d)
    yield from _norm_shapes("vision_model.head.layernorm", d)
    yield from _mlp_shapes("vision_model.head.mlp", config)


def _text_shapes(config: TextConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, at = config.hidden_size, "text_model.embeddings"
    yield f"{at}.token_embedding.weight", (config.vocab_size, d)
    yield f"{at}.position_embedding.weight", (config.max_position_embeddings, d)
    yield from _encoder_shapes("text_model", config)
    yield from _norm_shapes("text_model.final_layer_norm", d)
    yield from _linear_shapes("text_model.head", config.projection, d)


def tensors(config: SiglipConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, with its shape, in the order of the file."""
    scalars = {"logit_scale": (1,), "logit_bias": (1,)}
    return scalars | dict(_text_shapes(config.text_config)) | dict(vision_shapes(config.vision_config))


def blocks(tower: str, config: TowerConfig) -> dict[str, str]:
    """Where each module of the checkpoint ends among the operations."""
    layers = (f"{tower}.encoder.layers.{i}" for i in range(config.num_hidden_layers))
    return {
        f"{tower}.embeddings.position_embedding": f"{tower}.embeddings",
        **{f"{layer}.residual2": layer for layer in layers},
    }


def _parts(config: SiglipConfig) -> tuple[Part, Part]:
    vision, text = config.vision_config, config.text_config
    pixels = (vision.num_channels, vision.image_size, vision.image_size)
    return (
        Part(
            "image_encoder",
            (TensorSpec(name="pixel_values", dtype="float32", shape=("batch", *pixels)),),
            (TensorSpec(name="image_embeds", dtype="float32", shape=("batch", vision.hidden_size)),),
            vision.tokens,
            partial(image_encoder, config=vision),
            blocks=blocks("vision_model", vision) | {"vision_model.post_layernorm": "vision_model.post_layernorm"},
        ),
        Part(
            "text_encoder",
            (TensorSpec(name="input_ids", dtype="int64", shape=("batch", text.max_position_embeddings)),),
            (TensorSpec(name="text_embeds", dtype="float32", shape=("batch", text.projection)),),
            text.max_position_embeddings,
            partial(text_encoder, config=text),
            blocks=blocks("text_model", text),
        ),
    )


def spec(
    config: Mapping[str, Any],
    *,
    id: str,
    hub_id: str = "",
    revision: str = "main",
    variant: str = "bigvision",
) -> ModelSpec:
    """The ModelSpec of a SiglipModel config.json.

    Raises:
        pydantic.ValidationError: a field is missing or contradicts another.
    """
    parsed = SiglipConfig.model_validate(config)
    return ModelSpec(
        id=id,
        hub_id=hub_id,
        revision=revision,
        parts=_parts(parsed),
        tensors=tensors(parsed),
        image=ImageSpec.model_validate({"size": parsed.vision_config.image_size, "variant": variant}),
        tokenizer=TokenizerSpec(length=parsed.text_config.max_position_embeddings),
        config=dict(config),
        scalars={"logit_scale": "logit_scale", "logit_bias": "logit_bias"},
    )
