"""The models that medge knows by name, and the families that it can read from a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from medge.errors import CorruptError, UnsupportedError, UsageError
from medge.models import siglip
from medge.spec import ModelSpec

HAI_DEF_TERMS = "https://developers.google.com/health-ai-developer-foundations/terms"
HAI_DEF_NOTICE = (
    "HAI-DEF is provided under and subject to the Health AI Developer Foundations Terms of Use found at "
    + HAI_DEF_TERMS
)
HAI_DEF = "HAI-DEF"


@dataclass(frozen=True)
class Family:
    """One architecture: how a config.json becomes a ModelSpec."""

    spec: Callable[..., ModelSpec]
    configs: Mapping[str, Mapping[str, Any]]
    """"tiny" and "full" configs for `medge synth`."""


@dataclass(frozen=True)
class Model:
    """A published checkpoint."""

    id: str
    hub_id: str
    revision: str
    model_type: str
    licence: str = HAI_DEF


FAMILIES: dict[str, Family] = {
    "siglip": Family(siglip.spec, {"full": siglip.FULL, "tiny": siglip.TINY}),
}

MODELS: dict[str, Model] = {
    model.id: model
    for model in (
        Model("medsiglip-448", "google/medsiglip-448", "main", "siglip"),
        Model("medgemma-4b-it", "google/medgemma-4b-it", "main", "gemma3"),
        Model("medgemma-1.5-4b-it", "google/medgemma-1.5-4b-it", "main", "gemma3"),
        Model("medgemma-27b-it", "google/medgemma-27b-it", "main", "gemma3"),
        Model("medgemma-27b-text-it", "google/medgemma-27b-text-it", "main", "gemma3_text"),
    )
}


def find(model_id: str) -> Model:
    """A model by its id.

    Raises:
        UsageError: no such model.
    """
    if model_id not in MODELS:
        raise UsageError(f"'{model_id}' is neither a folder nor a known model", f"Known: {', '.join(MODELS)}")
    return MODELS[model_id]


def family(model_type: str) -> Family:
    """The family that reads a config's `model_type`.

    Raises:
        UnsupportedError: none does.
    """
    if model_type not in FAMILIES:
        raise UnsupportedError(f"medge reads no {model_type} checkpoints yet", f"It reads: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def spec_of(config: Mapping[str, Any], name: str) -> ModelSpec:
    """The ModelSpec of a config.json, under its published id when its tensors are those of that model.

    Raises:
        UnsupportedError: an unknown architecture.
        CorruptError: the config contradicts itself.
    """
    built = family(str(config.get("model_type")))
    try:
        spec = built.spec(config, id=name)
        published = next((m for m in MODELS.values() if _same(built, m, spec)), None)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptError(f"config.json of '{name}' is invalid at '{where}': {first['msg']}") from None
    if published is None:
        return spec
    return built.spec(config, id=published.id, hub_id=published.hub_id, revision=published.revision)


def _same(built: Family, model: Model, spec: ModelSpec) -> bool:
    """Whether a checkpoint has the published model's tensors, and so its id and licence."""
    if FAMILIES.get(model.model_type) is not built:
        return False
    return dict(built.spec(built.configs["full"], id=model.id).tensors) == dict(spec.tensors)


def licence_of(spec: ModelSpec) -> str:
    """The licence that a model's derivatives carry; a user's own checkpoint carries his own."""
    return MODELS[spec.id].licence if spec.id in MODELS else "as the source checkpoint"
