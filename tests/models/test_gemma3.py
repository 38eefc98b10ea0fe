"""The spec against transformers' own models: names and shapes of every tensor, at every size."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from medge.errors import CorruptError
from medge.models import gemma3
from medge.models.gemma3 import CONFIG_4B, CONFIG_27B, CONFIG_27B_TEXT, TINY, TINY_TEXT, Gemma3Config, TextConfig
from medge.registry import FAMILIES, spec_of

MULTIMODAL = pytest.mark.parametrize("config", [TINY, CONFIG_4B, CONFIG_27B], ids=["tiny", "4b", "27b"])


def shapes(model: Any, canonical: Any, tied: frozenset[str]) -> dict[str, tuple[int, ...]]:
    found = {canonical(name): tuple(x.shape) for name, x in model.state_dict().items()}
    return {name: shape for name, shape in found.items() if name not in tied}


@MULTIMODAL
def test_tensors_are_those_of_transformers(config: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Gemma3Config as Reference
    from transformers import Gemma3ForConditionalGeneration

    family = FAMILIES["gemma3"]
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Reference.from_dict(config))
    assert dict(spec_of(config, "x").tensors) == shapes(model, family.canonical, family.tied)


@pytest.mark.parametrize("config", [TINY_TEXT, CONFIG_27B_TEXT], ids=["tiny", "27b"])
def test_text_tensors_are_those_of_transformers(config: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    family = FAMILIES["gemma3_text"]
    with torch.device("meta"):
        model = Gemma3ForCausalLM(Gemma3TextConfig.from_dict(config))
    assert dict(spec_of(config, "x").tensors) == shapes(model, family.canonical, family.tied)


@pytest.mark.parametrize(
    ("config", "id", "billions"),
    [
        (CONFIG_4B, "medgemma-4b-it", 4.3),
        (CONFIG_27B, "medgemma-27b-it", 27.4),
        (CONFIG_27B_TEXT, "medgemma-27b-text-it", 27.0),
    ],
)
def test_full_sizes_get_their_published_id(config: dict[str, Any], id: str, billions: float) -> None:
    spec = spec_of(config, "folder")
    assert spec.id == id
    assert round(spec.parameters / 1e9, 1) == billions


@MULTIMODAL
def test_the_tower_averages_to_256_tokens(config: dict[str, Any]) -> None:
    parsed = Gemma3Config.model_validate(config)
    spec = gemma3.spec(config, id="x")
    assert spec.part("vision").outputs[0].shape == ("batch", 256, parsed.text_config.hidden_size)
    assert spec.image is not None
    assert spec.image.size == 896
    assert [part.name for part in spec.parts] == ["decoder", "embedding", "vision"]


def test_the_tiny_config_keeps_the_full_one_s_pitfalls() -> None:
    tiny, full = (TextConfig.model_validate(c["text_config"]) for c in (TINY, CONFIG_4B))
    assert tiny.num_hidden_layers >= tiny.sliding_window_pattern == full.sliding_window_pattern == 6
    assert tiny.sliding_window >= 512
    assert tiny.rope_scaling == full.rope_scaling
    assert tiny.num_attention_heads // tiny.num_key_value_heads == full.num_attention_heads // full.num_key_value_heads
    assert TINY["vision_config"]["intermediate_size"] % 32
    assert TINY["image_token_index"] == TINY["text_config"]["vocab_size"] - 1


def test_missing_fields_are_transformers_defaults() -> None:
    theirs = pytest.importorskip("transformers").Gemma3TextConfig()
    for name, value in TextConfig().model_dump(exclude={"sliding_window_pattern"}).items():
        assert getattr(theirs, name) == value, name


def test_layer_types_give_the_period() -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    assert TextConfig(num_hidden_layers=6, layer_types=kinds).sliding_window_pattern == 3
    with pytest.raises(ValidationError, match="no regular alternation"):
        TextConfig(num_hidden_layers=6, layer_types=kinds[::-1])


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("model.vision_tower.vision_model.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", "multi_modal_projector.mm_soft_emb_norm.weight"),
        ("language_model.model.norm.weight", "language_model.model.norm.weight"),
    ],
)
def test_both_spellings_of_a_name_are_one(name: str, canonical: str) -> None:
    assert gemma3.canonical(name) == canonical


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 5),
        ("head_dim", 0),
        ("rope_scaling", {"rope_type": "yarn", "factor": 8.0}),
        ("hidden_activation", "gelu"),
        ("attention_bias", True),
        ("num_hidden_layers", 10**9),
    ],
)
def test_what_contradicts_the_architecture_is_refused(field: str, value: Any) -> None:
    with pytest.raises(CorruptError, match="of 'x' is invalid at"):
        spec_of({**TINY_TEXT, field: value}, "x")
