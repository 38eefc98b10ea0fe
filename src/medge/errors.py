"""What can go wrong, each with its exit code. A message names the offender; the remedy says what to do."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import ClassVar


class MedgeError(Exception):
    """The root of every expected failure: one clear line, a remedy, an exit code, no traceback."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}" if self.remedy else self.message


class RegressedError(MedgeError):
    """An artifact moved past a limit, or its parity with the reference failed."""

    exit_code = 1


class UsageError(MedgeError):
    """What the user passed (an option, an image, a folder) cannot be used."""

    exit_code = 2


class ContextError(UsageError):
    """A prompt has more tokens than the model's context holds."""


class UnsupportedError(MedgeError):
    """A cell of model x format x scheme that cannot be built, with its reason."""

    exit_code = 3


class MissingExtraError(MedgeError):
    """An optional dependency is not installed."""

    exit_code = 3


class WeightsError(MedgeError):
    """Weights are gated, absent or incomplete."""

    exit_code = 4


class CorruptError(MedgeError):
    """A file contradicts itself: truncated, altered, non-finite, or of an unknown schema."""

    exit_code = 5


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Raises:
        MissingExtraError: the module is not installed, or its installation is broken.
    """
    require_installed(module, extra)
    try:
        return importlib.import_module(module)
    except ImportError as error:  # a namespace package's other half is missing, or a library that it links to
        raise MissingExtraError(f"'{module}' cannot be imported: {error}", _install(extra)) from error


def require_installed(module: str, extra: str) -> None:
    """Say which extra brings a module, without the seconds that importing it may take.

    Raises:
        MissingExtraError: the module is not installed.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise MissingExtraError(f"'{module}' is not installed", _install(extra))


def _install(extra: str) -> str:
    return f"Run: pip install 'medge[{extra}]'"
