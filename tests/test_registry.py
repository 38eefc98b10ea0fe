"""Models by name, families by config, and who gets whose licence."""

from __future__ import annotations

import pytest

from medge.errors import UnsupportedError, UsageError
from medge.models import gemma3, siglip
from medge.registry import FAMILIES, HAI_DEF, MODELS, family, find, licence_of, spec_of


def test_every_model_is_found_by_its_id() -> None:
    for model_id, model in MODELS.items():
        assert find(model_id) is model
        assert model.hub_id == f"google/{model_id}"
        assert model.licence == HAI_DEF


def test_an_unknown_model_lists_the_known() -> None:
    with pytest.raises(UsageError, match="Known: medsiglip-448, medgemma-4b-it"):
        find("medsiglip")


@pytest.mark.parametrize("model_type", ["gemma4", "", "None"])
def test_an_unknown_family_lists_the_known(model_type: str) -> None:
    with pytest.raises(UnsupportedError, match="It reads: siglip"):
        family(model_type)


def test_full_size_tensors_get_the_published_id_and_licence() -> None:
    spec = spec_of(siglip.FULL, "my-folder")
    assert (spec.id, spec.hub_id) == ("medsiglip-448", "google/medsiglip-448")
    assert licence_of(spec) == HAI_DEF
    assert spec.parameters == 878_300_338  # the model card's 0.9 B


def test_any_other_keeps_its_own_name_and_licence() -> None:
    spec = spec_of(siglip.TINY, "my-folder")
    assert (spec.id, spec.hub_id) == ("my-folder", "")
    assert licence_of(spec) == "as the source checkpoint"


def test_configs_are_of_their_family() -> None:
    for name, built in FAMILIES.items():
        assert built.tiny["model_type"] == name
        assert built.spec(built.tiny, id="x").parameters < 10_000_000
    for model in MODELS.values():
        assert model.config["model_type"] == model.model_type
        assert model.spec().hub_id == model.hub_id


@pytest.mark.parametrize("name", ["medgemma-4b-it", "medgemma-1.5-4b-it", "elsewhere"])
def test_two_models_of_one_shape_are_told_apart_by_name(name: str) -> None:
    expected = name if name in MODELS else "medgemma-4b-it"
    assert spec_of(gemma3.CONFIG_4B, name).id == expected
