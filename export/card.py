"""What an artifact says of itself to people: model card and NOTICE."""

from __future__ import annotations

from importlib.resources import files

from medge import __version__
from medge.manifest import Manifest
from medge.registry import HAI_DEF, HAI_DEF_NOTICE, HAI_DEF_TERMS


def model_card(manifest: Manifest, title: str) -> str:
    """README.md of an artifact, in Markdown."""
    from jinja2 import Environment, StrictUndefined

    template = (files("medge.export") / "templates" / "card.md").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701 - Markdown, not HTML
    )
    card: str = environment.from_string(template).render(
        m=manifest, title=title, version=__version__, hai_def=manifest.licence == HAI_DEF, terms=HAI_DEF_TERMS
    )
    return card


def notice(licence: str) -> str:
    """NOTICE of an artifact: the terms that a Model Derivative passes on."""
    modified = "The weights in this folder were converted and may be quantized by medge: they are modified files.\n"
    if licence != HAI_DEF:
        return modified + "They carry the licence of their source checkpoint.\n"
    return (
        f"{HAI_DEF_NOTICE}\n\n{modified}This folder is a Model Derivative under those terms. Whoever receives it is "
        f"bound by their use restrictions, the Prohibited Use Policy linked there included:\n{HAI_DEF_TERMS}\n"
    )
