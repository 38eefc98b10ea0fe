"""A reference interpreter for Core ML's ML programs, in numpy: runs a saved .mlpackage where there is no Core ML.

Every operation is computed in float32 from what is stored, and its result rounded to the type that the program
declares for it (fp16, as a rule): fp16 products summed in fp32, as Apple's hardware and BNNS do. It is no
measurement of Apple's runtime, which may fuse operations and round less often, or sum in another order.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from medge.errors import CorruptError, UnsupportedError, UsageError
from medge.runtimes.mil_operations import CONSTEXPR, OPERATIONS
from medge.runtimes.mil_package import Array, Constant, Operation, Package, Program, TensorType

_REMEDY = "Export the artifact again"
_BEFORE_IOS18 = ("CoreML5", "CoreML6", "CoreML7")


class Interpreter:
    """Runs the main function of one package. Compressed weights are unfolded as they are used: no second copy."""

    def __init__(self, package: Package) -> None:
        self._package = package
        self._program = package.program
        self._old = self._program.opset in _BEFORE_IOS18
        _check(self._program, old=self._old)
        self._last_use = _last_uses(self._program)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the program once; floats come back as float32.

        Raises:
            UsageError: inputs of other names or shapes than the program's.
            UnsupportedError: an operation in a form that this interpreter lacks.
            CorruptError: the program or its weights contradict themselves.
        """
        values: dict[str, Any] = dict(self._inputs(inputs))
        for i, operation in enumerate(self._program.operations):
            with np.errstate(all="ignore"):  # an overflow is fp16's infinity, and travels on as it does there
                self._step(operation, values)
            for name in self._last_use.get(i, ()):
                del values[name]
        missing = [name for name in self._program.outputs if name not in values]
        if missing:
            raise CorruptError(f"{self._package.root} promises '{missing[0]}', which no operation gives", _REMEDY)
        return {name: values[name] for name in self._program.outputs}

    def _inputs(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        expected = dict(self._program.inputs)
        if inputs.keys() != expected.keys():
            raise UsageError(f"The program takes {', '.join(expected)}, not {', '.join(inputs)}")
        for name, kind in expected.items():
            if inputs[name].shape != kind.shape:
                raise UsageError(f"'{name}' has shape {inputs[name].shape}, the program takes {kind.shape}")
        return {name: _rounded(inputs[name], kind) for name, kind in expected.items()}

    def _step(self, operation: Operation, values: dict[str, Any]) -> None:
        if len(operation.outputs) != 1:
            raise _unsupported(operation, f"{len(operation.outputs)} outputs")
        ((name, kind),) = operation.outputs
        try:
            values[name] = self._value(operation, kind, values)
        except NotImplementedError as error:
            raise _unsupported(operation, str(error)) from None
        except KeyError as error:
            raise CorruptError(f"'{operation.name}' reads {error}, which nothing gives", _REMEDY) from None
        except (ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
            raise CorruptError(f"'{operation.name}' ({operation.type}) cannot run: {error}", _REMEDY) from None

    def _value(self, operation: Operation, kind: TensorType, values: Mapping[str, Any]) -> Any:
        if operation.type == "const":
            (constant,) = operation.inputs["val"]
            return self._read(constant, values)
        arguments = {key: self._argument(key, bound, values) for key, bound in operation.inputs.items()}
        found = _function(operation, old=self._old)(**arguments)
        if found.shape != kind.shape:
            raise ValueError(f"gives shape {found.shape}, declares {kind.shape}")
        return _rounded(found, kind)

    def _argument(self, key: str, bound: tuple[str | Constant, ...], values: Mapping[str, Any]) -> Any:
        read = [self._read(one, values) for one in bound]
        return read if key == "values" else read[0]

    def _read(self, bound: str | Constant, values: Mapping[str, Any]) -> Any:
        if isinstance(bound, str):
            return values[bound]
        value = self._package.constant(bound)
        return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float16 else value


def _check(program: Program, *, old: bool) -> None:
    """Refuse before any work what could not be run to its end."""
    for operation in program.operations:
        if operation.type == "const":
            continue
        known = inspect.signature(_function(operation, old=old)).parameters
        for parameter in operation.inputs:
            if parameter not in known:
                raise _unsupported(operation, f"parameter '{parameter}'")


def _function(operation: Operation, *, old: bool) -> Any:
    function = CONSTEXPR.get((operation.type, old)) or OPERATIONS.get(operation.type)
    if function is None:
        raise UnsupportedError(
            f"The reference interpreter has no operation '{operation.type}'", "Run the model on a Mac"
        )
    return function


def _unsupported(operation: Operation, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"The reference interpreter runs no '{operation.type}' with {what} ('{operation.name}')",
        "Run the model on a Mac",
    )


def _rounded(value: Array, kind: TensorType) -> Array:
    """The value in its declared type; fp16 as float32 on fp16's grid."""
    if kind.dtype == "fp16":
        return value.astype(np.float16).astype(np.float32)
    if kind.dtype == "string":
        return value
    return value.astype({"fp32": "float32"}.get(kind.dtype, kind.dtype), copy=False)


def _last_uses(program: Program) -> dict[int, list[str]]:
    """Position -> values that no later operation reads, so that memory stays a layer high."""
    last: dict[str, int] = {}
    for i, operation in enumerate(program.operations):
        names = [one for bound in operation.inputs.values() for one in bound if isinstance(one, str)]
        last |= dict.fromkeys([*names, *(name for name, _ in operation.outputs)], i)
    uses: dict[int, list[str]] = {}
    for name, i in last.items():
        if name not in program.outputs:
            uses.setdefault(i, []).append(name)
    return uses
