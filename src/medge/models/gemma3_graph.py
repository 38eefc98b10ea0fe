"""Gemma 3 against `medge.spec.DecoderOps`: image tower and projector, embedding table, decoder.

Source: transformers' modeling_gemma3.py. Every RMSNorm multiplies by 1 + weight; queries and keys are normalized a
head before they are rotated; five of six layers see a window of tokens and rotate with a base of their own; a block
normalizes what it adds to the residual stream as well as what it reads from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from medge.models import siglip
from medge.spec import BuildOptions, CausalAttention, DecoderOps, ProjectorOps, Read, Rope, Weight

if TYPE_CHECKING:
    from medge.models.gemma3 import Gemma3Config, TextConfig

V = TypeVar("V")

TOWER = "vision_tower."
PROJECTOR = "multi_modal_projector."


def image_embeddings(
    ops: ProjectorOps[V], inputs: Mapping[str, V], read: Read, options: BuildOptions, *, config: Gemma3Config
) -> V:
    """pixel_values (B, 3, S, S) in [-1, 1] -> image_embeds (B, tokens, D), which stand among the text's as they are."""
    vision, side = config.vision_config, round(config.mm_tokens_per_image**0.5)
    x = siglip.image_states(ops, inputs["pixel_values"], read, f"{TOWER}vision_model", vision, options)
    square = vision.image_size // vision.patch_size // side
    x = ops.pool(x, side, square, f"{PROJECTOR}pooled")
    norm = f"{PROJECTOR}mm_soft_emb_norm"
    x = ops.rms_norm(x, _gain(read, norm), vision.layer_norm_eps, 1, norm)
    at = f"{PROJECTOR}mm_input_projection"
    matrix = read(f"{at}_weight")  # (in, out): the checkpoint multiplies by it from the right
    (x,) = ops.linears(x, {at: (matrix.map(f"{at}.weight", lambda w: np.ascontiguousarray(w.T)), None)})
    return x


def token_embeddings(
    ops: ProjectorOps[V], inputs: Mapping[str, V], read: Read, options: BuildOptions, *, config: TextConfig, prefix: str
) -> V:
    """input_ids (B, N) -> inputs_embeds (B, N, D), scaled by the square root of D."""
    at = f"{prefix}embed_tokens"
    x = ops.embedding(inputs["input_ids"], read(f"{at}.weight"), at)
    return ops.scale(x, config.hidden_size**0.5, f"{at}.scaled")


def decoder(
    ops: DecoderOps[V],
    inputs: Mapping[str, V],
    read: Read,
    options: BuildOptions,
    *,
    config: TextConfig,
    prefix: str,
    images: bool,
) -> V:
    """inputs_embeds (1, N, D) -> logits (1, kept, vocabulary), given the cache of all tokens before."""
    x = inputs["inputs_embeds"]
    if options.residual_scale != 1:
        x = ops.scale(x, options.residual_scale, f"{prefix}rescaled")
    layers = _Layers(ops, read, config, options.residual_scale, images)
    for i in range(config.num_hidden_layers):
        x = layers(x, f"{prefix}layers.{i}", i)
    x = ops.kept(x, f"{prefix}kept")
    x = layers.reading_norm(x, f"{prefix}norm")
    at = f"{prefix}embed_tokens"
    return ops.logits(x, read(f"{at}.weight"), at)


def blocks(prefix: str, config: TextConfig) -> dict[str, str]:
    """Where each of the decoder's modules ends among the operations."""
    layers = (f"{prefix}layers.{i}" for i in range(config.num_hidden_layers))
    return {f"{layer}.residual2": layer for layer in layers}


class _Layers(Generic[V]):
    """Builds the decoder's layers, which differ in their attention alone."""

    def __init__(self, ops: DecoderOps[V], read: Read, config: TextConfig, scale: float, images: bool) -> None:
        self._ops, self._read, self._config, self._scale, self._images = ops, read, config, scale, images

    def __call__(self, x: V, at: str, index: int) -> V:
        y = self._attention(self.reading_norm(x, f"{at}.input_layernorm"), f"{at}.self_attn", index)
        y = self._writing_norm(y, f"{at}.post_attention_layernorm")
        x = self._ops.add(x, y, f"{at}.residual1")
        y = self._mlp(self.reading_norm(x, f"{at}.pre_feedforward_layernorm"), f"{at}.mlp")
        y = self._writing_norm(y, f"{at}.post_feedforward_layernorm")
        return self._ops.add(x, y, f"{at}.residual2")

    def reading_norm(self, x: V, at: str) -> V:
        """Of the residual stream: its scale cancels, if eps has it too."""
        eps = self._config.rms_norm_eps * self._scale**2
        return self._ops.rms_norm(x, _gain(self._read, at), eps, 1, at)

    def _writing_norm(self, x: V, at: str) -> V:
        """Of what is added to the residual stream, in that stream's scale."""
        return self._ops.rms_norm(x, _gain(self._read, at, self._scale), self._config.rms_norm_eps, 1, at)

    def _attention(self, x: V, at: str, index: int) -> V:
        layer, eps = self._layer(index), self._config.rms_norm_eps
        names = [f"{at}.{n}_proj" for n in "qkv"]
        q, k, v = self._ops.linears(x, {name: (self._read(f"{name}.weight"), None) for name in names})
        q = self._ops.rms_norm(q, _gain(self._read, f"{at}.q_norm"), eps, layer.heads, f"{at}.q_norm")
        k = self._ops.rms_norm(k, _gain(self._read, f"{at}.k_norm"), eps, layer.key_heads, f"{at}.k_norm")
        return self._linear(self._ops.causal_attention(q, k, v, layer, at), f"{at}.o_proj")

    def _layer(self, index: int) -> CausalAttention:
        config = self._config
        full = (index + 1) % config.sliding_window_pattern == 0
        factor = config.rope_scaling.factor if config.rope_scaling else 1.0
        return CausalAttention(
            layer=index,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_width=config.head_dim,
            scale=config.query_pre_attn_scalar**-0.5,
            rope=Rope(config.rope_theta, factor) if full else Rope(config.rope_local_base_freq),
            window=None if full else config.sliding_window,
            images=self._images,
        )

    def _mlp(self, x: V, at: str) -> V:
        names = [f"{at}.gate_proj", f"{at}.up_proj"]
        gate, up = self._ops.linears(x, {name: (self._read(f"{name}.weight"), None) for name in names})
        gate = self._ops.gelu_tanh(gate, f"{at}.gelu")
        return self._linear(self._ops.multiply(gate, up, f"{at}.gated"), f"{at}.down_proj")

    def _linear(self, x: V, at: str) -> V:
        (y,) = self._ops.linears(x, {at: (self._read(f"{at}.weight"), None)})
        return y


def _gain(read: Read, at: str, scale: float = 1.0) -> Weight:
    """An RMSNorm's 1 + weight."""
    return read(f"{at}.weight").map(f"{at}.weight", lambda w: (w + np.float32(1)) * np.float32(scale))
