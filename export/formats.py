"""The exporters by format, and the matrix of what they can build."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from medge.errors import MissingExtraError, UnsupportedError, UsageError, require
from medge.export.base import Exporter, Support
from medge.manifest import Format
from medge.quantize.scheme import Scheme, load, names
from medge.registry import MODELS, family
from medge.spec import ModelSpec

FORMATS: tuple[str, ...] = get_args(Format)


def find(format: str) -> Exporter:
    """The exporter of a format.

    Raises:
        UsageError: no such format.
        UnsupportedError: medge knows the format, and has no exporter for it yet.
        MissingExtraError: the format's extra is not installed.
    """
    if format not in FORMATS:
        raise UsageError(f"'{format}' is no format", f"Formats: {', '.join(FORMATS)}")
    if format != "onnx":
        raise UnsupportedError(_no_exporter(format), "Use --format onnx")
    require("onnx", "export")
    from medge.export.onnx import OnnxExporter

    return OnnxExporter()


def _no_exporter(format: str) -> str:
    return f"medge has no {format} exporter yet"


def require_support(exporter: Exporter, spec: ModelSpec, scheme: Scheme) -> None:
    """Every part can be built.

    Raises:
        UnsupportedError: one cannot, with its reason.
    """
    for part in spec.parts:
        support = exporter.supports(spec, part, scheme)
        if not support.ok:
            raise UnsupportedError(support.reason, "See: medge targets")


@dataclass(frozen=True)
class Target:
    """A cell of the matrix."""

    model: str
    format: str
    scheme: str
    support: Support


def targets() -> Iterator[Target]:
    """Every model x format x scheme, each buildable or with the reason why not."""
    for model in MODELS.values():
        for format in FORMATS:
            for scheme in names():
                yield Target(model.id, format, scheme, _support(model.id, format, scheme))


def _support(model_id: str, format: str, scheme: str) -> Support:
    try:
        built = family(MODELS[model_id].model_type)
        require_support(find(format), built.spec(built.configs["full"], id=model_id), load(scheme))
    except (UnsupportedError, MissingExtraError) as error:
        return Support(False, error.message)
    return Support(True)
