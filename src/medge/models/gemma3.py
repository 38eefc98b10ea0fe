"""Gemma 3: MedGemma 4B, 1.5 4B and 27B (with a SigLIP image tower), and 27B text.

Sources: the Gemma 3 report (arXiv:2503.19786), transformers' modeling_gemma3.py, and the MedGemma model card.
MedGemma 4B: 34 layers of 2560, MLP 10240, 8 query and 4 key heads of 256, five of six layers see a window of
1,024 tokens; an image is 896 px, 4,096 patches, averaged 4 x 4 to 256 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from medge.models import gemma3_graph, siglip
from medge.models.gemma3_graph import PROJECTOR, TOWER
from medge.spec import ChatFormat, ChatSpec, DecoderOps, ImageSpec, Part, ProjectorOps, TensorSpec

TEXT_PREFIX = "language_model.model."
"""Where the multimodal checkpoints keep the text model."""
TEXT_ONLY_PREFIX = "model."
"""Where those without an image tower keep it."""
TIED_HEAD = "language_model.lm_head.weight"
"""The output matrix, which some writers store a second time: it is the embedding table."""

_ALIASES = {
    "model.language_model.": TEXT_PREFIX,
    "model.vision_tower.": TOWER,
    "model.multi_modal_projector.": PROJECTOR,
}
"""Names that transformers 4.52 and later write, and the hub's own."""


class RopeScaling(BaseModel):
    """Linear stretching of the positions of full-attention layers."""

    model_config = ConfigDict(extra="ignore")

    rope_type: Literal["linear"]
    factor: float = Field(gt=0)


class TextConfig(BaseModel):
    """The decoder; Hugging Face's names and defaults."""

    model_config = ConfigDict(extra="ignore")

    vocab_size: int = Field(default=262208, gt=0)
    hidden_size: int = Field(default=2304, gt=0)
    intermediate_size: int = Field(default=9216, gt=0)
    num_hidden_layers: int = Field(default=26, gt=0, le=1000)
    num_attention_heads: int = Field(default=8, gt=0)
    num_key_value_heads: int = Field(default=4, gt=0)
    head_dim: int = Field(default=256, gt=0)
    query_pre_attn_scalar: float = Field(default=256, gt=0)
    max_position_embeddings: int = Field(default=131072, gt=0)
    rms_norm_eps: float = 1e-6
    rope_theta: float = Field(default=1e6, gt=0)
    rope_local_base_freq: float = Field(default=1e4, gt=0)
    rope_scaling: RopeScaling | None = None
    sliding_window: int = Field(default=4096, gt=0)
    sliding_window_pattern: int = Field(default=6, gt=0)
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    attention_bias: Literal[False] = False

    @field_validator("sliding_window_pattern", mode="before")
    @classmethod
    def _pattern(cls, value: Any) -> Any:
        return 6 if value is None else value

    @model_validator(mode="before")
    @classmethod
    def _layer_types(cls, raw: Any) -> Any:
        """Newer configs list each layer's kind where older ones give the period."""
        kinds = raw.get("layer_types") if isinstance(raw, dict) else None
        if not kinds:
            return raw
        period = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
        expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(kinds))]
        if kinds != expected or len(kinds) != raw.get("num_hidden_layers", len(kinds)):
            raise ValueError("layer_types is no regular alternation of sliding and full attention")
        return {**raw, "sliding_window_pattern": period}

    @model_validator(mode="after")
    def _consistent(self) -> TextConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            heads, keys = self.num_attention_heads, self.num_key_value_heads
            raise ValueError(f"{heads} query heads are no multiple of {keys} key heads")
        return self


class VisionConfig(siglip.VisionConfig):
    """The image tower, without the pooling head."""

    vision_use_head: bool = False


class Gemma3Config(BaseModel):
    """config.json of a Gemma3ForConditionalGeneration."""

    model_config = ConfigDict(extra="ignore")

    text_config: TextConfig
    vision_config: VisionConfig
    mm_tokens_per_image: int = Field(default=256, gt=0)
    boi_token_index: int = 255999
    eoi_token_index: int = 256000
    image_token_index: int = 262144

    @model_validator(mode="after")
    def _consistent(self) -> Gemma3Config:
        side = round(self.mm_tokens_per_image**0.5)
        patches = self.vision_config.image_size // self.vision_config.patch_size
        if side * side != self.mm_tokens_per_image or patches % side:
            raise ValueError(f"{patches} x {patches} patches do not average to {self.mm_tokens_per_image} tokens")
        return self


def canonical(name: str) -> str:
    """A tensor's name as the hub's checkpoints write it."""
    for newer, own in _ALIASES.items():
        if name.startswith(newer):
            return own + name.removeprefix(newer)
    return name


def text_tensors(config: TextConfig, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The decoder's tensors. The output matrix is the embedding table, so it is no tensor of its own."""
    d, mlp, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (d,),
        "mlp.down_proj": (d, mlp),
        "mlp.gate_proj": (mlp, d),
        "mlp.up_proj": (mlp, d),
        "post_attention_layernorm": (d,),
        "post_feedforward_layernorm": (d,),
        "pre_feedforward_layernorm": (d,),
        "self_attn.k_norm": (head,),
        "self_attn.k_proj": (keys, d),
        "self_attn.o_proj": (d, queries),
        "self_attn.q_norm": (head,),
        "self_attn.q_proj": (queries, d),
        "self_attn.v_proj": (keys, d),
    }
    yield f"{prefix}embed_tokens.weight", (config.vocab_size, d)
    for i in range(config.num_hidden_layers):
        for name, shape in shapes.items():
            yield f"{prefix}layers.{i}.{name}.weight", shape
    yield f"{prefix}norm.weight", (d,)


