"""coremltools, brought in quietly, and the empty ML program that a part's operations go into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from medge.runtimes.coreml_backend import quiet_coremltools
from medge.spec import Part, TensorSpec


@dataclass(frozen=True)
class Target:
    """What `--set` chose."""

    name: str
    """ios17 or ios18: the oldest system that runs the file, which decides the operations there are."""
    input: str
    """array or image: how the app hands over pixels."""


@dataclass(frozen=True)
class Toolkit:
    """The pieces of coremltools that an export needs."""

    coremltools: Any
    mil: Any
    """coremltools.converters.mil.mil"""
    small: Mapping[int, Any]
    """Bits -> numpy type of unsigned integers below a byte."""

    @property
    def builder(self) -> Any:
        """Adds operations to the function that is open."""
        return self.mil.Builder

    def opset(self, target: Target) -> Any:
        """coremltools' name of the target."""
        return getattr(self.coremltools.target, {"ios17": "iOS17", "ios18": "iOS18"}[target.name])

    def specification(self, function: Any, target: Target, weights: Path, images: list[Any] | None) -> Any:
        """The Model message of a finished function; its weights are written to the folder `weights`.

        What `coremltools.convert` calls: that would write all weights to the system's temporary folder first and copy
        them from there. The passes are those that no file can do without, such as the names that Core ML accepts;
        none rewrites a GELU, casts, or copies all weights to compare them.
        """
        converter: Any = import_module("coremltools.converters.mil.converter")
        program = self.mil.Program()
        program.add_function("main", function)
        found, _ = converter.mil_convert_to_proto(
            program,
            "milinternal",
            "mlprogram",
            converter.ConverterRegistry,
            main_pipeline=self.coremltools.PassPipeline.EMPTY,
            inputs=images,
            weights_dir=str(weights),
            specification_version=self.opset(target),
        )
        return found


def toolkit() -> Toolkit:
    """coremltools, imported without its warnings, its progress bars off.

    Raises:
        MissingExtraError: it is not installed.
    """
    coremltools = quiet_coremltools()
    mil = import_module("coremltools.converters.mil.mil")
    passes: Any = import_module("coremltools.converters.mil.mil.passes.pass_pipeline")
    passes.tqdm = partial(import_module("tqdm").tqdm, disable=True)  # medge shows the progress of an export
    small = {bits: getattr(mil.types, f"np_uint{bits}_dtype") for bits in (1, 2, 4, 6)}
    return Toolkit(coremltools, mil, small)


def start(tools: Toolkit, part: Part, target: Target) -> Any:
    """An open function with the part's inputs at batch 1."""
    # Names of constants count up over the life of the process; from zero they are the same in every export.
    tools.builder.name_count.clear()
    inputs = {spec.name: _placeholder(tools, spec) for spec in part.inputs}
    return tools.mil.Function(inputs, opset_version=tools.opset(target))


def _placeholder(tools: Toolkit, spec: TensorSpec) -> Any:
    """64-bit integers become 32-bit ones, which Core ML has."""
    types = tools.mil.types
    shape = tuple(1 if isinstance(n, str) else n for n in spec.shape)
    return tools.builder.placeholder(shape, types.fp32 if spec.dtype == "float32" else types.int32, name=spec.name)
