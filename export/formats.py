"""The exporters by format, and the matrix of what they can build."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast, get_args

from medge.errors import MissingExtraError, UnsupportedError, UsageError, require_installed
from medge.export.base import Exporter, Support
from medge.manifest import Format
from medge.quantize.scheme import Scheme, load, names
from medge.registry import MODELS
from medge.spec import AnySpec, Part

FORMATS: tuple[str, ...] = get_args(Format)

_EXPORTERS = {
    "onnx": ("medge.export.onnx", "OnnxExporter", "onnx", "export"),
    "executorch": ("medge.export.executorch", "ExecutorchExporter", "executorch", "executorch"),
    "coreml": ("medge.export.coreml", "CoremlExporter", "coremltools", "coreml"),
    "gguf": ("medge.export.gguf", "GgufExporter", "gguf", "gguf"),
}
"""Format -> module, class, the package that it needs, the extra that brings it."""


def find(format: str) -> Exporter:
    """The exporter of a format.

    Raises:
        UsageError: no such format.
        MissingExtraError: the format's extra is not installed.
    """
    if format not in _EXPORTERS:
        raise UsageError(f"'{format}' is no format", f"Formats: {', '.join(FORMATS)}")
    module, name, package, extra = _EXPORTERS[format]
    require_installed("onnx", "export")  # every format's evidence and parity come through it
    require_installed(package, extra)
    return cast("Exporter", getattr(importlib.import_module(module), name)())


def require_support(exporter: Exporter, spec: AnySpec, scheme: Scheme) -> None:
    """Every part can be built.

    Raises:
        UnsupportedError: one cannot, with its reason and the nearest scheme that can.
    """
    for part in exporter.parts(spec):
        known = part.operators in exporter.operators
        support = exporter.supports(spec, part, scheme) if known else _no_graph(part, exporter.format)
        if not support.ok:
            nearest = f"Nearest: --scheme {support.nearest}. " if support.nearest else ""
            raise UnsupportedError(support.reason, f"{nearest}All: medge targets")


def _no_graph(part: Part, format: str) -> Support:
    return Support(False, f"medge has no {format} graph of this model's {part.name} yet")


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
        require_support(find(format), MODELS[model_id].spec(), load(scheme))
    except (UnsupportedError, MissingExtraError) as error:
        return Support(False, error.message)
    return Support(True)


@dataclass(frozen=True)
class Row:
    """Models that one format builds alike: their cells, scheme by scheme."""

    models: tuple[str, ...]
    format: str
    cells: dict[str, Support]

    @property
    def reasons(self) -> dict[str, tuple[str, ...]]:
        """Each reason with the schemes that it refuses."""
        found: dict[str, tuple[str, ...]] = {}
        for scheme, support in self.cells.items():
            if not support.ok:
                found[support.reason] = (*found.get(support.reason, ()), scheme)
        return found


def rows() -> list[Row]:
    """The matrix, models with equal cells in one row."""
    cells: dict[tuple[str, str], dict[str, Support]] = {}
    for target in targets():
        cells.setdefault((target.model, target.format), {})[target.scheme] = target.support
    merged: list[Row] = []
    for (model, format), found in cells.items():
        same = next((row for row in merged if row.format == format and row.cells == found), None)
        if same is None:
            merged.append(Row((model,), format, found))
        else:
            merged[merged.index(same)] = Row((*same.models, model), format, found)
    return merged