def image_tensors(config: Gemma3Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Projector and image tower."""
    vision, width = config.vision_config, config.text_config.hidden_size
    yield f"{PROJECTOR}mm_input_projection_weight", (vision.hidden_size, width)
    yield f"{PROJECTOR}mm_soft_emb_norm.weight", (vision.hidden_size,)
    for name, shape in siglip.vision_shapes(vision):
        if not name.startswith("vision_model.head."):
            yield TOWER + name, shape


def tensors(config: Gemma3Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a multimodal checkpoint."""
    return dict([*text_tensors(config.text_config, TEXT_PREFIX), *image_tensors(config)])


_ROPE = {"rope_type": "linear", "factor": 8.0}
_SO400M_896 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}
_TEXT_4B: dict[str, Any] = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "vocab_size": 262208,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "rope_scaling": _ROPE,
    "max_position_embeddings": 131072,
}
_TEXT_27B: dict[str, Any] = {
    **_TEXT_4B,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
}
_TEXT_TINY: dict[str, Any] = {
    **_TEXT_4B,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,  # one whole period: five sliding layers and a full one
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 512,
    "max_position_embeddings": 8192,
}


def _multimodal(text: Mapping[str, Any], vision: Mapping[str, Any] = _SO400M_896, **fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "eos_token_id": [1, 106],
        "tie_word_embeddings": True,
        "text_config": dict(text),
        "vision_config": dict(vision),
        **fields,
    }


CONFIG_4B = _multimodal(_TEXT_4B)
CONFIG_27B = _multimodal(_TEXT_27B)
CONFIG_27B_TEXT: dict[str, Any] = {
    **_TEXT_27B,
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262144,
    "eos_token_id": [1, 106],
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = _multimodal(
    {**_TEXT_TINY, "vocab_size": 2048},
    {
        **_SO400M_896,
        "hidden_size": 64,
        "intermediate_size": 240,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    boi_token_index=6,
    eoi_token_index=7,
    image_token_index=2047,
    eos_token_id=[1, 5],
)
"""The same architecture with the same pitfalls and the small tokenizer's ids, small enough for a unit test."""
TINY_TEXT: dict[str, Any] = {
    **_TEXT_TINY,
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 2048,
    "eos_token_id": [1, 5],
    "tie_word_embeddings": True,
}


def spec(config: Mapping[str, Any], *, id: str, hub_id: str = "", revision: str = "main") -> ChatSpec:
    """The ChatSpec of a Gemma3ForConditionalGeneration config.json.

    Raises:
        pydantic.ValidationError: a field is missing or contradicts another.
    """
    parsed = Gemma3Config.model_validate(config)
    text = parsed.text_config
    return ChatSpec(
        id=id,
        hub_id=hub_id,
        revision=revision,
        parts=(*_text_parts(text, TEXT_PREFIX, images=True), _vision(parsed)),
        tensors=tensors(parsed),
        config=dict(config),
        # Gemma3ImageProcessor: Pillow bilinear, antialiased, no crop: what MedSigLIP's fine-tuning does too
        image=ImageSpec(size=parsed.vision_config.image_size, variant="finetune"),
        chat=ChatFormat(image_tokens=parsed.mm_tokens_per_image, context=text.max_position_embeddings),
    )


def text_spec(config: Mapping[str, Any], *, id: str, hub_id: str = "", revision: str = "main") -> ChatSpec:
    """The ChatSpec of a Gemma3ForCausalLM config.json: no image tower.

    Raises:
        pydantic.ValidationError: a field is missing or contradicts another.
    """
    text = TextConfig.model_validate(config)
    return ChatSpec(
        id=id,
        hub_id=hub_id,
        revision=revision,
        parts=_text_parts(text, TEXT_ONLY_PREFIX, images=False),
        tensors=dict(text_tensors(text, TEXT_ONLY_PREFIX)),
        config=dict(config),
        image=None,
        chat=ChatFormat(context=text.max_position_embeddings),
    )


def _text_parts(config: TextConfig, prefix: str, *, images: bool) -> tuple[Part, Part]:
    """The decoder, and what turns ids into its input: their rows of the table that is also its output matrix."""
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "tokens"))
    embeds = TensorSpec(name="inputs_embeds", dtype="float32", shape=("batch", "tokens", config.hidden_size))
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch", "kept", config.vocab_size))
    length = config.max_position_embeddings
    decoder = partial(gemma3_graph.decoder, config=config, prefix=prefix, images=images)
    embedding = partial(gemma3_graph.token_embeddings, config=config, prefix=prefix)
    return (
        Part("decoder", (embeds,), (logits,), length, decoder, DecoderOps, gemma3_graph.blocks(prefix, config)),
        Part("embedding", (ids,), (embeds,), length, embedding, ProjectorOps),
    )


def _vision(config: Gemma3Config) -> Part:
    vision = config.vision_config
    size = vision.image_size
    pixels = TensorSpec(name="pixel_values", dtype="float32", shape=("batch", vision.num_channels, size, size))
    shape = ("batch", config.mm_tokens_per_image, config.text_config.hidden_size)
    embeds = TensorSpec(name="image_embeds", dtype="float32", shape=shape)
    build = partial(gemma3_graph.image_embeddings, config=config)
    blocks = siglip.blocks(f"{TOWER}vision_model", vision)
    return Part("vision", (pixels,), (embeds,), vision.tokens, build, ProjectorOps, blocks)
