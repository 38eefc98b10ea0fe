"""The spec against transformers' own model: names and shapes of every tensor, at both sizes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from medge.models.siglip import FULL, TINY, SiglipConfig, spec, tensors


@pytest.mark.parametrize("config", [TINY, FULL], ids=["tiny", "full"])
def test_tensors_are_those_of_transformers(config: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from transformers import SiglipConfig as Reference
    from transformers import SiglipModel

    with torch.device("meta"):
        state = SiglipModel(Reference.from_dict(config)).state_dict()
    assert tensors(SiglipConfig.model_validate(config)) == {name: tuple(x.shape) for name, x in state.items()}


@pytest.mark.parametrize("config", [TINY, FULL], ids=["tiny", "full"])
def test_parts_state_the_contract(config: dict[str, Any]) -> None:
    built = spec(config, id="x")
    size, width = config["vision_config"]["image_size"], config["vision_config"]["hidden_size"]
    image, text = built.part("image_encoder"), built.part("text_encoder")
    assert image.inputs[0].shape == ("batch", 3, size, size)
    assert image.outputs[0].shape == text.outputs[0].shape == ("batch", width)
    assert text.inputs[0].shape == ("batch", 64)
    assert (built.image.size, built.image.variant, built.tokenizer.length) == (size, "bigvision", 64)


def test_the_tiny_config_keeps_the_full_one_s_pitfalls() -> None:
    for config in (TINY, FULL):
        assert config["vision_config"]["intermediate_size"] % 32
        assert not config["vision_config"]["intermediate_size"] % 16


def test_missing_fields_are_transformers_defaults() -> None:
    theirs = pytest.importorskip("transformers").SiglipConfig()
    ours = SiglipConfig.model_validate({"vision_config": {}, "text_config": {}})
    for tower in ("vision_config", "text_config"):
        for name, value in getattr(ours, tower).model_dump(exclude={"projection_size"}).items():
            assert getattr(getattr(theirs, tower), name) == value, (tower, name)


@pytest.mark.parametrize(
    ("tower", "field", "value"),
    [
        ("vision_config", "hidden_size", 0),
        ("vision_config", "hidden_size", -64),
        ("vision_config", "hidden_size", "wide"),
        ("vision_config", "num_attention_heads", 7),
        ("vision_config", "num_channels", 4),
        ("text_config", "hidden_act", "relu"),
        ("text_config", "vocab_size", 0),
        ("text_config", "num_hidden_layers", 10**9),
    ],
)
def test_a_contradicting_config_is_refused_by_its_field(tower: str, field: str, value: object) -> None:
    with pytest.raises(ValidationError, match="heads" if "heads" in field else field):
        spec({**TINY, tower: {**TINY[tower], field: value}}, id="x")
