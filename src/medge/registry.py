"""The models that medge knows by name, and the families that it can read from a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from medge.errors import CorruptError, UnsupportedError, UsageError
from medge.models import gemma3, siglip
from medge.spec import AnySpec

HAI_DEF_TERMS = "https://developers.google.com/health-ai-developer-foundations/terms"
HAI_DEF_NOTICE = (
    "HAI-DEF is provided under and subject to the Health AI Developer Foundations Terms of Use found at "
    + HAI_DEF_TERMS
)
HAI_DEF = "HAI-DEF"


@dataclass(frozen=True)
class Family:
    """One architecture: how a config.json becomes a spec."""

    spec: Callable[..., AnySpec]
    tiny: Mapping[str, Any]
    """A config for tests."""
    canonical: Callable[[str], str] = lambda name: name
    """A tensor's name as the spec has it; several writers name them differently."""
    tied: frozenset[str] = frozenset()
    """Tensors that some writers repeat: copies of another, by their canonical names."""


@dataclass(frozen=True)
class Model:
    """A published checkpoint."""

    id: str
    hub_id: str
    revision: str
    model_type: str
    config: Mapping[str, Any]
    """Its config.json, in the keys that matter."""
    licence: str = HAI_DEF

    def spec(self) -> AnySpec:
        """Its spec."""
        return FAMILIES[self.model_type].spec(self.config, id=self.id, hub_id=self.hub_id, revision=self.revision)


FAMILIES: dict[str, Family] = {
    "siglip": Family(siglip.spec, siglip.TINY),
    "gemma3": Family(gemma3.spec, gemma3.TINY, gemma3.canonical, frozenset({"lm_head.weight", gemma3.TIED_HEAD})),
    "gemma3_text": Family(gemma3.text_spec, gemma3.TINY_TEXT, tied=frozenset({"lm_head.weight"})),
}

MODELS: dict[str, Model] = {
    model.id: model
    for model in (
        Model("medsiglip-448", "google/medsiglip-448", "main", "siglip", siglip.FULL),
        Model("medgemma-4b-it", "google/medgemma-4b-it", "main", "gemma3", gemma3.CONFIG_4B),
        Model("medgemma-1.5-4b-it", "google/medgemma-1.5-4b-it", "main", "gemma3", gemma3.CONFIG_4B),
        Model("medgemma-27b-it", "google/medgemma-27b-it", "main", "gemma3", gemma3.CONFIG_27B),
        Model("medgemma-27b-text-it", "google/medgemma-27b-text-it", "main", "gemma3_text", gemma3.CONFIG_27B_TEXT),
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


def spec_of(config: Mapping[str, Any], name: str) -> AnySpec:
    """The spec of a config.json, under its published id when its tensors are those of that model.

    Raises:
        UnsupportedError: an unknown architecture.
        CorruptError: the config contradicts itself.
    """
    built = family(str(config.get("model_type")))
    try:
        spec = built.spec(config, id=name)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptError(f"config.json of '{name}' is invalid at '{where}': {first['msg']}") from None
    published = [model for model in MODELS.values() if _same(built, model, spec)]
    if not published:
        return spec
    named = next((model for model in published if model.id == name), published[0])  # 4B and 1.5 4B have one shape
    return built.spec(config, id=named.id, hub_id=named.hub_id, revision=named.revision)


def _same(built: Family, model: Model, spec: AnySpec) -> bool:
    """Whether a checkpoint has the published model's tensors, and so its id and licence."""
    return FAMILIES[model.model_type] is built and dict(model.spec().tensors) == dict(spec.tensors)


def licence_of(spec: AnySpec) -> str:
    """The licence that a model's derivatives carry; a user's own checkpoint carries his own."""
    return MODELS[spec.id].licence if spec.id in MODELS else "as the source checkpoint"
